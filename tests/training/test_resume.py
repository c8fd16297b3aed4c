"""Two ranks that are interrupted after any step end bit for bit where ranks end that were not."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from model.config import RunConfig, load_config
from model.plumbing.assets import Kind, Manifest
from model.plumbing.checkpoints import Checkpointer
from model.training.state import Resumable
from tests.instances import ingest, make_in_rank
from tests.ranks import two_ranks
from tests.training import test_clip, test_transformer, test_vqvae

STEPS = 12
# Log lines, validations and checkpoints fall apart: most checkpoints lie between two log lines.
CADENCE = {"steps": STEPS, "log_every": 5, "eval_every": 4, "checkpoint_every": 1}


def _resumed_from_everywhere(
    kind: Kind, run: str, inputs: dict[str, str], stores: list[str], ports: list[str]
) -> None:
    """Train as a whole in the first store, with no checkpoint, and in the n-th from one at step n."""
    save, restore, port = Resumable.save, Resumable.restore, iter(ports)

    def save_elsewhere(state: Resumable, done: int) -> None:
        uri = state.checkpoints.uri.replace(stores[-1], stores[done])
        elsewhere = Resumable(Checkpointer(uri), state.processes, **state.parts)
        save(elsewhere, done)
        elsewhere.wait()

    def train(start: int, store: str, saving: Callable[[Resumable, int], None]) -> None:
        def starts(state: Resumable) -> int:
            assert restore(state) == start
            return start

        os.environ["LATENT_GPT_STORE"] = store
        os.environ["MASTER_PORT"] = next(port)  # a rank that is early would join those who are about to leave
        Resumable.save, Resumable.restore = saving, starts  # type: ignore[method-assign]
        make_in_rank(kind, run, {name: f"{store}/{path}" for name, path in inputs.items()})

    def nothing(state: Resumable, done: int) -> None:
        pass

    train(0, stores[0], nothing)
    train(0, stores[-1], save_elsewhere)
    for start, store in enumerate(stores[1:-1], 1):
        train(start, store, nothing)


def transformer(optimizer: str) -> tuple[RunConfig, dict[str, Manifest]]:
    run = test_transformer.run_config(**CADENCE)
    assert run.transformer
    changed = run.transformer.model_copy(update={"optimizer": optimizer, "random_order": 0.7})
    run = run.model_copy(update={"transformer": changed})
    return run, test_transformer.publish(run)


def tokenizer() -> tuple[RunConfig, dict[str, Manifest]]:
    cadence = [f"tokenizer.training.{name}={value}" for name, value in CADENCE.items()]
    run = load_config("smoke", [f"tokenizer.{part}" for part in test_vqvae.EVERYTHING] + cadence)
    return run, {"images": ingest(run.data)}


def judge() -> tuple[RunConfig, dict[str, Manifest]]:
    run = test_clip.run_config(**CADENCE)
    return run, {"images": ingest(run.data)}


def free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "made"),
    [
        pytest.param("transformer", lambda: transformer("adamw"), id="transformer"),
        pytest.param("transformer", lambda: transformer("muon"), id="transformer-muon"),
        pytest.param("tokenizer", tokenizer, id="tokenizer"),
        pytest.param("judge", judge, id="judge"),
    ],
)
def test_two_ranks_continue_from_every_step_as_if_nothing_had_happened(
    kind: Kind, made: Callable[[], tuple[RunConfig, dict[str, Manifest]]], store: str, tmp_path: Path
) -> None:
    run, inputs = made()
    paths = {name: os.path.relpath(manifest.uri, store) for name, manifest in inputs.items()}
    stores = [tmp_path / f"{stop:02d}" for stop in range(STEPS + 1)]  # of the last one none resumes
    for copy in stores:
        shutil.copytree(store, copy)
    given = run.model_dump_json(), paths, list(map(str, stores)), free_ports(len(stores))
    two_ranks(_resumed_from_everywhere, store, kind, *given, patience=500)
    ends = []
    for copy in stores:
        (asset,) = (copy / kind).glob("*/manifest.json")
        ends.append([(asset.parent / name).read_bytes() for name in ("history.json", "model.safetensors")])
    differ = [stop for stop, end in enumerate(ends) if end != ends[0]]
    assert not differ
