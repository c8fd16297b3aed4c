"""The census of a set of pictures: each figure on a set whose answer is known."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.config import ShapesSource
from model.data.image_shards import load_images
from model.data.ingest import QUARANTINED
from model.evaluation import census
from model.evaluation.census import count_captions, count_scripts, count_words, find_alike, words_of
from model.nets.clip import token_counts
from model.nets.metrics import NEAR_DUPLICATE
from model.plumbing import storage
from model.plumbing.assets import PICTURES
from tests.data.test_ingest import folder, picture, shapes, write
from tests.instances import ingest


def tokens(texts: list[list[str]]) -> dict[str, int]:
    said = [caption for captions in texts for caption in captions]
    return dict(zip(said, token_counts(said), strict=True))


# ── captions and words ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A red apple, isn't it?", ["a", "red", "apple", "isn't", "it"]),
        ("red_apple-03.png", ["red", "apple", "03", "png"]),
        ("Ein großer Äpfel-Baum", ["ein", "grosser", "äpfel", "baum"]),
        ("красное яблоко", ["красное", "яблоко"]),
        ("红苹果 3kg", ["红", "苹", "果", "3kg"]),
        ("iPhone的照片", ["iphone", "的", "照", "片"]),
        ("लाल सेब", ["लाल", "सेब"]),
        ("l\u2019été d'or", ["l\u2019été", "d'or"]),
        ("'quoted' \u2019", ["quoted"]),
        ("😀 !?", []),
        ("", []),
    ],
)
def test_words(caption, words):
    assert words_of(caption) == words


def test_captions_are_counted():
    texts = [["a cat"], ["A cat"], ["a cat", "a cat that sleeps"], ["IMG_1234"], ["猫"], ["x 2"]]
    found = count_captions(texts, tokens(texts))
    assert (found.captions, found.distinct, found.several) == (7, 5, 1)
    assert found.shared == 2, "the third has a caption of its own, too"
    assert found.nameless == 2, "a camera's name; a letter and a number"
    assert found.words == {1: 1, 2: 5, 4: 1}
    assert sum(found.tokens.values()) == 7
    assert found.tokens[2] == 4, "CLIP knows 'a' and 'cat'"


def test_words_are_counted_by_pictures():
    train = [["red cat", "a red red cat"], ["red dog"], ["red house"]]
    found = count_words(train, [["red cat"], ["blue cat"], ["Blue dog", "green dog"]])
    assert found.distinct == 7
    assert found.frequent[:3] == [("red", 4), ("cat", 3), ("blue", 2)]
    assert found.once == 3, "a, house, green"
    assert found.own == 3
    assert found.median == 2
    assert found.unheard == 2
    assert found.unheard_words == ["blue", "green"]
    nothing = count_words([], [])
    assert (nothing.distinct, nothing.median, nothing.frequent) == (0, 0.0, [])


def test_scripts_are_told_apart_by_most_letters():
    texts = [["a red apple"], ["красное яблоко", "ein Apfel"], ["红苹果"], ["りんごだよ"], ["123 😀"]]
    found = {one.name: one for one in count_scripts(texts, tokens(texts))}
    captions = {name: one.captions for name, one in found.items()}
    assert captions == {"Latin": 2, "Cyrillic": 1, "Han": 1, "Hiragana": 1}
    assert found["Latin"].letters == 9 + 8
    assert found["Latin"].tokens == token_counts(["a red apple"])[0] + token_counts(["ein Apfel"])[0]
    assert found["Latin"].tokens < 0.5 * found["Latin"].letters
    assert found["Han"].tokens > found["Han"].letters, "CLIP has no such words"


# ── pictures that look alike ────────────────────────────────────────────────────────────────────────────


def every_pair(pictures: torch.Tensor, trained: int, bound: float) -> dict[tuple[int, int], float]:
    """Pairs of a picture and a training picture before it or in training, by plain arithmetic."""
    flat = pictures.double().flatten(1) / 255
    distances = {
        (row, other): float((flat[row] - flat[other]).square().mean().sqrt())
        for row in range(len(flat))
        for other in range(trained)
        if row >= trained or row < other
    }
    return {pair: distance for pair, distance in distances.items() if distance <= bound}


@pytest.mark.parametrize("side", [5, 16, 32])
def test_no_pair_that_looks_alike_is_missed_and_none_is_made_up(side, monkeypatch):
    monkeypatch.setattr(census, "ROWS", 7)
    monkeypatch.setattr(census, "COLUMNS", 5)
    rng = np.random.default_rng(side)
    base = rng.integers(0, 256, (6, 3, side, side))
    noise = rng.normal(0, 1, (60, 3, side, side)) * rng.uniform(0, 25, (60, 1, 1, 1))
    pictures = torch.from_numpy((base[np.arange(60) % 6] + noise).clip(0, 255).astype(np.uint8))
    trained, bound = 40, 0.07
    expected = every_pair(pictures, trained, bound)
    assert 100 < len(expected) < 300
    found = find_alike(pictures, trained, bound)
    pairs = {(one.row, one.other): one.distance for one in (*found.within.nearest, *found.across.nearest)}
    assert pairs.keys() == expected.keys()
    assert pairs == pytest.approx(expected, abs=1e-4)
    assert found.within.pairs == sum(row < trained for row, _ in expected)
    assert found.across.pairs == sum(row >= trained for row, _ in expected)
    like = {row for row, _ in expected} | {other for row, other in expected if row < trained}
    assert set(found.like.nonzero()[:, 0].tolist()) == like
    assert found.within.nearest == sorted(found.within.nearest)


def test_descriptors_are_no_farther_apart_than_pictures():
    rng = np.random.default_rng(0)
    for side in (1, 7, 8, 31, 32):
        pictures = torch.from_numpy(rng.integers(0, 256, (40, 3, side, side), dtype=np.uint8))
        pictures[1] = 0
        pictures[2] = 255
        near, full = census._descriptors(pictures), pictures.flatten(1).float() / 255
        near, full = ((one[:, None] - one).square().sum(2).sqrt() for one in (near, full))
        full /= (3 * side * side) ** 0.5
        assert (near <= full + 1e-5).all()
        assert near[1, 2] == pytest.approx(1.0, abs=1e-5), "all of what differs is in the mean"


def test_many_equal_pictures_are_counted_in_bounded_memory():
    found = find_alike(torch.zeros(700, 3, 8, 8, dtype=torch.uint8), 600)
    assert found.within.pairs == 600 * 599 // 2
    assert found.across.pairs == 600 * 100
    assert found.like.all()
    assert len(found.within.nearest) == census.CLOSEST


def test_nothing_looks_alike_where_there_is_nothing():
    for count, trained in ((0, 0), (3, 0), (1, 1)):
        found = find_alike(torch.zeros(count, 3, 4, 4, dtype=torch.uint8), trained)
        assert (found.within.pairs, found.across.pairs, int(found.like.sum())) == (0, 0, 0)


# ── of an asset ─────────────────────────────────────────────────────────────────────────────────────────


def nearly(data: bytes) -> bytes:
    """The same picture with one pixel changed: another content, and no other look."""
    image = Image.open(io.BytesIO(data))
    image.putpixel((0, 0), (255, 255, 255) if image.getpixel((0, 0)) != (255, 255, 255) else (0, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def some(here: Path) -> Path:
    """A folder of 40 pictures, 20 of which look like the other 20; a duplicate, bad ones, and other files."""
    files: dict[str, bytes | str] = {}
    for n in range(20):
        first = picture(n, size=(16, 16))
        files |= {f"{n:02}a.png": first, f"{n:02}b.png": nearly(first)}
        files |= {f"{n:02}a.txt": f"thing number {n}\nsomething", f"{n:02}b.txt": "<b>the same</b>"}
    files |= {"copy.png": picture(3, size=(16, 16)), "copy.txt": "again", "notes.pdf": b"x"}
    files |= {"cut.jpg": picture(90, "JPEG", size=(90, 60))[:900], "cut.txt": "cut"}
    files |= {"zero.png": b"", "zero.txt": "0"}
    return write(here, files)


def test_a_census_of_an_asset(store, tmp_path):
    made = ingest(folder(some(tmp_path / "here"), validation_share=0.3, min_side=8))
    assert census.left(made) is None
    found = census.take(made)
    assert census.left(made) == found
    assert census.take(made) == found, "it is the same each time"
    splits = {split: made.info[split] for split in ("train", "validation")}
    assert found.counts == {"read": 43, "duplicates": 1, "quarantined": 2, "composition": 0, **splits}
    assert found.pictures == found.seen == 40
    assert found.others == {".pdf": 1}
    assert found.sizes["pictures"] == 41
    assert {one.source: one.pictures for one in found.reasons} == {"cut.jpg": 1, "zero.png": 1}
    assert [one.source for one in found.missing] == ["cut.jpg"]
    assert found.captions.shared == 20
    assert [(group.caption, group.pictures) for group in found.groups] == [
        ("<b>the same</b>", 20),
        ("something", 20),
    ]
    pictures = torch.cat([load_images(made, split)[0] for split in ("train", "validation")])
    pairs = every_pair(pictures, made.info["train"], NEAR_DUPLICATE)
    held = found.alike.held_out["validation"]
    assert 0 < held == found.alike.across == sum(row >= made.info["train"] for row, _ in pairs)
    assert 0 < found.alike.pairs == len(pairs) - held
    assert found.alike.training == 2 * found.alike.pairs
    assert len(found.across) == min(held, census.PAIRS)
    shown = Image.open(io.BytesIO(base64.b64decode(found.across[0].pictures[0].data)))
    assert shown.size == (16, 16)
    assert json.loads(storage.read_bytes(storage.join(made.uri, PICTURES, census.NAME)))["release"] == 1
    assert not [file for file in made.files if PICTURES in file.name]


def test_of_a_large_set_whole_shards_are_looked_at_evenly_spread(store, monkeypatch):
    monkeypatch.setattr(census, "LOOKED", 60)
    made = ingest(shapes(source=ShapesSource(count=300, seed=1), shard_images=20, validation_share=0.2))
    opened: list[str] = []
    real = census.shard_index
    monkeypatch.setattr(census, "shard_index", lambda images, name: opened.append(name) or real(images, name))
    found = census.take(made)
    assert found.seen == sum(found.looked.values()) <= 60 < found.pictures
    assert found.looked["train"] >= 40
    assert min(found.looked["validation"], found.looked["composition"]) > 2
    assert found.captions.captions == 2 * found.seen
    shards = [int(name[-10:-4]) for name in opened if name.startswith("train")]
    assert 3 <= len(shards) < 8
    assert min(shards) < 4
    assert max(shards) > 8


def test_pictures_of_many_pixels_are_fewer(store, monkeypatch):
    made = ingest(shapes())
    monkeypatch.setattr(census, "LOOKED_PIXELS", 16 * 16 * 40)
    assert census.take(made).seen <= 40


def test_a_census_that_is_damaged_or_of_another_release_is_none(store):
    made = ingest(shapes(source=ShapesSource(count=40)))
    where = storage.join(made.uri, PICTURES, census.NAME)
    text = census.take(made).model_dump_json()
    for wrong in (text.replace('"release":1', '"release":2'), text[:100], "[]"):
        storage.write_bytes(where, wrong.encode())
        assert census.left(made) is None
    storage.write_bytes(storage.join(made.uri, PICTURES, QUARANTINED), b"{}")
    assert census.take(made).missing == []


def test_images_of_an_earlier_release_have_no_sizes(store):
    made = ingest(shapes(source=ShapesSource(count=40)))
    earlier = made.model_copy(update={"info": {k: v for k, v in made.info.items() if k != "sizes"}})
    assert census.take(earlier).sizes == {}
