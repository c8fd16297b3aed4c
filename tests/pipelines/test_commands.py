"""The command `generate`, as a function: what it cannot do, it refuses in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from pipelines.commands import generate
from tests.instances import config, write_models


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
