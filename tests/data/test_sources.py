"""Sources: what they yield, that it never changes by itself, and what they say about bad input."""

from __future__ import annotations

import io
import itertools
import random
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from model.config import OpenMojiSource, ShapesSource
from model.data.names import folder_words, words
from model.data.sources import fingerprint, iterate, openmoji, recognise, shapes
from model.data.sources.folder import CAPTIONED
from model.errors import UserError
from model.plumbing import storage
from tests import ROOT
from tests.instances import config


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


# ── openmoji ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("character", "expected"),
    [
        ("🍎", ["red apple", "apple"]),
        ("👋🏿", ["waving hand with dark skin tone", "wave with dark skin tone"]),
        ("🇩🇪", ["flag of Germany"]),
        ("🏴󠁧󠁢󠁥󠁮󠁧󠁿", ["flag of England"]),
        ("🔝", ["TOP arrow", "top"]),
        (
            "👩🏼‍🦰",
            ["woman red hair with medium-light skin tone", "red haired woman with medium-light skin tone"],
        ),
        ("🫱🏻‍🫲🏿", ["handshake with light skin tone and dark skin tone"]),
        ("🏿", ["dark skin tone"]),
        ("\ue0c0", []),  # an extra of OpenMoji's own
    ],
)
def test_openmoji_captions(character, expected):
    assert openmoji.captions(character) == expected


def test_openmoji_every_named_picture_has_a_caption_and_a_group():
    names = list(openmoji._names(OpenMojiSource()))
    everyone = frozenset().union(*openmoji.groups().values())
    assert len(names) == 3953
    assert all(openmoji.captions(name) for name in names)
    assert {openmoji.without_tones(name).replace("\ufe0f", "") for name in names} <= everyone


def test_openmoji_holds_out_combinations_but_no_tone_and_no_person():
    toned = [n for n in openmoji._names(OpenMojiSource()) if openmoji.without_tones(n) != n]
    held = [n for n in toned if openmoji.is_composition(n)]
    seen = [n for n in toned if not openmoji.is_composition(n)]
    assert 0.08 < len(held) / len(toned) < 0.12
    assert {openmoji.without_tones(n) for n in seen} == {openmoji.without_tones(n) for n in toned}
    assert {c for n in seen for c in n if c in openmoji.TONES} == set(openmoji.TONES)
    assert not openmoji.is_composition("🍎")


def test_openmoji_groups_choose_and_limit_cuts():
    fruit = list(openmoji._names(OpenMojiSource(groups=["food-fruit"])))
    assert "🍎" in fruit
    assert "🐈" not in fruit
    assert list(openmoji._names(OpenMojiSource(groups=["food-fruit"], limit=3))) == fruit[:3]
    with pytest.raises(UserError, match=r"'fruits' is none of .*food-fruit"):
        next(iterate(OpenMojiSource(groups=["fruits"]), 32))


def test_openmoji_renders_colour_on_transparent(monkeypatch):
    monkeypatch.setattr("model.plumbing.parallel.cores", lambda: 1)
    records = {r.captions[0]: r for r in iterate(OpenMojiSource(groups=["food-fruit"]), 32)}
    apple = Image.open(io.BytesIO(records["red apple"].image))
    assert (apple.format, apple.size, apple.mode) == ("PNG", (64, 64), "RGBA")
    pixels = np.asarray(apple)
    assert pixels[0, 0, 3] == 0
    red, green, blue, alpha = pixels[40, 32]
    assert alpha == 255
    assert red > 2 * max(green, blue)
    assert "openmoji-17" in fingerprint(OpenMojiSource())


# ── what people name as their data ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("uri", "values"),
    [
        ("", None),
        (" openmoji ", {"kind": "openmoji"}),
        ("shapes", {"kind": "shapes"}),
        ("s3://b/p/{000..099}.tar", {"kind": "webdataset", "urls": "s3://b/p/{000..099}.tar"}),
        ("shards/*.tar", {"kind": "webdataset", "urls": "shards/*.tar"}),
        ("them/flowers", {"kind": "hub", "repo": "them/flowers"}),
        ("hf://datasets/them/flowers", {"kind": "hub", "repo": "them/flowers"}),
        ("hf://datasets/them/flowers@v1", {"kind": "hub", "repo": "them/flowers", "revision": "v1"}),
        ("https://huggingface.co/datasets/them/flowers/", {"kind": "hub", "repo": "them/flowers"}),
        (
            "https://huggingface.co/datasets/them/flowers/tree/refs%2Fpr%2F1",
            {"kind": "hub", "repo": "them/flowers", "revision": "refs/pr/1"},
        ),
        ("https://huggingface.co/datasets/them/flowers/viewer/x", {"kind": "hub", "repo": "them/flowers"}),
        ("s3://b/p.parquet", {"kind": "parquet", "path": "s3://b/p.parquet"}),
        ("folder/*.parquet", {"kind": "parquet", "path": "folder/*.parquet"}),
    ],
)
def test_data_is_recognised_by_its_name(uri, values):
    assert recognise(uri) == values
    if values:
        config(data={"source": values})


@pytest.mark.parametrize(
    ("files", "values"),
    [
        (["a/b.PNG", "c.csv", "a/b.txt"], {"kind": "folder"}),
        (["a/b.PNG", "c/captions.TSV"], {"kind": "folder"}),
        (["a.gif", "a.gif.txt"], {"kind": "folder"}),
        (["a.jpg", "a.json"], {"kind": "folder"}),
        (["deep/er/x.parquet"], {"kind": "parquet"}),
        (["x.parquet", "y.jpg"], {"kind": "parquet"}),
        (["x.parquet", "y.jpg", "y.caption"], {"kind": "folder"}),
        (["metadata.parquet", "y.jpg"], {"kind": "folder"}),
        (
            ["red-apple_03.png", "IMG_1234.jpg", "blue pear.webp", "plum.png"],
            {"kind": "folder", "captions": "names"},
        ),
        (["fruit/apple.png", "fruit/pear.png", "fruit/IMG_1.png"], {"kind": "folder", "captions": "names"}),
        (["fruit/apple_1.png", "fruit/apple_2.png"], {"kind": "folder", "captions": "names"}),
        (["train/red apple/1.png", "train/pear/IMG_2.png"], {"kind": "folder", "captions": "folders"}),
        (["nevus/ISIC_1.png", "melanoma/ISIC_2.png"], {"kind": "folder", "captions": "folders"}),
    ],
)
@pytest.mark.parametrize("where", ["here", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_folder_is_recognised_by_what_it_holds(files, values, where, request, tmp_path):
    root = (
        str(tmp_path / "data")
        if where == "here"
        else f"{request.getfixturevalue('services')['LATENT_GPT_STORE']}"
    )
    for name in files:
        storage.write_bytes(f"{root}/{name}", b'{"text": "a"}')
    assert recognise(root) == {"path": root, **values}


def test_names_caption_as_many_pictures_as_an_ingest_asks_for():
    auto = yaml.safe_load((ROOT / "model/presets/auto.yaml").read_text())
    assert 1 - auto["data"]["max_bad_share"] == CAPTIONED


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("red-apple_03", "red apple"),
        ("0012 Red Apple (2)", "Red Apple"),
        ("RedApple7", "Red Apple"),
        ("3 apples", "3 apples"),
        ("caf%C3%A9 au lait", "café au lait"),
        ("cafe\u0301", "café"),
        ("红苹果_1", "红苹果"),
        ("photo of a cat copy", "photo of a cat"),
        ("00a8ffca-0c6b-40d9-8d9a-dc8f9a1d5eac___RS_Late.B 5083", "RS Late B"),
        ("beach_20240101_5f3a9c0d sunset", "beach sunset"),
        ("Fabaceae leaf", "Fabaceae leaf"),
        ("DJI_0001", ""),
        ("MVIMG_20200101_120000", ""),
        ("received_1234567890", ""),
        ("IMG_1234", ""),
        ("IMG-20240101-WA0001", ""),
        ("Screenshot 2024-01-01 at 10.11.12", ""),
        ("deadbeefcafe", ""),
        ("3f2504e0-4f89-11d3-9a0c-0305e82c3301", ""),
        ("000123", ""),
        ("n01440764_10026", ""),
        ("de", ""),
        ("train", ""),
        ("", ""),
    ],
)
def test_what_a_name_says(name, said):
    assert words(name) == said


@pytest.mark.parametrize(
    ("path", "said"),
    [("fruit/red apple/10", "red apple"), ("10_sks dog", "sks dog"), ("3 cats", "3 cats"), ("10", "")],
)
def test_what_a_path_of_folders_says(path, said):
    assert folder_words(path) == said


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("{}/nowhere", "data: there is no folder {}/nowhere here; data is that, tar shards"),
        ("{}/empty", "data: {}/empty holds no pictures (it is empty); data is a folder of them, tar shards"),
        (
            "{}/films/1.mp4",
            "data: {}/films/1.mp4 is a single file; name the folder that it lies in, or tar shards",
        ),
        ("{}/films", "data: {}/films holds no pictures (2 .mp4, 1 without suffix); data is a folder of them"),
        ("{}/svg", "data: no picture in {}/svg is of a format that is read (1 .svg); make them JPEG, PNG or"),
        (
            "{}/camera",
            "data: no picture in {}/camera has a caption (101 .jpg, 2 .txt, 1 .json, 1 .csv), and fewer"
            " than 75% of them have names, or folders, that are words; lists of captions are called"
            " metadata.jsonl, captions.csv, captions.tsv, metadata.csv, metadata.parquet, and not"
            " captions.txt, 2017/captions.json, 2017/labels.csv; write what",
        ),
        ("{}/most", "data: no picture in {}/most has a caption (3 .png), and fewer than 75% of them"),
        (
            "{}/tars",
            "data: {}/tars is a folder of archives (1 .tar, 1 .tar.gz), and of no shards, as no picture in"
            " the first tar has a .txt or .json of its name; name one of them, or unpack them",
        ),
        ("{}/zips", "data: {}/zips is a folder of archives (1 .zip); name one of them, or unpack them into"),
        ("https://huggingface.co/them/model", "names no data set of the hub as a whole; give owner/name"),
        ("https://huggingface.co/datasets/them/flowers/blob/main/x.zip", "names no data set of the hub as a"),
        ("https://example.org/x", "data: https://example.org/x: only s3://bucket/key and local paths"),
        ("\0", "data: "),
    ],
)
def test_what_is_no_data_is_refused(uri, said, tmp_path):
    empty = (
        "empty/.hidden.png",
        "tars/0.tar",
        "tars/1.tar.gz",
        "zips/0.zip",
        "films/1.mp4",
        "films/2.mp4",
        "films/LICENSE",
        "svg/red apple.svg",
    )
    camera = ["camera/IMG_1.jpg", "camera/IMG_1.txt", "camera/captions.txt"]
    camera += ["camera/2017/labels.csv", "camera/2017/captions.json"]
    camera += [f"camera/2017/{number}.jpg" for number in range(100)]
    most = ("most/red apple.png", "most/pear.png", "most/IMG_1.png")
    for name in (*empty, *camera, *most):
        storage.write_bytes(f"{tmp_path}/{name}", b"")
    with pytest.raises(UserError, match=re.escape(said.format(tmp_path, tmp_path))):
        recognise(uri.format(tmp_path))
