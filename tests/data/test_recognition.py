"""Whatever a person names as their data, here or in S3: recognised, looked at, made into images."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from model.config import DataConfig, FolderSource, Source
from model.data import sources
from model.data.sources import Record, folder, recognise, tree, unpacked
from model.data.survey import look
from model.errors import UserError
from model.plumbing import storage
from tests.data.test_archives import zipped
from tests.data.test_ingest import captions, picture, tar, write
from tests.data.test_strangers import KINDS as BAD_ONES
from tests.data.test_strangers import comma, jsonl, listed, pictures, sidecars
from tests.instances import ingest

TOLD = ["a red apple", "a blue pear", "two green plums"]
FILES = [f"{number}.png" for number in range(3)]


def rows(separator: str) -> str:
    return "\n".join(
        separator.join(row) for row in (("file_name", "caption"), *zip(FILES, TOLD, strict=True))
    )


def table(**columns: list[object]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def shard(members: dict[str, bytes], here: Path) -> bytes:
    return tar(here.parent / "made.tar", members).read_bytes()


def beside(ending: str, write_one=str.encode) -> dict[str, bytes]:
    return {f"{number}{ending}": write_one(text) for number, text in enumerate(TOLD)}


PICTURES = {name: picture(number) for number, name in enumerate(FILES)}
STRUCTS = [{"bytes": image, "path": None} for image in PICTURES.values()]
DATA: dict[str, tuple[dict[str, bytes], str, dict[str, str]]] = {  # files, what is named, how it is read
    ".txt": (PICTURES | beside(".txt"), "", {"kind": "folder"}),
    ".caption": (PICTURES | beside(".png.caption"), "", {"kind": "folder"}),
    ".json caption": (
        PICTURES | beside(".json", lambda text: json.dumps({"Caption": text}).encode()),
        "",
        {"kind": "folder"},
    ),
    ".json captions": (
        PICTURES | beside(".png.json", lambda text: json.dumps({"captions": [text]}).encode()),
        "",
        {"kind": "folder"},
    ),
    "captions.csv": (PICTURES | {"captions.csv": rows(",").encode()}, "", {"kind": "folder"}),
    "captions.tsv": (PICTURES | {"captions.tsv": rows("\t").encode()}, "", {"kind": "folder"}),
    "metadata.csv": (PICTURES | {"metadata.csv": rows(",").encode()}, "", {"kind": "folder"}),
    "metadata.jsonl": (
        {f"train/{name}": image for name, image in PICTURES.items()}
        | {
            "train/metadata.jsonl": "\n".join(
                json.dumps({"file_name": name, "text": text})
                for name, text in zip(FILES, TOLD, strict=True)
            ).encode()
        },
        "",
        {"kind": "folder"},
    ),
    "metadata.parquet": (
        PICTURES | {"metadata.parquet": table(file_name=FILES, text=TOLD)},
        "",
        {"kind": "folder"},
    ),
    "names": (
        {f"{text.replace(' ', '-')}_0{n}.png": picture(n) for n, text in enumerate(TOLD)},
        "",
        {"kind": "folder", "captions": "names"},
    ),
    "folders": (
        {f"{text}/IMG_{n}.png": picture(n) for n, text in enumerate(TOLD)},
        "",
        {"kind": "folder", "captions": "folders"},
    ),
    "parquet with structs": ({"data/0.parquet": table(image=STRUCTS, caption=TOLD)}, "", {"kind": "parquet"}),
    "parquet with bytes": (
        {"0.parquet": table(image=list(PICTURES.values()), caption=TOLD)},
        "/0.parquet",
        {"kind": "parquet"},
    ),
}  # fmt: skip


def put(root: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        storage.write_bytes(f"{root}/{name}", data)


def of(values: dict[str, object] | None) -> Source:
    source: Source = TypeAdapter(Source).validate_python(values)
    return source


@pytest.fixture(params=["here", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest, here: Path) -> str:
    """A place for data, here and in a real S3."""
    if request.param == "here":
        request.getfixturevalue("store")
        return str(here)
    return f"{request.getfixturevalue('services')['LATENT_GPT_STORE']}/data"


@pytest.mark.parametrize(("files", "named", "kind"), DATA.values(), ids=DATA.keys())
def test_each_kind_of_data_is_recognised_looked_at_and_made_into_images(root, files, named, kind):
    put(root, files)
    values = recognise(root + named)
    assert values == {"path": root + named, **kind}
    found = look(of(values), 16)
    assert (found.survey.pictures, found.survey.counted, found.survey.captions) == (3, True, 3)
    assert sorted(text for one in found.examples for text in one.captions) == sorted(TOLD)
    assert {(one.width, one.height) for one in found.examples} == {(40, 32)}
    made = ingest(DataConfig(source=of(values), image_size=16, validation_share=0.01))
    assert captions(made) == sorted([text] for text in TOLD)
    assert made.info["quarantined"] == 0


@pytest.mark.parametrize(
    ("ending", "write_one"),
    [
        (".txt", str.encode),
        (".json", lambda text: json.dumps({"text": text}).encode()),
        (".json", lambda text: json.dumps({"Caption": text, "captions": None, "text": "other"}).encode()),
        (".json", lambda text: json.dumps({"captions": [text]}).encode()),
    ],
)
def test_tar_shards_are_recognised_looked_at_and_made_into_images(ending, write_one, root, here):
    for number in range(2):
        members = {f"{number}.png": picture(number), f"{number}{ending}": write_one(TOLD[number])}
        put(root, {f"{number}.tar": shard(members, here)})
    values = recognise(f"{root}/{{0..1}}.tar")
    found = look(of(values), 16)
    assert (found.kind, found.survey.pictures, found.survey.counted) == ("2 tar shards", 2, True)
    made = ingest(DataConfig(source=of(values), image_size=16, validation_share=0.01))
    assert captions(made) == sorted([text] for text in TOLD[:2])


@pytest.mark.parametrize("inside", [name for name in DATA if name != "parquet with bytes"])
def test_an_archive_of_each_kind_of_data_is_recognised_looked_at_and_made_into_images(
    inside, root, here, monkeypatch
):
    monkeypatch.setenv("LATENT_GPT_CACHE", str(here.parent / "cache"))
    monkeypatch.setattr(unpacked, "SPARE", 0)
    put(root, {"data.zip": zipped(here.parent / "made.zip", DATA[inside][0]).read_bytes()})
    values = recognise(f"{root}/data.zip")
    assert values == {"kind": "archive", "path": f"{root}/data.zip"}
    found = look(of(values), 16)
    assert found.kind.startswith("an archive of ")
    assert (found.survey.pictures, found.survey.captions) == (3, 3)
    made = ingest(DataConfig(source=of(values), image_size=16, validation_share=0.01))
    assert captions(made) == sorted([text] for text in TOLD)
    assert made.info["quarantined"] == 0


def test_what_captions_come_from_is_said_with_how_to_give_better_ones(here):
    write(here, {"red-apple_03.png": picture(1), "IMG_1234.png": picture(2), "blue pear.png": picture(3)})
    write(here, {"plum.png": picture(4), "labels.csv": "a,b", "captions.txt": "a,b"})
    found = look(of(recognise(str(here))), 16)
    assert found.kind == "a folder with captions in the names of files"
    said = "\n".join(found.lines())
    assert (
        "captions are the names of files (not read as captions: 1 .csv, 1 .txt); better ones: write" in said
    )
    assert "cannot be used: 1 of 4 looked at, no caption (IMG_1234.png)" in said


# ── captions of a folder ────────────────────────────────────────────────────────────────────────────────


def records(path: object, **values: str) -> dict[str, list[str] | str]:
    found = sources.iterate(FolderSource(path=str(path), **values), 16)
    return {one.key: one.problem or one.captions for one in found if not one.others}


def test_names_are_captions_only_where_no_file_says_one(here):
    write(
        here,
        {"red apple.png": picture(1), "blue pear.png": picture(2), "blue pear.txt": "a pear that is blue"},
    )
    write(here, {"plum.png": picture(3), "plum.txt": " \n", "sloe.png": picture(4), "sloe.json": "{}"})
    assert recognise(str(here)) == {"kind": "folder", "path": str(here)}
    assert records(here, captions="names") == {
        "blue pear.png": ["a pear that is blue"],
        "plum.png": ["plum"],
        "red apple.png": ["red apple"],
        "sloe.png": ["sloe"],
    }
    assert records(here)["red apple.png"] == []


def test_where_a_files_name_is_no_words_that_of_the_innermost_folder_counts(here):
    for name in ("fruit/red apple/images/1.png", "fruit/IMG_1.png", "3.png", "fruit/a pear.png"):
        write(here, {name: picture(1)})
    assert list(records(here, captions="names").values()) == [[], ["fruit"], ["a pear"], ["red apple"]]
    assert list(records(here, captions="folders").values()) == [[], ["fruit"], ["fruit"], ["red apple"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"caption": "a", "text": "b"}', ["a"]),
        ('{"text": ["a", "b"]}', ["a", "b"]),
        ('{"CAPTIONS": ["a"]}', ["a"]),
        ('["a"]', []),
        ('{"title": "a"}', []),
        ("[" * 10**6, "0.json: not valid JSON: nested too deeply"),
        ("{", "0.json: not valid JSON: Expecting property name"),
    ],
)
def test_captions_in_json_beside_a_picture(here, text, said):
    write(here, {"0.png": picture(), "0.json": text})
    found = records(here)["0.png"]
    assert found == said or (isinstance(said, str) and str(found).startswith(said))


def test_a_table_with_tabs_may_have_commas_and_quotes(here):
    text = 'file_name\tcaption\n0.png\ta, b "c"\n1.png\t"a ""d"""\n2.png\ta\tb\n'
    write(here, {**{f"{number}.png": picture(number) for number in range(3)}, "captions.tsv": text})
    assert list(records(here).values()) == [['a, b "c"'], ['a "d"'], records(here)["2.png"]]
    assert "more fields than the header" in records(here)["2.png"]


def test_names_of_a_list_may_be_absolute_or_have_backslashes_and_are_no_addresses(here, tmp_path):
    write(here, {f"in/{name}.png": picture(number) for number, name in enumerate(("a", "b", "c", "d\\e"))})
    (tmp_path / "link").symlink_to(here)
    names = [
        "a.png",
        f"{here}/in/b.png",
        f"{tmp_path}/link/in/c.png",
        "d\\e.png",
        "..\\in\\a.png",
        "no\\a.png",
    ]
    names += [f"{here}/../up.png", "https://example.org/a.png"]
    entries = [json.dumps({"file_name": name, "text": "a"}) for name in names]
    write(here, {"in/metadata.jsonl": "\n".join(entries)})
    assert records(tmp_path / "link") == {
        "in/a.png": ["a"],
        "in/b.png": ["a"],
        "in/c.png": ["a"],
        "in/d\\e.png": ["a"],
        "in/../in/a.png": ["a"],
        "in/no\\a.png": "cannot be read: No such file or directory",
        "../up.png": "lies outside the folder",
        "https://example.org/a.png": "is an address, and pictures are not downloaded",
    }


# ── a folder in S3 ──────────────────────────────────────────────────────────────────────────────────────


def plain(found: list[Record], place: str) -> list[tuple[object, ...]]:
    return [(one.key.removeprefix(place), one.image, one.captions, one.problem, one.others) for one in found]


@pytest.mark.slow
@pytest.mark.parametrize("make", [sidecars, listed(jsonl), listed(comma("captions.csv"))])
def test_a_folder_in_s3_is_read_as_one_here(services, here, make):
    chance = random.Random(1)
    source = make(here, pictures(chance), chance)
    root = f"{services['LATENT_GPT_STORE']}/data"
    put(root, {str(path.relative_to(here)): path.read_bytes() for path in here.rglob("*") if path.is_file()})
    there = FolderSource(path=root + "/")
    local, remote = (list(sources.iterate(one, 16)) for one in (source, there))
    assert plain(remote, root) == plain(local, str(here))
    assert len(remote) > len(BAD_ONES)
    assert sources.count(there) == sources.count(source) == len(remote) - 1
    assert plain(list(sources.iterate(there, 16, 7)), root) == plain(local[7:], str(here))


@pytest.mark.slow
def test_of_a_folder_in_s3_what_is_as_it_was_is_not_read(services, monkeypatch):
    root = f"{services['LATENT_GPT_STORE']}/data"
    put(root, {"a/0.png": picture(0), "a/0.txt": b"a pear", "1.png": picture(1), "1.txt": b"an apple"})
    source = FolderSource(path=root)
    before = {one.unit: one.mark for one in sources.iterate(source, 16)}
    fingerprint = sources.fingerprint(source)
    assert fingerprint == sources.fingerprint(source)
    put(root, {"a/0.txt": b"a plum"})  # as long as it was
    assert sources.fingerprint(source) != fingerprint
    read: list[str] = []
    monkeypatch.setattr(
        storage, "read_bytes", lambda uri, real=storage.read_bytes: read.append(uri) or real(uri)
    )
    found = list(sources.iterate(source, 16, 0, lambda unit, mark: before[unit] == mark))
    assert [(one.key, one.known, one.captions) for one in found] == [
        ("1.png", True, []),
        ("a/0.png", False, ["a plum"]),
    ]
    assert sorted(read) == [f"{root}/a/0.png", f"{root}/a/0.txt"]


@pytest.mark.slow
def test_odd_objects_of_a_folder_in_s3_are_named_one_by_one(services, monkeypatch):
    root = f"{services['LATENT_GPT_STORE']}/data"
    names = [
        "../0.png",
        "/0.png",
        "gone.png",
        "a/../0.png",
        "cafe\u0301.png",
        f"{root}/2.png",
        "s3://b/2.png",
    ]
    entries = [json.dumps({"file_name": name, "text": "a"}) for name in names]
    put(root, {"metadata.jsonl": "\n".join(entries).encode(), "0.png": picture(0), "café.png": picture(1)})
    put(root, {".hidden/1.png": picture(2), "2.png": picture(3)})
    found = {one.key: one.problem for one in sources.iterate(FolderSource(path=root), 16)}
    assert found == {
        "../0.png": "lies outside the folder",
        "/0.png": "lies outside the folder",
        "gone.png": "cannot be read: it is not there",
        "a/../0.png": "",
        "cafe\u0301.png": "",
        "2.png": "",
        "s3://b/2.png": "is an address, and pictures are not downloaded",
    }
    monkeypatch.setattr(folder, "LARGEST_PICTURE", 10)
    problems = {one.problem for one in sources.iterate(FolderSource(path=root), 16)}
    assert any("more than the 10 that are read" in problem for problem in problems)


@pytest.mark.slow
def test_an_object_that_goes_while_a_folder_is_read_is_named(services):
    root = f"{services['LATENT_GPT_STORE']}/data"
    put(root, {f"{n:03d}.png": picture(n) for n in range(200)} | {f"{n:03d}.txt": b"a" for n in range(200)})
    found = sources.iterate(FolderSource(path=root), 16)
    first = next(found)
    storage.delete(f"{root}/199.png")
    rest = list(found)
    assert [one.key for one in (first, *rest)] == [f"{n:03d}.png" for n in range(200)]
    assert [one.key for one in rest if one.problem] == ["199.png"]
    assert rest[-1].problem == "cannot be read: it is gone"


def test_pictures_that_are_fetched_ahead_are_bounded_in_bytes_and_in_order(monkeypatch):
    class Slow:
        readers, place = 8, ""
        held = most = 0

        def size(self, name: str) -> int:
            return 100

        def read(self, name: str, most: int) -> bytes:
            self.held += 1
            self.most = max(self.most, self.held)
            return name.encode()

    monkeypatch.setattr(folder, "AHEAD_BYTES", 550)
    slow = Slow()
    names = [f"{number}.png" for number in range(50)]
    for number, one in enumerate(folder._read(slow, (folder.Found(Record(name, b"")) for name in names))):
        assert one.image == names[number].encode()
        slow.held -= 1
    assert number == 49
    assert slow.most <= 6


@pytest.mark.slow
def test_a_folder_in_s3_that_is_not_there_is_refused_in_one_line(services):
    root = services["LATENT_GPT_STORE"]
    with pytest.raises(UserError, match=f"^data: {root}/nothing holds no pictures \\(it is empty\\)"):
        recognise(f"{root}/nothing")
    with pytest.raises(
        UserError, match=r"^data: s3://no-such-bucket/x: bucket no-such-bucket does not exist"
    ):
        recognise("s3://no-such-bucket/x")
    with pytest.raises(UserError, match=r"^data.source.path: s3://no-such-bucket/x: bucket no-such-bucket"):
        sources.fingerprint(FolderSource(path="s3://no-such-bucket/x"))
    with pytest.raises(UserError, match="holds no picture"):
        sources.fingerprint(FolderSource(path=f"{root}/nothing"))


def test_what_is_remembered_is_recognised_and_listed_once(root, monkeypatch):
    put(root, PICTURES | beside(".txt"))
    asked: list[str] = []
    marks = storage.marks
    monkeypatch.setattr(storage, "marks", lambda uri: asked.append(uri) or marks(uri))
    with sources.remembered():
        values = recognise(root)
        values["captions"] = "names"  # as overrides do
        assert recognise(root) == {"kind": "folder", "path": root}
        assert look(of(recognise(root)), 16).survey.pictures == 3
        sources.fingerprint(of(recognise(root)))
        storage.delete_prefix(root)
        assert recognise(root) == {"kind": "folder", "path": root}
    assert asked == ([root] if storage.is_s3(root) else [])
    with pytest.raises(UserError):
        recognise(root)


def test_a_folder_whose_name_is_not_utf_8_is_refused(here):
    put(f"{here}/d\udcff", PICTURES | beside(".txt"))
    with pytest.raises(UserError, match=r"^data: the name .*d\udcff is not UTF-8; rename it$"):
        recognise(f"{here}/d\udcff")


def test_who_need_not_reach_s3_does_not_ask_it(monkeypatch):
    monkeypatch.setattr(tree, "S3Tree", None)
    assert recognise("s3://b/folder", look=False) == {"kind": "folder", "path": "s3://b/folder"}
