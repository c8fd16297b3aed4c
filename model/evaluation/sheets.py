"""Pictures for people: tiles and sheets of samples, and curves. Tensors and numbers in, image files out.

Letters: R rows, C columns, N pictures.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
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
    pen, font = ImageDraw.Draw(canvas), _font()
    for r, row in enumerate(rows):
        y = GAP + r * step
        if captions:
            lines = _wrapped(captions[r], font, LABEL - 2 * GAP)[: (step - GAP) // LINE]
            for number, line in enumerate(lines):
                pen.text((GAP, y + number * LINE), line, INK, font)
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
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu, which comes with matplotlib: Latin, Greek, Cyrillic and more, where Pillow's own has ASCII."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", LETTERS)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words, and within those that are longer than a line."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        for letter in f" {word}" if lines[-1] else word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
