"""The step that reads pictures: what nets cannot be judged on is said there, not by their jobs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from kfp import dsl
from PIL import Image

from components.images import images
from model.config import AssetRef, load_config
from model.plumbing.assets import PICTURES, Manifest
from tests.data.test_ingest import picture, write


def test_pictures_of_which_none_is_held_out_are_refused_when_they_are_read(store, tmp_path, capfd):
    same = {f"{n}.png": picture(7) for n in range(30)} | {f"{n}.txt": "x" for n in range(30)}
    source = {"kind": "folder", "path": str(write(tmp_path / "pictures", same))}
    config = load_config("smoke", [f"data.source={json.dumps(source)}"])
    target, settings = (dsl.Artifact(uri=str(tmp_path / name)) for name in ("artifact", "config"))
    Path(settings.path).write_text(config.model_dump_json())
    with pytest.raises(SystemExit):
        images.python_func(settings, "", target, target, target, target)
    said = capfd.readouterr()
    assert "none of 1 pictures (29 duplicates apart) is held out; give more, or raise validation_share" in (
        said.out + said.err
    )


@pytest.mark.slow  # starts processes
def test_pictures_grow_from_earlier_ones_and_where_they_cannot_it_is_said(store, tmp_path, capfd):
    files = {f"{n}.png": picture(n) for n in range(40)} | {f"{n}.txt": "x" for n in range(40)}
    folder = write(tmp_path / "source", files)
    made, settings, pictures, examples = (
        dsl.Artifact(uri=str(tmp_path / name)) for name in ("images", "config", "pictures", "examples")
    )
    metrics = dsl.Metrics(uri=str(tmp_path / "metrics"))
    config = load_config("smoke", [f"data.source={json.dumps({'kind': 'folder', 'path': str(folder)})}"])

    def read(origin: dict[str, AssetRef]) -> tuple[Manifest, str]:
        Path(settings.path).write_text(config.model_copy(update={"origin": origin}).model_dump_json())
        images.python_func(settings, "", made, metrics, examples, pictures)
        said = capfd.readouterr()
        return Manifest.model_validate_json(Path(made.path).read_text()), said.out + said.err

    first, _ = read({})
    write(folder, {"new.png": picture(50), "new.txt": "x"})
    ref = AssetRef(key=first.key, sha256=first.sha256)
    second, said = read({"images": ref})
    assert second.settings["grown_from"] == first.key
    assert re.search(r"takes over \d shards of \d+ pictures; 1 new, 0 deleted, 0 changed", said)
    third, said = read({"images": ref.model_copy(update={"key": "0" * 16})})
    assert "grown_from" not in third.settings
    assert "images | reads all of the source: the earlier pictures are not there any more (" in said


@pytest.mark.slow  # starts processes
def test_what_was_read_is_shown(store, tmp_path, capfd):
    made, settings, pictures, examples = (
        dsl.Artifact(uri=str(tmp_path / name)) for name in ("images", "config", "pictures", "examples")
    )
    metrics = dsl.Metrics(uri=str(tmp_path / "metrics"))
    Path(settings.path).write_text(load_config("smoke").model_dump_json())
    for reused in ("no", "yes"):
        images.python_func(settings, "", made, metrics, examples, pictures)
        assert made.metadata["reused"] == reused
    assert metrics.metadata["train"] == 43
    assert Image.open(pictures.path).format == "PNG"
    text = Path(examples.path).read_text()
    some = text.partition("<h2>Some of the pictures</h2>")[2]
    assert some.count("<figure>") == 24
    assert "<h2>The data</h2>" in text
    assert (Path(made.metadata["asset"]) / PICTURES / "data.html").read_text() == text
    said = capfd.readouterr().out
    assert said.count("images | data: 64 pictures, ") == 2
    assert "warning" not in said
