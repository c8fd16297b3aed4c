"""Parquet files with picture bytes and captions, as Hugging Face datasets store them; local or in S3.

The image column holds bytes, or a struct whose field `bytes` does; the caption column text or a list of it.

A few bytes of a file can stand for gigabytes. So the sizes in the headers of pages are looked at before Arrow
unpacks them, and rows are read so few at a time that they fit the memory even if all are the largest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from model.config import ParquetSource
from model.data.captions import LARGEST_TEXT, as_list, decode
from model.data.sources import LARGEST_PICTURE, Known, Record, marked, nothing_known, suffix, too_large
from model.errors import UserError
from model.plumbing import storage

BATCH = 64  # rows read at a time, at most
BATCH_BYTES = 1 << 27  # of those rows, in memory
LARGEST_PAGE = 1 << 28  # bytes, unpacked
LARGEST_UNFOLDED = 1 << 32  # bytes of a row group's values that a dictionary stands for
MOST_VALUES = 1 << 25  # of a column in a row group; lists of captions have more than there are rows
DICTIONARY = (2, 8)  # encodings of pages that hold numbers of entries
LONGEST_HEADER = 1 << 16  # bytes of a page's header
MOST_CAPTIONS = 10_000  # of a picture
SIDE_BY_SIDE = 16  # files looked at together


def iterate(
    config: ParquetSource, side: int, start: int = 0, known: Known = nothing_known
) -> Iterator[Record]:
    """Rows in the order of the files' names; whole files and row groups before `start` are not read.

    A file is a unit.
    """
    for uri, state in _marks(config):
        mark = marked(state, config.image_column, config.caption_column)
        if known(uri, mark):
            yield Record(uri, b"", unit=uri, mark=mark, known=True)
            continue
        with storage.open_read(uri) as file, _opened(file, uri, config) as table:
            count = table.metadata.num_rows
            wanted = [config.image_column, config.caption_column]
            for number, row in enumerate(rows(table, file, uri, wanted, start), start):
                record = _record(f"{os.path.basename(uri)}:{number}", *(row[name] for name in wanted))
                yield replace(record, unit=uri, mark=mark, place=number)
        start = max(0, start - count)


def fingerprint(config: ParquetSource) -> str:
    """A hash over the files' names and marks."""
    listing = "\n".join(f"{uri}\0{mark}" for uri, mark in _marks(config))
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()


def _marks(config: ParquetSource) -> list[tuple[str, str]]:
    uris = _files(config)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return list(zip(uris, pool.map(storage.mark, uris), strict=True))


def count(config: ParquetSource) -> int:
    """Rows of all files, from their footers; a file that is not what it should be is refused here already."""

    def length(uri: str) -> int:
        with storage.open_read(uri) as file, _opened(file, uri, config) as table:
            return int(table.metadata.num_rows)

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return sum(pool.map(length, _files(config)))


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────


def _files(config: ParquetSource) -> list[str]:
    """The file itself, or those of a folder (all levels) or glob (of names in one folder), sorted by path."""
    path = config.path if storage.is_s3(config.path) else os.path.abspath(os.path.expanduser(config.path))
    folder, _, pattern = path.rstrip("/").rpartition("/")
    try:
        if "*" in pattern:
            found = [name for name in _below(folder) if "/" not in name and fnmatch(name, pattern)]
        elif storage.exists(path):
            return [path]
        else:
            folder = path
            found = [name for name in _below(folder) if suffix(name) == ".parquet"]
    except UserError as error:
        raise UserError(f"data.source.path: {error}") from None
    visible = [name for name in sorted(found) if not any(part.startswith(".") for part in name.split("/"))]
    if not visible:
        raise UserError(f"data.source.path: no parquet file at {config.path}")
    return [storage.join(folder, name) for name in visible]


def _below(folder: str) -> list[str]:
    if storage.is_s3(folder):
        return list(storage.list_sizes(folder))

    def closed(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}") from None

    tree = os.walk(folder, onerror=closed) if os.path.isdir(folder) else ()
    return [os.path.relpath(os.path.join(path, name), folder) for path, _, names in tree for name in names]


@contextmanager
def opened(file: BinaryIO, where: str, texts: list[str]) -> Iterator[pq.ParquetFile]:
    """A Parquet file; `texts` are columns of short texts that repeat."""
    try:
        metadata = pq.read_metadata(file)
        paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
        # Read as numbers into a dictionary, a value that is said a thousand times is held once.
        shared = [path for path in paths if any(_of(path, name) for name in texts)]
        yield pq.ParquetFile(file, metadata=metadata, read_dictionary=shared, buffer_size=storage.READ_AHEAD)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None


@contextmanager
def _opened(file: BinaryIO, uri: str, config: ParquetSource) -> Iterator[pq.ParquetFile]:
    """A file that has the columns that are wanted."""
    with opened(file, f"data.source.path: {uri}", [config.caption_column]) as table:
        present = table.schema_arrow.names
        for field in ("image_column", "caption_column"):
            if (column := getattr(config, field)) not in present:
                raise UserError(
                    f"data.source.{field}: {uri} has no column '{column}'; it has {', '.join(present)}"
                )
        yield table


def _of(path: str, column: str) -> bool:
    """Whether a leaf belongs to a column; the name of a column may have dots."""
    return path.lower() == column.lower() or path.lower().startswith(f"{column.lower()}.")


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────


def rows(
    table: pq.ParquetFile, file: BinaryIO, where: str, columns: list[str], start: int = 0
) -> Iterator[Mapping[str, pa.Scalar]]:
    """Rows from number `start` on, as the scalars of the wanted columns.

    Raises:
        UserError: a page, or a column of a row group, is larger than can be read.
    """
    for group in range(table.metadata.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        if start >= count:
            start -= count
            continue
        batch_rows = _rows_at_once(table.metadata.row_group(group), file, where, columns)
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


def _record(key: str, image: pa.Scalar, caption: pa.Scalar) -> Record:
    try:
        captions = as_list(plain(caption, LARGEST_TEXT))
    except ValueError as error:
        return Record(key, b"", problem=f"captions: {error}")
    where = None
    if isinstance(image, pa.StructScalar):
        fields = {name: image[name] for name in image.type.names} if image.is_valid else {}
        where = fields.get("path")
        image = fields.get("bytes", image)
    buffer = _buffer(image)
    if buffer is None:
        only = ", only a path; embed the pictures" if where is not None and where.is_valid else ""
        return Record(key, b"", captions, problem=f"no picture bytes in this row{only}")
    if buffer.size > LARGEST_PICTURE:
        return Record(key, b"", captions, problem=too_large(buffer.size, LARGEST_PICTURE))
    return Record(key, buffer.to_pybytes(), captions)


def _buffer(scalar: pa.Scalar) -> pa.Buffer | None:
    if isinstance(scalar, pa.DictionaryScalar):
        scalar = scalar.value
    return scalar.as_buffer() if hasattr(scalar, "as_buffer") else None


# ── pages ───────────────────────────────────────────────────────────────────────────────────────────────


def _rows_at_once(group: pq.RowGroupMetaData, file: BinaryIO, where: str, columns: list[str]) -> int:
    """How many rows of a group fit the memory, from the headers of its pages."""
    largest = 1.0  # bytes of a value
    for number in range(group.num_columns):
        chunk = group.column(number)
        if not any(_of(chunk.path_in_schema, column) for column in columns):
            continue
        values, entries, unfolded = 0, 0.0, 0.0
        at = min(o for o in (chunk.dictionary_page_offset, chunk.data_page_offset) if o)
        end = at + chunk.total_compressed_size
        while at < end:
            file.seek(at)
            try:
                page, length = _header(file.read(LONGEST_HEADER))
                size, packed = page[2], page[3]
                kind = next(kind for kind in (5, 7, 8) if kind in page)  # data, dictionary, data v2
                held = page[kind][1]
                if min(size, packed, held) < 0:
                    raise ValueError
            except (LookupError, ValueError, TypeError, RecursionError, StopIteration):
                raise UserError(f"{where}: the header of a page is damaged") from None
            values += held
            if size > LARGEST_PAGE or values > MOST_VALUES:
                raise UserError(
                    f"{where}: column {chunk.path_in_schema} has a page of {size:,} bytes, {values:,} values;"
                    f" at most {LARGEST_PAGE:,} and {MOST_VALUES:,} are read, write it in smaller row groups"
                )
            if kind == 7:
                entries = size / max(1, held)  # bytes of each, on average
            elif page[kind].get(2 if kind == 5 else 4) in DICTIONARY:
                unfolded += held * entries
            if unfolded > LARGEST_UNFOLDED:
                raise UserError(
                    f"{where}: column {chunk.path_in_schema} stands for {unfolded:,.0f} bytes, more than the"
                    f" {LARGEST_UNFOLDED:,} that are read; write it without dictionary"
                )
            largest = max(largest, size if kind == 7 else size / max(1, held))
            at += length + packed
    return max(1, min(BATCH, int(BATCH_BYTES / largest)))


def _header(data: bytes) -> tuple[dict[int, Any], int]:
    """The header of a page: fields by number, and its length in bytes.

    Thrift's compact protocol, as far as headers need it:
    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
    """
    at = 0

    def byte() -> int:
        nonlocal at
        at += 1
        return data[at - 1]

    def number() -> int:
        value = shift = 0
        while True:
            part = byte()
            value |= (part & 127) << shift
            shift += 7
            if part < 128:
                return value

    def signed() -> int:
        value = number()
        return (value >> 1) ^ -(value & 1)

    def struct() -> dict[int, Any]:
        nonlocal at
        fields: dict[int, Any] = {}
        last = 0
        while head := byte():
            last = last + (head >> 4) if head >> 4 else signed()
            kind = head & 15
            if kind in (1, 2):
                fields[last] = kind == 1
            elif kind in (4, 5, 6):
                fields[last] = signed()
            elif kind == 8:
                length = number()  # moves `at` as well
                at += length
            elif kind == 12:
                fields[last] = struct()
            else:
                raise ValueError(f"no header has a field of kind {kind}")
        return fields

    return struct(), at
