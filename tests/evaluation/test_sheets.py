"""Sheets of samples: captions in any letters that the font has, beside the pictures and not under them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import FontEntry, FontManager, fontManager
from PIL import Image

from model.evaluation import sheets
from model.evaluation.sheets import GAP, LABEL, LETTERS, PAPER, sheet

ROW = torch.zeros(1, 2, 3, 64, 64)


def captioned(text: str) -> np.ndarray:
    """Pixels of a sheet of one row, left of its pictures."""
    return np.asarray(Image.open(io.BytesIO(sheet(ROW, [text]))))[:, :LABEL]


@pytest.mark.parametrize("letters", ["äéß", "ŁőĂ", "Ωλπ", "ждЯ", "→∞★"])
def test_letters_outside_ascii_are_drawn_as_themselves(letters: str) -> None:
    first, second, third = map(captioned, letters)
    assert not np.array_equal(first, second), "a box stands for all that the font lacks"
    assert not np.array_equal(second, third)


@pytest.fixture
def no_other_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[FontManager]:
    """A machine without fonts but DejaVu, and what matplotlib knows of those."""
    monkeypatch.setattr(fontManager, "ttflist", [])
    sheets._other_font.cache_clear()
    yield fontManager
    sheets._other_font.cache_clear()


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("赤い apple", r"\u8d64\u3044 apple"),
        ("two 🍎🍎 red", "two :red_apple::red_apple: red"),
        ("👩🏽\u200d🚀", ":woman_astronaut_medium_skin_tone:"),
        ("a\x07b", r"a\x07b"),
        ("\U0002070e", r"\U0002070e"),
        ("☺ and ★", "☺ and ★"),
    ],
)
def test_letters_that_no_font_has_are_said_in_others(
    no_other_fonts: FontManager, text: str, spelled: str
) -> None:
    assert np.array_equal(captioned(text), captioned(spelled))
    assert not np.array_equal(captioned(text), captioned("")), "something is shown"


def test_a_font_of_the_machine_has_what_ours_lacks(no_other_fonts: FontManager, tmp_path: Path) -> None:
    last, path, coloured = (tmp_path / f"{name}.ttf" for name in ("LastResort", "theirs", "a"))
    for file in (last, path):
        write_font(file, "赤")
    coloured.write_bytes(b"no font")
    no_other_fonts.ttflist += [FontEntry(fname=str(file), weight=400) for file in (last, path, coloured)]
    assert sheets._other_font("赤") == str(path)
    assert sheets._other_font("い") == ""
    shown = captioned("赤")
    assert not np.array_equal(shown, captioned(r"\u8d64"))
    column = (shown != PAPER).any(2)[:, GAP:].any(0).nonzero()[0]
    assert (column.min(), len(column)) == (0, LETTERS), "the square that is its letter there"
    both = captioned("red 赤い")
    assert np.array_equal(both[:, : GAP + 20], captioned("red")[:, : GAP + 20])
    assert not np.array_equal(both, captioned(r"red 赤")), "and what it lacks is said in other letters"


def write_font(path: Path, letter: str) -> None:
    """A font with one letter, a square as high as a line."""
    pen = TTGlyphPen(None)
    for step, point in enumerate([(0, 0), (0, 1000), (1000, 1000), (1000, 0)]):
        (pen.lineTo if step else pen.moveTo)(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(letter): "square"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


@pytest.mark.parametrize("text", ["w" * 60, "Donaudampfschifffahrtsgesellschaft " * 2, "red apple " * 8])
def test_a_caption_stays_beside_the_pictures_and_is_shown_whole(text: str) -> None:
    shown = captioned(text)
    assert (shown[:, LABEL - GAP :] == PAPER).all(), "nothing runs under the pictures"
    assert (shown[GAP + 16 : GAP + 32] != PAPER).any(), "it goes on in the next line"


def test_a_caption_longer_than_its_picture_is_high_ends_with_it() -> None:
    shown = captioned("apple " * 200)
    assert (shown[-GAP:] == PAPER).all()
