"""Parquet files with picture bytes and captions, as Hugging Face datasets store them; local or in S3.

The image column holds bytes, a struct whose field `bytes` does, or paths of files in the Parquet file's
folder; the caption column text, a list of it, or numbers of classes whose names Hugging Face's metadata tell.
Where a file has no column of the name that is set by default, its columns are found by type and name.

A few bytes of a file can stand for gigabytes. So the sizes in the headers of pages are looked at before Arrow
unpacks them, and rows are read so few at a time that they fit the memory even if all are the largest. Where
these are is read here, too: pyarrow's `RowGroupMetaData.column` ends the process over wrong statistics.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import accumulate, chain, groupby, islice
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from model.config import ParquetSource
from model.data import listing
from model.data.captions import (
    CAPTION_FIELDS,
    FILE_FIELDS,
    LARGEST_TEXT,
    MOST_CAPTIONS,
    as_list,
    decode,
    lookup,
    parse,
    shown,
)
from model.data.sources import (
    LARGEST_PICTURE,
    NAMES,
    SUFFIXES,
    Known,
    Record,
    Sample,
    marked,
    nothing_known,
    suffix,
    too_large,
)
from model.data.sources.tree import Tree, Unreadable, joined, meant, open_tree
from model.errors import UserError
from model.plumbing import speech, storage

Fields = dict[int, Any]  # of a struct of Thrift, by number
Wanted = dict[int, Any]  # the kind of each, or for structs and lists of them what is wanted of these

BATCH = 64  # rows read at a time, at most
BATCH_BYTES = 1 << 27  # of those rows, in memory
LARGEST_PAGE = 1 << 28  # bytes, unpacked
LARGEST_UNFOLDED = 1 << 32  # bytes of a row group's values that a dictionary stands for
MOST_VALUES = 1 << 25  # of a column in a row group; lists of captions have more than there are rows
DICTIONARY = (2, 8)  # encodings of pages that hold numbers of entries
LONGEST_HEADER = 1 << 16  # bytes of a page's header
TAIL = 1 << 16  # bytes of a file's end, with most footers in it
LARGEST_FOOTER = 1 << 24  # bytes
SMALL_FOOTER = 1 << 20  # bytes of one whose parts need not be counted
MOST_PARTS = 1 << 20  # schema's elements and chunks, for each of which Arrow takes up to 700 bytes
BYTE, I16, I32, I64, BINARY, LIST, STRUCT = 3, 4, 5, 6, 8, 9, 12  # kinds of fields
WIDTHS = {1: 0, 2: 0, BYTE: 1, 7: 8}  # bytes of others; 1 and 2 are true and false, 7 is a double
# The fields that are read, by number, and their kinds: https://github.com/apache/parquet-format
FOOTER: Wanted = {2: {}, 4: {1: {3: {7: I64, 9: I64, 11: I64, 12: {3: I64}}}}}
PAGE: Wanted = {2: I32, 3: I32, 5: {1: I32, 2: I32}, 7: {1: I32}, 8: {1: I32, 4: I32}}
DAMAGE = (LookupError, ValueError, TypeError, AttributeError, RecursionError)  # what it throws at the reader
LONGEST_PATH = 4096  # bytes
IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
PATH_NAMES = ("image_path", "path", "file_path", "filepath", "filename")
CAPTION_NAMES = (
    "prompt",
    "description",
    "alt_text",
    "title",
    "sentences",
    "sentence",
    "name",
    "label",
    "class",
)
SIDE_BY_SIDE = 16  # files looked at together
LOOKED_AT = 8  # row groups of which a look reads some rows, at least
LOOKED_THROUGH = 1 << 28  # bytes of these, up to which all of them is read


def iterate(
    config: ParquetSource, side: int, start: int = 0, known: Known = nothing_known
) -> Iterator[Record]:
    """Rows in the order of the files' names; whole files and row groups before `start` are not read.

    A file is a unit.
    """
    said = set[str]()
    for uri, state in _marks(config):
        mark = marked(state, config.image_column, config.caption_column)
        if known(uri, mark):
            yield Record(uri, b"", unit=uri, mark=mark, known=True)
            continue
        with storage.open_read(uri) as file, _opened(file, uri, config) as (table, columns):
            count = table.metadata.num_rows
            _say(columns, said)
            if _by_path(table.metadata, file, uri, columns.image):
                mark = ""  # of files that nothing here tells the state of
            for record in _records(table, file, uri, columns, start):
                yield replace(record, unit=uri, mark=mark)
        start = max(0, start - count)


def fingerprint(config: ParquetSource) -> str:
    """A hash over the files' names and marks, and those of all files around them where rows name some."""
    marks = _marks(config)
    lines = [f"{uri}\0{mark}" for uri, mark in marks] + _named(config, [uri for uri, _ in marks])
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _named(config: ParquetSource, uris: list[str]) -> list[str]:
    """Names and states of the files around those that name pictures.

    Nothing is opened where no pictures are, nor is the folder of a single file listed if it names none.
    """

    def names(uri: str) -> bool:
        return names_pictures(config, uri)

    lines = []
    for place, there in groupby(sorted(uris, key=os.path.dirname), key=os.path.dirname):
        if len(uris) == 1 and not names(uris[0]):
            continue
        tree = open_tree(place)
        files = [joined(folder.path, name) for folder in tree.folders() for name in folder.names]
        if any(suffix(name) in SUFFIXES for name in files) and any(map(names, there)):
            lines += [f"{name}\0{tree.state(name)}" for name in files if suffix(name) != ".parquet"]
    return lines


def names_pictures(config: ParquetSource, uri: str) -> bool:
    """Whether rows of a file name pictures that lie beside it, all or some."""
    with storage.open_read(uri) as file, _opened(file, uri, config) as (table, columns):
        return _by_path(table.metadata, file, uri, columns.image)


def _marks(config: ParquetSource) -> list[tuple[str, str]]:
    uris = _files(config)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return list(zip(uris, pool.map(storage.mark, uris), strict=True))


def count(config: ParquetSource) -> int:
    """Rows of all files, from their footers; a file that is not what it should be is refused here already."""
    return sum(group.rows for group in _groups(config))


def sample(config: ParquetSource, most: int, seconds: float) -> Sample:
    """Rows of row groups all over the files, which are often sorted: of small groups all over them, of large
    ones the first.
    """
    groups = _groups(config)
    total = sum(group.rows for group in groups)
    wanted = min(len(groups), max(LOOKED_AT, -(-most * len(groups) // max(1, total))))
    chosen = [groups[place * len(groups) // wanted] for place in range(wanted)]
    each = most if total <= most else -(-most // wanted)

    def records() -> Iterator[Record]:
        said = set[str]()
        for uri, first, count, size in chosen:
            step = max(1, count // each) if size * wanted <= LOOKED_THROUGH else 1
            with storage.open_read(uri) as file, _opened(file, uri, config) as (table, columns):
                _say(columns, said)
                yield from islice(_records(table, file, uri, columns, first, step), min(each, count))

    return Sample(records(), NAMES[config.kind], total)


class Group(NamedTuple):
    """A row group."""

    uri: str
    first: int  # number of its first row in the file
    rows: int
    size: int  # bytes, unpacked


def _groups(config: ParquetSource) -> list[Group]:
    """Those of all files, but empty ones, in order."""

    def of(uri: str) -> list[Group]:
        with storage.open_read(uri) as file, _opened(file, uri, config) as (table, _):
            groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
        firsts = accumulate((group.num_rows for group in groups), initial=0)
        return [
            Group(uri, first, group.num_rows, group.total_byte_size)
            for first, group in zip(firsts, groups, strict=False)
            if group.num_rows
        ]

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return list(chain.from_iterable(pool.map(of, _files(config))))


def _say(columns: Columns, said: set[str]) -> None:
    """Which columns were chosen, where nobody set them and it was not said yet."""
    if columns.chosen and columns.chosen not in said:
        said.add(columns.chosen)
        speech.say("images", columns.chosen)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────


def _files(config: ParquetSource) -> list[str]:
    """The file itself, or those of a folder (all levels) or glob (of names in one folder), sorted by path."""
    path = config.path if storage.is_s3(config.path) else os.path.abspath(os.path.expanduser(config.path))
    try:
        found = listing.files(path, (".parquet",))
    except UserError as error:
        raise UserError(f"data.source.path: {error}") from None
    if not found:
        raise UserError(f"data.source.path: no parquet file at {config.path}")
    return found


@contextmanager
def opened(file: BinaryIO, where: str, texts: list[str]) -> Iterator[pq.ParquetFile]:
    """A Parquet file; `texts` are columns of short texts that repeat."""
    with _explained(where):
        yield _table(file, _metadata(file, where), texts)


@contextmanager
def _opened(file: BinaryIO, uri: str, config: ParquetSource) -> Iterator[tuple[pq.ParquetFile, Columns]]:
    """A file, and its columns that are wanted."""
    with _explained(f"data.source.path: {uri}"):
        metadata = _metadata(file, f"data.source.path: {uri}")
        columns = _columns(metadata.schema.to_arrow_schema(), uri, config)
        yield _table(file, metadata, [columns.caption]), columns


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError:
        raise UserError(f"{where}: the name of a column is not UTF-8; give it another") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None


def _table(file: BinaryIO, metadata: pq.FileMetaData, texts: list[str]) -> pq.ParquetFile:
    # Read as numbers into a dictionary, a value that is said a thousand times is held once.
    shared = [path for path in _leaves(metadata) if any(_of(path, name) for name in texts)]
    return pq.ParquetFile(file, metadata=metadata, read_dictionary=shared, buffer_size=storage.READ_AHEAD)


def _leaves(metadata: pq.FileMetaData) -> list[str]:
    """Paths of what columns are made of, in the order of a row group's chunks."""
    return [metadata.schema.column(number).path for number in range(metadata.num_columns)]


def _of(path: str, column: str) -> bool:
    """Whether a leaf belongs to a column; the name of a column may have dots."""
    return path.lower() == column.lower() or path.lower().startswith(f"{column.lower()}.")


# ── columns ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Columns:
    """Those of a file that are read."""

    image: str
    caption: str
    classes: tuple[str, ...] = ()  # names of those that captions are numbers of
    chosen: str = ""  # says so, where they are not the ones that were set

    def named(self, caption: pa.Scalar) -> pa.Scalar:
        """A caption, in place of the number of a class."""
        if not self.classes or not caption.is_valid:
            return caption
        number = caption.as_py()
        known = isinstance(number, int) and 0 <= number < len(self.classes)
        return pa.scalar(self.classes[number] if known else None, pa.string())


def _columns(schema: pa.Schema, uri: str, config: ParquetSource) -> Columns:
    """The columns that are set, or where the default ones are not there those that look like them.

    Raises:
        UserError: there is none.
    """
    types = dict(zip(schema.names, schema.types, strict=True))
    features = _features(schema)
    found: dict[str, str] = {}
    for field, look in (("image_column", _image_column), ("caption_column", _caption_column)):
        column = getattr(config, field)
        if column not in types and column == ParquetSource.model_fields[field].default:
            column = look(types, features) or column
        if column not in types:
            raise UserError(
                f"data.source.{field}: {uri} has no column '{column}'; it has {', '.join(map(shown, types))}"
            )
        _refuse_twins(schema, f"data.source.{field}: {uri}", column)
        found[field] = column
    image, caption = found.values()
    is_class = not _is_text(types[caption]) and _is(features.get(caption), "ClassLabel")
    classes = tuple(str(name).replace("_", " ") for name in features[caption]["names"]) if is_class else ()
    chosen = ""
    if found != {field: getattr(config, field) for field in found}:
        what = "names of classes" if classes else "captions"
        chosen = f"pictures are in the column '{shown(image)}', {what} in '{shown(caption)}'"
    return Columns(image, caption, classes, chosen)


def _refuse_twins(schema: pa.Schema, where: str, column: str) -> None:
    """Refuse a name that several columns have: nothing says which is meant."""
    if (count := schema.names.count(column)) > 1:
        raise UserError(f"{where}: {count} columns are called '{shown(column)}'; rename all but one")


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's metadata say of columns; nothing where there are none that make sense."""
    text = (schema.metadata or {}).get(b"huggingface", b"")
    try:
        features = parse(text[: LARGEST_TEXT + 1].decode())["info"]["features"]
    except (ValueError, LookupError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _is(feature: Any, kind: str) -> bool:
    if not isinstance(feature, dict) or feature.get("_type") != kind:
        return False
    return kind != "ClassLabel" or isinstance(feature.get("names"), list)


def _image_column(types: Mapping[str, pa.DataType], features: Mapping[str, Any]) -> str:
    """The column that pictures are in; "" where none looks so."""
    structs = {name: name for name, kind in types.items() if _is_struct(kind)}
    bytes_ = {name: name for name, kind in types.items() if _is_binary(kind)}
    paths = {name: name for name, kind in types.items() if _is_text(kind) and not pa.types.is_list(kind)}
    said = next((name for name in types if _is(features.get(name), "Image")), "")
    return (
        said
        or _known(structs, IMAGE_NAMES)
        or next(iter(structs), "")
        or _known(bytes_, IMAGE_NAMES)
        or next(iter(bytes_), "")
        or _known(paths, (*FILE_FIELDS, *PATH_NAMES))
    )


def _caption_column(types: Mapping[str, pa.DataType], features: Mapping[str, Any]) -> str:
    """The column that captions are in; "" where none looks so."""
    texts = {name: name for name, kind in types.items() if _is_text(kind)}
    classes = [name for name in types if _is(features.get(name), "ClassLabel")]
    return _known(texts, (*CAPTION_FIELDS, *CAPTION_NAMES)) or next(iter(classes), "")


def _known(columns: Mapping[str, str], names: tuple[str, ...]) -> str:
    """The first of these names that a column has, in any case."""
    found = lookup(columns, names)
    return found[1] if found else ""


def _is_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and any(
        field.name == "bytes" and _is_binary(field.type) for field in kind.fields
    )


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _by_path(metadata: pq.FileMetaData, file: BinaryIO, where: str, image: str) -> bool:
    """Whether rows name files, all or some."""
    kind = metadata.schema.to_arrow_schema().field(image).type
    if _is_text(kind):
        return True
    if not _is_struct(kind):
        return False
    chunks = chain.from_iterable(_chunks(metadata, file, where))
    return any(chunk.path == f"{image}.bytes" and chunk.nulls for chunk in chunks)


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────


def rows(
    table: pq.ParquetFile, file: BinaryIO, where: str, columns: list[str], start: int = 0
) -> Iterator[Mapping[str, pa.Scalar]]:
    """Rows from number `start` on, as the scalars of the wanted columns.

    Raises:
        UserError: a page, or a column of a row group, is larger than can be read; two columns share a name.
    """
    for column in columns:
        _refuse_twins(table.schema_arrow, where, column)
    for group, chunks in enumerate(_chunks(table.metadata, file, where)):
        count = table.metadata.row_group(group).num_rows
        if start >= count:
            start -= count
            continue
        read = [chunk for chunk in chunks if any(_of(chunk.path, column) for column in columns)]
        batch_rows = _rows_at_once(read, file, where)
        for batch in table.iter_batches(batch_rows, row_groups=[group], columns=columns):
            first, start = min(start, len(batch)), max(0, start - len(batch))
            for row in zip(*(batch.column(name)[first:] for name in columns), strict=True):
                yield dict(zip(columns, row, strict=True))


def plain(scalar: pa.Scalar, most: int) -> Any:
    """Bytes and text as text, lists of them as lists, all else as None.

    Raises:
        ValueError: more bytes than `most`.
    """
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar) and scalar.is_valid:
        if len(scalar.values) > MOST_CAPTIONS:
            raise ValueError(f"{len(scalar.values)} of them, more than the {MOST_CAPTIONS} that are read")
        found = []
        for value in scalar.values:
            found.append(plain(value, most))
            most -= len(found[-1] or "")
        return found
    buffer = _buffer(scalar)
    if buffer is None:
        return None
    if buffer.size > most:
        raise ValueError(too_large(buffer.size, most))
    return decode(buffer.to_pybytes())


def _records(
    table: pq.ParquetFile, file: BinaryIO, uri: str, columns: Columns, start: int, step: int = 1
) -> Iterator[Record]:
    """What the rows of a file are from number `start` on, or every so many of them."""
    read = _reader(uri)
    wanted = [columns.image, columns.caption]
    for number, row in enumerate(rows(table, file, uri, wanted, start), start):
        if (number - start) % step == 0:
            captions = columns.named(row[columns.caption])
            record = _record(f"{os.path.basename(uri)}:{number}", row[columns.image], captions, read)
            yield replace(record, place=number)


def _record(key: str, image: pa.Scalar, caption: pa.Scalar, read: Callable[[str], bytes]) -> Record:
    try:
        captions = as_list(plain(caption, LARGEST_TEXT))
    except ValueError as error:
        return Record(key, b"", problem=f"captions: {error}")
    path = image if _is_text(image.type) else None
    if isinstance(image, pa.StructScalar):
        fields = {name: image[name] for name in image.type.names} if image.is_valid else {}
        path = fields.get("path")
        image = fields.get("bytes", image)
    buffer = None if image is path else _buffer(image)
    if buffer is not None:
        if buffer.size > LARGEST_PICTURE:
            return Record(key, b"", captions, problem=too_large(buffer.size, LARGEST_PICTURE))
        return Record(key, buffer.to_pybytes(), captions)
    try:
        name = plain(path, LONGEST_PATH) if path is not None else None
        if not name:
            return Record(key, b"", captions, problem="no picture bytes in this row")
        return Record(key, read(name), captions)
    except (ValueError, Unreadable) as error:
        return Record(key, b"", captions, problem=f"its picture {error}")


def _reader(uri: str) -> Callable[[str], bytes]:
    """Reads pictures that rows name: files in the folder of the Parquet file, and no others."""
    place = os.path.dirname(uri)

    @cache
    def tree() -> Tree:
        return open_tree(place)

    def read(name: str) -> bytes:
        return tree().read(meant(tree(), "", name), LARGEST_PICTURE)

    return read


def _buffer(scalar: pa.Scalar) -> pa.Buffer | None:
    if isinstance(scalar, pa.DictionaryScalar):
        scalar = scalar.value
    return scalar.as_buffer() if hasattr(scalar, "as_buffer") else None


# ── pages ───────────────────────────────────────────────────────────────────────────────────────────────


class Chunk(NamedTuple):
    """The values of a leaf in a row group."""

    path: str  # of the leaf
    at: int  # where its pages begin
    end: int
    nulls: int  # how many of them are none, as far as that is said


def _metadata(file: BinaryIO, where: str) -> pq.FileMetaData:
    """What Arrow makes of a file's footer.

    Raises:
        UserError: that would take too much of the memory.
    """
    if len(footer := _footer(file, where)) > SMALL_FOOTER:
        try:
            said = _told(footer)
            parts = len(said[2]) + sum(len(group[1]) for group in said[4])
        except DAMAGE:
            raise UserError(f"{where}: the footer is damaged") from None
        if parts > MOST_PARTS:
            raise UserError(
                f"{where}: the footer tells of {parts:,} columns and pieces of columns, more than the"
                f" {MOST_PARTS:,} that are read; write it in larger row groups"
            )
    return pq.read_metadata(file)


def _footer(file: BinaryIO, where: str) -> bytes:
    """The bytes of a footer, as far as they are there. Raises UserError: they are too many."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL))  # as Arrow does: from S3 it comes once for both
    tail = file.read(TAIL)
    length = int.from_bytes(tail[-8:-4], "little")
    if LARGEST_FOOTER < length < size:
        raise UserError(f"{where}: its footer has {too_large(length, LARGEST_FOOTER)}")
    if len(tail) < length + 8 <= size:
        file.seek(size - 8 - length)
        tail = file.read(length + 8)
    return tail[-8 - length : -8]


@lru_cache(maxsize=1)  # a look opens a file for each of its row groups
def _told(footer: bytes) -> Fields:
    return _struct(footer, FOOTER)[0]


def _chunks(metadata: pq.FileMetaData, file: BinaryIO, where: str) -> list[list[Chunk]]:
    """The chunks of each row group, from the footer of a file that Arrow has opened."""
    leaves = _leaves(metadata)
    try:
        groups = (group[1] for group in _told(_footer(file, where))[4])
        return [[_chunk(path, one[3]) for path, one in zip(leaves, group, strict=True)] for group in groups]
    except DAMAGE:
        raise UserError(f"{where}: the footer is damaged") from None


def _chunk(path: str, said: Fields) -> Chunk:
    size, data, dictionary = said[7], said[9], said.get(11, 0)
    at = dictionary if 0 < dictionary < data else data
    if min(at, size) < 0:
        raise ValueError
    return Chunk(path, at, at + size, said.get(12, {}).get(3, 0))


def _rows_at_once(chunks: list[Chunk], file: BinaryIO, where: str) -> int:
    """How many rows of a group fit the memory, from the headers of the pages of these chunks."""
    largest = 1.0  # bytes of a value
    for chunk in chunks:
        values, entries, unfolded = 0, 0.0, 0.0
        at = chunk.at
        while at < chunk.end:
            file.seek(at)
            try:
                page, length = _struct(file.read(LONGEST_HEADER), PAGE)
                size, packed = page[2], page[3]
                kind = next(kind for kind in (5, 7, 8) if kind in page)  # data, dictionary, data v2
                held = page[kind][1]
                if min(size, packed, held) < 0:
                    raise ValueError
            except (*DAMAGE, StopIteration):
                raise UserError(f"{where}: the header of a page is damaged") from None
            values += held
            if size > LARGEST_PAGE or values > MOST_VALUES:
                raise UserError(
                    f"{where}: column {chunk.path} has a page of {size:,} bytes, {values:,} values;"
                    f" at most {LARGEST_PAGE:,} and {MOST_VALUES:,} are read, write it in smaller row groups"
                )
            if kind == 7:
                entries = size / max(1, held)  # bytes of each, on average
            elif page[kind].get(2 if kind == 5 else 4) in DICTIONARY:
                unfolded += held * entries
            if unfolded > LARGEST_UNFOLDED:
                raise UserError(
                    f"{where}: column {chunk.path} stands for {unfolded:,.0f} bytes, more than the"
                    f" {LARGEST_UNFOLDED:,} that are read; write it without dictionary"
                )
            largest = max(largest, size if kind == 7 else size / max(1, held))
            at += length + packed
    return max(1, min(BATCH, int(BATCH_BYTES / largest)))


def _struct(data: bytes, wanted: Wanted) -> tuple[Fields, int]:
    """The wanted fields of a struct, by number, and its length in bytes.

    A field that is not of the wanted kind is passed over, as by Arrow. Thrift's compact protocol, as far as
    Parquet needs it: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
    """
    at = 0

    def byte() -> int:
        nonlocal at
        at += 1
        return data[at - 1]

    def number() -> int:
        value = shift = 0
        while shift < 64:
            part = byte()
            value |= (part & 127) << shift
            shift += 7
            if part < 128:
                return value
        raise ValueError("no number is as long")

    def signed() -> int:
        value = number()
        return (value >> 1) ^ -(value & 1)

    def struct(wanted: Wanted) -> Fields:
        fields: Fields = {}
        last = 0
        while head := byte():
            last = last + (head >> 4) if head >> 4 else signed()
            kind, want = head & 15, wanted.get(last)
            fits = kind in (LIST, STRUCT) if isinstance(want, dict) else kind == want
            found = value(kind, want if isinstance(want, dict) else {})
            if fits and last in fields:
                raise ValueError("a field comes twice")
            if fits:
                fields[last] = found
        return fields

    def value(kind: int, wanted: Wanted) -> Any:
        nonlocal at
        if kind in (I16, I32, I64):
            return signed()
        if kind == STRUCT:
            return struct(wanted)
        if kind == LIST:
            head = byte()
            count = number() if head >> 4 == 15 else head >> 4
            kind = max(head & 15, BYTE)  # in a list true and false are bytes
            return [value(kind, wanted) for _ in range(count)]
        if kind not in WIDTHS and kind != BINARY:
            raise ValueError(f"no field is of kind {kind}")
        width = number() if kind == BINARY else WIDTHS[kind]  # moves `at` as well
        at += width
        return None

    return struct(wanted), at
