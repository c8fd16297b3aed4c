"""The files that a path names, while others work beside them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model.data import listing
from model.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With two tars, in it and below, and a folder that is gone or cannot be read when somebody looks."""
    (tmp_path / "below").mkdir()
    (tmp_path / "gone").mkdir()
    (tmp_path / "a.tar").touch()
    (tmp_path / "below/b.tar").touch()
    real = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("/gone"):
            raise FileNotFoundError(2, "No such file or directory", path)
        if path.endswith("/broken"):
            raise OSError(5, "Input/output error", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    return tmp_path


def test_a_folder_that_goes_meanwhile_is_passed_over(folder: Path) -> None:
    assert listing.files(str(folder), (".tar",)) == [f"{folder}/a.tar", f"{folder}/below/b.tar"]


def test_a_folder_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "broken").mkdir()
    with pytest.raises(UserError, match="/broken: Input/output error"):
        listing.files(str(folder), (".tar",))


def test_a_glob_looks_into_no_folder_below(folder: Path) -> None:
    (folder / "broken").mkdir()
    assert listing.files(f"{folder}/*.tar", (".tar",)) == [f"{folder}/a.tar"]
