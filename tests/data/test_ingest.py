"""Ingest: every picture ends in one place, a killed run ends as if it had not been, bad input is named."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from model.config import (
    DataConfig,
    FolderSource,
    OpenMojiSource,
    ParquetSource,
    ShapesSource,
    WebDatasetSource,
)
from model.data import sources
from model.data.captions import clean_captions
from model.data.image_shards import load_images
from model.data.ingest import QUARANTINE, QUARANTINED, SHOWN_OF_ONE
from model.data.sources import Record
from model.errors import UserError
from model.plumbing import storage
from model.plumbing.assets import PICTURES, Manifest
from tests import ROOT
from tests.data.test_images import bomb
from tests.instances import ingest


def shapes(**values) -> DataConfig:
    defaults = {"source": ShapesSource(count=100), "image_size": 16, "shard_images": 30}
    return DataConfig(**{**defaults, **values})


def folder(path, **values) -> DataConfig:
    return DataConfig(source=FolderSource(path=str(path)), **{"image_size": 16, "max_bad_share": 1, **values})


def picture(seed: int = 0, kind: str = "PNG", size=(40, 32)) -> bytes:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.NEAREST).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, names: dict[str, bytes | str]) -> Path:
    for name, content in names.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def quarantine(manifest: Manifest) -> dict[str, str]:
    lines = storage.read_bytes(storage.join(manifest.uri, QUARANTINE)).decode().splitlines()
    return {entry["source"]: entry["reason"] for entry in map(json.loads, lines)}


def captions(manifest: Manifest) -> list[list[str]]:
    splits = {name.partition("-")[0] for name in manifest.info["shards"]}
    return sorted(texts for split in splits for texts in load_images(manifest, split)[1])


def members(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        return archive.getnames()


# ── the asset ───────────────────────────────────────────────────────────────────────────────────────────


def test_every_record_ends_in_one_place(store):
    made = ingest(shapes(validation_share=0.2))
    info = made.info
    assert info["read"] == 100
    assert (
        sum(info[name] for name in ("train", "validation", "composition", "duplicates", "quarantined")) == 100
    )
    assert min(info["train"], info["validation"], info["composition"]) > 5
    assert sum(info["shards"].values()) == 100
    assert storage.list_uris(made.uri) == sorted(
        [storage.join(made.uri, f.name) for f in made.files] + [storage.join(made.uri, "manifest.json")]
    )


def test_pixels_are_the_source_s(store):
    made = ingest(shapes(validation_share=0, shard_images=1000, source=ShapesSource(count=20)))
    drawn = [r for r in sources.iterate(ShapesSource(count=20), 16) if not r.composition]
    pixels, texts = load_images(made, "train")
    assert texts == [r.captions for r in drawn]
    for image, record in zip(pixels, drawn, strict=True):
        assert (image.permute(1, 2, 0).numpy() == np.asarray(Image.open(io.BytesIO(record.image)))).all()


def test_composition_of_the_source_is_its_own_split(store):
    made = ingest(shapes())
    from model.data.sources.shapes import parse

    for split, expected in (("train", False), ("validation", False), ("composition", True)):
        if any(name.startswith(split) for name in made.info["shards"]):
            assert {parse(c[0]).composition for c in load_images(made, split)[1]} == {expected}


def test_the_same_picture_is_on_the_same_side_in_a_grown_set(store):
    def sides(count):
        made = ingest(shapes(source=ShapesSource(count=count), validation_share=0.3))
        return {
            name: split
            for split in ("train", "validation")
            for shard in made.info["shards"]
            if shard.startswith(split)
            for name in members(Path(made.uri, shard))
        }

    small, large = sides(60), sides(90)
    assert small.items() < large.items()


def test_repeated_it_is_found_and_another_config_is_another_asset(store, monkeypatch):
    first = ingest(shapes())
    assert ingest(shapes(image_size=32)).uri != first.uri
    assert ingest(shapes(augment={"views": 4, "flip": True})).uri == first.uri
    monkeypatch.setattr("model.data.sources.iterate", None)
    assert ingest(shapes()) == first


def test_an_asset_that_is_found_costs_no_import_of_torch(store):
    wanted = shapes(source=ShapesSource(count=10))
    made = ingest(wanted)
    program = (
        "import sys; from model.config import DataConfig; from model.data.ingest import ingest;"
        " from model.plumbing.assets import AssetWriter; from model.steps import STEPS, image_settings;"
        " data = DataConfig.model_validate_json(sys.argv[1]);"
        " ingest(data, AssetWriter('images', image_settings(data), {}, STEPS['images'].version));"
        " assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, wanted.model_dump_json()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"images | reused {made.uri}\n"


def test_progress_has_a_percent_where_the_source_knows_its_number(store, here, capsys):
    ingest(shapes())
    assert "images | picture 100/100  100%" in capsys.readouterr().out
    ingest(shards(here))
    assert "%" not in capsys.readouterr().out


def test_tars_are_readable_by_webdataset(store):
    import webdataset

    made = ingest(shapes(validation_share=0))
    urls = [str(Path(made.uri, name)) for name in made.info["shards"] if name.startswith("train")]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(samples) == made.info["train"]
    assert samples[0]["png"].size == (16, 16)
    assert samples[0]["json"]["captions"]


def test_lossy_stays_lossy_and_lossless_exact(store, here):
    write(here, {"a.jpg": picture(1, "JPEG"), "a.txt": "a", "b.png": picture(2), "b.txt": "b"})
    made = ingest(folder(here, validation_share=0))
    names = members(Path(made.uri, "train-000000.tar"))
    assert [name.rpartition(".")[2] for name in names] == ["jpg", "json", "png", "json"]


@pytest.mark.slow
def test_processes_threads_and_none_make_the_same_bytes(store, monkeypatch):
    made = []
    for workers, many_cores in ((1, 1), (2, 1), (2, 16)):  # here, threads, processes
        monkeypatch.setattr("model.plumbing.parallel.cores", lambda workers=workers: workers)
        monkeypatch.setattr("model.data.ingest.cores", lambda many_cores=many_cores: many_cores)
        made.append(ingest(shapes()))
        storage.delete_prefix(made[0].uri)
    assert made[0] == made[1] == made[2]


# ── duplicates ──────────────────────────────────────────────────────────────────────────────────────────


def test_duplicates_in_a_chunk_give_their_captions_and_later_ones_go(store, here):
    same = picture(1)
    webp = io.BytesIO()
    Image.open(io.BytesIO(same)).save(webp, "WEBP", lossless=True)
    write(
        here,
        {
            "a.png": same, "a.txt": "first\nsecond",
            "b.webp": webp.getvalue(), "b.txt": "second\nthird",
            "c.png": picture(2), "c.txt": "other",
            "d.png": same, "d.txt": "too late",
        },
    )  # fmt: skip
    made = ingest(folder(here, shard_images=3, validation_share=0))
    assert captions(made) == [["first", "second", "third"], ["other"]]
    assert made.info["duplicates"] == 2


@pytest.mark.parametrize("held_out", [(False, True), (True, False)], ids=["second", "first"])
def test_a_picture_that_is_held_out_under_one_of_its_names_is_held_out(store, here, monkeypatch, held_out):
    records = [
        Record(f"{n}.png", picture(1), [f"name {n}"], composition=held) for n, held in enumerate(held_out)
    ]
    records.append(Record("other.png", picture(2), ["other"], composition=False))
    monkeypatch.setattr(sources, "iterate", lambda *_: iter(records))
    made = ingest(folder(write(here, {"a.png": picture(1)}), validation_share=0))
    assert (made.info["composition"], made.info["train"], made.info["duplicates"]) == (1, 1, 1)
    assert load_images(made, "composition")[1] == [["name 0", "name 1"]]


# ── killed ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_killed_after_any_chunk_it_ends_with_the_same_bytes(store, here, monkeypatch, at):
    write(here, {f"{n:02d}.png": picture(n % 23) for n in range(30)})
    write(here, {f"{n:02d}.txt": f"number {n}" for n in range(28)} | {"05.png": b"broken"})
    wanted = folder(here, shard_images=8, validation_share=0.2)
    whole = ingest(wanted)
    everything = {uri: storage.read_bytes(uri) for uri in storage.list_uris(whole.uri)}
    storage.delete_prefix(whole.uri)

    import model.data.ingest as module

    real, packed = module._pack, []

    def dies(*arguments):
        if len(packed) == at:
            raise KeyboardInterrupt
        packed.append(1)
        return real(*arguments)

    monkeypatch.setattr(module, "_pack", dies)
    with pytest.raises(KeyboardInterrupt):
        ingest(wanted)
    assert not storage.exists(storage.join(whole.uri, "manifest.json"))
    monkeypatch.setattr(module, "_pack", lambda *a: (packed.append(1), real(*a))[1])
    assert ingest(wanted) == whole
    assert len(packed) == 4  # no chunk twice
    assert {uri: storage.read_bytes(uri) for uri in storage.list_uris(whole.uri)} == everything


@pytest.mark.slow
def test_sigkill_at_any_instant(store):
    wanted = shapes(source=ShapesSource(count=3000), shard_images=100, image_size=64)
    whole = ingest(wanted)
    everything = {uri: storage.read_bytes(uri) for uri in storage.list_uris(whole.uri)}
    storage.delete_prefix(whole.uri)
    program = (
        "import sys; from model.config import DataConfig; from tests.instances import ingest;"
        " ingest(DataConfig.model_validate_json(sys.argv[1]))"
    )
    kills = 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", program, wanted.model_dump_json()],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout
        process.stdout.readline()  # it works on the first pictures
        time.sleep(0.1 + 0.07 * kills)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL)
        if process.returncode == 0 or kills == 4:
            break
    assert kills >= 2
    assert ingest(wanted) == whole
    assert {uri: storage.read_bytes(uri) for uri in storage.list_uris(whole.uri)} == everything


# ── captions ────────────────────────────────────────────────────────────────────────────────────────────


def test_captions_are_cleaned():
    assert clean_captions(["a\x00b\x1b[31m\tred\n apple ", "", "  ", "\x07", None, 3, float("nan")]) == [
        "a b [31m red apple"
    ]
    assert clean_captions(["e\u0301", "é"]) == ["é"]
    assert clean_captions(["\ud800 lone"]) == ["lone"]
    assert len(clean_captions(["word " * 2000])[0]) <= 1000
    assert clean_captions(["👩🏼‍🦰 family"]) == ["👩🏼‍🦰 family"]


def test_strange_captions_in_a_folder(store, here):
    write(
        here,
        {
            "a.png": picture(1), "a.txt": "control \x00\x1b characters\x7f",
            "b.png": picture(2), "b.txt": "x" * 10_000,
            "c.png": picture(3), "c.txt": b"caf\xe9",
            "d.png": picture(4), "d.txt": "\n \n",
            "e.png": picture(5),
        },
    )  # fmt: skip
    made = ingest(folder(here))
    assert captions(made) == [["control characters"], ["x" * 1000]]
    assert quarantine(made) == {
        "c.png": "captions are not UTF-8 (byte 0xe9); save them as UTF-8",
        "d.png": "no caption",
        "e.png": "no caption",
    }


# ── bad pictures ────────────────────────────────────────────────────────────────────────────────────────


def test_bad_pictures_are_quarantined_with_their_reasons(store, here):
    good = picture(1)
    files = {
        "bomb.png": bomb(), "cut.png": good[: len(good) // 2], "good.png": good,
        "small.png": picture(2, size=(8, 8)), "text.jpg": b"<html>404</html>", "zero.png": b"",
    }  # fmt: skip
    write(here, files | {f"{Path(name).stem}.txt": name for name in files})
    made = ingest(folder(here))
    assert captions(made) == [["good.png"]]
    reasons = quarantine(made)
    assert list(reasons) == ["bomb.png", "cut.png", "small.png", "text.jpg", "zero.png"]
    assert "pixels" in reasons["bomb.png"]
    assert "truncated" in reasons["cut.png"]
    assert "min_side" in reasons["small.png"]
    assert "not one of JPEG" in reasons["text.jpg"]
    assert reasons["zero.png"] == "empty file"


def small(manifest: Manifest) -> list[tuple[str, str, tuple[int, int]]]:
    """Name, reason and size of the small pictures of what was left out."""
    entries = json.loads(storage.read_bytes(storage.join(manifest.uri, PICTURES, QUARANTINED)))
    found = []
    for entry in entries:
        with Image.open(io.BytesIO(base64.b64decode(entry["jpeg"]))) as image:
            found.append((entry["source"], entry["reason"], image.size))
    return found


def test_what_can_be_seen_of_quarantined_pictures_lies_beside_the_asset(store, here, monkeypatch):
    monkeypatch.setattr("model.plumbing.parallel.cores", lambda: 1)
    whole = picture(3, "JPEG", size=(400, 300))
    files = {f"{n:02}.jpg": picture(n, "JPEG", size=(9, 9 + n % 3)) for n in range(9)}
    files |= {"cut.jpg": whole[: len(whole) // 2], "good.png": picture(1)}
    files |= {"text.jpg": b"none", "zero.jpg": b""}
    files |= {f"{Path(name).stem}.txt": name for name in files}
    write(here, files | {"mute.png": picture(2, size=(300, 100)), "mute.txt": " "})
    for shard_images in (2, 100):
        made = ingest(folder(here, shard_images=shard_images))
        shown = small(made)
        assert [(name, size) for name, _, size in shown if not name[0].isdigit()] == [
            ("cut.jpg", (64, 48)),
            ("mute.png", (64, 21)),
        ]
        tiny = [(name, size) for name, _, size in shown if name[0].isdigit()]
        assert tiny == [(f"{n:02}.jpg", (9, 9 + n % 3)) for n in range(SHOWN_OF_ONE)], "enough of one kind"
        assert {name: reason for name, reason, _ in shown}.items() <= quarantine(made).items()
        assert not [file for file in made.files if QUARANTINED in file.name]


def test_sizes_are_counted_as_they_were_found(store, here, monkeypatch):
    sizes = [(16, 16), (31, 20), (40, 33), (300, 100), (1000, 200)]
    files = {f"{n}.png": picture(n, size=size) for n, size in enumerate(sizes)} | {"bad.png": b"x"}
    write(here, files | {f"{Path(name).stem}.txt": "a caption" for name in files})
    expected = {
        "pictures": 5, "enlarged": 2, "side 16": 2, "side 32": 1, "side 96": 1, "side 192": 1,
        "longer 1.0": 1, "longer 1.1": 1, "longer 1.45": 1, "longer 3.0": 2,
    }  # fmt: skip
    assert ingest(folder(here, image_size=32)).info["sizes"] == expected
    padded = ingest(folder(here, image_size=32, fit="pad")).info["sizes"]
    assert padded == expected, "of 31 x 20 the longer side is enlarged, too"
    assert ingest(folder(here, image_size=24, fit="pad")).info["sizes"]["enlarged"] == 1


def test_too_many_bad_pictures_fail_and_leave_nothing(store, here):
    write(here, {f"{n}.png": picture(n) for n in range(8)} | {f"{n}.txt": "x" for n in range(10)})
    write(here, {"8.png": b"", "9.png": b"nonsense"})
    with pytest.raises(
        UserError, match=r"2 of the first 10 pictures are bad.*max_bad_share 0\.1: .*empty file \(8\.png\)"
    ):
        ingest(folder(here, max_bad_share=0.1))
    assert not storage.list_uris(store)
    assert ingest(folder(here, max_bad_share=0.2)).info["quarantined"] == 2


def test_the_share_of_bad_pictures_is_that_of_all(store, here):
    """A bad beginning does not fail an asset that is good enough; what cannot be mended fails at once."""
    write(here, {f"{n}.png": picture(n) if n > 1 else b"" for n in range(8)})
    write(here, {f"{n}.txt": "x" for n in range(8)})
    assert ingest(folder(here, shard_images=2, max_bad_share=0.25)).info["quarantined"] == 2
    with pytest.raises(UserError, match=r"2 of the first 2 pictures are bad, more than max_bad_share 0\.2"):
        ingest(folder(here, shard_images=2, max_bad_share=0.2, min_side=1))


def test_no_good_picture_at_all(store, here):
    write(here, {"a.png": b"", "a.txt": "x"})
    with pytest.raises(UserError, match="gave no picture to train on: 1 read"):
        ingest(folder(here))
    assert not storage.list_uris(store)


def test_empty_and_missing_folder(store, here):
    with pytest.raises(UserError, match=r"data\.source\.path: .* holds no picture"):
        ingest(folder(here))
    with pytest.raises(UserError, match="is not a folder"):
        ingest(folder(here / "missing"))


# ── folders ─────────────────────────────────────────────────────────────────────────────────────────────


def test_metadata_jsonl(store, here):
    lines = [
        {"file_name": "x/a.png", "text": "one"},
        {"file_name": "x/a.png", "text": "two"},
        {"file_name": "b.png", "captions": ["three", "four"]},
        {"file_name": "gone.png", "caption": "five"},
        {"file_name": "../outside.png", "caption": "six"},
    ]
    root = write(here / "data", {"x/a.png": picture(1), "b.png": picture(2)})
    write(here, {"outside.png": picture(3)})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = ingest(folder(root))
    assert captions(made) == [["one", "two"], ["three", "four"]]
    assert quarantine(made) == {
        "gone.png": "cannot be read: No such file or directory",
        "../outside.png": "lies outside the folder",
    }


def test_captions_csv(store, here):
    write(here, {"a.png": picture(1), "b.png": picture(2)})
    with (here / "captions.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(
            [("file", "caption"), ("a.png", "one, with comma"), ("b.png", "two\nlines")]
        )
    assert captions(ingest(folder(here))) == [["one, with comma"], ["two lines"]]


def test_lists_without_the_right_fields(store, here):
    write(here, {"a.png": picture(1), "captions.csv": "name,words\na.png,one\n"})
    with pytest.raises(
        UserError, match=r"captions\.csv, line 2: fields name, words; needed are one of file_name"
    ):
        ingest(folder(here))
    write(here, {"metadata.jsonl": '{"file_name": "a.png", "text": "x"}\nnonsense\n'})
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 2: not valid JSON"):
        ingest(folder(here))


# ── tars ────────────────────────────────────────────────────────────────────────────────────────────────


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(number: int) -> dict[str, bytes]:
    notes = json.dumps({"caption": f"json {number}"}).encode()
    return {
        f"{number:03d}.jpg": picture(number, "JPEG", (200, 160)),
        f"{number:03d}.txt": f"text {number}".encode(),
        f"{number:03d}.json": notes,
    }


def shards(path: Path, count: int = 2) -> DataConfig:
    for number in range(count):
        files = {k: v for n in range(4) for k, v in sample(4 * number + n).items()}
        tar(path / f"{number:03d}.tar", files)
    urls = f"{path}/{{000..{count - 1:03d}}}.tar"
    return DataConfig(source=WebDatasetSource(urls=urls), image_size=16, max_bad_share=1)


def test_webdataset(store, here):
    made = ingest(shards(here))
    assert captions(made) == [[f"text {n}", f"json {n}"] for n in range(8)]
    again = DataConfig(source=WebDatasetSource(urls=f"{made.uri}/train-000000.tar"), image_size=16)
    assert ingest(again).info["read"] == made.info["train"]  # our own shards can be a source


def test_a_tar_cut_in_half_gives_its_first_half(store, here):
    wanted = shards(here)
    path = here / "000.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    made = ingest(wanted)
    texts = [c[0] for c in captions(made)]
    assert {"text 0", "text 4", "text 5", "text 6", "text 7"} <= set(texts)
    reasons = quarantine(made)
    assert reasons[str(path)].startswith("the tar breaks off")
    assert made.info["read"] == len(texts) + len(reasons)


def test_a_number_of_samples_that_cannot_be_read_is_unknown(store, here, monkeypatch):
    wanted = shards(here)
    (here / "000_stats.json").write_text('{"successes": 4}')
    for text in ("", "[]", '{"successes": null}', '{"count": 4}'):
        (here / "001_stats.json").write_text(text)
        assert sources.count(wanted.source) == 0

    def denied(uri: str) -> bytes:  # S3 says so of an absent key to those who may not list
        raise UserError(f"{uri}: access denied")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_bytes", denied)
        assert sources.count(wanted.source) == 0
    assert ingest(wanted).info["read"] == 8


def test_a_wrong_number_of_samples_misleads_nobody_but_the_progress_line(store, here):
    wanted = shards(here)
    (here / "000.tar").write_bytes(b"")  # one bad of 5 read
    for announced in (1, 100):
        for number in range(2):
            (here / f"{number:03d}_stats.json").write_text(f'{{"successes": {announced}}}')
        enough, scarce = (wanted.model_copy(update={"max_bad_share": share}) for share in (0.2, 0.19))
        with pytest.raises(UserError, match=r"1 of the first 5 pictures are bad.*000\.tar"):
            ingest(scarce)
        assert ingest(enough).info["quarantined"] == 1
        storage.delete_prefix(storage.join(str(store), "images"))


def test_an_empty_tar_file_is_quarantined(store, here):
    wanted = shards(here)
    (here / "000.tar").write_bytes(b"")
    made = ingest(wanted)
    assert captions(made) == [[f"text {n}", f"json {n}"] for n in range(4, 8)]
    assert quarantine(made)[str(here / "000.tar")].startswith("the tar breaks off")


def test_missing_and_misnamed_tars(store, here):
    wanted = shards(here)
    (here / "001.tar").unlink()
    with pytest.raises(UserError, match=r"001\.tar does not exist"):
        ingest(wanted)
    (here / "000.tar").unlink()
    with pytest.raises(UserError, match=r"no tar shard at .*name them, e\.g\. "):
        ingest(DataConfig(source=WebDatasetSource(urls=str(here))))
    for braces in ("{0..9999999}", "{-9..9999999}", f"{{0..{'9' * 99}}}", "{a..z}" * 5, "{a,b}" * 21):
        with pytest.raises(UserError, match=r"stands for more than 1,048,576 shards"):
            ingest(DataConfig(source=WebDatasetSource(urls=f"{here}/{braces}.tar")))


# ── parquet ─────────────────────────────────────────────────────────────────────────────────────────────


def table(path: Path, first: int = 0, count: int = 5, struct: bool = True, caption: str = "caption") -> Path:
    images = [picture(n) for n in range(first, first + count)]
    column = [{"bytes": i, "path": None} for i in images] if struct else images
    texts = [[f"row {n}", f"again {n}"] if struct else f"row {n}" for n in range(first, first + count)]
    pq.write_table(pa.table({"image": column, caption: texts}), path, row_group_size=2)
    return path


def parquet(path, **values) -> DataConfig:
    return DataConfig(source=ParquetSource(path=str(path), **values), image_size=16, max_bad_share=1)


def test_parquet(store, here):
    table(here / "a.parquet")
    table(here / "b.parquet", 5)
    expected = [[f"row {n}", f"again {n}"] for n in range(10)]
    assert sorted(captions(ingest(parquet(here)))) == sorted(expected)
    assert sorted(captions(ingest(parquet(here / "*.parquet")))) == sorted(expected)
    plain = table(here / "c.parquet", struct=False, caption="text")
    assert captions(ingest(parquet(plain, caption_column="text"))) == [[f"row {n}"] for n in range(5)]


def test_every_source_continues_where_it_is_told(here):
    table(here / "a.parquet")
    table(here / "b.parquet", 5)
    write(here, {f"{n}.png": picture(n) for n in range(7)} | {f"{n}.txt": "x" for n in range(7)})
    tars = shards(here)
    assert sources.count(tars.source) == 0  # unknown
    for number in range(2):
        (here / f"{number:03d}_stats.json").write_text('{"count": 5, "successes": 4}')
    for config in (
        parquet(here),
        tars,
        folder(here),
        shapes(),
        DataConfig(source=OpenMojiSource(groups=["food-fruit"])),
    ):
        everything = list(sources.iterate(config.source, 16))
        assert sources.count(config.source) == sum(not record.others for record in everything)
        for start in (0, 1, 5, 6, len(everything), len(everything) + 3):
            assert list(sources.iterate(config.source, 16, start)) == everything[start:]


def test_parquet_bad_input(store, here):
    with pytest.raises(UserError, match="no parquet file at"):
        ingest(parquet(here / "none.parquet"))
    file = table(here / "a.parquet")
    with pytest.raises(UserError, match=r"caption_column: .* has no column 'text'; it has image, caption"):
        ingest(parquet(file, caption_column="text"))
    with pytest.raises(UserError, match=r"image_column: .* has no column 'jpg'; it has image, caption"):
        ingest(parquet(file, image_column="jpg"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=r"data\.source\.path: .*a\.parquet: .*[Pp]arquet"):
        ingest(parquet(file))
    pq.write_table(pa.table({"image": [None, picture(1)], "caption": ["a", None]}), here / "nulls.parquet")
    pq.write_table(pa.table({"image": [picture(2)], "caption": ["fine"]}), here / "nulls2.parquet")
    made = ingest(parquet(here / "nulls*.parquet"))
    assert quarantine(made) == {
        "nulls.parquet:0": "no picture bytes in this row",
        "nulls.parquet:1": "no caption",
    }


# ── S3 ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_from_s3_to_s3(services, here):
    root = services["LATENT_GPT_STORE"]
    files = shards(here)
    table(here / "a.parquet")
    for path in here.iterdir():
        storage.upload_file(path, f"{root}/raw/{path.name}")
    tars = files.model_copy(update={"source": WebDatasetSource(urls=f"{root}/raw/{{000..001}}.tar")})
    made = ingest(tars)
    assert made.uri.startswith("s3://")
    assert captions(made) == [[f"text {n}", f"json {n}"] for n in range(8)]
    assert not storage.list_uris(storage.join(made.uri, "journal"))
    assert captions(ingest(parquet(f"{root}/raw/"))) == [[f"row {n}", f"again {n}"] for n in range(5)]
    assert captions(ingest(parquet(f"{root}/raw/*.parquet"))) == captions(
        ingest(parquet(f"{root}/raw/a.parquet"))
    )


@pytest.mark.slow
def test_s3_that_refuses_or_has_nothing(services, monkeypatch):
    root = services["LATENT_GPT_STORE"]
    with pytest.raises(UserError, match=r"raw/000\.tar does not exist"):
        ingest(DataConfig(source=WebDatasetSource(urls=f"{root}/raw/000.tar")))
    with pytest.raises(UserError, match="no parquet file at s3://"):
        ingest(parquet(f"{root}/raw/"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match=r"denies HeadObject \(403\); check AWS_ACCESS_KEY_ID"):
        ingest(DataConfig(source=WebDatasetSource(urls=f"{root}/raw/000.tar")))
    with pytest.raises(UserError, match=r"data\.source\.path: s3://.*(ACCESS_DENIED|403|[Ss]ignature)"):
        ingest(parquet(f"{root}/raw/a.parquet"))


@pytest.mark.slow
def test_s3_that_stands_still(store, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        monkeypatch.setenv("LATENT_GPT_S3_PATIENCE", "0.3")
        monkeypatch.setattr(storage, "ATTEMPTS", 2)
        with pytest.raises(UserError, match="does not answer"):
            ingest(DataConfig(source=WebDatasetSource(urls="s3://bucket/000.tar")))
        with pytest.raises(UserError, match=r"data\.source\.path: s3://bucket/a\.parquet"):
            ingest(parquet("s3://bucket/a.parquet"))
    assert not storage.list_uris(store)


@pytest.mark.slow
def test_s3_that_goes_away_in_the_middle_keeps_what_is_done(services, monkeypatch):
    wanted = shapes(validation_share=0.2)
    whole = ingest(wanted)
    storage.delete_prefix(whole.uri)
    import model.data.ingest as module

    real, packed = module._pack, []

    def loses_the_server(*arguments):
        packed.append(1)
        if len(packed) == 3:
            monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
        return real(*arguments)

    monkeypatch.setattr(module, "_pack", loses_the_server)
    with pytest.raises(UserError, match="cannot be reached"):
        ingest(wanted)
    monkeypatch.setenv("S3_ENDPOINT_URL", services["S3_ENDPOINT_URL"])
    assert len(storage.list_uris(storage.join(whole.uri, "journal"))) == 2
    assert ingest(wanted) == whole
    assert len(packed) == 3 + 2  # the first two chunks were not made again
