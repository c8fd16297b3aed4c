"""What is found out before anything starts."""

from pathlib import Path

import pytest

from components.preflight import check_disk, preflight
from model.config import load_config
from model.errors import UserError


def test_enough_room_is_fine_even_where_the_folder_is_not_there_yet(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "yet", needed=1)


def test_a_full_disk_is_named_with_what_it_has_and_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GiB free and a run needs 1048576 GiB"):
        check_disk(tmp_path, needed=2**50)


def test_weights_that_are_not_where_the_config_says(store: str, tmp_path: Path) -> None:
    config = load_config("smoke", [f"tokenizer={{kind: pretrained, ref: {tmp_path / 'none'}}}"])
    with pytest.raises(UserError, match=r"tokenizer\.ref: .*none does not exist"):
        preflight(config)
