"""Archives: what is in one is what a folder of it would be; nothing of it is trusted."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.config import ArchiveSource, DataConfig
from model.data import sources
from model.data.sources import archive, unpacked
from model.errors import UserError
from model.plumbing import cache, storage
from tests import ROOT
from tests.data.test_ingest import captions, picture, quarantine, tar
from tests.instances import ingest

Files = dict[str, bytes]


def files(count: int = 6) -> Files:
    """Pictures with captions beside them."""
    made: Files = {}
    for number in range(count):
        made[f"set/{number}.png"] = picture(number)
        made[f"set/{number}.txt"] = f"picture {number}".encode()
    return made


def zipped(path: Path, content: Files, kind: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as made:
        for name, data in content.items():
            made.writestr(zipfile.ZipInfo(name), data, kind)  # all of 1980
    return path


def packed(kind: str) -> Callable[[Path, Files], Path]:
    def pack(path: Path, content: Files) -> Path:
        plain = tar(path.with_suffix(".plain"), content)
        with tarfile.open(plain) as before, tarfile.open(path, f"w:{kind}") as after:
            for member in before:
                after.addfile(member, before.extractfile(member))
        return path

    return pack


def config(path: Path | str) -> DataConfig:
    values = sources.recognise(str(path))
    return DataConfig.model_validate(
        {"source": values, "image_size": 16, "max_bad_share": 1, "validation_share": 0}
    )


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder; what the last test unpacked is not known any more."""
    monkeypatch.setenv("LATENT_GPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(unpacked, "SPARE", 0)
    return tmp_path / "cache"


TOLD = sorted([f"picture {number}"] for number in range(6))


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.zip", zipped), ("a.tar.gz", packed("gz")), ("a.tgz", packed("gz")), ("a.tar.bz2", packed("bz2")),
     ("a.tar.xz", packed("xz")), ("a.tar", tar)],
)  # fmt: skip
def test_an_archive_of_a_folder_is_what_the_folder_is(name, pack, here, store):
    listed = {f"set/{number}.png": picture(number) for number in range(6)}
    rows = "".join(f"{number}.png,picture {number}\n" for number in range(6))
    path = pack(here / name, {"set/captions.csv": f"file_name,caption\n{rows}".encode(), **listed})
    data = config(path)
    assert data.source == ArchiveSource(path=str(path))
    assert captions(ingest(data)) == TOLD


def test_an_archive_may_hold_parquet_files_or_tar_shards(here, store):
    table = pa.table({"image": [picture(1), picture(2)], "caption": ["one", "two"]})
    pq.write_table(table, here / "rows.parquet")
    rows = zipped(here / "rows.zip", {"x/rows.parquet": (here / "rows.parquet").read_bytes()})
    made = ingest(config(rows))
    assert captions(made) == [["one"], ["two"]]
    shard = tar(here / "shard.tar", files()).read_bytes()
    made = ingest(config(zipped(here / "shards.zip", {"000.tar": shard})))
    assert captions(made) == TOLD
    with pytest.raises(UserError, match="folder of archives"):
        ingest(config(zipped(here / "outer.zip", {"inner.zip": rows.read_bytes()})))


def test_a_tar_is_a_shard_where_its_members_look_like_one(here):
    shard = {"kind": "webdataset", "urls": str(tar(here / "a.tar", files()))}
    assert sources.recognise(str(here / "a.tar")) == shard
    listed = tar(here / "b.tar", {**files(), "set/metadata.jsonl": b"{}"})
    assert sources.recognise(str(listed)) == {"kind": "archive", "path": str(listed)}
    bare = tar(here / "c.tar", {"red apple.png": picture(1)})
    assert sources.recognise(str(bare)) == {"kind": "archive", "path": str(bare)}
    packed_shard = packed("gz")(here / "d.tar.gz", files())
    assert sources.recognise(str(packed_shard)) == {"kind": "webdataset", "urls": str(packed_shard)}
    (here / "e").mkdir()
    packed_shard.rename(here / "e/d.tar.gz")
    assert sources.recognise(str(here / "e")) == {"kind": "webdataset", "urls": str(here / "e")}


@pytest.mark.slow
def test_an_archive_in_s3(services, here):
    uri = storage.join(os.environ["LATENT_GPT_STORE"], "source/a.zip")
    storage.upload_file(zipped(here / "a.zip", files()), uri)
    data = config(uri)
    assert data.source == ArchiveSource(path=uri)
    assert captions(ingest(data)) == TOLD
    uri = storage.join(os.environ["LATENT_GPT_STORE"], "source/a.tar")
    storage.upload_file(tar(here / "a.tar", {"a red apple.png": picture(1), "b.zip": b""}), uri)
    assert config(uri).source == ArchiveSource(path=uri)
    with pytest.raises(UserError, match=r"data: s3://.*/none.zip does not exist"):
        sources.recognise(storage.join(os.environ["LATENT_GPT_STORE"], "none.zip"))


# ── unpacked once ───────────────────────────────────────────────────────────────────────────────────────


def records(path: Path) -> list[sources.Record]:
    return list(sources.iterate(ArchiveSource(path=str(path)), 16))


def forget() -> None:
    """As another process would find the cache."""
    cache._whole_here.clear()


def test_it_is_unpacked_once_and_marks_say_what_changed(here, room, monkeypatch):
    path = zipped(here / "a.zip", files())
    first = records(path)
    assert {record.unit for record in first} == {f"set/{number}.png" for number in range(6)}
    forget()
    monkeypatch.setattr(archive, "_zip", None)  # nobody unpacks it again
    assert records(path) == first
    room.rename(here / "moved")
    monkeypatch.setenv("LATENT_GPT_CACHE", str(here / "moved"))
    assert records(path) == first
    monkeypatch.undo()
    monkeypatch.setenv("LATENT_GPT_CACHE", str(here / "other"))
    assert records(path) == first  # marks do not tell where and when it was unpacked

    changed = files() | {"set/3.txt": b"picture X"}  # as long, and of the same time
    again = records(zipped(here / "a.zip", changed))
    assert [new.unit for old, new in zip(first, again, strict=True) if old.mark != new.mark] == ["set/3.png"]
    assert again[3].captions == ["picture X"]


def test_what_is_half_unpacked_is_never_taken_for_whole(here, room, monkeypatch):
    path = zipped(here / "a.zip", files())
    code = (
        "import os, sys; from model.config import ArchiveSource; from model.data import sources\n"
        "from model.data.sources.unpacked import Writer; write = Writer.write\n"
        "def killed(self, name, *rest):\n"
        "    write(self, name, *rest)\n"
        "    if name == 'set/3.png': os.kill(os.getpid(), 9)\n"
        "Writer.write = killed\n"
        f"list(sources.iterate(ArchiveSource(path={str(path)!r}), 16))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == -9
    assert list(room.glob("unpacked/*/.partial-*/set/*.png"))
    whole = records(path)
    assert len(whole) == 6
    assert not list(room.glob("unpacked/*/.partial-*"))
    (home,) = room.glob("unpacked/*/files")
    (home / "set/2.png").unlink()  # somebody tidied up
    forget()
    assert records(path) == whole


def test_unpacked_folders_make_room_for_each_other(here, room, monkeypatch):
    monkeypatch.setenv("LATENT_GPT_CACHE_GIB", str(150_000 / 2**30))
    code = "import sys; from tests.data.test_archives import *; records(Path(sys.argv[1]))"
    for name in ("a.zip", "b.zip"):  # in processes of their own: what one has open stays
        path = zipped(here / name, {**files(), "set/large.png": os.urandom(20_000)})
        subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=True, env=os.environ)
    assert len(list(room.glob("unpacked/*/files"))) == 1
    with pytest.raises(UserError, match="bytes do not fit into a cache of 150000 bytes; raise LATENT_GPT"):
        records(zipped(here / "c.zip", {"a.png": os.urandom(200_000)}))
    assert len(list(room.glob("unpacked/*/files"))) <= 1


# ── archives of strangers ───────────────────────────────────────────────────────────────────────────────


def refused(path: Path, most: float = 10) -> str:
    """The line by which it is refused, within seconds; nothing is left behind."""
    began = time.monotonic()
    with pytest.raises(UserError) as said:
        records(path)
    assert time.monotonic() - began < most
    assert {file.name for file in Path(os.environ["LATENT_GPT_CACHE"]).glob("unpacked/*/*")} <= {cache.LOCK}
    line = str(said.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("name", ["../outside.png", "/outside.png", "set/../../outside.png"])
@pytest.mark.parametrize("pack", [zipped, tar])
def test_nothing_is_written_outside_of_the_folder(name, pack, here, tmp_path):
    line = refused(pack(here / "a.zip", {**files(), name: picture(9)}))
    assert f"has a file '{name}', which lies outside of it" in line
    assert not list(tmp_path.rglob("outside.png"))


def test_links_and_devices_are_counted_and_not_made(here, store, room):
    path = tar(here / "a.tar", {**files(), "list.tsv": b"x"})
    with tarfile.open(path, "a") as made:
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
        for kind, name in zip(kinds, ("a.png", "b.png", "c.png", "d.png"), strict=True):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            made.addfile(member)
    assert records(path)[0].others == {"links and special files": 4}
    with zipfile.ZipFile(zipped(here / "b.zip", files()), "a") as made:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        made.writestr(link, "/etc/passwd")
    found = records(here / "b.zip")
    assert found[0].others == {"links and special files": 1}
    for start in (1, 3, 7, 9):
        rest = sources.iterate(ArchiveSource(path=str(here / "b.zip")), 16, start)
        assert list(rest) == found[start:]
    below = [path for path in room.rglob("*") if not path.is_dir()]
    assert all(path.is_file() and not path.is_symlink() for path in below)


def test_what_unpacks_to_too_much_is_refused_before_it_is_written(here, monkeypatch):
    zeros = bytes(2 << 20)
    monkeypatch.setattr(unpacked, "FREELY", 1 << 20)
    assert "over 100 times as many" in refused(zipped(here / "a.zip", {"a.png": zeros}))
    assert "over 100 times as many" in refused(packed("gz")(here / "a.tar.gz", {"a.png": zeros}))
    monkeypatch.setattr(unpacked, "MOST_FILES", 5)
    assert "holds more than 5 files" in refused(zipped(here / "b.zip", files()))
    assert "holds more than 5 files" in refused(packed("gz")(here / "b.tar.gz", files()))
    monkeypatch.setattr(unpacked, "MOST_FILES", 1 << 22)
    monkeypatch.setattr(archive, "LARGEST_DIRECTORY", 100)
    assert "more than the 100 that are read" in refused(zipped(here / "c.zip", files()))


def test_a_million_files_are_not_too_many(here, monkeypatch):
    files = 1_200_000  # 600,000 pictures and their captions
    monkeypatch.setattr(unpacked, "BLOCK", 0)
    unpacked.Writer(here, lambda size: None, "a.zip").announce(files, 0)
    assert files * len("PK" * 23 + "train/0123/COCO_000000123456.jpg") < archive.LARGEST_DIRECTORY


def test_a_full_disk_is_seen_before_anything_is_written(here, monkeypatch):
    monkeypatch.setattr(unpacked, "SPARE", 1 << 60)
    assert "and that disk has" in refused(zipped(here / "a.zip", files()))


@pytest.mark.parametrize("lie", [1, 1 << 31])
def test_a_size_that_is_a_lie(lie, here):
    path = zipped(here / "a.zip", {"red.png": picture(1), "sky.png": picture(2)})
    with zipfile.ZipFile(path) as made:
        size = made.getinfo("sky.png").file_size
    at = path.read_bytes().rfind(b"sky.png") - 46 + 24
    data = bytearray(path.read_bytes())
    assert int.from_bytes(data[at : at + 4], "little") == size
    data[at : at + 4] = lie.to_bytes(4, "little")
    path.write_bytes(data)
    if lie > size:
        assert "over 100 times as many" in refused(path)
    else:
        assert "damaged in the zip: Bad CRC-32" in next(
            r.problem for r in records(path) if r.key == "sky.png"
        )


def test_encrypted_members_other_methods_and_other_archives_are_named(here):
    path = zipped(here / "a.zip", files())
    data = bytearray(path.read_bytes())
    data[data.rfind(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    assert "1 of its 12 files are encrypted; unpack it yourself" in refused(path)
    assert "is packed by lzma, which is not read" in refused(
        zipped(here / "b.zip", files(), zipfile.ZIP_LZMA)
    )
    for data, said in [
        (b"7z\xbc\xaf\x27\x1c", "is a 7z archive"),
        (b"text", "no zip or tar"),
        (b"", "no zip"),
    ]:
        (here / "c.zip").write_bytes(data.ljust(600, b"\1") if data else b"")
        assert said in refused(here / "c.zip")
    with pytest.raises(UserError, match=r"data: .*\.rar is not read; make a zip or tar of it"):
        sources.recognise("pictures.rar")
    with pytest.raises(UserError, match=r"data: .*none.zip does not exist"):
        sources.recognise(str(here / "none.zip"))


def test_names_that_are_no_utf_8_are_said_and_those_without_a_flag_are_read(here, capsys):
    path = here / "a.zip"
    zipped(path, {"cafe/e1.png": picture(1), "cafe/e1.txt": b"one", "cafe/e2.png": picture(2)})
    data = path.read_bytes().replace(b"cafe/e1", "caf\N{LATIN SMALL LETTER E WITH ACUTE}/1".encode())
    path.write_bytes(data.replace(b"cafe/e2", b"caf\xe9/e2"))
    found = {record.key: record.captions for record in records(path) if not record.others}
    assert found["café/1.png"] == ["one"]
    assert "1 names in data.source.path" in capsys.readouterr().out


def test_a_zip_of_nothing_but_damage_is_refused(here, monkeypatch):
    monkeypatch.setattr(unpacked, "MOST_BAD", 5)
    path = zipped(here / "a.zip", files())
    path.write_bytes(path.read_bytes().replace(b"PK\3\4", b"PK\3\5"))
    data = b"PK\3\4" + path.read_bytes()[4:]
    path.write_bytes(data)
    assert "more than 5 of its files are damaged" in refused(path)


@pytest.mark.parametrize("pack", [packed("gz"), zipped])
def test_damage_is_quarantined_and_the_rest_is_used(pack, here, store):
    path = pack(here / "a.tar.gz", {"z.tsv": b"", **files(40)})
    data = bytearray(path.read_bytes())
    if pack is zipped:
        at = data.find(b"set/20.png") + 60
        data[at : at + 20] = bytes(20)
    else:
        del data[len(data) // 2 :]
    path.write_bytes(data)
    made = ingest(DataConfig(source=ArchiveSource(path=str(path)), image_size=16, max_bad_share=1))
    reasons = " ".join(quarantine(made).values())
    assert ("damaged in the zip" if pack is zipped else "the tar breaks off") in reasons
    assert 15 < made.info["read"] - made.info["quarantined"] < 40


@pytest.mark.parametrize("pack", [tar, zipped])
def test_names_that_no_file_can_have_cost_themselves_alone(pack, here):
    odd = {"n" * 252 + ".png": picture(7), "set/0.png/x.png": picture(8), "set": b"a file and a folder"}
    found = records(pack(here / "a.tar.gz", {**files(), **odd}))
    assert sorted(record.captions for record in found if not record.problem) == TOLD
    assert {record.key: record.problem for record in found if record.problem} == {
        "n" * 252 + ".png": "cannot be written: File name too long",
        "set/0.png/x.png": "cannot be written: File exists",
        "set": "cannot be written: Is a directory",
    }


def test_a_zip_of_a_file_without_name_is_refused(here):
    path = zipped(here / "a.zip", {"\1.png": picture(1)})
    path.write_bytes(path.read_bytes().replace(b"\1.png", b"\0.png"))
    assert "has a file '', which lies outside of it" in refused(path)


def test_a_pipe_is_no_archive(here):
    os.mkfifo(here / "a.zip")
    assert "is not a regular file" in refused(here / "a.zip")


@pytest.mark.slow
def test_bombs_cost_neither_memory_nor_time(here):
    """A tar that unpacks to more than a gigabyte, and a zip whose list of members is as large."""
    with tarfile.open(here / "a.tar.gz", "w:gz", compresslevel=1) as made:
        for number in range(12):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = 100 << 20
            made.addfile(member, io.BytesIO(bytes(member.size)))
    (here / "b.zip").write_bytes(
        b"PK\5\6" + bytes(4) + b"\xff\xff\xff\xff" + (1 << 30).to_bytes(4, "little") + bytes(6)
    )
    code = (
        "import sys; from tests import peak; from tests.data.test_archives import *\n"
        "idle, began = peak(), time.monotonic()\n"
        "for path in sys.argv[1:]:\n"
        "    try: records(Path(path))\n"
        "    except UserError as error: print(error)\n"
        "print(peak() - idle, time.monotonic() - began)\n"
    )
    command = [sys.executable, "-c", code, here / "a.tar.gz", here / "b.zip"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *lines, last = done.stdout.splitlines()
    assert sum("data.source.path" in line for line in lines) == 2, done
    kib, seconds = map(float, last.split())
    assert kib < 1 << 18
    assert seconds < 20  # for both


def test_files_of_one_archive_are_found_by_their_name(here, store):
    made = ingest(
        config(zipped(here / "a.zip", {"red-apple_03.png": picture(1), "green pear.png": picture(2)}))
    )
    assert captions(made) == [["green pear"], ["red apple"]]
