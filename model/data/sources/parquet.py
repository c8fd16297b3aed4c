"""Parquet files with picture bytes and captions, as Hugging Face datasets store them; local or in S3.

The image column holds bytes, or a struct whose field `bytes` does; the caption column text or a list of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from model.config import ParquetSource
from model.data.sources import Record
from model.errors import UserError
from model.plumbing import environment, storage

BATCH = 64  # rows read at a time
SIDE_BY_SIDE = 16  # files looked at together


def iterate(config: ParquetSource, side: int, start: int = 0) -> Iterator[Record]:
    """Rows in the order of the files' names; whole files before `start` are not read."""
    filesystem, files = _files(config)
    for info in files:
        with _opened(filesystem, info, config) as table:
            if start >= table.metadata.num_rows:
                start -= table.metadata.num_rows
                continue
            row = -1
            for batch in table.iter_batches(BATCH, columns=[config.image_column, config.caption_column]):
                images = batch.column(config.image_column)
                captions = batch.column(config.caption_column)
                for image, caption in zip(images, captions, strict=True):
                    row += 1
                    if row >= start:
                        yield _record(f"{info.base_name}:{row}", image.as_py(), caption.as_py())
            start = 0


def fingerprint(config: ParquetSource) -> str:
    """A hash over names, sizes and times of change of the files."""
    _, files = _files(config)
    listing = "\n".join(f"{info.path}\0{info.size}\0{info.mtime_ns}" for info in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def count(config: ParquetSource) -> int:
    """Rows of all files, from their footers; a file that is not what it should be is refused here already."""
    filesystem, files = _files(config)

    def rows(info: pafs.FileInfo) -> int:
        with _opened(filesystem, info, config) as table:
            return int(table.metadata.num_rows)

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return sum(pool.map(rows, files))


@contextmanager
def _opened(
    filesystem: pafs.FileSystem, info: pafs.FileInfo, config: ParquetSource
) -> Iterator[pq.ParquetFile]:
    """A file that has the columns that are wanted."""
    try:
        with pq.ParquetFile(filesystem.open_input_file(info.path)) as table:
            _check_columns(table, config, info.path)
            yield table
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"data.source.path: {info.path}: {_one_line(error)}") from None


def _record(key: str, image: Any, caption: Any) -> Record:
    data = image.get("bytes") if isinstance(image, dict) else image
    captions = caption if isinstance(caption, list) else [caption]
    if not isinstance(data, bytes):
        return Record(key, b"", captions, problem="no picture bytes in this row")
    return Record(key, data, captions)


def _check_columns(table: pq.ParquetFile, config: ParquetSource, path: str) -> None:
    present = table.schema_arrow.names
    for field, column in (("image_column", config.image_column), ("caption_column", config.caption_column)):
        if column not in present:
            raise UserError(
                f"data.source.{field}: {path} has no column '{column}'; it has {', '.join(present)}"
            )


def _files(config: ParquetSource) -> tuple[pafs.FileSystem, list[pafs.FileInfo]]:
    """The file itself, or those of a folder (all levels) or glob (of names in one folder), sorted by path."""
    filesystem, path = _filesystem(config.path)
    folder, _, pattern = path.rpartition("/")
    try:
        if "*" in pattern:
            selector = pafs.FileSelector(folder or ".", allow_not_found=True)
            found = [info for info in filesystem.get_file_info(selector) if fnmatch(info.base_name, pattern)]
        else:
            info = filesystem.get_file_info(path)
            found = [info]
            if info.type == pafs.FileType.Directory:
                selector = pafs.FileSelector(path, recursive=True)
                found = [i for i in filesystem.get_file_info(selector) if i.extension == "parquet"]
    except OSError as error:
        raise UserError(f"data.source.path: {config.path}: {_one_line(error)}") from None
    files = sorted((i for i in found if i.type == pafs.FileType.File), key=lambda i: i.path)
    if not files:
        raise UserError(f"data.source.path: no parquet file at {config.path}")
    return filesystem, files


def _filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    if not path.startswith("s3://"):
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    scheme, _, endpoint = environment.S3_ENDPOINT_URL.get().rpartition("://")
    patience = environment.S3_PATIENCE.get()
    filesystem = pafs.S3FileSystem(
        endpoint_override=endpoint or None,
        scheme=scheme or "https",
        region=environment.AWS_DEFAULT_REGION.get(),
        connect_timeout=patience,
        request_timeout=patience,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(storage.ATTEMPTS),
    )
    return filesystem, path.removeprefix("s3://").rstrip("/")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
