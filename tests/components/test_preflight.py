"""What is found out before anything starts: each of the checks is really made."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from components.preflight import check_disk, preflight
from model.config import load_config
from model.errors import UserError

NOBODY = "http://127.0.0.1:1"  # where nothing listens


def test_enough_room_is_fine_even_where_the_folder_is_not_there_yet(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "yet", needed=1)


def test_a_full_disk_is_named_with_what_it_has_and_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GiB free and a run needs 1048576 GiB"):
        check_disk(tmp_path, needed=2**50)


def test_a_disk_without_room_for_a_run_is_refused(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**30, 2**30))
    with pytest.raises(UserError, match=r"^disk: .* has 1\.0 GiB free and a run needs 2 GiB; free some"):
        preflight(load_config("smoke"))


def test_a_source_that_is_not_there_is_refused(store: str, tmp_path: Path) -> None:
    config = load_config("smoke", [f"data.source={{kind: folder, path: {tmp_path / 'none'}}}"])
    with pytest.raises(UserError, match=r"none"):
        preflight(config)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("tokenizer={{kind: pretrained, ref: {}}}", "tokenizer.ref"),
        ("tokenizer.loss.perceptual_weights={}", "tokenizer.loss.perceptual_weights"),
        ("clip={{kind: pretrained, weights: {}}}", "clip.weights"),
    ],
)
def test_weights_that_are_not_where_the_config_says(
    override: str, field: str, store: str, tmp_path: Path
) -> None:
    config = load_config("smoke", [override.format(tmp_path / "none.safetensors")])
    with pytest.raises(UserError, match=rf"^{field}: .*none\.safetensors does not exist"):
        preflight(config)


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LATENT_GPT_STORE", str(tmp_path / "file" / "store"))
    with pytest.raises(UserError, match=r"file/store.*: Not a directory"):
        preflight(load_config("smoke"))


def test_mlflow_that_does_not_answer_is_refused(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    with pytest.raises(UserError, match=rf"^MLflow at {NOBODY} cannot be reached"):
        preflight(load_config("smoke"))


@pytest.mark.slow
def test_where_all_is_well_each_check_says_what_it_found(services: dict[str, str]) -> None:
    found = preflight(load_config("smoke"))
    assert [line.split()[0] for line in found] == ["source", "storage", "tracking"]
    assert found[1].endswith(services["LATENT_GPT_STORE"])
    assert found[2].endswith(os.environ["MLFLOW_TRACKING_URI"])
