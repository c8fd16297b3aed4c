"""A tree of files, in a local folder or below a prefix in S3: names, what changes with a file, bounded reads.

What is hidden (.name) is passed over. Links are followed within a local folder only.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from io import BufferedReader
from typing import NamedTuple, Protocol, cast

from model.data.sources import Record, once, too_large
from model.errors import UserError
from model.plumbing import storage

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class Unreadable(Exception):
    """A file that is not read; the message is the reason."""


class Folder(NamedTuple):
    """One folder of a tree."""

    path: str  # relative to the tree; "" is its root
    names: list[str]  # of its files, in order
    apart: list[Record]  # what is not entered


class Tree(Protocol):
    """What sources ask of a place that holds files; names are relative to it, with slashes."""

    place: str  # where it is, absolute
    places: tuple[str, ...]  # that, and where a person said that it is: absolute names of files begin so
    readers: int  # reads side by side that pay

    def folders(self) -> Iterator[Folder]:
        """Each folder before those in it, siblings in the order of their names."""

    def size(self, name: str) -> int:
        """Bytes of a file, 0 where nothing is known of it."""

    def state(self, name: str) -> tuple[object, ...]:
        """What changes with a file, without reading it. Raises Unreadable: it is not there."""

    def open(self, name: str) -> BufferedReader:
        """A file of the tree. Raises Unreadable: it is none, or cannot be read."""

    def read(self, name: str, most: int) -> bytes:
        """All of a file. Raises Unreadable: it has more than `most` bytes; and as `open`."""


def open_tree(path: str) -> Tree:
    """The files of a local folder or of an S3 prefix.

    Args:
        path: of the folder, or `s3://bucket/prefix`, of which all is listed now, unless it is `remembered`.

    Raises:
        UserError: there is no such folder, or no access to it.
    """
    return once(("tree", path), lambda: S3Tree(path)) if storage.is_s3(path) else LocalTree(path)


def joined(folder: str, name: str) -> str:
    """The name of a file in a folder of the tree."""
    return f"{folder}/{name}" if folder else name


def meant(tree: Tree, folder: str, name: str) -> str:
    """The name, relative to the tree, of what a list in one of its folders names.

    Programs that export lists write absolute paths, and some of them backslashes.

    Raises:
        Unreadable: it is an address.
    """
    place = next((place for place in tree.places if name != place and within(place, name)), "")
    if place:
        name = name[len(place) :].lstrip("/")
    elif ADDRESS.match(name):
        raise Unreadable("is an address, and pictures are not downloaded")
    else:
        name = posixpath.join(folder, name)
    slashed = name.replace("\\", "/")
    return slashed if slashed != name and not _has(tree, name) and _has(tree, slashed) else name


def _has(tree: Tree, name: str) -> bool:
    try:
        tree.state(name)
    except Unreadable:
        return False
    return True


def within(folder: str, path: str) -> bool:
    """Whether a path is a folder, or below it."""
    return not folder or path == folder or path.startswith(f"{folder.rstrip('/')}/")


def nfc(name: str) -> str:
    """A name with composed characters: a Mac writes them decomposed, lists have them composed."""
    return unicodedata.normalize("NFC", name)


# ── of this machine ─────────────────────────────────────────────────────────────────────────────────────


class LocalTree:
    """A folder of this machine."""

    readers = 1

    def __init__(self, path: str) -> None:
        self.place = os.path.realpath(os.path.expanduser(path))
        self.places: tuple[str, ...] = (self.place, os.path.abspath(os.path.expanduser(path)))
        try:
            os.scandir(self.place).close()
        except PermissionError:
            raise UserError(f"{self.place}: permission denied; give this user access") from None
        except (OSError, ValueError):
            raise UserError(f"{path} is not a folder") from None

    def folders(self) -> Iterator[Folder]:
        closed: list[OSError] = []
        for path, subfolders, names in storage.walk(self.place, closed.append):
            folder = "" if path == self.place else os.path.relpath(path, self.place)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            links = [name for name in subfolders if os.path.islink(os.path.join(path, name))]
            yield Folder(
                folder,
                sorted(name for name in names if not name.startswith(".")),
                [self._linked(joined(folder, name)) for name in links],
            )
        for error in closed:
            name = os.path.relpath(error.filename, self.place)
            yield Folder(
                name, [], [Record(name, b"", problem=f"this folder cannot be read: {error.strerror}")]
            )

    def _linked(self, name: str) -> Record:
        if within(self.place, os.path.realpath(os.path.join(self.place, name))):
            return Record(
                name, b"", others=Counter({"linked folders": 1})
            )  # its pictures are found where they are
        return Record(
            name, b"", problem="a folder that is a link out of this one; copy what it leads to (cp -rL)"
        )

    def size(self, name: str) -> int:
        return 0

    def state(self, name: str) -> tuple[object, ...]:
        path = self._located(name)
        try:
            try:
                status = os.stat(path)
            except OSError:  # a link that leads nowhere
                status = os.lstat(path)
        except (OSError, ValueError):
            raise Unreadable("cannot be read: it is not there") from None
        return status.st_size, status.st_mtime_ns

    def open(self, name: str) -> BufferedReader:
        if os.path.isabs(name) or os.path.normpath(name).split("/")[0] == "..":
            raise Unreadable("lies outside the folder")
        try:
            path = os.path.realpath(self._located(name), strict=True)
            if not within(self.place, path):
                raise Unreadable("a link that leads out of the folder; copy what it leads to (cp -rL)")
            # A pipe would wait for its writer.
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from None
        except ValueError:
            raise Unreadable("cannot be read: no file can have this name") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise Unreadable("cannot be read: not a regular file")
        return open(handle, "rb")

    def read(self, name: str, most: int) -> bytes:
        with self.open(name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise Unreadable(too_large(size, most))
            return file.read(size)

    def _located(self, name: str) -> str:
        """The path of a file, whichever way its name is composed."""
        path = os.path.join(self.place, name)
        if not os.path.lexists(path):
            forms = (os.path.join(self.place, unicodedata.normalize(form, name)) for form in ("NFC", "NFD"))
            path = next(filter(os.path.lexists, forms), path)
        return path


# ── in S3 ───────────────────────────────────────────────────────────────────────────────────────────────


class S3Tree:
    """What is below a prefix in S3, as it was listed; of each file some 300 bytes are held."""

    readers = 16

    def __init__(self, uri: str) -> None:
        self.place = uri.rstrip("/")
        self.places: tuple[str, ...] = (self.place,)
        self._files: dict[str, tuple[int, str]] = {}  # in S3's order
        self._apart: list[Record] = []
        for name, size, mark in storage.marks(uri):
            parts = name.split("/")
            if any(part.startswith(".") for part in parts) or not parts[-1]:
                continue  # hidden, or what some programs store in place of a folder
            if "" in parts:
                self._apart.append(
                    Record(name, b"", problem="its key has an empty part (//); give it another")
                )
            else:
                self._files[name] = size, mark

    def folders(self) -> Iterator[Folder]:
        names: dict[str, list[str]] = {"": []}
        for file in self._files:
            folder, _, name = file.rpartition("/")
            names.setdefault(folder, []).append(name)
        for folder in sorted(names, key=lambda path: path.split("/") if path else []):
            yield Folder(folder, names[folder], [] if folder else self._apart)

    def size(self, name: str) -> int:
        return self._files.get(self._located(name), (0, ""))[0]

    def state(self, name: str) -> tuple[object, ...]:
        try:
            return self._files[self._located(name)]
        except KeyError:
            raise Unreadable("cannot be read: it is not there") from None

    def open(self, name: str) -> BufferedReader:
        uri = self._uri(name)
        try:
            return cast(BufferedReader, storage.open_read(uri))
        except storage.NotFound:
            raise Unreadable("cannot be read: it is gone") from None

    def read(self, name: str, most: int) -> bytes:
        uri, size = self._uri(name), self.size(name)
        if size > most:
            raise Unreadable(too_large(size, most))
        try:
            return storage.read_bytes(uri)
        except storage.NotFound:
            raise Unreadable("cannot be read: it is gone") from None
        except storage.Damaged as error:
            raise Unreadable(str(error)) from None

    def _uri(self, name: str) -> str:
        if name.startswith("/") or posixpath.normpath(name).split("/")[0] == "..":
            raise Unreadable("lies outside the folder")
        located = self._located(name)
        if located not in self._files:
            raise Unreadable("cannot be read: it is not there")
        return storage.join(self.place, located)

    def _located(self, name: str) -> str:
        """The name as it was listed, whichever way it is composed, and whatever way it takes."""
        return name if name in self._files else self._composed.get(nfc(posixpath.normpath(name)), name)

    @cached_property
    def _composed(self) -> dict[str, str]:
        return {nfc(name): name for name in self._files}
