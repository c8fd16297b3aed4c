"""The local cache: verified copies of what lies in S3, bounded, and shared by the processes of a machine.

    <LATENT_GPT_CACHE>/assets/<hash of a manifest>/<name of a file>
    <LATENT_GPT_CACHE>/unpacked/<hash of what it is made from>/files/…

When room is needed those copies go first that were not asked for the longest, and with them what nobody has
asked for in a month. A folder that a living process was given stays; single files do not, so that training
may read more than the cache holds. Files of a local store are used where they are. What was unpacked is
whole where the note beside it says what is there, and goes as a whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from model.errors import UserError
from model.plumbing import assets, environment, storage
from model.plumbing.assets import File, Manifest

IDLE_DAYS = 30  # a copy that nobody asked for in so long goes, even where there is room
UNPACKED = "unpacked"  # folder of what is not copied but made, from an archive or a hub
NOTE = "note.json"  # what is said of such a folder
LOCK = "lock"  # of the whole cache where its files change, and within an unpacked folder of that one
TRIES = 100  # to use a copy that others push out again and again

Get = Callable[[File, Path], object]  # brings a file to a path, verified
Room = Callable[[int], None]  # makes room for so many bytes in all
Fill = Callable[[Path, Room], dict[str, Any]]  # what `unpacked` asks of those who write into a folder
T = TypeVar("T")

_right: dict[Path, tuple[int, int, int, str]] = {}  # what was verified, as it was: inode, size, mtime, hash
_whole_here: dict[
    Path, dict[str, Any]
] = {}  # unpacked folders that this process found whole, and their notes
_held: dict[Path, int] = {}  # folders that this process uses, and its locks on them


def path(manifest: Manifest, name: str) -> Path:
    """A verified local copy of one file of an asset. It may go again when room is needed: open it at once.

    Raises:
        Damaged: it is not what the manifest says.
        UserError: it cannot be had, or is larger than the whole cache.
    """
    file = manifest.file(name)
    if not storage.is_s3(manifest.uri):
        return _in_place(manifest, file)
    return _copy(_home(manifest), file, _from(manifest))


def use(manifest: Manifest, names: Iterable[str], read: Callable[[], T]) -> T:
    """What `read` makes of copies that are there when it starts; once more where they go meanwhile.

    Raises:
        UserError: as `path`, or others push them out as soon as they are there.
    """
    names = list(names)
    for _ in range(TRIES):
        for name in names:
            path(manifest, name)
        with suppress(FileNotFoundError):
            return read()
    raise UserError(
        f"files of {manifest.uri} vanish from the cache as soon as they are there; give it more room:"
        " LATENT_GPT_CACHE_GIB"
    )


def folder(manifest: Manifest, names: Iterable[str] | None = None, get: Get | None = None) -> Path:
    """A local folder with an asset, or the named files of it, verified; it stays while this process lives.

    Args:
        manifest: of the asset.
        names: of files; all where there are none.
        get: where files come from, if not from the asset's place.

    Raises:
        Damaged: a file is not what the manifest says.
        UserError: it cannot be had, or is larger than the whole cache.
    """
    files = manifest.files if names is None else [manifest.file(name) for name in names]
    together = not any(file.asset for file in files)
    if get is None and together and not storage.is_s3(manifest.uri):
        for file in files:
            _in_place(manifest, file)
        return Path(manifest.uri)
    home = _home(manifest)
    _hold(home)
    for file in files:
        _copy(home, file, get or _from(manifest))
    if not (home / assets.NAME).is_file():
        with _locked(home.parent.parent / LOCK):
            storage.write_bytes(str(home / assets.NAME), manifest.text)
    return home


def unpacked(name: str, fill: Fill) -> tuple[Path, dict[str, Any]]:
    """A folder that `fill` makes, and what it says of it; it stays while this process lives.

    Args:
        name: 16 hex digits over all that decides what is in it.
        fill: given an empty folder and what makes room. It asks for room before it writes, for all that will
            be there, and returns a note, which is JSON.

    Raises:
        UserError: there is no room; and whatever `fill` raises, of which nothing stays.
    """
    home = _root() / UNPACKED / name
    _hold(home)
    with _locked(home / LOCK):  # others are filled meanwhile
        note = _whole(home) or _filled(home, fill)
        _whole_here[home] = note
    with suppress(FileNotFoundError, PermissionError):
        os.utime(home / NOTE, ns=(time.time_ns(), (home / NOTE).stat().st_mtime_ns))
    return home / "files", note["said"]


# ── below ───────────────────────────────────────────────────────────────────────────────────────────────


def _home(manifest: Manifest) -> Path:
    """The folder of an asset's copies. Raises UserError: this user cannot write there."""
    return _root() / "assets" / manifest.sha256[:16]


def _root() -> Path:
    root = Path(environment.CACHE.get() or "~/.cache/latent-gpt").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{root}: {error.strerror}; set LATENT_GPT_CACHE to a folder for copies of what lies in S3"
        ) from None
    return root


def _filled(home: Path, fill: Fill) -> dict[str, Any]:
    """Make an unpacked folder; returns its note. Who asks for room meanwhile finds its bytes counted."""
    root = home.parent.parent
    _clear(home)
    note: dict[str, Any] = {"bytes": 0}

    def room(wanted: int) -> None:
        with _locked(root / LOCK):
            (home / NOTE).unlink(missing_ok=True)  # or what was asked for before would count, too
            _make_room(root, wanted)
            note["bytes"] = wanted
            storage.write_bytes(str(home / NOTE), json.dumps(note).encode())

    try:
        partial = home / f"{storage.TEMPORARY}files"
        partial.mkdir()
        said = fill(partial, room)
        partial.rename(home / "files")
        note |= {"listed": _listed(home / "files"), "said": said}
        storage.write_bytes(str(home / NOTE), json.dumps(note).encode())
    except BaseException:
        _clear(home)
        raise
    return note


def _clear(home: Path) -> None:
    """Remove what is in an unpacked folder: somebody has spoilt it, or did not come to its end."""
    for entry in list(home.iterdir()):
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def _whole(home: Path) -> dict[str, Any] | None:
    """The note of an unpacked folder; None where it is not there or not as it was left."""
    if home in _whole_here and (home / NOTE).is_file():
        return _whole_here[home]
    note = _note(home)
    with suppress(OSError):
        return note if "listed" in note and note["listed"] == _listed(home / "files") else None
    return None


def _note(home: Path) -> dict[str, Any]:
    """What is said of an unpacked folder; it has `listed` when that is whole."""
    try:
        note = json.loads((home / NOTE).read_bytes())
        return note if isinstance(note, dict) else {}
    except (OSError, ValueError):
        return {}


def _listed(folder: Path) -> str:
    """A hash over names, sizes and times of change of all files below a folder."""
    digest = hashlib.sha256()
    for path, folders, names in storage.walk(folder):
        folders.sort()
        below = os.path.relpath(path, folder)
        for name in sorted(names):
            status = os.stat(os.path.join(path, name))
            line = f"{os.path.join(below, name)}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _from(manifest: Manifest) -> Get:
    return lambda file, target: storage.download_file(manifest.where_is(file), target, file.sha256)


def _in_place(manifest: Manifest, file: File) -> Path:
    found = Path(manifest.where_is(file))
    if not _is_right(found, file):
        if not found.exists():
            raise storage.Damaged(f"{found} is missing; delete {manifest.uri}, so that it is made again")
        if (size := found.stat().st_size) != file.size:
            raise storage.Damaged(
                f"{found} has {size} bytes, its manifest says {file.size}; delete {manifest.uri}, so that"
                " it is made again"
            )
        raise storage.checksum_error(str(found), storage.file_sha256(found), file.sha256)
    return found


def _is_right(found: Path, file: File) -> bool:
    """Whether a file is what the manifest says; its bytes are read once per process."""
    try:
        is_now = found.stat()
        as_it_is = (is_now.st_ino, is_now.st_size, is_now.st_mtime_ns, file.sha256)
        if _right.get(found) != as_it_is:
            if is_now.st_size != file.size or storage.file_sha256(found) != file.sha256:
                return False
            _right[found] = as_it_is
    except FileNotFoundError:
        return False
    return True


def _copy(home: Path, file: File, get: Get) -> Path:
    copy = home / file.name
    if not _is_right(copy, file):
        root = home.parent.parent
        with _locked(root / LOCK):  # one download a time, itself in parallel parts, per machine
            if not _is_right(copy, file) and not (file.asset and _linked(copy, file, root)):
                _make_room(root, file.size)
                get(file, copy)
    with suppress(FileNotFoundError, PermissionError):  # gone again already, or another user's
        os.utime(copy, ns=(time.time_ns(), copy.stat().st_mtime_ns))
    return copy


def _linked(copy: Path, file: File, root: Path) -> bool:
    """Whether a file that was taken over is here as one of another asset, and now as one of this, too."""
    for other in (root / "assets").glob(f"*/{file.name}"):
        if other.stat().st_size == file.size and _is_right(other, file):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.unlink(missing_ok=True)
            os.link(other, copy)
            return True
    return False


def _make_room(root: Path, wanted: int) -> None:
    """Let copies go until `wanted` bytes fit: the order is that of the times they were last asked for.

    Raises:
        UserError: they never fit, or what is there is in use.
    """
    limit = int(environment.CACHE_GIB.get() * 2**30)
    if wanted > limit:
        raise UserError(
            f"{wanted} bytes do not fit into a cache of {limit} bytes; raise LATENT_GPT_CACHE_GIB"
        )
    for outdated in _of_earlier_versions(root):
        shutil.rmtree(outdated) if outdated.is_dir() else outdated.unlink(missing_ok=True)
    copies = []
    for copy in (root / "assets").rglob("*"):
        with suppress(FileNotFoundError):
            if copy.name.startswith(storage.TEMPORARY):
                copy.unlink()  # of a download that was killed: this one is the only one
            elif copy.is_file() and copy.name != assets.NAME:
                copies.append((copy.stat().st_atime_ns, copy.stat().st_size, copy))
    copies += _unpacked_before(root)
    used = sum(size for _, size, _ in copies)
    idle = time.time_ns() - IDLE_DAYS * 24 * 3600 * 10**9
    with ExitStack() as locks:
        free: dict[Path, bool] = {}
        for asked, size, copy in sorted(copies):
            if used + wanted <= limit and asked > idle:
                break
            home = Path(*copy.parts[: len(root.parts) + 2])
            if home not in free:
                free[home] = locks.enter_context(_unused(home))
            if free[home] and copy == home:
                shutil.rmtree(home)
                used -= size
            elif free[home]:
                copy.unlink(missing_ok=True)  # who has it open keeps it until it is done
                used -= size
                _tidy(copy.parent, home)
    if used + wanted > limit:
        raise UserError(
            f"the cache {root} may hold {limit} bytes, and {used} are in use; raise LATENT_GPT_CACHE_GIB"
        )


def _unpacked_before(root: Path) -> list[tuple[int, int, Path]]:
    """When unpacked folders were last asked for, and their sizes; what a killed process left of one goes."""
    found = []
    for home in (root / UNPACKED).glob("*"):
        note = _note(home)
        if "listed" not in note:
            with _unused(home) as free:  # not what is being unpacked now
                if free:
                    shutil.rmtree(home)
                    continue
        with suppress(FileNotFoundError, LookupError):  # its filling fails just now, or did not ask yet
            found.append(((home / NOTE).stat().st_atime_ns, int(note["bytes"]), home))
    return found


def _tidy(folder: Path, home: Path) -> None:
    """Remove a folder in which no copy is left, and those above it up to its asset's."""
    while [entry.name for entry in folder.iterdir()] in ([], [assets.NAME]):
        shutil.rmtree(folder)
        if folder == home:
            break
        folder = folder.parent


def _of_earlier_versions(root: Path) -> Iterator[Path]:
    """Copies as they were kept before; nobody asks for them any more."""
    for old in chain(
        root.glob("*.tar"), root.glob("*.safetensors"), root.glob("models/*"), root.glob("sets/*/*")
    ):
        if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{16}", old.stem):
            yield old


def _hold(home: Path) -> None:
    """Keep a folder in the cache until this process ends, however it ends."""
    while True:
        home.mkdir(parents=True, exist_ok=True)
        if home in _held and _is_at(_held[home], home):
            return
        handle = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_SH)
        if _is_at(handle, home):  # nobody removed it in between
            _held[home] = handle
            return
        os.close(handle)


def _is_at(handle: int, home: Path) -> bool:
    try:
        return os.fstat(handle).st_ino == home.stat().st_ino
    except FileNotFoundError:
        return False


@contextmanager
def _unused(home: Path) -> Iterator[bool]:
    """Whether no process holds a folder; within the block none can begin to."""
    handle = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False
    finally:
        os.close(handle)


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
