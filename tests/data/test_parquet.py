"""Parquet files: which columns are read, and pictures that rows name by their paths."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.config import DataConfig, FolderSource, ParquetSource
from model.data import sources
from model.data.sources import parquet
from model.errors import UserError
from model.plumbing import storage
from tests.data.test_ingest import captions, picture, quarantine, write
from tests.instances import ingest

ONE, TWO = picture(1), picture(2)
STRUCT = [{"bytes": ONE, "path": "a.png"}, {"bytes": TWO, "path": None}]


def features(**columns: object) -> dict[bytes, bytes]:
    """The metadata by which `datasets` tells what columns are."""
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


def records(path: Path | str, **values: str) -> list[sources.Record]:
    return list(sources.iterate(ParquetSource(path=str(path), **values), 16))


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"image": [ONE, TWO], "caption": ["one", "two"], "text": ["x", "y"]}, ""),
        ({"img": STRUCT, "text": ["one", "two"]}, "pictures are in the column 'img', captions in 'text'"),
        ({"id": [1, 2], "jpg": [ONE, TWO], "Captions": [["one"], ["two"]]}, "'jpg', captions in 'Captions'"),
        ({"mask": [b"x", b"y"], "png": [ONE, TWO], "prompt": ["one", "two"]}, "'png', captions in 'prompt'"),
        ({"pixels": [ONE, TWO], "label": ["one", "two"]}, "column 'pixels', captions in 'label'"),
        ({"image": [ONE, TWO], "text": ["one", "two"]}, "column 'image', captions in 'text'"),
    ],
)
def test_columns_are_found_where_none_has_the_default_name(columns, told, here, capsys):
    pq.write_table(pa.table(columns), here / "a.parquet")
    found = records(here)
    assert [(record.image, record.captions) for record in found] == [(ONE, ["one"]), (TWO, ["two"])]
    said = capsys.readouterr().out
    assert told in said if told else not said


def test_names_of_classes_are_captions_where_there_are_no_others(here, store, capsys):
    table = pa.table({"photo": [ONE, TWO, picture(3)], "fine": [1, 0, -1]})
    classes = {"_type": "ClassLabel", "names": ["apple_pie", "cat"]}
    table = table.replace_schema_metadata(features(photo={"_type": "Image"}, fine=classes))
    pq.write_table(table, here / "a.parquet")
    made = ingest(DataConfig(source=ParquetSource(path=str(here)), image_size=16, max_bad_share=1))
    assert captions(made) == [["apple pie"], ["cat"]]
    assert list(quarantine(made)) == ["a.parquet:2"]
    assert "names of classes in 'fine'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "said", [b"\xff", b"[]", b'{"info": 1}', b"[" * 100_000, b'{"info": {"features": {"a": 1}}}']
)
def test_metadata_of_strangers_are_passed_over(said, here):
    table = pa.table({"jpg": [ONE], "text": ["one"]}).replace_schema_metadata({b"huggingface": said})
    pq.write_table(table, here / "a.parquet")
    assert [record.captions for record in records(here)] == [["one"]]


def test_what_is_set_is_not_replaced_and_what_is_not_there_is_named(here):
    pq.write_table(pa.table({"jpg": [ONE], "text": ["one"]}), here / "a.parquet")
    with pytest.raises(
        UserError, match=r"data.source.image_column: .* has no column 'png'; it has jpg, text"
    ):
        records(here, image_column="png")
    pq.write_table(pa.table({"jpg": [ONE], "size": [3]}), here / "a.parquet")
    with pytest.raises(
        UserError, match=r"data.source.caption_column: .* has no column 'caption'; it has jpg, size"
    ):
        records(here)
    # neither goes into keys where nobody sets it
    assert ParquetSource(path="x").model_dump() == {
        "kind": "parquet", "path": "x", "image_column": "image", "caption_column": "caption",
    }  # fmt: skip


def test_statistics_that_cannot_be_end_no_process(here):
    table = pa.table({"image": STRUCT, "caption": ["one", "two"], "other": ["x", "y"]})
    pq.write_table(table, here / "a.parquet")
    whole = (here / "a.parquet").read_bytes()
    for column in (b"caption", b"other"):  # whose values are said to be there always
        head = bytes([len(column)]) + column
        assert whole.count(b"\x25\x02\x18" + head) == 1
        (here / "a.parquet").write_bytes(whole.replace(b"\x25\x02\x18" + head, b"\x25\x00\x18" + head))
        if column == b"other":
            assert [record.captions for record in records(here)] == [["one"], ["two"]]
            continue
        with pytest.raises(UserError, match=r"a.parquet: Definition level histogram size mismatch"):
            records(here)


def test_names_of_columns_are_utf_8_and_those_that_are_read_are_said_once(here):
    pq.write_table(pa.table({"image": [ONE], "caption": ["one"]}), here / "a.parquet", store_schema=False)
    whole = (here / "a.parquet").read_bytes()
    (here / "a.parquet").write_bytes(whole.replace(b"caption", b"capt\xefon"))
    with pytest.raises(UserError, match=r"a.parquet: the name of a column is not UTF-8; give it another"):
        records(here)
    twins = [pa.array(["0.png"]), pa.array(["one"]), pa.array(["two"]), pa.array([ONE])]
    names = ["file_name", "text", "text", "image"]
    pq.write_table(pa.Table.from_arrays(twins, names), here / "a.parquet")
    with pytest.raises(UserError, match=r"data.source.caption_column: .* 2 columns are called 'text'"):
        records(here, caption_column="text")
    assert [record.captions for record in records(here, caption_column="file_name")] == [["0.png"]]
    (here / "a.parquet").rename(here / "metadata.parquet")
    write(here, {"0.png": ONE})
    with pytest.raises(UserError, match=r"metadata.parquet: 2 columns are called 'text'; rename all but one"):
        list(sources.iterate(FolderSource(path=str(here)), 16))


def by_path(kind: str, names: list[str]) -> pa.Table:
    texts = [f"caption {number}" for number in range(len(names))]
    if kind == "struct":
        rows = [{"bytes": None, "path": name} for name in names]
        return pa.table(
            {
                "image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                "text": texts,
            }
        )
    return pa.table({kind: names, "text": texts})


@pytest.mark.parametrize("kind", ["struct", "image", "file_name", "path"])
@pytest.mark.parametrize("where", ["here", pytest.param("s3", marks=pytest.mark.slow)])
def test_pictures_are_read_from_the_folder_of_the_file_and_from_nowhere_else(
    kind, where, request, here, tmp_path
):
    outside = write(tmp_path, {"secret.png": picture(9)}) / "secret.png"
    root = str(here)
    if where == "s3":
        request.getfixturevalue("services")
        root = storage.join(os.environ["LATENT_GPT_STORE"], "here")
        outside = storage.join(os.environ["LATENT_GPT_STORE"], "secret.png")
        storage.write_bytes(outside, picture(9))
    names = [
        "pics/a.png",
        f"{root}/pics/b.png",
        "../secret.png",
        str(outside),
        "none.png",
        "",
        "https://example.org/a.png",
    ]
    if where == "here":
        (here / "pics").mkdir()
        (here / "link.png").symlink_to(outside)
        os.mkfifo(here / "pipe.png")
        names += ["link.png", "pipe.png"]
    storage.write_bytes(f"{root}/pics/a.png", ONE)
    storage.write_bytes(f"{root}/pics/b.png", TWO)
    pq.write_table(by_path(kind, names), tmp_path / "a.parquet")
    storage.upload_file(tmp_path / "a.parquet", f"{root}/a.parquet")
    found = records(root)
    assert [record.image for record in found] == [ONE, TWO] + [b""] * (len(names) - 2)
    assert all(record.problem for record in found[2:])
    assert "its picture lies outside the folder" in found[2].problem
    assert "its picture is an address" in found[6].problem


@pytest.mark.parametrize(
    ("group", "through", "classes"),
    [(30, 0, 8), (1, 0, 10), (300, 0, 1), (300, 1 << 28, 10), (100, 1 << 28, 10)],
)
def test_a_look_sees_rows_all_over_files_that_are_sorted(group, through, classes, here, monkeypatch):
    monkeypatch.setattr(parquet, "LOOKED_THROUGH", through)
    texts = [f"class {number // 30}" for number in range(300)]
    pq.write_table(
        pa.table({"image": [ONE] * 300, "caption": texts}), here / "a.parquet", row_group_size=group
    )
    found = parquet.sample(ParquetSource(path=str(here)), 24, 1)
    looked = list(found.records)
    numbers = [int(record.key.rpartition(":")[2]) for record in looked]
    assert numbers == sorted(set(numbers))
    assert (len(numbers), numbers[0]) == (24, 0)
    assert len({record.captions[0] for record in looked}) == classes
    assert (found.total, found.exact, found.kind) == (300, True, "parquet files")
    assert len(list(parquet.sample(ParquetSource(path=str(here)), 300, 1).records)) == 300


def test_a_picture_that_changed_is_news(here):
    write(here, {"a.png": ONE, "b.png": TWO})
    pq.write_table(by_path("struct", ["a.png", "b.png"]), here / "a.parquet")
    source = ParquetSource(path=str(here))
    before = sources.fingerprint(source)
    assert sources.fingerprint(source) == before
    assert {record.mark for record in records(here)} == {""}  # so it is read each time
    write(here, {"b.png": picture(3)})
    os.utime(here / "b.png", ns=(1, 1))
    assert sources.fingerprint(source) != before
    assert sources.fingerprint(ParquetSource(path=str(here / "a.parquet"))) != before
