"""Sources: what they yield, that it never changes by itself, and what they say about bad input."""

from __future__ import annotations

import io
import itertools
import random

import numpy as np
import pytest
from PIL import Image

from model.config import ShapesSource
from model.sources import fingerprint, iterate, shapes


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# ── shapes ──────────────────────────────────────────────────────────────────────────────────────────────


def every_scene() -> list[shapes.Scene]:
    things = [shapes.Thing(*t) for t in itertools.product(shapes.SIZES, shapes.COLOURS, shapes.SHAPES)]
    pairs = itertools.product(things[::5], things[::7], shapes.RELATIONS)
    return [shapes.Scene((thing,)) for thing in things] + [shapes.Scene((a, b), r) for a, b, r in pairs]


@pytest.mark.parametrize("template", shapes.TEMPLATES)
def test_shapes_captions_parse_back(template):
    for scene in every_scene():
        assert shapes.parse(scene.caption(template)) == scene


def test_shapes_parse_refuses_other_text():
    with pytest.raises(ValueError, match="not a caption"):
        shapes.parse("a large red circle beside a small blue square")


def test_shapes_canonical_is_the_same_for_both_tellings():
    for scene in every_scene():
        assert scene.canonical() == scene.converse().canonical()
        assert scene.composition == scene.converse().composition


def test_shapes_relation_and_colours_are_in_the_picture():
    rng = random.Random(0)
    for _ in range(200):
        scene = shapes.random_scene(rng)
        a, b = scene.things
        if a.colour == b.colour:
            continue
        pixels = scene.draw(64, rng)
        spots = []
        for thing in (a, b):
            ys, xs = np.nonzero((pixels == shapes.COLOURS[thing.colour]).all(-1))
            spots.append((xs.mean(), ys.mean(), len(xs)))
        (ax, ay, _), (bx, by, _) = spots
        assert {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[scene.relation]
        # nothing touches the border, so nothing is cut off
        assert (np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]) == 255).all()


def test_shapes_holds_out_pairs_but_no_part():
    records = list(iterate(ShapesSource(count=3000), 16))
    scenes = [(shapes.parse(r.captions[0]), r.composition) for r in records]
    held = [s for s, out in scenes if out]
    seen = [s for s, out in scenes if not out]
    assert 0.10 < len(held) / len(scenes) < 0.15
    pair = lambda s: tuple(sorted(t.index for t in s.things))  # noqa: E731
    assert not {pair(s) for s in held} & {pair(s) for s in seen}
    assert {t for s in seen for t in s.things} == {t for s in scenes for t in s[0].things}
    assert len({t for s in seen for t in s.things}) == 2 * 6 * 4


def test_shapes_tells_each_picture_from_both_sides():
    for record in iterate(ShapesSource(count=50), 16):
        first, second = (shapes.parse(caption) for caption in record.captions)
        assert first == second.converse()


def test_shapes_are_the_same_every_time_and_other_with_another_seed():
    first, again, other = (list(iterate(ShapesSource(count=20, seed=s), 32)) for s in (1, 1, 2))
    assert first == again
    assert [r.image for r in first] != [r.image for r in other]
    assert picture(first[0].image).shape == (32, 32, 3)
    assert fingerprint(ShapesSource()) == fingerprint(ShapesSource(count=3))
