"""Tars of strangers, as streams: members one by one, in bounded memory, and never the end in silence.

A tar may be packed by gzip, bzip2 or xz, which its first bytes say. Where Python's `tarfile` would take
damage for the end, or read a header without bounds, `tarfile.ReadError` is raised.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from model.errors import UserError
from model.plumbing import storage

PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz")
BLOCK = 512  # bytes of a header
LARGEST_HEADER = 1 << 18  # bytes of a header that extends another
XZ_MEMORY = 1 << 28  # bytes that unpacking may take
TAIL = 1 << 26  # bytes behind the end of an archive that are looked at
SPECIAL = "links and special files"  # what members are that hold no bytes of their own


@dataclass(frozen=True)
class Member:
    """A member that is no folder; it can be read until the next one is asked for."""

    name: str
    size: int  # bytes
    seconds: float  # when it was last changed, since 1970
    is_file: bool
    at: int  # where its bytes begin
    stream: Any

    def parts(self) -> Iterator[bytes]:
        """Its bytes, piece by piece.

        Raises:
            tarfile.ReadError: the archive breaks off.
        """
        with _readable():
            self.stream.seek(self.at)
        left = self.size
        while left:
            with _readable():
                data = self.stream.read(min(left, storage.MIB))
                if not data:
                    raise tarfile.ReadError("unexpected end of data")
            left -= len(data)
            yield data


def members(stream: BinaryIO, largest: int) -> Iterator[Member]:
    """Members in their order, folders left out.

    Args:
        stream: of the archive.
        largest: bytes of a member of a packed archive, at most: to pass over one, it has to be unpacked.

    Raises:
        tarfile.ReadError: the archive breaks off.
    """
    with _readable():
        unpacked, packed = _unpacked(stream)
        with tarfile.open(fileobj=unpacked, mode="r:", tarinfo=_Header) as archive:
            while member := archive.next():
                archive.members = []  # type: ignore[attr-defined]  # or they are all held
                if member.size < 0 or archive.offset <= member.offset:
                    raise tarfile.ReadError("damaged header: the archive leads back into itself")
                if packed and member.size > largest:
                    raise tarfile.ReadError(f"{member.name} unpacks to {member.size:,} bytes")
                if not member.isdir():
                    seconds, at = float(member.mtime), member.offset_data
                    yield Member(member.name, member.size, seconds, member.isreg(), at, unpacked)
            unpacked.seek(archive.offset)
            for _ in range(0, TAIL, storage.MIB):
                if (block := unpacked.read(storage.MIB)).count(0) < len(block):
                    raise tarfile.ReadError("what follows its end is not read (two tars in one file?)")


@contextmanager
def _readable() -> Iterator[None]:
    """Whatever a parser throws at a stranger's tar is one error."""
    try:
        yield
    except (UserError, tarfile.ReadError):
        raise
    except Exception as error:
        raise tarfile.ReadError(str(error) or type(error).__name__) from None


class _Header(tarfile.TarInfo):
    """A header that is refused where Python's would end the archive in silence, or read without bounds."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> _Header:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == BLOCK and not any(buf):  # the end, as it should be
                raise
            raise tarfile.ReadError(str(error)) from None
        plain = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES + PAX_TYPES
        if header.size < 0 or (not plain and header.size > LARGEST_HEADER):
            raise tarfile.ReadError(f"a header announces {header.size:,} bytes")
        return header

    def _sparse(self, *_: Any) -> None:
        raise tarfile.ReadError("sparse members are not read")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _sparse


def _unpacked(stream: BinaryIO) -> tuple[Any, bool]:
    """The archive, and whether it is compressed. (`tarfile` itself would unpack any amount at once.)"""
    head = stream.read(1024)
    stream.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=stream), True
    if head.startswith(b"BZh"):
        return bz2.BZ2File(stream), True
    if head.startswith(b"\xfd7zXZ"):
        return io.BufferedReader(_Xz(stream)), True
    return stream, False


class _Xz(io.RawIOBase):
    """What an xz file unpacks to, read forwards only. (`lzma.LZMAFile` gives a block what memory it asks.)"""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed, self._at = packed, 0
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or offset < self._at:
            raise io.UnsupportedOperation("an xz file is read forwards only")
        while self._at < offset and self.read(min(storage.MIB, offset - self._at)):
            pass
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._unpack(len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _unpack(self, most: int) -> bytes:
        """Some bytes; none at the end."""
        while True:
            packed = b""
            if self._decoder.eof:  # another stream may follow, behind zeros
                packed = (self._decoder.unused_data or self._packed.read(storage.MIB)).lstrip(b"\0")
                if not packed:
                    return b""
                self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
            elif self._decoder.needs_input and not (packed := self._packed.read(storage.MIB)):
                raise EOFError("the xz file ends early")
            if data := self._decoder.decompress(packed, most):
                return data
