"""Pictures into image shards: WebDataset tars, and beside each what it contains."""

from __future__ import annotations

import io
import json
import sqlite3
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from model.data.records import contents_lines, contents_name
from model.plumbing.assets import AssetWriter, File

SPLITS = ("train", "validation", "composition")


@dataclass
class Entry:
    """A picture that waits in a spool file."""

    suffix: str
    offset: int
    size: int  # 0 where the picture is in the asset that this one grows from
    captions: list[str]
    composition: bool = False
    sources: list[str] = field(default_factory=list)

    def join(self, captions: Iterable[str], composition: bool, source: str) -> None:
        """Add what is said of a duplicate."""
        self.captions = list(dict.fromkeys([*self.captions, *captions]))
        self.composition |= composition
        self.sources.append(source)


def shard_name(split: str, number: int) -> str:
    """Of the shards of a split."""
    return f"{split}-{number:06d}.tar"


def add_shard(
    writer: AssetWriter, name: str, members: Mapping[bytes, Entry], spool: IO[bytes], scratch: Path
) -> list[File]:
    """Write a shard and its contents: pictures by the hash of their pixels. Their entries in the manifest."""
    path = scratch / name
    write_tar(path, members, spool)
    tar = writer.add_file(name, path)
    path.unlink()
    listed = contents_lines((content, entry.captions) for content, entry in members.items())
    return [tar, writer.add_bytes(contents_name(name), listed)]


def write_tar(path: Path, members: Mapping[bytes, Entry], spool: IO[bytes]) -> None:
    """WebDataset layout; the same members give the same bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for content, entry in members.items():
            spool.seek(entry.offset)
            notes = {"captions": entry.captions, "sources": entry.sources}
            text = json.dumps(notes, ensure_ascii=False).encode()
            for suffix, data in ((entry.suffix, spool.read(entry.size)), ("json", text)):
                info = tarfile.TarInfo(f"{content.hex()}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def table(path: Path, *statements: str) -> sqlite3.Connection:
    """A database on disk that is of no use after a crash, and need not be durable."""
    made = sqlite3.connect(path, isolation_level=None)
    for statement in ("PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF", *statements):
        made.execute(statement)
    return made


class Seen:
    """Content hashes of all earlier chunks, on disk: 20 bytes each, and no memory."""

    def __init__(self, path: Path) -> None:
        self._table = table(path, "CREATE TABLE seen (content BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, hashes: list[bytes]) -> None:
        """Remember a chunk."""
        self._table.execute("BEGIN")
        self._table.executemany("INSERT OR IGNORE INTO seen VALUES (?)", ((content,) for content in hashes))
        self._table.execute("COMMIT")

    def __contains__(self, content: bytes) -> bool:
        return self._table.execute("SELECT 1 FROM seen WHERE content = ?", (content,)).fetchone() is not None
