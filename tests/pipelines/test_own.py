"""People's own pictures through the real command line: one command, from a folder to pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.command_line import latent_gpt, refused
from tests.data.test_ingest import picture, write

pytestmark = pytest.mark.slow

SMALL = (  # so that it takes seconds; the transformer's steps are left to be derived
    *("--set", "transformer.depth=1", "--set", "transformer.width=16", "--set", "transformer.heads=2"),
    *(
        "--set",
        "tokenizer.width=8",
        "--set",
        "tokenizer.training.steps=20",
        "--set",
        "clip.training.steps=20",
    ),
    *("--set", "clip.text_layers=1", "--set", "clip.vision_layers=1", "--set", "jobs.processes_per_worker=1"),
    *("--set", "gate.above_chance=false"),
)
COLOURS = ("red", "green", "blue", "dark red", "pale blue", "light green")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty pictures with nothing but names, and two files that are none."""
    names = {f"{colour.replace(' ', '-')}-stone_{n:02}.png": 10 * n for colour in COLOURS for n in range(10)}
    pictures = {name: picture(seed + len(name)) for name, seed in names.items()}
    return write(tmp_path / "stones", pictures | {"broken.png": b"\x89PNG\r\n", "notes.doc": "-"})


def test_a_folder_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    done = latent_gpt("run", "--data", str(folder), "--effort", "0.01", *SMALL, state=state)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a folder with captions in the names of files: 60 pictures" in done.stdout
    assert re.search(r"blue-stone_00.png +40x32 +blue stone", done.stdout)
    assert re.search(r"chosen for effort 0.01 on 1 x cpu: 32 px, .*; steps: 20 of the tokenizer", done.stdout)
    assert "latent-gpt-stones version 1" in done.stdout
    (report,) = (state / "runs").glob("*/report.html")
    assert "<h2>The data</h2>" in report.read_text()

    again = latent_gpt("run", "--data", f"{folder}/", "--effort", "0.01", *SMALL, state=state)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "sizes are those of version 1 of latent-gpt-stones" in again.stdout
    assert len(re.findall(r"reused s3://", again.stdout)) == 7, "the same folder, by another spelling"

    out = tmp_path / "stone.png"
    drawn = latent_gpt("generate", "a blue stone", "--out", str(out), "--size", "128", state=state)
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    with Image.open(out) as image:
        assert image.size == (128, 128)
        assert "32" in json.dumps(image.info)


def test_what_cannot_be_used_is_said_in_one_line(tmp_path: Path) -> None:
    pictures = write(tmp_path / "camera", {f"IMG_{n:04}.png": picture(n) for n in range(5)})
    line = refused(latent_gpt("run", "--data", str(pictures), state=tmp_path / "state"))
    assert "caption" in line
    line = refused(latent_gpt("run", "--data", str(tmp_path / "nowhere"), state=tmp_path / "state"))
    assert "nowhere" in line
