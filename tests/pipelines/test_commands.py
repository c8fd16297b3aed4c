"""Commands as functions: what they say they did, and what they cannot do, which they refuse in one line."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components import preflight as checks
from model.errors import UserError
from model.plumbing import registry
from model.plumbing.registry import Aliases
from pipelines import commands
from pipelines import gc as sweeps
from pipelines import plan as plans
from pipelines.cluster import reach
from pipelines.commands import evaluate, generate, models, promote, rollback
from tests.data.test_ingest import picture, write
from tests.instances import config, write_models
from tests.plumbing.test_registry import made, register


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model in it."""
    monkeypatch.chdir(tmp_path)
    run = config()
    write_models(tmp_path / "model", run)
    (tmp_path / "model/sampling.json").write_text(run.sampling.model_dump_json())
    return tmp_path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"out": Path("a.gif")}, "--out a.gif must end in .png, .jpg or .webp"),
        ({"out": Path("none/a.png")}, "--out none/a.png: folder none does not exist"),
        ({"out": Path("folder.png")}, "--out folder.png is a folder; name a file, e.g. folder.png/out.png"),
        (
            {"out": Path("many.png"), "num_images": 2},
            "--out many-1.png is a folder; name a file, e.g. many-1.png/out.png",
        ),
        ({"out": Path("full.png")}, "--out full.png cannot be written: No space left on device"),
        (
            {"temperature": float("inf")},
            "sampling: temperature is inf: Input should be a finite number",
        ),
        ({"size": 15}, "--size 15 is less than the 16 px that this model draws; it only enlarges"),
        ({"cfg_scale": float("nan")}, "sampling: cfg_scale is nan: Input should be a finite number"),
        (
            {"seed": 2**63 - 1, "num_images": 2},
            "seed 9223372036854775808 is out of range; a seed is a whole number from 0 to 2^63 - 1",
        ),
    ],
)
def test_what_generate_cannot_do_is_refused(here: Path, options: dict[str, Any], said: str) -> None:
    (here / "folder.png").mkdir()
    (here / "many-1.png").mkdir()
    (here / "full.png").symlink_to("/dev/full")
    with pytest.raises(UserError) as refused:
        generate("x", model="model", **options)
    assert str(refused.value) == said


def test_several_pictures_are_numbered(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate("x", Path("a.png"), "model", num_images=2)
    assert capsys.readouterr().out.split() == ["a-0.png", "a-1.png"]
    assert {path.name for path in here.glob("*.png")} == {"a-0.png", "a-1.png"}


def test_the_best_of_several_is_kept_and_the_picture_says_so(here: Path) -> None:
    generate("a cat", Path("own.png"), "model", seed=3)
    generate("a cat", Path("best.png"), "model", seed=3, best_of=16)
    own, best = Image.open("own.png"), Image.open("best.png")
    assert own.tobytes() != best.tobytes()
    assert '"best_of":16' in best.text["Sampling"]  # type: ignore[attr-defined]


def test_a_picture_has_the_size_that_was_asked_for_and_says_so(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate("a cat", Path("own.png"), "model", seed=3)
    generate("a cat", Path("large.png"), "model", num_images=2, seed=2, size=40)
    own, large = Image.open("own.png"), Image.open("large-1.png")
    assert (own.size, large.size) == ((16, 16), (40, 40))
    assert own.text.keys() == {"Software", "Model", "Prompt", "Seed", "Sampling", "Drawn size"}  # type: ignore[attr-defined]
    assert large.text == own.text | {"Processing": "upscaled from 16 px by lanczos"}  # type: ignore[attr-defined]
    assert (own.text["Model"], own.text["Seed"]) == ("model", "3")  # type: ignore[attr-defined]
    generate(out=Path("none.png"), model="model", unconditional=True)
    assert "Prompt" not in Image.open("none.png").text  # type: ignore[attr-defined]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one whenever services are started, which are none here."""
    count: list[str] = []

    @contextmanager
    def services() -> Iterator[None]:
        count.append("services")
        yield

    monkeypatch.setattr(commands, "_services", services)
    return count


def test_minutes_are_timed_however_they_are_said(
    tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "lines", lambda *_: [])
    write(tmp_path, {"1.png": picture(1), "1.txt": "one"})
    commands.plan(data=str(tmp_path), minutes=10)
    commands.plan(data=str(tmp_path), overrides=["recipe.minutes=10"])
    assert len(started) == 2
    commands.plan(data=str(tmp_path), overrides=["recipe.effort=2"])
    commands.plan("openmoji-tiny")
    assert len(started) == 2


def test_preflight_looks_at_ones_own_pictures(
    tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "PROBES", [one for one in checks.PROBES if one.section == "source"])
    monkeypatch.setenv("LATENT_GPT_STATE", str(tmp_path / "state"))
    write(tmp_path / "mine", {"1.png": picture(1), "1.txt": "one"})
    commands.preflight(data=str(tmp_path / "mine"), minutes=5)
    assert capsys.readouterr().out.startswith("source    ")
    with pytest.raises(UserError, match="there is no folder"):
        commands.preflight(data=str(tmp_path / "none"))
    with pytest.raises(UserError, match="minutes and effort change nothing"):
        commands.preflight("openmoji-tiny", minutes=5)
    assert len(started) == 1, "what is wrong with it is said before anything starts"


def test_pictures_are_drawn_by_the_clusters_model_where_there_is_a_cluster(
    started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="kubectl"):  # by which its MLflow is reached
        generate("a cat", tmp_path / "a.png", "")
    assert not started


@pytest.mark.parametrize("named", [False, True])
def test_gc_uses_a_pod_of_ours_only_for_an_mlflow_that_nobody_named(
    started: list[str], monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    used: list[object] = []
    monkeypatch.setattr(sweeps, "gc", lambda *told: used.append(told[-1]))
    monkeypatch.setattr(reach, "services", lambda kubectl: nullcontext())
    monkeypatch.setenv("KFP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere" if named else "")
    commands.gc(delete=True)
    (pod,) = used
    assert (pod is None) == named


@pytest.fixture
def name(services: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A registered model with three versions, of which the second is champion."""
    monkeypatch.setenv("LATENT_GPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LATENT_GPT_STATE", str(tmp_path / "state"))
    name = f"model-{uuid.uuid4().hex[:8]}"
    for number in (1, 2, 3):
        register(name, made(number))
    registry.promote(1, name)
    registry.promote(2, name)
    with registry.changing(name, "test") as now:
        now.settle(now.before.refused(3))
    registry.note(3, name, "# card", reason="0.4 against 0.5")
    registry.judged(3, name, "not better")
    return name


@pytest.mark.slow
def test_versions_are_listed_promoted_and_rolled_back(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    models(name)
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == name
    assert [line.split()[0] for line in listed[1:]] == ["3", "2", "1"]
    assert listed[1].endswith("  challenger         not better: 0.4 against 0.5")
    assert "  champion  " in listed[2]
    assert listed[3].endswith("  previous-champion  not judged, or by an earlier release")

    promote(model=name)
    assert capsys.readouterr().out.splitlines() == [
        f"{name} version 3 is champion",
        "version 2, champion until now, is previous champion: `latent-gpt rollback` returns to it",
    ]
    assert registry.aliases(name) == Aliases(champion=3, previous=2)
    promote(3, model=name)
    assert capsys.readouterr().out == f"{name} version 3 is champion already: nothing has changed\n"
    with pytest.raises(UserError, match="has no challenger; say which version"):
        promote(model=name)
    with pytest.raises(UserError, match=r"has no version 9; it has 1, 2, 3"):
        promote(9, model=name)

    began = time.monotonic()
    rollback(name)
    assert time.monotonic() - began < 5
    assert capsys.readouterr().out.splitlines() == [
        f"{name} version 2 is champion",
        "version 3, champion until now, is previous champion: once more returns to it",
    ]
    assert registry.aliases(name) == Aliases(champion=2, previous=3)


@pytest.mark.slow
def test_an_evaluation_needs_two_models_with_a_benchmark(name: str, here: Path) -> None:
    with pytest.raises(UserError, match=r"--against is missing: model is no registered model"):
        evaluate("model")
    with pytest.raises(UserError, match=r"model has no manifest.json: it is of an earlier release"):
        evaluate("model", f"models:/{name}/1")
    with pytest.raises(
        UserError, match=r"neither .* nor .* is a registered version whose benchmark is there"
    ):
        evaluate(f"models:/{name}/1")
