"""Sources within something else: what an archive or a hub holds, as files of the cache.

They are written once, into a folder that is there whole or not at all (`plumbing/cache.py`), and then read as
any source of their kind. Records, units and marks are what they would be anywhere else: names are relative
to that folder, and a file's time of change is what its archive says, with a fraction of a second that follows
from its bytes. (Archives often give all members one time, and a corrected caption may be as long as before.)
"""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from model.config import Source
from model.data import sources
from model.data.captions import shown
from model.data.sources import Known, Record
from model.errors import UserError
from model.plumbing import cache, speech
from model.plumbing.cache import Fill, Room

MOST_FILES = 1 << 22  # files and folders: two million pictures with their captions
MOST_LEVELS = 100  # of folders within folders
MOST_TIMES = 100  # its size that an archive may unpack to,
FREELY = 1 << 30  # beyond these bytes
SPARE = 1 << 30  # bytes of the disk that stay free
BLOCK = 1 << 12  # bytes that a file takes at least
STEP = 1 << 27  # bytes between two looks at the disk, at most
MOST_BAD = 1000  # damaged files; with more an archive is refused
# What is wrong with a file's name alone: too long, or one is a file and a folder.
ODD_NAME = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
LATEST = 1 << 33  # seconds since 1970; a later time of change is none


@dataclass
class Writer:
    """Writes files of strangers below a folder, within bounds.

    Its methods raise UserError: a name leads out of the folder, or there is too much of them.
    """

    folder: Path
    room: Room
    where: str  # for people
    packed: int = 0  # bytes of the archive that they come from; 0 where there is none
    others: Counter[str] = field(default_factory=Counter)
    bad: dict[str, str] = field(default_factory=dict)  # files that could not be had, and why
    odd: list[str] = field(default_factory=list)  # names that are not UTF-8
    _files: int = 0
    _bytes: int = 0
    _granted: int = 0
    _made: set[str] = field(default_factory=set)

    def announce(self, files: int, size: int) -> None:
        """So many files and bytes will come."""
        self._check(files, size + files * BLOCK)
        self._grant(size + files * BLOCK)

    def consider(self, size: int) -> None:
        """So many bytes come next, whatever becomes of them."""
        self._check(self._files, self._bytes + size)

    def path(self, name: str) -> Path | None:
        """Where a file belongs; None for a hidden one, which nobody looks at."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts or "\0" in name or not parts:
            raise UserError(
                f"{self.where} has a file '{shown(name)}', which lies outside of it; make it anew, from"
                " within its folder"
            )
        if len(parts) > MOST_LEVELS:
            raise UserError(
                f"{self.where} has a file '{shown(name)}', which lies {len(parts)} folders deep;"
                f" {MOST_LEVELS} are made"
            )
        return None if any(part.startswith(".") for part in parts) else self.folder.joinpath(*parts)

    def write(self, name: str, parts: Iterable[bytes], seconds: float) -> None:
        """One file; one that no file can be beside the others is damaged.

        Args:
            name: relative to the folder.
            parts: its bytes.
            seconds: when it was last changed, since 1970.
        """
        path = self.path(name)
        if path is None:
            return
        if any("\udc80" <= letter <= "\udcff" for letter in name):
            self.odd.append(name)
        try:
            self._folder(path.parent)
            path.unlink(missing_ok=True)  # the last one of a name counts, as for tar
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", "no file can have this name")
            if isinstance(error, OSError) and error.errno not in ODD_NAME:
                raise self._failed(name, error) from None
            self.damaged(name, f"cannot be written: {reason}")
            return
        self._count(BLOCK)
        check, size = 0, 0
        try:
            with os.fdopen(handle, "wb") as file:
                for part in parts:
                    self._bytes += len(part)
                    self._grow()
                    file.write(part)
                    check, size = zlib.crc32(part, check), size + len(part)
            whole = int(seconds) if 0 <= seconds < LATEST else 0
            os.utime(path, ns=(whole * 10**9 + check % 10**9,) * 2)
        except OSError as error:
            raise self._failed(name, error) from None
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def link(self, name: str, target: Path) -> None:
        """One file that lies elsewhere, at a place that is trusted."""
        path = self.path(name)
        if path is not None:
            self._folder(path.parent)
            path.symlink_to(target)
            self._count(BLOCK)

    def damaged(self, name: str, problem: str) -> None:
        """A file could not be had."""
        self.bad[name] = problem
        if len(self.bad) > MOST_BAD:
            raise UserError(
                f"{self.where}: more than {MOST_BAD:,} of its files are damaged, as '{shown(name)}'"
            )

    def note(self) -> dict[str, Any]:
        """What is said of the folder."""
        if self.odd:
            speech.warn(
                "images",
                f"{len(self.odd)} names in {self.where} are not UTF-8, as '{shown(self.odd[0])}'; lists and"
                " captions that are told by names do not find them",
            )
        return {"others": dict(self.others), "bad": self.bad}

    def _folder(self, path: Path) -> None:
        if path == self.folder or str(path) in self._made:
            return
        self._folder(path.parent)
        path.mkdir(exist_ok=True)
        self._made.add(str(path))
        self._count(BLOCK)

    def _count(self, size: int) -> None:
        self._files += 1
        self._bytes += size
        self._grow()

    def _grow(self) -> None:
        if self._bytes > self._granted:
            self._check(self._files, self._bytes)
            self._grant(self._bytes + min(STEP, BLOCK + self._bytes // 4))
        elif self._files > MOST_FILES:
            self._check(self._files, 0)

    def _check(self, files: int, size: int) -> None:
        if files > MOST_FILES:
            raise UserError(f"{self.where} holds more than {MOST_FILES:,} files; make several of it")
        if self.packed and size > max(FREELY, MOST_TIMES * self.packed):
            raise UserError(
                f"{self.where} has {self.packed:,} bytes and unpacks to {size:,} or more, over {MOST_TIMES}"
                " times as many; no pictures do that. Unpack it yourself if it is to be trusted"
            )

    def _grant(self, wanted: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if wanted - self._bytes > free - SPARE:
            raise UserError(
                f"{self.where} needs {wanted:,} bytes in {self.folder.parents[2]}, and that disk has {free:,}"
                " left; free some, or set LATENT_GPT_CACHE to another place"
            )
        self.room(wanted)
        self._granted = wanted

    def _failed(self, name: str, error: OSError) -> UserError:
        return UserError(f"{self.where}: '{shown(name)}' cannot be written: {error.strerror}")


@dataclass(frozen=True)
class Inner:
    """A source that lies in the cache."""

    root: str
    config: Source
    note: dict[str, Any]
    where: str  # for people

    def iterate(self, side: int, start: int, known: Known) -> Iterator[Record]:
        """As `sources.iterate`, with names that are relative to the root; first what did not come into it."""
        apart = self._apart()
        yield from apart[start:]
        asked: Callable[[str, str], bool] = lambda unit, mark: known(self._name(unit), mark)  # noqa: E731
        for record in sources.iterate(self.config, side, max(0, start - len(apart)), asked):
            yield self._named(record)

    def count(self) -> int:
        """As `sources.count`."""
        return sources.count(self.config)

    def _apart(self) -> list[Record]:
        found = [Record(name, b"", problem=problem) for name, problem in self.note["bad"].items()]
        others = Counter(self.note["others"])
        return [*found, Record(self.where, b"", others=others)] if others else found

    def _named(self, record: Record) -> Record:
        return replace(record, key=self._name(record.key) or self.where, unit=self._name(record.unit))

    def _name(self, name: str) -> str:
        return name[len(self.root) :].strip("/") if name.startswith(self.root) else name


def inner(name: str, where: str, fill: Fill, made: Callable[[str], Source] | None = None) -> Inner:
    """The source in a folder that `fill` makes.

    Args:
        name: 16 hex digits over what decides its content, see `cache.unpacked`.
        where: for people.
        fill: makes the folder.
        made: the source, of the folder's path; without it, it is recognised.

    Raises:
        UserError: nothing in it is a source that we read.
    """
    root, note = cache.unpacked(name, fill)
    root = root.resolve()
    if made:
        return Inner(str(root), made(str(root)), note, where)
    try:
        values = sources.recognise(str(root))
    except UserError as error:
        reason = str(error).removeprefix("data: ").replace(str(root), "it")
        raise UserError(f"{where}: {reason}") from None
    if values and values["kind"] in ("archive", "hub"):
        raise UserError(
            f"{where} is an archive within an archive; unpack the outer one, and name what is in it"
        )
    config: Source = TypeAdapter(Source).validate_python(values)
    return Inner(str(root), config, note, where)
