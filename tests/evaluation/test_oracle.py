"""The oracle against pictures whose content is known."""

import random

import pytest
import torch
import torch.nn.functional as F

from model.data.sources.shapes import Scene, Thing, random_scene
from model.evaluation import oracle


def pictures(count: int, side: int, things: int, seed: int = 0) -> tuple[torch.Tensor, list[Scene]]:
    rng = random.Random(seed)
    scenes = [random_scene(rng, things) for _ in range(count)]
    drawn = torch.stack([torch.from_numpy(scene.draw(side, rng).copy()) for scene in scenes])
    return drawn.permute(0, 3, 1, 2).float() / 127.5 - 1, scenes


@pytest.mark.parametrize(("side", "things", "count"), [(32, 2, 600), (32, 1, 300), (64, 2, 150)])
def test_clean_pictures_are_read_without_error(side: int, things: int, count: int) -> None:
    images, scenes = pictures(count, side, things)
    assert oracle.oracle_score(images, scenes)["all_right"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("side", "count"), [(32, 5000), (64, 2000)])
def test_thousands_of_clean_pictures(side: int, count: int) -> None:
    images, scenes = pictures(count, side, 2, seed=1)
    assert oracle.oracle_score(images, scenes)["all_right"] >= 0.9995


@pytest.mark.parametrize("side", [32, 64])
def test_the_errors_of_a_reconstruction_do_not_mislead(side: int) -> None:
    images, scenes = pictures(200 if side == 32 else 60, side, 2, seed=2)
    generator = torch.Generator().manual_seed(0)
    fine = 0.2 * torch.randn(images.shape, generator=generator)  # 22 dB
    coarse = 0.15 * torch.randn((len(images), 3, side // 4, side // 4), generator=generator)
    for noise in (fine, F.interpolate(coarse, (side, side), mode="nearest")):  # 25 dB
        assert oracle.oracle_score((images + noise).clamp(-1, 1), scenes)["all_right"] >= 0.97
    halved = F.interpolate(F.avg_pool2d(images, 2), (side, side), mode="bilinear")
    assert oracle.oracle_score(halved, scenes)["all_right"] >= 0.98


def test_each_attribute_is_judged_on_its_own() -> None:
    rng = random.Random(3)
    circle, square = Thing("large", "red", "circle"), Thing("small", "blue", "square")
    shown = Scene((circle, square), "left of")
    image = torch.from_numpy(shown.draw(32, rng).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    wrong_colour = Scene((circle, Thing("small", "green", "square")), "left of")
    score = oracle.oracle_score(image, [wrong_colour])
    assert score == {"all_right": 0, "colour": 0, "shape": 1, "size": 1, "relation": 1}
    swapped = Scene((square, circle), "left of")
    assert oracle.oracle_score(image, [swapped])["relation"] == 0
    assert oracle.oracle_score(image, [shown.converse()])["all_right"] == 1


def test_what_is_no_scene_is_not_read() -> None:
    images, scenes = pictures(20, 32, 2)
    blank = torch.ones_like(images)
    half = images.clone()
    for i, scene in enumerate(scenes):  # wipe one thing out
        if scene.canonical().relation == "left of":
            half[i, :, :, :16] = 1
        else:
            half[i, :, :16] = 1
    grey = torch.zeros_like(images)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for wrong in (blank, half, grey, noise):
        assert oracle.read(wrong) == [None] * 20
