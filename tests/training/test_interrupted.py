"""Two processes of a real worker, killed or told to end at chosen moments.

The next ones end bit for bit where two end that nobody interrupted.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from model import steps
from model.config import RunConfig, load_config
from model.plumbing import leases, outcome, stopping, storage, worker
from model.plumbing.assets import AssetWriter, Kind, Manifest
from model.plumbing.checkpoints import Checkpointer
from model.plumbing.jobs import write_spec
from model.plumbing.outcome import Outcome
from model.training.state import Resumable
from tests.instances import ingest
from tests.training import test_transformer, test_vqvae

STEPS = 9
# Checkpoints after steps 2, 4, 6 and 8; the third one deletes the first.
CADENCE = {"steps": STEPS, "log_every": 5, "eval_every": 3, "checkpoint_every": 2}
NO_CHANCE = {"dropout": 0.0, "condition_dropout": 0.0, "random_order": 0.0}
FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported all: a second saved, each
FORKS.set_forkserver_preload([__name__, "model.training.transformer", "model.training.vqvae", "open_clip"])
PATIENCE = 60  # seconds for each attempt


@dataclass(frozen=True)
class Moment:
    """The n-th time that a rank comes by some place, counted from 1, and what happens there.

    That is a signal; or from there on no file can be written (`full`); or the job's lease ends (`orphaned`).
    """

    rank: int
    place: str
    time: int = 1
    what: str = (
        "SIGKILL"  # or SIGTERM; "full": from there on no file can be written; "orphaned": the lease ends
    )
    kind: Kind = "transformer"

    def __str__(self) -> str:
        return f"{self.kind}-{self.rank}-{self.place}-{self.time}"


# ── in a rank ───────────────────────────────────────────────────────────────────────────────────────────


def _rank(rank: int, world: int, store: str, spec: str, attempt: str, moment: Moment | None) -> None:
    log = os.open(f"{attempt}/{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "LATENT_GPT_STORE": store, "LATENT_GPT_CACHE": f"{attempt}/cache", "OMP_NUM_THREADS": "1",
        "LATENT_GPT_MEETING": f"{attempt}/meeting", "LATENT_GPT_OUTCOMES": f"{attempt}/outcomes",
        "LATENT_GPT_LEASES": f"{attempt}/leases" if os.path.exists(f"{attempt}/leases") else "",
    }  # fmt: skip
    stopping.EVERY, leases.LIVE = 0.02, 0.1
    module = import_module(steps.STEPS[Path(spec).parents[1].name].module)  # type: ignore[index]
    tracker = worker.Tracker
    worker.Tracker = lambda ids, params, enabled: tracker(ids, params, False)  # type: ignore[misc,assignment]
    if moment and moment.rank == rank:
        _prepare(module, moment)
    sys.argv = ["worker", spec]
    worker.run_worker(module.main)


def _prepare(module: Any, moment: Moment) -> None:
    """Have it happen at this moment."""
    count = itertools.count(1)

    def here() -> None:
        if next(count) == moment.time:
            if moment.what == "full":
                os.fsync = _no_space  # type: ignore[assignment]
            elif moment.what == "orphaned":
                _renewed(Path(os.environ["LATENT_GPT_LEASES"]), seconds_ago=601)
                time.sleep(0.5)  # so that it is seen in this step
            else:
                os.kill(os.getpid(), signal.Signals[moment.what])

    def watch(owner: Any, name: str, which: Callable[..., bool] = lambda *_: True) -> None:
        inner = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            if after:
                result = inner(*arguments, **named)
            if which(*arguments):
                here()
            return result if after else inner(*arguments, **named)

        setattr(owner, name, watched)

    before, _, place = moment.place.partition(" ")
    after = before == "after"
    match place:
        case "restore":
            watch(Resumable, "restore")
        case "a step begins":
            watch(module, "learning_rate")
        case "gradients":
            watch(nn.utils, "clip_grad_norm_")
        case "validation":
            watch(module, "validate")
        case "a copy":
            watch(Checkpointer, "_copied")
        case "tensors" | "state":
            watch(storage, "upload_file", lambda path, uri: "/checkpoints/" in uri and f"/{place}." in uri)
        case "complete":
            watch(storage, "write_bytes", lambda uri, *_: uri.endswith("/complete.json"))
        case "pruning":
            watch(storage, "delete_prefix")
        case "the weights":
            watch(AssetWriter, "add_file")
        case "the manifest":
            watch(storage, "write_bytes", lambda uri, *_: uri.endswith("/manifest.json"))
        case _:
            raise ValueError(place)


def _renewed(folder: Path, seconds_ago: float) -> None:
    (folder / "step.json").touch()
    os.utime(folder / "step.json", 2 * (time.time() - seconds_ago,))


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


# ── an attempt ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Attempt:
    """How both ranks ended."""

    codes: tuple[int | None, ...]
    outcomes: dict[str, Outcome]
    log: str  # of the main one


class Place:
    """A store of its own in which a job is tried."""

    def __init__(self, prepared: Path, folder: Path) -> None:
        self.store = folder / "store"
        shutil.copytree(prepared, self.store)
        (self.spec,) = self.store.glob("*/*/job-*.json")
        self._attempts = (folder / f"attempt-{number}" for number in itertools.count())

    def attempt(self, moment: Moment | None = None, world: int = 2, lease: float | None = None) -> Attempt:
        """Try it, with one lease that was renewed so many seconds ago."""
        folder = next(self._attempts)
        folder.mkdir()
        if lease is not None:
            (folder / "leases").mkdir()
            _renewed(folder / "leases", lease)
        given = world, str(self.store), str(self.spec), str(folder), moment
        ranks = [FORKS.Process(target=_rank, args=(rank, *given)) for rank in range(world)]
        for process in ranks:
            process.start()
        try:
            for process in ranks:
                process.join(PATIENCE)
            codes = tuple(process.exitcode for process in ranks)
        finally:
            for process in ranks:
                process.kill()
        left = outcome.left_in(str(folder / "outcomes"))
        return Attempt(codes, left, (folder / "0.log").read_text())

    @property
    def made(self) -> dict[str, bytes]:
        """Curves and weights of the asset."""
        assert (self.spec.parent / "manifest.json").exists()
        return {
            name: (self.spec.parent / name).read_bytes() for name in ("history.json", "model.safetensors")
        }

    @property
    def newest(self) -> str:
        """Name of the newest complete checkpoint; empty without one."""
        return (Checkpointer(str(self.spec.parent / "checkpoints")).newest() or "").rpartition("/")[2]


def transformer(**settings: Any) -> tuple[RunConfig, dict[str, Manifest]]:
    run = test_transformer.run_config(**CADENCE)
    assert run.transformer
    run = run.model_copy(update={"transformer": run.transformer.model_copy(update=settings)})
    return run, test_transformer.publish(run)


def tokenizer() -> tuple[RunConfig, dict[str, Manifest]]:
    cadence = [f"tokenizer.training.{name}={value}" for name, value in CADENCE.items()]
    run = load_config("smoke", [f"tokenizer.{part}" for part in test_vqvae.EVERYTHING] + cadence)
    return run, {"images": ingest(run.data)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stores with a job that has not begun, by kind; `no chance` is a transformer without dropouts."""
    stores = {}
    made: dict[str, Callable[[], tuple[RunConfig, dict[str, Manifest]]]] = {
        "transformer": transformer,
        "tokenizer": tokenizer,
        "no chance": lambda: transformer(**NO_CHANCE),
    }
    for name, make in made.items():
        stores[name] = tmp_path_factory.mktemp("prepared")
        kind: Kind = "tokenizer" if name == "tokenizer" else "transformer"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LATENT_GPT_STORE", str(stores[name]))
            run, inputs = make()
            write_spec(steps.job(kind, run, "test", inputs))
    return stores


@pytest.fixture(scope="module")
def whole(prepared: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What is made where nobody interrupts, by two processes."""
    found = {}
    for name, store in prepared.items():
        place = Place(store, tmp_path_factory.mktemp("whole"))
        attempt = place.attempt()
        assert attempt.codes == (0, 0), attempt.log
        found[name] = place.made
    return found


# ── killed ──────────────────────────────────────────────────────────────────────────────────────────────

KILLS = [
    Moment(0, "before restore"),
    Moment(1, "after restore"),
    Moment(0, "before a step begins", 1),
    Moment(1, "before a step begins", 3),
    Moment(0, "before gradients", 3),
    Moment(1, "after gradients", 5),
    Moment(1, "before gradients", 9),
    Moment(0, "before validation", 1),
    Moment(1, "after validation", 2),
    Moment(0, "before a copy", 2),
    Moment(0, "before tensors", 1),
    Moment(0, "after tensors", 2),
    Moment(0, "after state", 3),
    Moment(0, "before complete", 2),
    Moment(0, "after complete", 2),
    Moment(0, "before pruning", 1),
    Moment(0, "before the weights", 1),
    Moment(0, "before the manifest"),
    Moment(1, "before gradients", 5, kind="tokenizer"),
    Moment(0, "before complete", 3, kind="tokenizer"),
]


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLS, ids=str)
def test_a_killed_process_changes_nothing(
    moment: Moment, prepared: dict[str, Path], whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    place = Place(prepared[moment.kind], tmp_path)
    broken = place.attempt(moment)
    assert broken.codes[moment.rank] == -signal.SIGKILL, broken.log
    other = broken.outcomes.get(str(1 - moment.rank))
    assert other, "the other one did not end by itself"
    assert other.kind == ("finished" if "the" in moment.place.split() else "lost")
    again = place.attempt()
    assert again.codes == (0, 0), again.log
    assert place.made == whole[moment.kind]


# ── told to end ─────────────────────────────────────────────────────────────────────────────────────────

STOPS = [  # and the checkpoint that is kept: of the step after the one at which it is told
    (Moment(0, "before gradients", 3, "SIGTERM"), 4),
    (Moment(1, "before validation", 1, "SIGTERM"), 4),
    (Moment(0, "before tensors", 2, "SIGTERM"), None),  # beside the loop: at whichever step it is
    (Moment(1, "after gradients", 4, "SIGTERM", "tokenizer"), 5),
]


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "kept"), STOPS, ids=lambda one: str(one))
def test_one_that_is_told_to_end_takes_all_with_it_after_a_checkpoint(
    moment: Moment,
    kept: int | None,
    prepared: dict[str, Path],
    whole: dict[str, dict[str, bytes]],
    tmp_path: Path,
) -> None:
    place = Place(prepared[moment.kind], tmp_path)
    told = place.attempt(moment)
    assert told.codes == (143, 143), told.log
    assert {end.kind for end in told.outcomes.values()} == {"stopped"}
    if kept:
        assert place.newest == f"step-{kept:08d}"
    assert f"a checkpoint of step {int(place.newest[5:])} is kept" in told.log
    step = int(place.newest[5:])
    again = place.attempt()
    assert again.codes == (0, 0), again.log
    assert f"| goes on from step {step}\n" in again.log
    assert place.made == whole[moment.kind]


@pytest.mark.slow
def test_one_that_is_told_to_end_before_its_loop_ends_at_once(
    prepared: dict[str, Path], whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    place = Place(prepared["transformer"], tmp_path)
    told = place.attempt(Moment(1, "after restore", what="SIGTERM"))
    assert told.codes[1] == 143, told.log
    assert (told.outcomes["1"].kind, told.outcomes["0"].kind) == ("stopped", "lost")
    assert place.newest == ""
    assert place.attempt().codes == (0, 0)
    assert place.made == whole["transformer"]


@pytest.mark.slow
def test_one_that_is_told_to_end_after_its_last_step_does_what_is_left(
    prepared: dict[str, Path], whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    place = Place(prepared["transformer"], tmp_path)
    assert place.attempt(Moment(0, "after gradients", STEPS, "SIGTERM")).codes == (0, 0)
    assert place.made == whole["transformer"]


@pytest.mark.slow
def test_a_job_that_nobody_wants_keeps_its_step_and_ends_with_zero(
    prepared: dict[str, Path], whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    place = Place(prepared["transformer"], tmp_path)
    orphan = place.attempt(Moment(0, "before gradients", 3, "orphaned"), lease=30)
    assert orphan.codes == (0, 0), orphan.log
    assert {end.kind for end in orphan.outcomes.values()} == {"orphaned"}
    assert place.newest == "step-00000004"
    again = place.attempt(lease=601)  # nobody wants it when it begins, either
    assert again.codes[0] == 0, again.log
    assert again.outcomes["0"].kind == "orphaned"
    assert not (place.spec.parent / "manifest.json").exists()
    assert place.attempt(lease=30).codes == (0, 0)
    assert place.made == whole["transformer"]


@pytest.mark.slow
def test_a_disk_that_is_full_ends_it_in_one_line_and_leaves_the_checkpoint_before(
    prepared: dict[str, Path], whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    place = Place(prepared["transformer"], tmp_path)
    full = place.attempt(Moment(0, "before tensors", 2, "full"))
    assert place.newest == "step-00000002"
    assert full.codes[0] == 2, full.log
    assert "no space left on the disk" in full.log
    assert place.attempt().codes == (0, 0)
    assert place.made == whole["transformer"]


# ── with another number of processes ────────────────────────────────────────────────────────────────────

CLOSE = 1e-4  # of a loss, relatively: other sums in another order, over nine steps


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_along_the_same_curve(
    first: int, then: int, prepared: dict[str, Path], whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    place = Place(prepared["no chance"], tmp_path)
    broken = place.attempt(Moment(0, "before gradients", 6), world=first)
    assert broken.codes[0] == -signal.SIGKILL
    again = place.attempt(world=then)
    assert again.codes == (0,) * then, again.log
    assert "| goes on from step 4" in again.log
    ours, theirs = (json.loads(made["history.json"]) for made in (place.made, whole["no chance"]))
    assert ours.keys() == theirs.keys()
    for name, points in theirs.items():
        assert [step for step, _ in ours[name]] == [step for step, _ in points]
        values = [value for _, value in points]
        assert [value for _, value in ours[name]] == pytest.approx(values, rel=CLOSE), name
