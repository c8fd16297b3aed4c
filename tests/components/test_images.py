"""The step that reads pictures: what nets cannot be judged on is said there, not by their jobs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from components.images import images
from model.config import load_config
from tests.data.test_ingest import picture, write


def test_pictures_of_which_none_is_held_out_are_refused_when_they_are_read(store, tmp_path, capfd):
    same = {f"{n}.png": picture(7) for n in range(30)} | {f"{n}.txt": "x" for n in range(30)}
    source = {"kind": "folder", "path": str(write(tmp_path / "pictures", same))}
    config = load_config("smoke", [f"data.source={json.dumps(source)}"])
    target = SimpleNamespace(path=str(Path(tmp_path, "artifact")), metadata={})
    with pytest.raises(SystemExit):
        images.python_func(config=config.model_dump_json(), run="", images=target)
    said = capfd.readouterr()
    assert "none of 1 pictures (29 duplicates apart) is held out; give more, or raise validation_share" in (
        said.out + said.err
    )
