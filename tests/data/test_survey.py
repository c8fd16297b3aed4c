"""A look at a source: what it says of a few pictures is right, and it costs little whatever the size."""

from __future__ import annotations

import gzip
import io
import json
import re
import time

import numpy as np
import pytest
from PIL import Image

from model.config import DataConfig, FolderSource, OpenMojiSource, ShapesSource, WebDatasetSource
from model.data import survey
from model.data.sources import sample
from model.data.survey import look
from model.errors import UserError
from tests.data.test_ingest import picture, tar, write


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_of_a_small_folder_everything_is_counted(here):
    for number in range(8):
        write(
            here, {f"{number}.jpg": jpeg(60, 30 + number), f"{number}.txt": f"A picture, number {number % 2}"}
        )
    for name, text in (("a", "nothing"), ("b", "all")):
        write(here, {f"{name}.png": picture(size=(40, 20)), f"{name}.txt": text})
    write(here, {"broken.jpg": b"\xff\xd8\xff", "broken.txt": "x", "bare.jpg": jpeg(9, 9), "notes.md": "x"})
    found = look(FolderSource(path=str(here)))
    said = found.survey
    assert (said.pictures, said.counted, said.looked) == (10, True, 12)
    assert found.smallest == 20
    assert found.worst.startswith("1 x ")
    assert said.bad == pytest.approx(2 / 12)
    assert said.side == 32.5
    assert said.lossy == 0.8
    assert (said.captions, said.length) == (4, pytest.approx(34 / 10))
    assert 0 < said.seconds < 1
    assert found.kind == "a folder with captions in .txt files beside the pictures"
    assert [(e.name, e.width, e.height) for e in found.examples] == [
        ("0.jpg", 60, 30),
        ("1.jpg", 60, 31),
        ("2.jpg", 60, 32),
    ]
    first, *examples, other, broken = found.lines()
    assert (
        first
        == f"{found.kind}: 10 pictures (12 looked at, 16.7% of those cannot be used), 4 different captions"
    )
    assert examples[0] == "e.g. 0.jpg  60x30  A picture, number 0"
    assert {other[:44], broken[:44]} == {
        "cannot be used: 1 of 12 looked at, no captio",
        "cannot be used: 1 of 12 looked at, not one o",
    }


def test_pictures_are_judged_as_the_data_says(here):
    write(here, {"a.jpg": jpeg(40, 20), "a.txt": "a", "b.jpg": jpeg(8, 8), "b.txt": "b"})
    source = FolderSource(path=str(here))
    for said, usable in (({"min_side": 8}, 2), ({}, 1), ({"min_side": 8, "max_pixels": 64}, 1)):
        assert look(source, 16, DataConfig(source=source, **said)).survey.pictures == usable, said
    assert look(source, 16).survey.pictures == 1


def test_of_a_large_folder_a_few_are_opened_all_over_it(here, monkeypatch):
    monkeypatch.setattr(survey, "MOST", 100)
    good, bad = picture(), picture()[:60]
    write(here, {f"{number:04d}.png": bad if number % 20 == 7 else good for number in range(1000)})
    lines = (json.dumps({"file_name": f"{n:04d}.png", "text": f"number {n % 10}"}) for n in range(1000))
    write(here, {"metadata.jsonl": "\n".join(lines)})
    said = look(FolderSource(path=str(here))).survey
    assert (said.looked, said.counted, said.captions) == (100, False, 10)
    assert 850 < said.pictures < 1000
    places = [
        int(record.key[:4])
        for record in sample(FolderSource(path=str(here)), 16, 100, time.monotonic() + 9).records
    ]
    assert places == sorted(places)
    assert places[:3] == [0, 1, 2]
    assert min(np.histogram(places, 4, (0, 1000))[0]) > 10


def test_captions_are_estimated_by_how_often_each_was_met():
    names = [f"{number} of its own" for number in range(300)]
    assert survey._distinct(names, 30_000) == 30_000
    assert survey._distinct(["a", "b", "c"] * 100, 30_000) == 3
    chance = np.random.default_rng(0)
    assert 800 < survey._distinct(list(map(str, chance.integers(1000, size=600))), 30_000) < 1250
    assert survey._distinct(["a", "b"], 2) == 2


@pytest.mark.parametrize("packed", [False, True])
def test_of_tars_the_first_samples_of_some_are_read_and_the_number_of_all_follows(here, monkeypatch, packed):
    chance = np.random.default_rng(0)
    for shard in range(6):
        members = {}
        for number in range(300):
            noise = Image.fromarray(
                chance.integers(256, size=(24, int(chance.integers(20, 60)), 3), dtype=np.uint8)
            )
            buffer = io.BytesIO()
            noise.save(buffer, "PNG")
            members |= {
                f"{number:04d}.png": buffer.getvalue(),
                f"{number:04d}.txt": f"{shard} {number}".encode(),
            }
        path = tar(here / f"{shard}.tar", members)
        path.write_bytes(gzip.compress(path.read_bytes()) if packed else path.read_bytes())
    source = WebDatasetSource(urls=f"{here}/{{0..5}}.tar")
    found = look(source)
    assert found.kind == "6 tar shards"
    assert (found.survey.looked, found.survey.counted) == (300, False)
    assert 1650 < found.survey.pictures < 1950
    monkeypatch.setattr(survey, "MOST", 3000)
    assert (look(source).survey.pictures, look(source).survey.counted) == (1800, False)
    one = look(WebDatasetSource(urls=f"{here}/0.tar")).survey
    assert (one.pictures, one.counted) == (300, True)


def test_a_tar_with_all_its_captions_at_the_end_is_read_until_one_comes_and_no_further(here, monkeypatch):
    noise = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    pictures = {f"{number}.png": buffer.getvalue() for number in range(200)}
    tar(here / "a.tar", pictures | {f"{number}.txt": b"x" for number in range(200)})
    source = WebDatasetSource(urls=f"{here}/a.tar")
    assert look(source).survey.pictures == 200
    monkeypatch.setattr(survey, "SECONDS", 0)
    hurried = look(source).survey
    assert (hurried.looked, hurried.counted) == (1, False)
    assert 200 < hurried.pictures < 300


def test_tars_without_a_picture_are_said_to_have_none(here, monkeypatch):
    monkeypatch.setattr(survey, "SECONDS", 0)
    tar(here / "a.tar", {f"{number}.mp4": b"x" for number in range(3)})
    with pytest.raises(UserError, match=r"holds no pictures \(3 \.mp4\)"):
        look(WebDatasetSource(urls=f"{here}/a.tar"))


@pytest.mark.parametrize("source", [OpenMojiSource(), ShapesSource(count=20_000)])
def test_pictures_that_are_drawn_are_known_in_number(source):
    began = time.monotonic()
    found = look(source, 32).survey
    assert time.monotonic() - began < 20
    assert found.counted
    assert found.pictures == (3953 if source.kind == "openmoji" else 20_000)
    assert found.looked == 300
    assert found.captions > 2000


def test_a_look_ends_when_its_time_is_over_but_looks_through_all_names(here, monkeypatch):
    monkeypatch.setattr(survey, "SECONDS", 0)
    write(here, {"notes.md": "x", "0.txt": "first"} | {f"{number}.png": picture() for number in range(1001)})
    found = look(FolderSource(path=str(here)))
    assert (found.survey.looked, found.survey.pictures, found.survey.counted) == (1, 1001, False)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"a.png": picture(1), "b.png": picture(2)},
            "none of the 2 pictures of .* 2 x no caption .* cat.txt",
        ),
        (
            {"a.png": b"x", "a.txt": "a"},
            "none of the 1 .* 1 x not one of JPEG, PNG, WEBP .* that open elsewhere, too$",
        ),
        (
            {"8.jpg": jpeg(8, 8), "8.txt": "a", "9.jpg": jpeg(9, 8), "9.txt": "b"},
            r": 2 x 8x8 pixels are below min_side 16 \(8.jpg\); .* or a smaller data.min_side$",
        ),
        (
            {"images/a.png": picture(1), "metadata.csv": "file_name,text\na.png,a\nb.png,b\n"},
            r": 2 x cannot be read: No such file or directory \(a.png\); .* names relative to its own$",
        ),
        (
            {"a.png": picture(1), "a.txt": "café".encode("cp1252")},
            r": 1 x captions are not UTF-8 \(byte 0xe9\); save them as UTF-8 \(a.png\)$",
        ),
    ],
)
def test_a_source_of_nothing_usable_is_refused_in_one_line(here, files, said):
    write(here, files)
    with pytest.raises(UserError, match=said) as caught:
        look(FolderSource(path=str(here)))
    assert len(str(caught.value).splitlines()) == 1
    assert re.match("data: ", str(caught.value))
