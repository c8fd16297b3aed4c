"""A zip or tar (also .gz, .bz2, .xz) of any other kind of source, here or in S3.

It is unpacked into the cache once for each state of it, and read from there as what it holds: a folder,
parquet files, tar shards. A damaged member is quarantined, and so is the place where a tar breaks off.

Nothing of an archive is trusted: names stay below the folder, links and special files are counted and not
made, and sizes are bounded, as announced before anything is written and as they turn out. Of a zip only what
is stored or deflated is read; Python would unpack the other methods into memory without bounds.
"""

from __future__ import annotations

import calendar
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from model.config import ArchiveSource, Source
from model.data import tars
from model.data.sources import (
    LARGEST_PICTURE,
    OTHER_SUFFIXES,
    SUFFIXES,
    Known,
    Record,
    marked,
    nothing_known,
    pass_over,
    suffix,
)
from model.data.sources.folder import LISTS
from model.data.sources.unpacked import FREELY, MOST_TIMES, Inner, Writer, inner
from model.errors import UserError
from model.plumbing import speech, storage
from model.plumbing.cache import Room

ZIPS = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # tars by gzip, bzip2, xz
NOT_READ = {  # archives by their first bytes
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
}
SUFFIXES_READ = (".zip", *tars.SUFFIXES)
SUFFIXES_OF_OTHERS = (".7z", ".rar", ".tar.zst", ".tzst", ".tar.lz4", ".tar.lz", ".tar.z")
# Bytes of a zip's list of members, which is read into memory: of some 1.7 million, a gigabyte there.
LARGEST_DIRECTORY = 1 << 27
LOOKED_AT = 200  # members by which a shard is told from other tars
LOOKED_THROUGH = 1 << 26  # bytes of them
ENCRYPTED = 0x1 | 0x40 | 0x2000  # flags of a zip's member
METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz"}  # of zips, none of them read
UTF_8 = 0x800  # a flag, too: of names
MS_DOS = 0  # the system of programs that write \ between folders
BAD_ZIP = (  # what a damaged one throws
    *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError),
    *(OverflowError, LookupError, struct.error),
)


def iterate(
    config: ArchiveSource, side: int, start: int = 0, known: Known = nothing_known
) -> Iterator[Record]:
    """What the source in it yields."""
    yield from _inner(config).iterate(side, start, known)


def fingerprint(config: ArchiveSource) -> str:
    """The archive's mark; nothing is unpacked for it. Raises UserError: it is none that we read."""
    with _open(config) as stream:
        _format(stream, config)
    return marked(storage.mark(_uri(config)))


def count(config: ArchiveSource) -> int:
    """As many as the source in it says."""
    return _inner(config).count()


def content(config: ArchiveSource) -> Source:
    """The source in it."""
    return _inner(config).config


def _uri(config: ArchiveSource) -> str:
    return config.path if storage.is_s3(config.path) else str(Path(config.path).expanduser().absolute())


def _inner(config: ArchiveSource) -> Inner:
    uri = _uri(config)

    def fill(folder: Path, room: Room) -> dict[str, Any]:
        with _open(config) as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            writer = Writer(folder, room, f"data.source.path: {config.path}", size)
            speech.say("images", f"unpacking {uri} ({size:,} bytes)")
            if _format(stream, config) == "zip":
                _zip(stream, writer)
            else:
                _tar(stream, writer)
        return writer.note()

    with storage.explained(uri):
        mark = storage.mark(uri)
    return inner(marked("archive", uri, mark), f"data.source.path: {config.path}", fill)


def _open(config: ArchiveSource) -> BinaryIO:
    uri = _uri(config)
    try:
        storage.mark(uri)  # only regular files are opened
        return storage.open_read(uri)
    except UserError as error:
        raise UserError(f"data.source.path: {error}") from None


def _format(stream: BinaryIO, config: ArchiveSource) -> str:
    """Whether it is a zip or a tar, by its first bytes."""
    head = stream.read(tars.BLOCK)
    stream.seek(0)
    if head.startswith(ZIPS):
        return "zip"
    if head.startswith(PACKED):
        return "tar"
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
        return "tar"
    except tarfile.HeaderError:
        kind = next((kind for magic, kind in NOT_READ.items() if head.startswith(magic)), "no zip or tar")
    raise UserError(f"data.source.path: {config.path} is {kind}; make a zip, tar or tar.gz of what is in it")


# ── which kind of archive ───────────────────────────────────────────────────────────────────────────────


def recognise(uri: str, look: bool = True) -> dict[str, Any] | None:
    """The values of `data.source` for what has the name of an archive or of tar shards; None for all else.

    Args:
        uri: what a person names.
        look: into S3; if not, a .tar there is a shard.

    Raises:
        UserError: it is not there, or an archive that is not read.
    """
    name = uri.lower()
    if name.endswith(SUFFIXES_OF_OTHERS):
        raise UserError(f"data: {uri}: {PurePosixPath(name).suffix} is not read; make a zip or tar of it")
    if not name.endswith(SUFFIXES_READ):
        return None
    shards = {"kind": "webdataset", "urls": uri}
    if any(letter in uri for letter in "{*"):
        return shards
    values = {"kind": "archive", "path": uri}
    if not look and storage.is_s3(uri):  # it need not be in reach of who asks
        return shards if name.endswith(".tar") else values
    try:
        with _open(ArchiveSource(path=uri)) as stream:
            return shards if not name.endswith(".zip") and is_shard(stream) else values
    except UserError as error:
        raise UserError(f"data: {str(error).removeprefix('data.source.path: ')}") from None


def is_shard(stream: BinaryIO) -> bool:
    """Whether a tar is a shard of captioned pictures and no other archive, by its first members."""
    pictures, texts = set[str](), set[str]()
    try:
        for number, member in enumerate(tars.members(stream, LARGEST_PICTURE)):
            kind = suffix(member.name)
            name = member.name.rpartition("/")[2].lower()
            if name in LISTS or kind == ".parquet" or name.endswith(SUFFIXES_READ):
                return False
            if kind in SUFFIXES + OTHER_SUFFIXES:
                pictures.add(member.name[: -len(kind)])
            elif kind in (".txt", ".json"):
                texts.add(member.name[: -len(kind)])
            if number == LOOKED_AT or member.at + member.size > LOOKED_THROUGH:
                break
    except tarfile.ReadError:  # whoever reads it says so
        pass
    return bool(pictures & texts)


# ── members ─────────────────────────────────────────────────────────────────────────────────────────────


def _tar(stream: BinaryIO, writer: Writer) -> None:
    try:
        for member in tars.members(stream, writer.packed * MOST_TIMES + FREELY):
            writer.consider(member.size)
            if member.is_file:
                writer.write(member.name, member.parts(), member.seconds)
            elif writer.path(member.name):
                pass_over(writer.others, tars.SPECIAL)
    except tarfile.ReadError as error:
        writer.damaged(writer.where, f"the tar breaks off: {error}")


def _zip(stream: BinaryIO, writer: Writer) -> None:
    try:
        with zipfile.ZipFile(_Bounded(stream)) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.header_offset)
            members = [member for member in members if not member.filename.endswith("/")]
            _check(members, writer)
            writer.announce(len(members), sum(member.file_size for member in members))
            for member in members:
                _member(archive, member, writer)
    except (*BAD_ZIP, OSError) as error:
        raise UserError(f"{writer.where} is a damaged zip: {error}") from None


def _check(members: list[zipfile.ZipInfo], writer: Writer) -> None:
    """Refuse what cannot be unpacked."""
    if locked := sum(bool(member.flag_bits & ENCRYPTED) for member in members):
        raise UserError(
            f"{writer.where}: {locked} of its {len(members)} files are encrypted; unpack it yourself, and"
            " name the folder"
        )
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            method = METHODS.get(member.compress_type, f"method {member.compress_type}")
            raise UserError(
                f"{writer.where} is packed by {method}, which is not read; zip it as usual (deflate), or make"
                " a tar of it"
            )


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, writer: Writer) -> None:
    name, mode = _name(member), stat.S_IFMT(member.external_attr >> 16)
    if writer.path(name) is None:
        return
    if mode and not stat.S_ISREG(mode):
        pass_over(writer.others, tars.SPECIAL)
        return
    try:
        seconds = calendar.timegm((*member.date_time, 0, 0, 0))
    except ValueError:  # months and days from 0 on
        seconds = 0
    try:
        with archive.open(member) as file:
            writer.write(name, iter(lambda: file.read(storage.MIB), b""), seconds)
    except BAD_ZIP as error:
        writer.damaged(name, f"damaged in the zip: {error}")


def _name(member: zipfile.ZipInfo) -> str:
    """Its name as its bytes were meant: UTF-8, flagged or not; nothing else is guessed."""
    name = member.filename
    if not member.flag_bits & UTF_8:
        name = name.encode("cp437").decode("utf-8", "surrogateescape")
    if member.create_system == MS_DOS and "/" not in name:
        name = name.replace("\\", "/")
    return name


class _Bounded:
    """A stream of which nothing large is read at once. (`zipfile` reads the list of all members.)"""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable

    def read(self, size: int = -1) -> bytes:
        if size > LARGEST_DIRECTORY:
            raise UserError(
                f"the list of files in this zip has {size:,} bytes, more than the {LARGEST_DIRECTORY:,} that"
                " are read; make a tar of them, or several zips"
            )
        return self._stream.read(size)
