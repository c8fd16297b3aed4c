"""Two coloured shapes with size and relation: pictures whose captions say everything about them.

The vocabulary lives here, and nowhere else, because `model.evaluation.oracle` reads the attributes back from
pixels. A caption fixes colours, shapes, sizes and relation; only the position within half a picture is left
to chance. Which things stand together is held out by a rule: every colour, shape, size and relation, and
every coloured shape, is seen in training, yet some pairs of coloured shapes never are.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from model.config import ShapesSource
from model.data.sources import Known, Record, marked, nothing_known

COLOURS: dict[str, tuple[int, int, int]] = {  # RGB
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 200, 30),
    "purple": (150, 50, 190),
    "black": (25, 25, 25),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
SIZES: dict[str, float] = {"small": 0.12, "large": 0.20}  # half the extent, as a share of the picture's side
RELATIONS: dict[str, str] = {  # and their converse
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
BACKGROUND = (255, 255, 255)

TEMPLATES: tuple[str, ...] = (
    "a {}",
    "{}",
    "a picture of a {}",
    "there is a {}",
)
OFFSET = 0.24  # of each centre from the middle, along the relation's axis, as a share of the side
ALONG, ACROSS = 0.03, 0.15  # largest chance move of a centre along and across that axis
SUPERSAMPLE = 8  # drawn this much larger, then averaged: 64 grey levels at an edge


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured shape."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def index(self) -> int:
        """0 … 23, over colours within shapes; size does not count."""
        return SHAPES.index(self.shape) * len(COLOURS) + list(COLOURS).index(self.colour)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows: one thing, or a first thing that is `relation` a second."""

    things: tuple[Thing, ...]
    relation: str = ""  # empty for one thing

    def converse(self) -> Scene:
        """The same picture told from the other thing: "a above b" is "b below a"."""
        if not self.relation:
            return self
        return Scene(self.things[::-1], RELATIONS[self.relation])

    def canonical(self) -> Scene:
        """The telling from left to right or from top to bottom: equal for equal pictures."""
        return self.converse() if self.relation in ("right of", "below") else self

    @property
    def composition(self) -> bool:
        """Whether training must not see this combination: one pair of coloured shapes in eight.

        The rule is on the sum of the two things' indices, so it does not depend on order, relation or sizes,
        and each coloured shape keeps seven partners in eight. One thing alone is held out where the colour's
        number is the shape's number (red circle, green square, blue triangle, yellow cross).
        """
        if self.relation:
            return sum(thing.index for thing in self.things) % 8 == 0
        thing = self.things[0]
        return list(COLOURS).index(thing.colour) == SHAPES.index(thing.shape)

    def caption(self, template: str = TEMPLATES[0]) -> str:
        """The scene in words: "a large red circle left of a small blue square"."""
        first = template.format(self.things[0])
        if not self.relation:
            return first
        article = "" if template == "{}" else "a "
        return f"{first} {self.relation} {article}{self.things[1]}"

    def centres(self, rng: random.Random) -> list[tuple[float, float]]:
        """Where the things stand: (x, y) in shares of the side, from the top left corner."""
        if not self.relation:
            return [(0.5 + rng.uniform(-2, 2) * ACROSS, 0.5 + rng.uniform(-2, 2) * ACROSS)]
        sign = 1 if self.relation in ("left of", "above") else -1
        centres = []
        for side in (-sign, sign):
            along = 0.5 + side * OFFSET + rng.uniform(-ALONG, ALONG)
            across = 0.5 + rng.uniform(-ACROSS, ACROSS)
            centres.append((along, across) if self.relation in ("left of", "right of") else (across, along))
        return centres

    def draw(self, side: int, rng: random.Random) -> np.ndarray:
        """The picture, uint8 (side, side, 3), antialiased, on white; `rng` moves the things a little."""
        scale = side * SUPERSAMPLE
        canvas = Image.new("RGB", (scale, scale), BACKGROUND)
        pen = ImageDraw.Draw(canvas)
        for thing, (x, y) in zip(self.things, self.centres(rng), strict=True):
            _draw(pen, thing, x * scale, y * scale, SIZES[thing.size] * scale)
        return np.asarray(canvas.reduce(SUPERSAMPLE))


def _draw(pen: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, r: float) -> None:
    fill = COLOURS[thing.colour]
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill)
    elif thing.shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill)
    elif thing.shape == "triangle":
        pen.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill)
    else:
        arm = r / 3
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill)


_THING = re.compile(rf"\b({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_RELATION = re.compile(rf"\b({'|'.join(RELATIONS)})\b")


def parse(caption: str) -> Scene:
    """The scene a caption describes; the inverse of `Scene.caption` for every template.

    Raises:
        ValueError: when the caption is not one of ours.
    """
    things = tuple(Thing(*match) for match in _THING.findall(caption))
    relations = _RELATION.findall(caption)
    if len(things) not in (1, 2) or len(relations) != len(things) - 1:
        raise ValueError(f"not a caption of the shapes source: {caption!r}")
    return Scene(things, *relations)


def random_scene(rng: random.Random, things: int = 2) -> Scene:
    """A scene with every attribute drawn evenly and on its own."""
    drawn = tuple(
        Thing(rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(things)
    )
    return Scene(drawn, rng.choice(list(RELATIONS)) if things == 2 else "")


def iterate(
    config: ShapesSource, side: int, start: int = 0, known: Known = nothing_known
) -> Iterator[Record]:
    """`config.count` pictures, each captioned from either thing's side; the n-th is always the same.

    Each is a unit.
    """
    mark = marked(
        fingerprint(config), config.seed, config.shapes_per_image, config.hold_out_compositions, side
    )
    for number in range(start, config.count):
        unit = f"{number:08d}"
        if known(unit, mark):
            yield Record(unit, b"", unit=unit, mark=mark, known=True)
            continue
        rng = random.Random(f"{config.seed}/{number}")
        scene = random_scene(rng, config.shapes_per_image)
        tellings = [scene, scene.converse()] if scene.relation else [scene]
        captions = [
            telling.caption(template)
            for telling, template in zip(tellings, rng.sample(TEMPLATES, len(tellings)), strict=True)
        ]
        buffer = io.BytesIO()
        Image.fromarray(scene.draw(side, rng)).save(buffer, "PNG", compress_level=1)
        composition = config.hold_out_compositions and scene.composition
        yield Record(unit, buffer.getvalue(), captions, composition, unit=unit, mark=mark)


def fingerprint(config: ShapesSource) -> str:
    """The drawing's version: raise it when a picture or caption of a given number changes."""
    return "shapes-1"


def count(config: ShapesSource) -> int:
    """Pictures drawn."""
    return config.count
