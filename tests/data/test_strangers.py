"""Sources of strangers: all that is there adds up; whatever comes, it costs bounded memory and no trace."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.config import DataConfig, FolderSource, ParquetSource, Source, WebDatasetSource
from model.data import sources
from model.data.ingest import IN_FLIGHT, _chunks
from model.data.sources import LARGEST_PICTURE, webdataset
from model.errors import UserError
from model.plumbing.assets import Manifest
from tests import ROOT
from tests.data.test_ingest import captions, folder, picture, quarantine, tar, write
from tests.instances import ingest


def data(source: Source, **values) -> DataConfig:
    return DataConfig(
        source=source, **{"image_size": 16, "max_bad_share": 1, "validation_share": 0.2, **values}
    )


# ── all that is there adds up ───────────────────────────────────────────────────────────────────────────

KINDS = ["good", "good", "wide", "bare", "broken", "latin", "empty", "gif"]
USED = {"good", "wide"}  # the others are bad, each for its own reason


def pictures(chance: random.Random) -> dict[str, tuple[str, bytes, bytes]]:
    """By name: what is the matter with a picture, its bytes and its caption's."""
    made = {}
    for number, kind in enumerate(chance.choices(KINDS, k=40) + KINDS):
        image = picture(number, "GIF" if kind == "gif" else "PNG")
        text = f"a caption of number {number}".encode()
        name = f"{number:02d}.{'gif' if kind == 'gif' else 'png'}"
        made[name] = (
            kind,
            {"broken": image[:60], "empty": b""}.get(kind, image),
            {"bare": b"", "latin": "café".encode("cp1252"), "wide": text.decode().encode("utf-16")}.get(
                kind, text
            ),
        )
    return made


def sidecars(root: Path, made: dict[str, tuple[str, bytes, bytes]], chance: random.Random) -> Source:
    for name, (_, image, text) in made.items():
        path = root / chance.choice(["", "a/", "a/b/", "c/"]) / name
        ending = chance.choice([".txt", ".TXT", ".caption", path.suffix + ".txt"])
        write(root, {str(path): image, str(path.with_suffix(ending)): text})
    write(
        root,
        {"a/notes.md": "x", "c/x.npz": b"x", "c/uncaptioned.gif": picture(99, "GIF"), ".hidden.png": b""},
    )
    return FolderSource(path=str(root))


def listed(write_list: Callable[[Path, list[tuple[str, bytes]]], None]):
    """A source of two folders with a list each; of their captions, what a list cannot say is left out."""

    def make(root: Path, made: dict[str, tuple[str, bytes, bytes]], chance: random.Random) -> Source:
        rows: dict[str, list[tuple[str, bytes]]] = {"one": [], "two/three": []}
        for name, (kind, image, text) in made.items():
            where = chance.choice(list(rows))
            write(root, {f"{where}/{name}": image})
            rows[where].append((name, text.decode("utf-16").encode() if kind == "wide" else text))
        for where, entries in rows.items():
            write_list(root / where, entries)
        write(root, {"two/notes.md": "x", "one/x.npz": b"x", "one/left-out.jpg": picture(99, "JPEG")})
        return FolderSource(path=str(root))

    return make


def jsonl(root: Path, rows: list[tuple[str, bytes]]) -> None:
    lines = (b'{"file_name": "%s", "Text": "%s"}' % (name.encode(), text) for name, text in rows)
    (root / "metadata.jsonl").write_bytes(b"\n".join(lines))


def comma(name: str):
    def write_list(root: Path, rows: list[tuple[str, bytes]]) -> None:
        lines = [b"FILE_NAME,Caption", *(b'%s,"%s"' % (name.encode(), text) for name, text in rows)]
        (root / name).write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))

    return write_list


def columns(root: Path, rows: list[tuple[str, bytes]]) -> None:
    names, texts = zip(*rows, strict=True)
    pq.write_table(
        pa.table({"file_name": names, "text": pa.array(texts, pa.binary())}), root / "metadata.parquet"
    )


def shards(root: Path, made: dict[str, tuple[str, bytes, bytes]], chance: random.Random) -> Source:
    """The members of two tars in no order."""
    for part, names in enumerate((list(made)[::2], list(made)[1::2])):
        members = {"notes.md": b"x", "._00.png": b"x"} if part else {"x.npz": b"x"}
        for name in names:
            _, image, text = made[name]
            members |= {name: image, f"{name[:-4]}.TXT": text} if text else {name: image}
        shuffled = chance.sample(list(members.items()), len(members))
        tar(root / f"{part}.tar", dict(shuffled))
    return WebDatasetSource(urls=f"{root}/{{0..1}}.tar")


def table(root: Path, made: dict[str, tuple[str, bytes, bytes]], chance: random.Random) -> Source:
    _, images, texts = zip(*made.values(), strict=True)
    values = {"image": pa.array(images, pa.binary()), "caption": pa.array(texts, pa.binary())}
    pq.write_table(pa.table(values), root / "a.parquet", row_group_size=7)
    return ParquetSource(path=str(root))


LISTED = {".md": 1, ".npz": 1, "pictures that no list names": 1}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("make", "others"),
    [
        pytest.param(sidecars, {".md": 1, ".npz": 1, ".gif": 1}, id="sidecars"),
        pytest.param(listed(jsonl), LISTED, id="metadata.jsonl"),
        pytest.param(listed(comma("captions.csv")), LISTED, id="captions.csv"),
        pytest.param(listed(comma("metadata.csv")), LISTED, id="metadata.csv"),
        pytest.param(listed(columns), LISTED, id="metadata.parquet"),
        pytest.param(shards, {".md": 1, ".npz": 1}, id="tars"),
        pytest.param(table, {}, id="parquet"),
    ],
)
def test_each_picture_ends_used_or_quarantined_and_all_else_is_counted(store, here, make, others, seed):
    chance = random.Random(seed)
    made = pictures(chance)
    found = ingest(data(make(here, made, chance), shard_images=7))
    fate = Counter(kind for kind, *_ in made.values())
    used = sum(fate[kind] for kind in USED)
    assert found.info["train"] + found.info["validation"] == used
    assert found.info["quarantined"] == len(made) - used
    assert found.info["read"] == len(made)
    assert found.info["others"] == others
    said = [int(text.split()[-1]) for texts in captions(found) for text in texts]
    names = [name for name, (kind, *_) in made.items() if kind in USED]
    assert sorted(said) == [int(name[:2]) for name in names]
    reasons = Counter(reason.split(" (")[0].split(":")[0] for reason in quarantine(found).values())
    assert reasons["captions are not UTF-8"] == fate["latin"]
    assert reasons["no caption"] >= fate["bare"]


# ── folders ─────────────────────────────────────────────────────────────────────────────────────────────


def good(count: int = 3) -> dict[str, bytes | str]:
    return {f"{n}.png": picture(n) for n in range(count)} | {f"{n}.txt": f"cap {n}" for n in range(count)}


def test_only_regular_files_within_the_folder_are_opened(store, here):
    root = write(here / "root", good() | {f"x{n}.png": picture(50 + n) for n in range(3)})
    write(here, {"secret.txt": "secret", "outside.png": picture(9), "away/y.png": picture(8)})
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "x0.txt")
    (root / "x1.txt").symlink_to(here / "secret.txt")
    (root / "x2.txt").symlink_to("0.txt")  # within the folder
    (root / "zero.png").symlink_to("/dev/zero")
    (root / "gone.png").symlink_to("nowhere")
    (root / "latest").symlink_to("nowhere")
    (root / "loop.png").symlink_to("loop.png")
    (root / "out.png").symlink_to(here / "outside.png")
    (root / "folder.png").mkdir()
    (root / "up").symlink_to(".")
    (root / "away").symlink_to(here / "away")
    made = ingest(folder(root))
    assert captions(made) == [["cap 0"], ["cap 0"], ["cap 1"], ["cap 2"]]
    link = "a link that leads out of the folder; copy what it leads to (cp -rL)"
    assert quarantine(made) == {
        "pipe.png": "cannot be read: not a regular file",
        "x0.png": "x0.txt: cannot be read: not a regular file",
        "x1.png": f"x1.txt: {link}",
        "zero.png": link,
        "gone.png": "cannot be read: No such file or directory",
        "loop.png": "cannot be read: Too many levels of symbolic links",
        "out.png": link,
        "away": "a folder that is a link out of this one; copy what it leads to (cp -rL)",
    }
    assert made.info["others"] == {"linked folders": 1, "files without suffix": 1}


def test_a_list_that_is_no_file_of_the_folder_is_refused(store, here):
    root = write(here / "root", good())
    os.mkfifo(root / "metadata.jsonl")
    with pytest.raises(UserError, match=r"metadata\.jsonl: cannot be read: not a regular file"):
        ingest(folder(root))
    (root / "metadata.jsonl").unlink()
    (root / "metadata.jsonl").symlink_to(write(here, {"list": "{}"}) / "list")
    with pytest.raises(UserError, match=r"metadata\.jsonl: a link that leads out of the folder"):
        ingest(folder(root))


@pytest.mark.parametrize("text", ["[" * 10**6, '{"file_name": "0.png", "text": ' + "9" * 5000 + "}"])
def test_json_that_no_parser_takes_is_one_line(store, here, text):
    write(here, good() | {"metadata.jsonl": text})
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 1: not valid JSON"):
        ingest(folder(here))


def test_odd_entries_of_a_list_are_named_one_by_one(store, here):
    names = ["", None, "a\0b.png", "\ud800.png", "/etc/hostname", "../up.png", "n" * 300 + ".png", "sub", 7]
    entries = [{"file_name": name, "text": "odd"} for name in names]
    entries += [{"file_name": f"{n}.png", "text": f"cap {n}"} for n in range(2)]
    entries += [{"file_name": "2.png", "text": "half \ud83c"}]
    write(here, good() | {"sub/0.png": picture(77), "metadata.jsonl": "\n".join(map(json.dumps, entries))})
    made = ingest(folder(here))
    assert captions(made) == [["cap 0"], ["cap 1"]]
    reasons = quarantine(made)
    assert len(reasons) == len(names) + 1
    assert reasons["metadata.jsonl, line 1"] == "this entry names no picture"
    assert reasons["a\\x00b.png"] == reasons["\\ud800.png"] == "cannot be read: no file can have this name"
    assert reasons["/etc/hostname"] == reasons["../up.png"] == "lies outside the folder"
    assert reasons["2.png"] == "a caption holds half a character (U+D83C)"


def test_a_line_of_a_table_that_is_torn_is_named_and_does_not_swallow_others(store, here):
    rows = ["file_name,text", "0.png,red, green apple", '1.png,"an "open" quote', '2.png,"fine, and quoted"']
    write(here, good() | {"metadata.csv": "\n".join(rows)})
    made = ingest(folder(here))
    assert captions(made) == [["fine, and quoted"]]
    assert "quote captions that have commas" in quarantine(made)["0.png"]
    assert quarantine(made)["metadata.csv, line 3"].startswith("this line cannot be read")


def test_names_composed_in_a_list_and_decomposed_on_disk_are_the_same(store, here):
    write(here, {"e\u0301lan.png": picture(1), "metadata.csv": "file_name,text\n\u00e9lan.png,verve\n"})
    made = ingest(folder(here))
    assert captions(made) == [["verve"]]
    assert made.info["others"] == {}


def test_a_name_that_is_no_utf_8_is_shown_escaped(store, here):
    write(here, good())
    for name, content in (
        (b"stra\xdfe.png", picture(5)),
        (b"stra\xdfe.txt", b"a street"),
        (b"\xe9.png", b""),
        (b"notes.\xff\x1b", b""),
    ):
        Path(os.fsdecode(os.fsencode(here) + b"/" + name)).write_bytes(content)
    made = ingest(folder(here))
    assert ["a street"] in captions(made)
    assert list(quarantine(made)) == ["\\udce9.png"]
    assert made.info["others"] == {".\\udcff\\x1b": 1}


# ── tars ────────────────────────────────────────────────────────────────────────────────────────────────


def shard(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Manifest:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return ingest(data(WebDatasetSource(urls=str(path))))


def sample(name: str, number: int) -> list[tuple[str, bytes]]:
    return [(f"{name}.jpg", picture(number, "JPEG")), (f"{name}.txt", f"cap {number}".encode())]


def test_a_name_that_comes_twice_costs_itself_alone(store, here):
    members = [member for n in range(9) for member in sample(f"{n}", n)]
    made = shard(here / "0.tar", [*members[:6], members[4], *members[6:], members[0]])
    assert len(captions(made)) == 9
    assert quarantine(made) == {
        "2.jpg": "a second file of this name",
        "0.jpg": "its sample was complete before; sort the tar by name",
    }


def test_dotted_names_are_names_and_parts_of_a_sample_are_parts(store, here):
    members = [member for n in range(4) for member in sample(f"train.v1/{n // 2}.{'ab'[n % 2]}", n)]
    members += [*sample("cat", 4), ("cat.mask.png", picture(40)), ("cat.png", picture(41))]
    members += [("dog.big.jpg", picture(5, "JPEG")), ("dog.txt", b"cap 5")]
    made = shard(here / "0.tar", members)
    assert captions(made) == [[f"cap {n}"] for n in range(6)]
    assert quarantine(made) == {}
    assert made.info["others"] == {"parts of a sample": 1, "further pictures of a sample": 1}


def test_captions_of_a_text_are_those_of_its_json_where_it_says_the_same(store, here):
    def both(text: str, caption: object, number: int) -> list[tuple[str, bytes]]:
        name = f"{number}"
        notes = json.dumps({"Caption": caption}).encode()
        return [
            (f"{name}.jpg", picture(number, "JPEG")),
            (f"{name}.txt", text.encode()),
            (f"{name}.json", notes),
        ]

    made = shard(
        here / "0.tar",
        [
            *both("first line\nsecond line", "first line\nsecond line", 0),
            *both("one\ntwo", ["three"], 1),
            *both("one\u2028caption", None, 2),
        ],
    )
    assert captions(made) == [["first line second line"], ["one", "two", "three"], ["one caption"]]


def test_metadata_behind_all_captions_are_no_bad_pictures(store, here):
    pictures, texts = zip(*(sample(f"{n}", n) for n in range(9)), strict=True)
    made = shard(here / "0.tar", [*pictures, *texts, *((f"{n}.json", b'{"width": 8}') for n in range(9))])
    assert len(captions(made)) == 9
    assert quarantine(made) == {}
    assert made.info["others"] == {"texts of complete samples": 9}


def test_what_waits_at_a_time_is_bounded_and_not_what_ever_waited(monkeypatch):
    """Of each two samples the pictures come first; one more waits from the beginning to the end."""
    monkeypatch.setattr(webdataset, "MOST_SPOOLED", 8000)
    monkeypatch.setattr(webdataset, "LARGEST_PICTURE", 4000)
    long = sample("long", 100)
    members = long[:1]
    for number in range(0, 100, 2):
        one, other = sample(f"{number}", number), sample(f"{number + 1}", number + 1)
        members += [one[0], other[0], one[1], other[1]]
    samples, found, most = webdataset._Samples(), [], 0
    for name, content in [*members, long[1]]:
        found += samples.add(webdataset._Member(name, len(content), sources.suffix(name), content))
        most = max(most, os.fstat(samples._spool.fileno()).st_size)
    found += samples.rest()
    pictures = {name.removesuffix(".jpg"): content for name, content in members if name.endswith(".jpg")}
    assert [record.problem for record in found if record.problem] == []
    assert {record.key: record.image for record in found} == pictures
    assert most < 2 * 8000 + 2 * 4000 < sum(map(len, pictures.values())) / 2


@pytest.mark.parametrize("limit", ["MOST_WAITING", "MOST_SPOOLED"])
def test_what_there_is_no_room_for_costs_itself_alone(store, here, monkeypatch, limit):
    monkeypatch.setattr(webdataset, limit, 0)
    members = [*sample("0", 0), sample("1", 1)[0], *sample("2", 2), sample("3", 3)[0], *sample("4", 4)]
    made = shard(here / "0.tar", members)
    assert captions(made) == [["cap 0"], ["cap 2"], ["cap 4"]]
    told = "what belongs to it is not near it; sort the tar by name"
    assert quarantine(made) == {"1": told, "3": told}


@pytest.mark.parametrize("room", [50, 0])
def test_parts_of_a_sample_are_parts_even_where_there_is_no_room_for_them(store, here, monkeypatch, room):
    monkeypatch.setattr(webdataset, "MOST_WAITING", room)
    members = [("00.mask.png", picture(99)), *sample("00", 0)]  # as sorted tars have it
    for number in range(1, 60):
        members += [*sample(f"{number:02d}", number), (f"{number:02d}.seg.png", picture(100 + number))]
    made = shard(here / "0.tar", members)
    assert quarantine(made) == {}
    assert made.info["others"] == {"parts of a sample": 60}
    assert len(captions(made)) == 60


def test_json_that_cannot_be_read_names_its_picture(store, here):
    made = shard(here / "0.tar", [*sample("a", 1), *sample("b", 2), ("b.json", b"[" * 10**6)])
    assert captions(made) == [["cap 1"]]
    assert quarantine(made) == {"b": "its .json is not valid JSON: nested too deeply"}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda whole: whole.replace(b"2.txt", b"3.txt"), "bad checksum"),
        (lambda whole: whole[: whole.rindex(b"cap") + 512], "unexpected end of data|empty|truncated"),
        (lambda whole: whole + whole, "two tars in one file"),
        (lambda whole: gzip.compress(whole)[:-200], "end-of-stream|unexpected end"),
        (lambda whole: bz2.compress(whole)[:-200], "end-of-stream|unexpected end"),
        (lambda whole: lzma.compress(whole)[:-200], "ends early"),
    ],
)
def test_a_tar_that_does_not_end_as_it_should_says_so(store, here, damage, reason):
    path = here / "0.tar"
    shard(path, [member for n in range(4) for member in sample(f"{n}", n)])
    path.write_bytes(damage(path.read_bytes()))
    assert path.stat().st_size
    reasons = list(sources.iterate(WebDatasetSource(urls=str(path)), 16))[-1]
    assert reasons.key == str(path)
    assert re.search(reason, reasons.problem), reasons.problem


def test_a_shard_that_changed_is_another_source(here):
    path = here / "0.tar"
    source = WebDatasetSource(urls=str(path))
    filler = [(f"{n}.jpg", picture(n, "JPEG", (800, 800))) for n in range(9)]
    marks = []
    for caption in (b"a red apple", b"a red pears"):
        tar(path, dict([*filler, ("9.txt", caption)]))
        marks.append((path.stat().st_size, sources.fingerprint(source)))
    assert marks[0][0] == marks[1][0] > 1 << 16
    assert marks[0][1] != marks[1][1]
    assert sources.fingerprint(source) == marks[1][1]


@pytest.mark.slow
def test_a_shard_that_changed_on_s3_is_another_source(services, here):
    from model.plumbing import storage

    uri = f"{services['LATENT_GPT_STORE']}/raw/0.tar"
    marks = set()
    for caption in (b"a red apple", b"a red pears"):
        storage.upload_file(tar(here / "0.tar", {"0.txt": caption}), uri)
        marks |= {
            sources.fingerprint(WebDatasetSource(urls=uri)),
            sources.fingerprint(WebDatasetSource(urls=uri)),
        }
    assert len(marks) == 2


# ── bounded memory; what is refused as a whole is in tests/refusals ──────────────────────────────────────

PROBE = """
import json, sys
from model.config import DataConfig
from model.data import sources
from model.errors import UserError
from tests import peak
import pyarrow.parquet, webdataset
source = DataConfig.model_validate_json(sys.stdin.read()).source
idle, good, bad = peak(), 0, []
try:
    sources.fingerprint(source)
    for record in sources.iterate(source, 16):
        good += not record.problem
        bad += [record.problem] * bool(record.problem)
except UserError as error:
    bad.append(str(error))
print(json.dumps([good, bad, peak() - idle]))
"""


def probe(source: Source) -> tuple[int, list[str]]:
    """How many records are good, why others are bad; within 10 s and 1 GiB above an idle process."""
    command = [sys.executable, "-c", PROBE]
    start = time.monotonic()
    done = subprocess.run(
        command, input=data(source).model_dump_json(), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    good, bad, kilobytes = json.loads(done.stdout)
    print(f"{time.monotonic() - start:.1f} s, {kilobytes / 1024:.0f} MiB: {bad[:1]}")
    assert kilobytes < 1 << 20
    return good, bad


def test_pictures_under_way_to_the_workers_are_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr("model.plumbing.parallel.cores", lambda: 2)
    monkeypatch.setattr("model.data.ingest.cores", lambda: 2)
    size = LARGEST_PICTURE // 2
    read = taken = most = 0

    def records() -> Iterator[sources.Record]:
        nonlocal read
        for read in range(1, 21):
            yield sources.Record(f"{read}", bytes(size), ["x"])

    for _, outcomes in _chunks(records(), data(FolderSource(path="")), 0):
        for _ in outcomes:
            most = max(most, read - taken)
            taken += 1
    assert taken == 20
    assert 2 * size < most * size <= IN_FLIGHT + size


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.slow
def test_a_sparse_member_of_a_tar_is_passed_over(here):
    path = tar(here / "0.tar", dict(sample("a", 1)))
    whole = path.read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512)
    path.write_bytes(whole + header("huge.jpg", 4 << 30))
    end = path.stat().st_size + (4 << 30)
    os.truncate(path, end)
    with path.open("ab") as file:
        file.write(b"".join([header("huge.txt", 1), b"x" + bytes(511), bytes(1024)]))
    count, bad = probe(WebDatasetSource(urls=str(path)))
    assert count == 1
    assert bad == [f".jpg: {4 << 30:,} bytes, more than the {LARGEST_PICTURE:,} that are read"]


def test_an_xz_shard_is_read_in_streams_none_of_which_takes_more_memory_than_it_may(store, here):
    path = here / "0.tar"
    shard(path, [member for n in range(9) for member in sample(f"{n}", n)])
    whole = path.read_bytes()
    first, second = (lzma.compress(part) for part in (whole[:9000], whole[9000:]))
    path.write_bytes(first + bytes(8) + second)
    assert len(captions(ingest(data(WebDatasetSource(urls=str(path)))))) == 9

    block = bytearray(second[12 : 12 + 4 * (second[12] + 1)])  # the header behind that of the stream
    assert block[2:4] == b"\x21\x01"  # LZMA2, and one byte that says how large its dictionary is
    block[4] = 38  # 2 GiB
    block[-4:] = zlib.crc32(block[:-4]).to_bytes(4, "little")
    path.write_bytes(first + second[:12] + block + second[12 + len(block) :])
    assert "limit" in list(sources.iterate(WebDatasetSource(urls=str(path)), 16))[-1].problem


@pytest.mark.slow
def test_a_picture_that_is_said_a_hundred_times_is_held_a_few_times(here):
    value = pa.array([b"x" * (32 << 20)])
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), value)
    pq.write_table(
        pa.table({"image": shared, "caption": ["x"] * 100}), here / "a.parquet", compression="zstd"
    )
    assert probe(ParquetSource(path=str(here))) == (100, [])
