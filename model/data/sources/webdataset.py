"""Tar shards as img2dataset writes them, local or in S3, read as streams.

A sample is the files that share a name: a picture, and its captions in `.txt` (one per line) or under
`captions` or `caption` in `.json`. Samples before the place where a shard breaks off are used; the break is
quarantined under the shard's name.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_iterator

from model.config import WebDatasetSource
from model.data.sources import SUFFIXES, Record
from model.errors import UserError
from model.plumbing import storage

HEAD = 1 << 16  # bytes of each shard that enter the fingerprint, with its size
SIDE_BY_SIDE = 16  # shards looked at together


def iterate(config: WebDatasetSource, side: int, start: int = 0) -> Iterator[Record]:
    """Samples of all shards, in the order of the range and of each tar."""
    yield from islice((record for uri in _uris(config) for record in _shard(uri)), start, None)


def fingerprint(config: WebDatasetSource) -> str:
    """A hash over every shard's name, size and first 64 KiB."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for mark in pool.map(_mark, _uris(config)):
            digest.update(mark)
    return digest.hexdigest()


def count(config: WebDatasetSource) -> int:
    """Samples of all shards, from img2dataset's `_stats.json` beside each; 0 where one is missing."""
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        counts = list(pool.map(_samples, _uris(config)))
    return sum(counts) if all(counts) else 0


def _samples(uri: str) -> int:
    try:
        stats = json.loads(storage.read_bytes(f"{uri.removesuffix('.tar')}_stats.json"))
        return int(stats["successes"])
    except (UserError, ValueError, KeyError, TypeError, OverflowError):
        return 0  # another program's shards, or none of our business: pictures are judged without it


def _uris(config: WebDatasetSource) -> list[str]:
    uris = list(expand_urls(config.urls))
    if not all(uri.endswith(".tar") for uri in uris):
        raise UserError(
            f"data.source.urls: {config.urls} must name .tar shards, e.g. s3://b/p/{{000..999}}.tar"
        )
    return uris


def _mark(uri: str) -> bytes:
    with storage.open_read(uri) as stream:
        head = stream.read(HEAD)
        size = stream.seek(0, 2)
    return f"{uri}\0{size}\0{hashlib.sha256(head).hexdigest()}\n".encode()


def _shard(uri: str) -> Iterator[Record]:
    problem = ""

    def files(stream: Any) -> Iterator[dict[str, Any]]:
        nonlocal problem
        try:
            for file in tar_file_iterator(stream):
                yield file | {"__url__": uri}
        except tarfile.TarError as error:  # what was read before it is whole
            problem = f"the tar breaks off: {error}"

    count = 0
    with storage.open_read(uri) as stream:
        try:
            for sample in group_by_keys(files(stream)):
                count += 1
                yield _record(sample)
        except ValueError as error:  # two files of one name: samples can no longer be told apart
            problem = f"after {count} samples: {error.args[0]}"
    if problem:
        yield Record(uri, b"", problem=problem)


def _record(sample: dict[str, Any]) -> Record:
    image = next((data for name, data in sample.items() if f".{name}" in SUFFIXES), None)
    captions = sample.get("txt", b"").decode("utf-8", "replace").splitlines()
    try:
        notes = json.loads(sample.get("json", b"{}"))
    except ValueError:
        notes = {}
    if isinstance(notes, dict):
        more = notes.get("captions") or notes.get("caption") or []
        captions += more if isinstance(more, list) else [more]
    if image is None:
        return Record(sample["__key__"], b"", captions, problem="no picture beside its other files")
    return Record(sample["__key__"], image, captions)
