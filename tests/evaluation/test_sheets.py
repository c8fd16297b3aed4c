"""Sheets of samples: captions in any letters that the font has, beside the pictures and not under them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from model.evaluation.sheets import GAP, LABEL, PAPER, sheet

ROW = torch.zeros(1, 2, 3, 64, 64)


def captioned(text: str) -> np.ndarray:
    """Pixels of a sheet of one row, left of its pictures."""
    return np.asarray(Image.open(io.BytesIO(sheet(ROW, [text]))))[:, :LABEL]


@pytest.mark.parametrize("letters", ["äéß", "ŁőĂ", "Ωλπ", "ждЯ", "→∞★"])
def test_letters_outside_ascii_are_drawn_as_themselves(letters: str) -> None:
    first, second, third = map(captioned, letters)
    assert not np.array_equal(first, second), "a box stands for all that the font lacks"
    assert not np.array_equal(second, third)


@pytest.mark.parametrize("text", ["w" * 60, "Donaudampfschifffahrtsgesellschaft " * 2, "red apple " * 8])
def test_a_caption_stays_beside_the_pictures_and_is_shown_whole(text: str) -> None:
    shown = captioned(text)
    assert (shown[:, LABEL - GAP :] == PAPER).all(), "nothing runs under the pictures"
    assert (shown[GAP + 16 : GAP + 32] != PAPER).any(), "it goes on in the next line"


def test_a_caption_longer_than_its_picture_is_high_ends_with_it() -> None:
    shown = captioned("apple " * 200)
    assert (shown[-GAP:] == PAPER).all()
