"""What a picture of the shapes source shows, read back from its pixels: a judge of composition without a net.

Analysis by synthesis. Pictures are white with at most one thing in either half, so what is missing to white
is one coloured shape per half, and least squares over all colours, shapes and sizes (and a grid of positions
around the centre of mass) names it. A half that no thing explains is not read at all, which counts as wrong.

Letters: N pictures, H W pixels (H = W), C colours, P candidate positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.data.sources.shapes import BACKGROUND, COLOURS, SHAPES, SIZES, Scene, Thing

MIN_EXPLAINED = (
    0.75  # share of the squared difference to white around a thing that the named thing must explain
)
MIN_AREA = 0.3  # smallest coverage that is a thing, as a share of the smallest thing's area
REACH, STEP = 0.75, 0.25  # positions tried around the centre of mass, pixels
NOISE = 0.35  # ink, summed over RGB, that is a reconstruction's noise on white; yellow's is 1.1
CHUNK = 32  # pictures fitted at once
ATTRIBUTES = ("colour", "shape", "size", "relation")

_RGB = torch.tensor(list(COLOURS.values())) / 255
_INK = torch.tensor(BACKGROUND) / 255 - _RGB  # (C, 3): what a colour takes from white


def oracle_score(images: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Shares of pictures that show what was asked for.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        scenes: what each picture should show; all with the same number of things.

    Returns:
        `all_right`, and for each of `colour`, `shape`, `size`, `relation` the share of pictures in which it
        is right for every thing (`relation` only where there are two: the axis, and which thing comes first).
    """
    things = len(scenes[0].things)
    right = dict.fromkeys(("all_right", *ATTRIBUTES[: 4 if things == 2 else 3]), 0)
    for scene, seen in zip(scenes, read(images, things), strict=True):
        if seen is None:
            continue
        scene = scene.canonical()
        pairs = list(zip(scene.things, seen.things, strict=True))
        right["all_right"] += scene == seen
        for name in ("colour", "shape", "size"):
            right[name] += all(getattr(asked, name) == getattr(shown, name) for asked, shown in pairs)
        if things == 2:
            in_order = _agreement(scene.things, seen.things) >= _agreement(scene.things, seen.things[::-1])
            right["relation"] += scene.relation == seen.relation and in_order
    return {name: count / len(scenes) for name, count in right.items()}


def correct(images: Tensor, scenes: Sequence[Scene]) -> list[bool]:
    """For each picture whether everything is as asked; arguments as for `oracle_score`."""
    seen = read(images, len(scenes[0].things))
    return [scene.canonical() == one for scene, one in zip(scenes, seen, strict=True)]


def _agreement(asked: tuple[Thing, ...], shown: tuple[Thing, ...]) -> int:
    names = ("colour", "shape", "size")
    return sum(getattr(a, n) == getattr(b, n) for a, b in zip(asked, shown, strict=True) for n in names)


@torch.no_grad()
def read(images: Tensor, things: int = 2) -> list[Scene | None]:
    """The scene of each picture (N, 3, H, W) in [-1, 1], told canonically (from the left, from above); None
    where it shows no scene of so many things."""
    scenes: list[Scene | None] = []
    for chunk in images.split(CHUNK):
        white = (torch.tensor(BACKGROUND) / 255)[:, None, None]
        ink = white - (chunk.float().cpu() / 2 + 0.5)  # (n, 3, H, W)
        ink = ink * (ink.sum(1, keepdim=True) > NOISE)
        if things == 1:
            scenes += [Scene((thing,)) if thing else None for thing in _name(ink)]
            continue
        columns = torch.arange(ink.shape[-1]) < ink.shape[-1] // 2
        left, upper = columns.expand(ink.shape[-2:]), columns[:, None].expand(ink.shape[-2:])
        # The centres are further apart along the relation's axis than across it.
        beside = _separation(ink, left, 0) >= _separation(ink, upper, 1)  # (n,)
        first = torch.where(beside[:, None, None], left, upper)[:, None]  # (n, 1, H, W)
        named = zip(beside.tolist(), _name(ink * first), _name(ink * ~first), strict=True)
        for is_beside, one, other in named:
            relation = "left of" if is_beside else "above"
            scenes.append(Scene((one, other), relation) if one and other else None)
    return scenes


def _separation(ink: Tensor, half: Tensor, axis: int) -> Tensor:
    """How far apart the centres of mass of a half (H, W) and of its complement lie, (n,) in pixels."""
    return (_centre(ink * ~half) - _centre(ink * half))[:, axis]


def _centre(ink: Tensor) -> Tensor:
    """Centre of mass (n, 2) of the ink, x and y in pixels from the corner; the middle where there is none."""
    mass = ink.clamp_min(0).sum(1).square()  # squares: what is faint does not move it
    side = mass.shape[-1]
    place = torch.arange(side) + 0.5
    total = mass.sum((1, 2))[:, None]
    centre = torch.stack([(mass.sum(1) * place).sum(1), (mass.sum(2) * place).sum(1)], dim=1)
    return torch.where(total > 0, centre / total.clamp_min(1e-6), side / 2)


def _name(ink: Tensor) -> list[Thing | None]:
    """The one thing of each picture's ink (n, 3, H, W), by least squares."""
    side = ink.shape[-1]
    centre = _centre(ink)
    offsets = torch.arange(-REACH, REACH + STEP / 2, STEP)
    grid = torch.cartesian_prod(offsets, offsets)  # (P, 2)
    ink, corner = _around(ink, centre, math.ceil(2.3 * max(SIZES.values()) * side) + 3)
    planes = torch.einsum("nchw,kc->nkhw", ink, _INK).flatten(2)  # (n, C, window²)
    weights = _INK.square().sum(1)  # (C,)
    best = torch.full((len(ink),), -torch.inf)
    which = torch.zeros(len(ink), dtype=torch.long)
    candidates = [(shape, size) for shape in SHAPES for size in SIZES]
    for number, (shape, size) in enumerate(candidates):
        radius = SIZES[size] * side
        drop = radius / 3 if shape == "triangle" else 0.0  # its centre of mass lies below its centre
        places = (centre - corner)[:, None] + grid - torch.tensor([0.0, drop])  # (n, P, 2)
        cover = coverage(shape, places, radius, ink.shape[-1]).flatten(2)  # (n, P, window²)
        overlap = planes @ cover.transpose(1, 2)  # (n, C, P)
        gain = 2 * overlap - weights[:, None] * cover.square().sum(2)[:, None]  # squares it explains
        most, place = gain.flatten(1).max(1)
        which = torch.where(most > best, number * len(COLOURS) + place // len(grid), which)
        best = torch.maximum(best, most)
    area = ink.clamp(0, 1).amax(1).sum((1, 2))
    least = MIN_AREA * 20 / 9 * (min(SIZES.values()) * side) ** 2  # a cross covers 20/9 r²
    sure = (best >= MIN_EXPLAINED * ink.square().sum((1, 2, 3))) & (area >= least)
    names: list[Thing | None] = []
    for index, good in zip(which.tolist(), sure.tolist(), strict=True):
        shape, size = candidates[index // len(COLOURS)]
        names.append(Thing(size, list(COLOURS)[index % len(COLOURS)], shape) if good else None)
    return names


def _around(ink: Tensor, centre: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """A square (n, 3, window, window) around each centre, and its corner (n, 2), x and y in pixels."""
    window = min(window, ink.shape[-1])
    corner = (centre - window / 2).round().clamp(0, ink.shape[-1] - window)
    x, y = (corner.long()[:, axis, None] + torch.arange(window) for axis in (0, 1))  # (n, window)
    rows = torch.arange(len(ink))[:, None, None]
    return ink[rows, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2), corner


def coverage(shape: str, places: Tensor, radius: float, side: int) -> Tensor:
    """Share of each pixel that a shape covers, (…, side, side), around `places` (…, 2), x and y in pixels.

    The same outlines as `model.data.sources.shapes` draws, antialiased by distance to the edge.
    """
    pixel = torch.arange(side) + 0.5
    dx = (pixel - places[..., :1]).abs()[..., None, :]  # (…, 1, side)
    dy = pixel - places[..., 1:]
    dy = dy[..., :, None]  # (…, side, 1)

    def inside(distance: Tensor) -> Tensor:
        return (distance + 0.5).clamp(0, 1)

    def box(half_width: float, half_height: float) -> Tensor:
        return inside(half_width - dx) * inside(half_height - dy.abs())

    if shape == "circle":
        return inside(radius - (dx.square() + dy.square()).sqrt())
    if shape == "square":
        return box(radius, radius)
    if shape == "cross":
        return torch.maximum(box(radius, radius / 3), box(radius / 3, radius))
    slope = (radius + dy - 2 * dx) / 5**0.5  # distance to the sloping edges of a triangle 2 r wide and high
    return torch.minimum(inside(slope), inside(radius - dy).expand_as(slope))
