"""Pictures for people: tiles and sheets of samples, and curves. Tensors and numbers in, image files out.

Letters: R rows, C columns, N pictures.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from model.data.images import to_pixels

SHOWN_SIDE = 96  # small pictures are enlarged by whole factors to at least this side, pixels
# Of single pictures, some three hundred to a page: a page has to weigh less than 5 MB. Pixels.
LOSSLESS_SIDE = 64  # larger ones are JPEG
LARGEST_SIDE = 192  # larger ones are made smaller: twice what is shown
GAP, LABEL = 6, 200  # between pictures, and width of the captions beside them, pixels
LETTERS, LINE = 12, 16  # height of captions and of a line of them, pixels
INK, PAPER = (28, 32, 38), (255, 255, 255)
COLOURS = ("#1f5fbf", "#d2691e", "#2a8a57", "#8a3fa0")  # of curves

Curves = dict[str, list[list[float]]]  # name -> [[x, y], …]


class Pairs(NamedTuple):
    """Originals and what the tokenizer leaves of them, (N, 3, H, W) in [-1, 1] each."""

    originals: Tensor
    reconstructions: Tensor


def tile(picture: Tensor) -> tuple[str, bytes]:
    """A picture (3, H, W) in [-1, 1] for a page, as (mime type, file content)."""
    image = _image(picture)
    buffer = io.BytesIO()
    if max(image.size) > LOSSLESS_SIDE:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=80)
        return "image/jpeg", buffer.getvalue()
    image.save(buffer, "PNG", optimize=True)
    return "image/png", buffer.getvalue()


def sheet(rows: Tensor, captions: Sequence[str] = ()) -> bytes:
    """Pictures (R, C, 3, H, W) in [-1, 1] as one PNG, with captions beside the rows."""
    side = rows.shape[-1]
    factor = max(1, -(-SHOWN_SIDE // side))
    step = side * factor + GAP
    left = LABEL if captions else GAP
    canvas = Image.new("RGB", (left + rows.shape[1] * step, GAP + rows.shape[0] * step), PAPER)
    pen, (ascent, _) = ImageDraw.Draw(canvas), _font().getmetrics()
    for r, row in enumerate(rows):
        y = GAP + r * step
        if captions:
            lines = _wrapped(_spelled(captions[r]), LABEL - 2 * GAP)[: (step - GAP) // LINE]
            for number, line in enumerate(lines):
                x, base = float(GAP), y + number * LINE + ascent
                for text, font in _runs(line):
                    pen.text((x, base), text, INK, font, anchor="ls")
                    x += font.getlength(text)
        for c, picture in enumerate(row):
            image = _image(picture).resize((side * factor,) * 2, Image.Resampling.NEAREST)
            canvas.paste(image, (left + c * step, y))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def plot(charts: Sequence[tuple[str, Curves]], x_label: str, marked: bool = False) -> bytes:
    """Charts side by side, three a row, as one PNG; `marked` shows each point."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display
    from matplotlib.ticker import MaxNLocator

    columns = 3
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.4 * rows), dpi=160, layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).flatten()
    for axes, (title, curves) in zip(grid, charts, strict=False):
        for colour, (name, points) in zip(COLOURS * len(curves), curves.items(), strict=False):
            x, y = zip(*points, strict=True)
            style = "o-" if marked or len(points) == 1 else "-"
            axes.plot(x, y, style, color=colour, linewidth=1.4, markersize=4, label=name)
        axes.set_title(title, fontsize=9, loc="left", color="#1c2026")
        axes.set_xlabel(x_label, fontsize=8, color="#5b626b")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=not marked))
        axes.tick_params(labelsize=7, colors="#5b626b")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e8eb", linewidth=0.6)
        if len(curves) > 1:
            axes.legend(fontsize=7, frameon=False)
    for axes in grid[len(charts) :]:
        axes.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray(to_pixels(picture[None].cpu())[0].permute(1, 2, 0).numpy())


@functools.cache
def _font(path: str = "") -> ImageFont.FreeTypeFont:
    """DejaVu, which comes with matplotlib: Latin, Greek, Cyrillic and more, where Pillow's own has ASCII.
    Or the font of another file."""
    return ImageFont.truetype(path or _ours(), LETTERS)


def _ours() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@functools.cache
def _letters(path: str) -> frozenset[int]:
    """The code points that a font's file has letters for; none of a file that cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@functools.cache
def _other_font(letter: str) -> str:
    """The font of this machine that is taken for a letter which ours lacks; "": none has it.

    Looked through are those that matplotlib finds, where systems have their fonts and in a folder of its own.
    """
    from matplotlib.font_manager import fontManager

    found = sorted(
        (font.style != "normal", font.weight != 400, font.fname)
        for font in fontManager.ttflist
        if "LastResort" not in font.fname  # has a box for everything
    )
    for _, _, path in found:
        if ord(letter) in _letters(path):
            try:
                _font(path).getlength(letter)
            except OSError:  # coloured pictures, in sizes of their own
                continue
            return path
    return ""


def _spelled(text: str) -> str:
    """A caption in letters that some font has: an emoji is called by its name, what else is missing by its
    code (`\\u8d64`)."""
    import emoji

    ours = _letters(_ours())

    def named(sequence: str, known: dict[str, str]) -> str:
        return sequence if ours.issuperset(map(ord, sequence)) else known["en"]

    letters = emoji.replace_emoji(text, named)
    return "".join(
        letter
        if letter.isspace() or ord(letter) in ours or _other_font(letter)
        else letter.encode("unicode_escape").decode()
        for letter in letters
    )


def _runs(text: str) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
    """Neighbouring letters of one font, and that font."""
    ours = _letters(_ours())
    for path, letters in groupby(text, lambda letter: "" if ord(letter) in ours else _other_font(letter)):
        yield "".join(letters), _font(path)


def _length(text: str) -> float:
    """Width of a line, pixels."""
    return sum(font.getlength(run) for run, font in _runs(text))


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words, and within those that are longer than a line."""
    lines = [""]
    for word in text.split():
        if lines[-1] and _length(f"{lines[-1]} {word}") > width:
            lines.append("")
        for letter in f" {word}" if lines[-1] else word:
            if _length(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
