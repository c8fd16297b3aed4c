"""Bytes at URIs: `s3://bucket/key` over boto3, anything without a scheme is a path on this machine.

Every failure that a person can mend (credentials, a bucket, the network, a full disk) is a `UserError` that
names the URI; one that may mend itself (no answer, a broken connection, an error of the server's) is the
`Unavailable` among them. S3's address and credentials are environment: `S3_ENDPOINT_URL` (empty means AWS)
and boto3's usual `AWS_*`, with what its files in ~/.aws say.

A write is all or nothing: an S3 object appears when its upload is complete, a local file by rename. What S3
answers is not believed: bytes have to have the hash that S3 or a manifest tells, answers have to come in
time, and listings to end.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import errno
import functools
import hashlib
import io
import math
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from model.errors import Unavailable, UserError
from model.plumbing import environment

if TYPE_CHECKING:
    from boto3.s3.transfer import TransferConfig
    from mypy_boto3_s3 import S3Client

MIB = 1 << 20
PART = 16 * MIB  # bytes per part of an upload or download, at least
LARGEST_PART = 64 * MIB  # of large ones: fewer requests; a download that breaks off goes on where it broke
THREADS = 8  # parts under way at once
READ_AHEAD = MIB  # bytes that a stream buffers
TEMPORARY = ".partial-"  # prefix of local files that are not complete yet; never listed
ATTEMPTS = 11  # of a request, the first included; boto3 spreads them over some 20 s if all are refused
AT_ONCE = 1000  # objects that S3 lists and deletes in one request, at most
IN_MEMORY = 256 * MIB  # bytes that are read whole, at most
MOST_HOLES = 1024 * MIB  # bytes of a file that may be missing on the disk: some copy zeros as nothing
BUSY = ("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling")
SLOWEST = 8 << 10  # bytes per second of a connection; who is slower is given up
LARGEST_ANSWER = 16 * MIB  # bytes that are no object's; a thousand names, as long as they may be, are fewer
MOST_LISTED = 10**7  # objects of a listing
MOST_EMPTY = 1000  # pages of it in a row that hold nothing
AT_LEISURE = ("CompleteMultipartUpload", "CopyObject", "UploadPartCopy")  # minutes, with blanks meanwhile


class NotFound(UserError):
    """Nothing is stored at a URI."""


class Damaged(UserError):
    """What is stored at a URI is not what its checksum says."""


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────


def join(uri: str, *parts: str) -> str:
    """`join("s3://bucket/a/", "b", "c.json")` is `s3://bucket/a/b/c.json`; the same for local paths."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def store_root() -> str:
    """Where assets are kept: the environment's `LATENT_GPT_STORE`, an S3 URI or a local folder."""
    root = environment.STORE.get()
    if not root:
        raise UserError("LATENT_GPT_STORE is not set; give a place for data, e.g. s3://latent-gpt or /data")
    return root.rstrip("/") if is_s3(root) else str(Path(root).expanduser().absolute())


def is_s3(uri: str) -> bool:
    """Whether a URI names S3.

    Raises:
        UserError: another scheme than s3.
    """
    if uri.startswith("s3://"):
        return True
    if "://" in uri:
        raise UserError(f"{uri}: only s3://bucket/key and local paths can be read and written")
    return False


def is_stored(ref: str) -> bool:
    """Whether a reference is an S3 URI or a path, and not the name of something on a hub."""
    return ref.startswith(("s3://", "/", ".", "~")) or (ref != "" and Path(ref).exists())


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of an S3 URI; the key has no slashes at its ends and may be empty."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"{uri}: an S3 URI reads s3://bucket/key")
    return bucket, key.strip("/")


# ── whole objects ───────────────────────────────────────────────────────────────────────────────────────


def read_bytes(uri: str, most: int = IN_MEMORY) -> bytes:
    """Everything stored at `uri`, which fits into memory; from S3, checked against its MD5.

    Args:
        uri: S3 or local.
        most: bytes; more are not read.

    Raises:
        NotFound: nothing is there.
        Damaged: other bytes came than were stored, twice.
        UserError: no access, no connection, no regular file, or too large.
    """

    def check(size: int) -> None:
        if size > most:
            raise UserError(f"{uri} has {size} bytes; {most} are read into memory at most")

    if not is_s3(uri):
        with explained(uri), open_local(uri) as file:
            check(os.fstat(file.fileno()).st_size)
            return file.read()
    for _ in range(2):  # what was damaged on its way comes whole the next time
        with _S3Stream(uri) as stream:
            check(stream.end)
            data = stream.readall()
        if stream.md5 in ("", hashlib.md5(data, usedforsecurity=False).hexdigest()):
            return data
    raise Damaged(
        f"{uri} is damaged, here or on its way: {len(data)} bytes came, and not those of its ETag"
        f" {stream.etag}; delete it, so that it is made again, or restore it"
    )


def write_bytes(uri: str, data: bytes, if_absent: bool = False) -> None:
    """Store `data` at `uri`, durably.

    Raises:
        FileExistsError: `if_absent`, and something is there already.
        UserError: no access, no connection, no space.
    """
    if is_s3(uri):
        bucket, key = split(uri)
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
        with explained(uri):
            client().put_object(Bucket=bucket, Key=key, Body=data, **condition)
    else:
        with _local_target(uri, if_absent) as partial:
            partial.write(data)


def upload_file(path: str | Path, uri: str) -> None:
    """Store a local file at `uri`; on S3 in large parts side by side."""
    if is_s3(uri):
        bucket, key = split(uri)
        with explained(uri):
            config = _transfer(_part(os.path.getsize(path)))
            client().upload_file(str(path), bucket, key, Config=config)
    else:
        with open(path, "rb") as source, _local_target(uri) as partial:
            shutil.copyfileobj(source, partial, 4 * MIB)


def download_file(uri: str, path: str | Path, sha256: str | None = None) -> None:
    """Copy what is stored at `uri` into a local file, which appears only when it is complete and right.

    Raises:
        UserError: it does not have the given SHA-256; and as `read_bytes`.
    """
    with _local_target(path, durable=False) as partial:
        if is_s3(uri):
            _download(uri, partial)
        else:
            with explained(uri), open_local(uri) as source:
                shutil.copyfileobj(source, partial, 4 * MIB)
        if sha256 is not None:
            partial.seek(0)
            found = hashlib.file_digest(partial, "sha256").hexdigest()
            if found != sha256:
                raise checksum_error(uri, found, sha256)


def copy(source: str, target: str, sha256: str) -> None:
    """Store what lies at `source` at `target` too; within S3 its bytes do not pass through this machine.

    Raises:
        Damaged: it does not have the given SHA-256.
        UserError: as `read_bytes` and `write_bytes`.
    """
    if not (is_s3(source) and is_s3(target)):
        with tempfile.TemporaryDirectory() as scratch:
            download_file(source, Path(scratch, "copy"), sha256)
            upload_file(Path(scratch, "copy"), target)
        return
    (from_bucket, from_key), (bucket, key) = split(source), split(target)
    with explained(source):
        client().copy({"Bucket": from_bucket, "Key": from_key}, bucket, key, Config=_transfer(LARGEST_PART))
    with io.BufferedReader(_S3Stream(target), READ_AHEAD) as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise checksum_error(source, found, sha256)


def open_read(uri: str) -> BinaryIO:
    """A readable, seekable stream over what is stored at `uri`; memory stays at one buffer.

    A broken connection is resumed where it broke, from the same version of the object.
    """
    if is_s3(uri):
        return io.BufferedReader(_S3Stream(uri), READ_AHEAD)
    with explained(uri):
        return open_local(uri)


def exists(uri: str) -> bool:
    """Whether an object or file is stored at `uri`."""
    if not is_s3(uri):
        return Path(uri).is_file()
    bucket, key = split(uri)
    try:
        with explained(uri):
            client().head_object(Bucket=bucket, Key=key)
    except NotFound:
        return False
    return True


def delete(uri: str) -> None:
    """Remove what is stored at `uri`; nothing there is no error."""
    with explained(uri):
        if is_s3(uri):
            bucket, key = split(uri)
            client().delete_object(Bucket=bucket, Key=key)
        else:
            Path(uri).unlink(missing_ok=True)


# ── folders ─────────────────────────────────────────────────────────────────────────────────────────────


def list_sizes(uri: str) -> dict[str, int]:
    """Names, relative to the folder `uri`, and sizes in bytes of everything below it, sorted by name."""
    found: dict[str, int] = {}
    if is_s3(uri):
        bucket, key = split(uri)
        prefix = f"{key}/" if key else ""
        for page in _pages(uri, "list_objects_v2", "Contents", Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                found[_told(uri, item, "Key").removeprefix(prefix)] = _told(uri, item, "Size")
    else:
        for name, status in _files(uri):
            if not _is_partial(name):
                found[name] = status.st_size
    return dict(sorted(found.items()))


def walk(
    folder: str | Path, closed: Callable[[OSError], object] = lambda error: None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, which calls itself for each level of folders, of which strangers make thousands.

    Args:
        folder: to begin in.
        closed: is told of folders that cannot be read.

    Yields:
        Path of each folder before those in it; names of folders in it, of which those that are left in the
        list are entered, in its order; names of all else.
    """
    waiting = [os.fspath(folder)]
    while waiting:
        here = waiting.pop()
        folders: list[str] = []
        others: list[str] = []
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    (folders if _is_folder(entry) else others).append(entry.name)
        except OSError as error:
            closed(error)
            continue
        yield here, folders, others
        below = (os.path.join(here, name) for name in reversed(folders))
        waiting += [path for path in below if not os.path.islink(path)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _files(
    folder: str, closed: Callable[[OSError], object] = lambda error: None
) -> Iterator[tuple[str, os.stat_result]]:
    """Names, relative to a local folder, of the files below it, with what is known of each.

    What somebody deletes meanwhile is passed over; `closed` as in `walk`.
    """
    for here, _, names in walk(folder, closed):
        for path in (Path(here, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    yield path.relative_to(folder).as_posix(), path.stat()


def _is_partial(name: str) -> bool:
    return name.rpartition("/")[2].startswith(TEMPORARY)


def _unreadable(error: OSError) -> None:
    """Raises OSError: a folder is neither gone nor closed to us; who takes what it holds for gone deletes."""
    if not isinstance(error, FileNotFoundError | PermissionError):
        raise error


@dataclass(frozen=True)
class Stored:
    """What is known of an object without reading it."""

    size: int  # bytes
    age: float  # seconds since it was last written


def listing(uri: str) -> dict[str, Stored]:
    """Names, relative to the folder `uri`, of everything below it, and what is known of each, sorted by name.

    Ages are by the store's own clock, whatever this machine's says, and to a second: S3 tells whole ones. A
    thousand objects are one request.
    """
    found: dict[str, Stored] = {}
    if is_s3(uri):
        bucket, key = split(uri)
        prefix = f"{key}/" if key else ""
        for page in _pages(uri, "list_objects_v2", "Contents", Bucket=bucket, Prefix=prefix):
            now = _date(uri, page["ResponseMetadata"]["HTTPHeaders"])
            for item in page.get("Contents", []):
                age = max(0.0, (now - _told(uri, item, "LastModified")).total_seconds())
                found[_told(uri, item, "Key").removeprefix(prefix)] = Stored(_told(uri, item, "Size"), age)
    elif Path(uri).is_dir():
        with explained(uri):
            try:
                now_here = _clock(uri)
            except FileNotFoundError:  # the folder has just gone
                return {}
            for name, status in _files(uri, _unreadable):
                if not _is_partial(name):
                    found[name] = Stored(status.st_size, max(0.0, now_here - status.st_mtime))
    return dict(sorted(found.items()))


def _clock(folder: str) -> float:
    """Seconds since 1970, by a folder's own clock: that of the network has one. Raises as `open`."""
    with tempfile.TemporaryFile(prefix=TEMPORARY, dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime


def unfinished(uri: str) -> dict[tuple[str, str], Stored]:
    """What was begun to be written below the folder `uri`, and lies there though nothing lists it.

    On S3 uploads in parts, whose age is since they began; here partial files.

    Returns:
        By name, relative to the folder, and by S3's id of the upload ("" here).
    """
    found: dict[tuple[str, str], Stored] = {}
    if not is_s3(uri):
        for name, status in _files(uri, _unreadable):
            if _is_partial(name):
                found[name, ""] = Stored(status.st_size, max(0.0, time.time() - status.st_mtime))
        return found
    bucket, key = split(uri)
    prefix = f"{key}/" if key else ""
    for page in _pages(uri, "list_multipart_uploads", "Uploads", Bucket=bucket, Prefix=prefix):
        now = _date(uri, page["ResponseMetadata"]["HTTPHeaders"])
        for one in page.get("Uploads", []):
            name, upload = _told(uri, one, "Key"), _told(uri, one, "UploadId")
            parts = _pages(uri, "list_parts", "Parts", Bucket=bucket, Key=name, UploadId=upload)
            with contextlib.suppress(NotFound):  # it was finished just now
                size = sum(_told(uri, part, "Size") for some in parts for part in some.get("Parts", []))
                age = max(0.0, (now - _told(uri, one, "Initiated")).total_seconds())
                found[name.removeprefix(prefix), upload] = Stored(size, age)
    return found


def give_up(uri: str, name: str, upload: str) -> None:
    """Let go of what was begun to be written, as `unfinished` names it; what is gone already is no error."""
    if not upload:
        delete_all(uri, [name])
        return
    bucket, key = split(join(uri, name))
    with contextlib.suppress(NotFound), explained(uri):
        client().abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)


def marks(uri: str) -> Iterator[tuple[str, int, str]]:
    """Name, relative to the folder `uri` in S3, size and ETag of everything below it, in S3's order.

    A thousand objects are one request, made when they are wanted.
    """
    bucket, key = split(uri)
    prefix = f"{key}/" if key else ""
    for page in _pages(uri, "list_objects_v2", "Contents", Bucket=bucket, Prefix=prefix):
        for item in page.get("Contents", []):
            name, size, etag = (_told(uri, item, what) for what in ("Key", "Size", "ETag"))
            yield name.removeprefix(prefix), size, etag


def ages(uri: str) -> dict[str, float]:
    """The ages alone, see `listing`."""
    return {name: one.age for name, one in listing(uri).items()}


def _date(uri: str, headers: Mapping[str, str]) -> datetime.datetime:
    """When S3 answered, by its own clock."""
    try:
        return email.utils.parsedate_to_datetime(headers.get("date", ""))
    except ValueError:
        raise UserError(f"{uri}: S3's answer bears no date, which ages are told by") from None


def list_uris(uri: str) -> list[str]:
    """URIs of everything below the folder `uri`, sorted."""
    return [join(uri, name) for name in list_sizes(uri)]


def delete_all(uri: str, names: Iterable[str]) -> None:
    """Remove what has these names below the folder `uri`; on S3 a thousand are one request.

    Of local folders those that are left empty go, too.
    """
    names = list(names)
    if is_s3(uri):
        bucket, key = split(uri)
        prefix = f"{key}/" if key else ""
        with explained(uri):
            for start in range(0, len(names), AT_ONCE):
                batch = [{"Key": f"{prefix}{name}"} for name in names[start : start + AT_ONCE]]
                answer = client().delete_objects(Bucket=bucket, Delete={"Objects": batch, "Quiet": True})  # type: ignore[typeddict-item]
                for failed in answer.get("Errors", []):
                    raise UserError(f"{uri}: {failed.get('Key')} cannot be deleted: {failed.get('Message')}")
        return
    with explained(uri):
        for name in names:
            Path(uri, name).unlink(missing_ok=True)
            for folder in Path(uri, name).parents:
                try:
                    folder.rmdir()
                except OSError:  # it is not empty, or gone
                    break
                if folder == Path(uri):
                    break


def delete_prefix(uri: str) -> None:
    """Remove everything below the folder `uri`.

    Raises:
        UserError: `uri` is a whole bucket or the root of the file system.
    """
    if is_s3(uri):
        if not split(uri)[1]:
            raise UserError(f"{uri}: refusing to delete a whole bucket; name a folder in it")
        delete_all(uri, list_sizes(uri))
    else:
        if Path(uri).absolute().parent == Path(uri).absolute():
            raise UserError(f"{uri}: refusing to delete the root of the file system; name a folder")
        if Path(uri).is_dir():
            with explained(uri):
                shutil.rmtree(uri)


def check_store(root: str) -> None:
    """Prove that `root` can be written, read and deleted from, with the credentials at hand; within seconds.

    A bucket that does not exist is created where the credentials allow it.

    Raises:
        UserError: what stands in the way, and what would be right.
    """
    probe = join(root, f".check-{os.getpid()}-{os.urandom(4).hex()}")
    data = os.urandom(16)
    if is_s3(root):
        bucket, key = split(probe)
        quick = client(patience=5, attempts=2)

        def put() -> None:
            with explained(root):
                quick.put_object(Bucket=bucket, Key=key, Body=data)

        try:
            put()
        except NotFound:
            with explained(root), contextlib.suppress(FileExistsError):  # another run was quicker
                quick.create_bucket(Bucket=bucket)
            put()
        with explained(root):
            found = quick.get_object(Bucket=bucket, Key=key)["Body"].read()
            quick.delete_object(Bucket=bucket, Key=key)
    else:
        write_bytes(probe, data)
        found = read_bytes(probe)
        delete(probe)
    if found != data:
        raise UserError(f"{root}: what was written came back different; this is not a working store")


# ── checksums ───────────────────────────────────────────────────────────────────────────────────────────


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a local file, as hex digits. Raises as `open_local` and `check_solid`."""
    with open_local(path) as stream:
        check_solid(stream, path)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_local(path: str | Path) -> io.BufferedReader:
    """A local file, open for reading; who opened a pipe would wait for its writer, and a device has no end.

    Raises:
        OSError: as `open`.
        UserError: it is no regular file.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path} is not a regular file")
    return file


def check_solid(file: BinaryIO, path: str | Path) -> None:
    """Refuse a local file that is mostly hole: it costs its maker nothing, and who reads it all of its size.

    Raises:
        UserError: more than half of it, and a GiB, are not on the disk.
    """
    size = os.fstat(file.fileno()).st_size
    if size <= MOST_HOLES:
        return
    held = at = 0
    try:
        while at < size:
            begins = os.lseek(file.fileno(), at, os.SEEK_DATA)
            at = os.lseek(file.fileno(), begins, os.SEEK_HOLE)
            held += at - begins
    except OSError as error:
        if error.errno != errno.ENXIO:  # this file system does not tell; otherwise all that follows is hole
            held = size
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    if size - held > max(MOST_HOLES, held):
        raise UserError(f"{path} announces {size} bytes, and {held} are on the disk; fetch it again")


def fingerprint(uri: str, suffixes: tuple[str, ...]) -> str:
    """64 hex digits over names and contents of a file, or of the files right in a folder, that end so.

    Contents by SHA-256 here, by ETag on S3, where nothing has to be read for it.

    Raises:
        NotFound: no such file is there.
    """
    found: dict[str, str] = {}
    if is_s3(uri):
        bucket, key = split(uri)
        for page in _pages(uri, "list_objects_v2", "Contents", Bucket=bucket, Prefix=key):
            for item in page.get("Contents", []):
                whole = _told(uri, item, "Key")
                folder, _, name = whole.rpartition("/")
                if key in (whole, folder) and name.endswith(suffixes):
                    found[name] = _told(uri, item, "ETag")
    else:
        path = Path(uri).expanduser()
        with explained(uri):
            for file in [path] if path.is_file() else path.iterdir():
                if file.is_file() and file.name.endswith(suffixes):
                    found[file.name] = file_sha256(file)
    if not found:
        raise NotFound(f"{uri} holds nothing that ends in {' or '.join(suffixes)}")
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def mark(uri: str) -> str:
    """What changes with a stored object, without reading it: its ETag on S3, size and time of change here.

    Raises:
        NotFound: nothing is there.
        UserError: it is no regular file.
    """
    with explained(uri):
        if is_s3(uri):
            bucket, key = split(uri)
            return str(_told(uri, client().head_object(Bucket=bucket, Key=key), "ETag"))
        status = os.stat(uri)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{uri} is not a regular file")
    return f"{status.st_size} {status.st_mtime_ns}"


def checksum_error(uri: str, found: str, expected: str) -> Damaged:
    """The error of a file that is not what its manifest says."""
    return Damaged(
        f"{uri} is damaged: its SHA-256 is {found[:16]}…, its manifest says {expected[:16]}…;"
        " delete the asset, so that it is made again, or restore the file"
    )


# ── below ───────────────────────────────────────────────────────────────────────────────────────────────


def client(patience: float | None = None, attempts: int | None = None) -> S3Client:
    """The process's S3 client.

    Args:
        patience: seconds to wait for an answer; default 10, or the environment's `LATENT_GPT_S3_PATIENCE`.
            With eleven attempts a restart or a minute's standstill is outlived, and two minutes' reported.
        attempts: tries of one request.
    """
    usual = _patience()
    # Connections must not be shared with a forked child, and tests move from server to server.
    surroundings = (os.getpid(), environment.starting("AWS_", "S3_"))
    return _client(surroundings, patience or usual[0], attempts or usual[1])


_haste: ContextVar[tuple[float, int] | None] = ContextVar("haste", default=None)


def _patience() -> tuple[float, int]:
    """Seconds to wait for an answer, and how often to ask."""
    return _haste.get() or (environment.S3_PATIENCE.get(), ATTEMPTS)


@contextlib.contextmanager
def hasty(patience: float, attempts: int) -> Iterator[None]:
    """Within the block every request of this thread has that patience and that many attempts."""
    token = _haste.set((patience, attempts))
    try:
        yield
    finally:
        _haste.reset(token)


def _pages(uri: str, operation: Any, held: str, **question: Any) -> Iterator[Any]:
    """The pages of a listing, each asked for when it is wanted; `held` names what they hold.

    Raises:
        UserError: it does not end; and what is wrong with S3.
    """
    pages = iter(client().get_paginator(operation).paginate(**question))
    empty = count = 0
    while True:
        try:
            with explained(uri):
                page = next(pages, None)
        except KeyError as error:  # botocore's own, for which it is no error of S3's
            raise _without(uri, str(error.args[0])) from None
        if page is None:
            return
        here = len(page.get(held, []))
        empty, count = 0 if here else empty + 1, count + here
        if empty > MOST_EMPTY or count > MOST_LISTED:
            raise UserError(
                f"{uri}: S3's listing does not end: {count} came, and {empty} pages that hold nothing"
            )
        yield page


def _told(uri: str, answer: Mapping[str, Any], what: str) -> Any:
    """What an answer of S3's says. Raises UserError: it does not."""
    if what not in answer:
        raise _without(uri, what)
    return answer[what]


def _without(uri: str, what: str) -> UserError:
    return UserError(f"{uri}: S3's answer has no {what}; this is not a working store")


def _sent(session: Any, patience: float, request: Any) -> Any:
    """The answer to a request, in time and, but for an object's bytes, whole.

    A byte now and then satisfies a socket's time-out, so a thread of its own waits for the answer.

    Args:
        session: botocore's, which sends.
        patience: seconds, beside those that what is sent may take.
        request: botocore's.

    Raises:
        Unavailable: the answer does not come in time.
        UserError: it is too large.
    """
    from botocore.exceptions import HTTPClientError
    from urllib3.exceptions import HTTPError

    answers: list[Any] = []

    def send() -> None:
        try:
            of_an_object, request.stream_output = request.stream_output, True
            answer = session.send(request)
            answer.raw.stream = functools.partial(_small, answer.raw.stream, request.url)
            if not of_an_object or answer.status_code >= 300:
                _ = answer.content  # which botocore keeps
            answers.append(answer)
        except HTTPError as error:
            answers.append(HTTPClientError(error=error))
        except BaseException as error:
            answers.append(error)

    patience += int(request.headers.get("Content-Length") or 0) / SLOWEST
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    thread.join(patience)
    if not answers:
        raise Unavailable(
            f"{request.url.partition('?')[0]}: S3 is too slow: no whole answer in {patience:.0f} s; set"
            " LATENT_GPT_S3_PATIENCE to more seconds if that is to be waited for"
        )
    if isinstance(answers[0], BaseException):
        raise answers[0]
    return answers[0]


def _small(stream: Callable[[], Iterable[bytes]], url: str) -> Iterator[bytes]:
    """The bytes of an answer. Raises UserError: they are too many."""
    came = 0
    for data in stream():
        came += len(data)
        if came > LARGEST_ANSWER:
            raise UserError(f"{url.partition('?')[0]}: S3's answer has more than {LARGEST_ANSWER} bytes")
        yield data


@functools.cache
def _client(surroundings: object, patience: float, attempts: int) -> S3Client:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, PartialCredentialsError
    from botocore.retries import standard
    from botocore.retries.quota import RetryQuota

    endpoint = environment.S3_ENDPOINT_URL.get()
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise UserError(f"S3_ENDPOINT_URL is '{endpoint}'; it must start with http:// or https://")
    config = Config(
        connect_timeout=patience,
        read_timeout=patience,
        retries={"mode": "adaptive", "total_max_attempts": attempts},
        max_pool_connections=2 * THREADS,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        # Not boto3's default session: that one keeps the first credentials it has seen.
        session = boto3.session.Session()
        region = session.region_name or "us-east-1"
        made = session.client("s3", endpoint_url=endpoint or None, region_name=region, config=config)
    except PartialCredentialsError:
        raise UserError(
            "S3 credentials are incomplete; set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"S3: {error}; check AWS_PROFILE, AWS_CONFIG_FILE and S3_ENDPOINT_URL") from None

    # botocore gives all threads together some 35 retries, which a second's restart would use up.
    made.meta.events.unregister("needs-retry.s3", unique_id="retry-config-s3")
    retries: Any = standard.register_retry_handler(made, attempts)
    retries._retry_quota._quota = RetryQuota(math.inf)  # type: ignore[arg-type]

    def send(request: Any, event_name: str, **_: Any) -> Any:
        if event_name.endswith(AT_LEISURE):
            return None  # botocore sends it itself
        # As long as all tries may wait, and with the second that boto3 waits to be told to go on.
        return _sent(made._endpoint.http_session, patience * (attempts + 2) + 1, request)  # type: ignore[attr-defined]

    made.meta.events.register("before-send.s3", send)
    return made


@functools.cache
def _transfer(part: int) -> TransferConfig:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        multipart_threshold=2 * PART, multipart_chunksize=part, max_concurrency=THREADS, io_chunksize=MIB
    )


def _part(size: int) -> int:
    """Bytes per part of an object: two for each thread, within bounds."""
    return min(max(PART, -(-size // (2 * THREADS))), LARGEST_PART)


def _download(uri: str, target: Any) -> None:
    """Write an S3 object into an open local file, a large one in parts side by side."""
    with _S3Stream(uri) as whole:
        if whole.end <= 2 * PART:
            shutil.copyfileobj(whole, target, MIB)
            target.flush()
            return
        size, etag = whole.end, whole.etag
    if size > (free := shutil.disk_usage(target.fileno()).free):
        raise UserError(
            f"{uri} has {size} bytes and the disk {free} left; free some, or choose another place"
        )
    step = _part(size)

    def fetch(start: int) -> None:
        chunk = memoryview(bytearray(MIB))
        with _S3Stream(uri, etag, start, min(start + step, size)) as part:
            position = start
            while count := part.readinto(chunk):
                os.pwrite(target.fileno(), chunk[:count], position)
                position += count

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            list(pool.map(fetch, range(0, size, step)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _S3Stream(io.RawIOBase):
    """An S3 object, or the bytes of it from `start` to `end`, as a raw file on one connection.

    Seeking opens a new connection at the next read, and so does a connection that breaks.
    """

    def __init__(self, uri: str, etag: str = "", start: int = 0, end: int = 0) -> None:
        super().__init__()
        self.etag = etag
        self.end = end
        self.md5 = ""  # of the whole object in hex digits, where S3 says so
        self._uri = uri
        self._bucket, self._key = split(uri)
        self._position = start
        self._body: Any = None
        self._came = 0  # bytes, in
        self._waited = 0.0  # seconds of
        self._patience = math.prod(_patience())
        if not etag:
            self._open()

    def _open(self) -> None:
        where: dict[str, Any] = {}
        if self.etag:  # never mix two versions of an object
            where = {"IfMatch": self.etag, "Range": f"bytes={self._position}-{self.end - 1}"}
        try:
            with explained(self._uri):
                answer = client().get_object(Bucket=self._bucket, Key=self._key, **where)
        except FileExistsError:
            raise UserError(f"{self._uri} was replaced while it was read; run the step again") from None
        length = answer.get("ContentLength", -1)
        if not self.etag:
            self.etag, self.end, self.md5 = answer.get("ETag", ""), length, _md5(self._bucket, answer)
        part = answer.get("ContentRange", "bytes 0-")
        right = 0 <= length == self.end - self._position and part.startswith(f"bytes {self._position}-")
        if not self.etag or not right:
            answer["Body"].close()
            raise UserError(
                f"{self._uri}: S3 answers another question: {length} bytes ({part}, ETag '{self.etag}')"
                f" where those from {self._position} to {self.end} were asked for"
            )
        # urllib3's own: it hands over what has come, where boto3's wrapper waits for as much as is asked for.
        self._body = answer["Body"].__enter__()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.end}[whence]
        if start + offset != self._position:
            self._position = start + offset
            self._close_body()
        return self._position

    def tell(self) -> int:
        return self._position

    def readall(self) -> bytes:
        data = bytearray()
        while part := self.read(min(MIB, self.end - self._position)):
            data += part
        return bytes(data)

    def readinto(self, buffer: Any) -> int:
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        wanted = min(len(buffer), self.end - self._position)
        if wanted <= 0:
            return 0
        began = time.monotonic()
        for attempt in range(ATTEMPTS):
            try:
                if self._body is None:
                    self._open()
                data = self._body.read1(wanted)
                if data:
                    break
            except (BotoCoreError, HTTPError, OSError) as error:
                if attempt == ATTEMPTS - 1:
                    raise Unavailable(
                        f"{self._uri}: the connection to S3 broke again and again: {error}"
                    ) from None
            self._close_body()
        else:
            raise UserError(f"{self._uri} ends after {self._position} of {self.end} bytes")
        self._came += len(data)
        self._waited += time.monotonic() - began
        if self._waited > self._patience + self._came / SLOWEST:
            raise Unavailable(
                f"{self._uri}: S3 is too slow: {self._came} bytes in {self._waited:.0f} s; set"
                " LATENT_GPT_S3_PATIENCE to more seconds if that is to be waited for"
            )
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _close_body(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None

    def close(self) -> None:
        self._close_body()
        super().close()


def _md5(bucket: str, answer: Any) -> str:
    """The MD5 that an answer tells in its ETag; "" for objects whose ETag is something else.

    Those are uploaded in parts, encrypted with a key of the user's, or in a directory bucket
    (docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html).
    """
    own_key = "SSECustomerAlgorithm" in answer or answer.get("ServerSideEncryption", "AES256") != "AES256"
    plain = re.fullmatch('"?([0-9a-f]{32})"?', answer.get("ETag", ""))
    return plain[1] if plain and not own_key and not bucket.endswith("--x-s3") else ""


@contextlib.contextmanager
def _local_target(uri: str | Path, if_absent: bool = False, durable: bool = True) -> Iterator[Any]:
    """A binary file that takes the name `uri` when the block ends well, and vanishes when it does not."""
    target = Path(uri)
    with explained(str(uri)):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=target.parent)
        try:
            with os.fdopen(handle, "w+b") as partial:
                yield partial
                partial.flush()
                if durable:
                    os.fsync(partial.fileno())
            os.chmod(name, 0o666 & ~_umask())
            if if_absent:
                os.link(name, target)
            else:
                os.replace(name, target)
            if durable:
                _sync_folder(target.parent)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


@functools.cache
def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    """A rename is durable when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn what boto3 and the file system raise into one line that says what is wrong and what is right."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith(("botocore", "boto3", "s3transfer")):
            raise _s3_error(uri, error) from None  # some of these are OSErrors as well
        if isinstance(error, OSError):
            raise _file_error(uri, error) from None
        raise


def _file_error(uri: str, error: OSError) -> Exception:
    """What a person can do about a failure of the file system; `error` itself where that is nothing."""
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{uri} does not exist")
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return UserError(f"{uri}: {error.strerror}; a file is needed here")
    if isinstance(error, PermissionError):
        return UserError(f"{uri}: permission denied; give this user access, or choose another place")
    if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO):  # ENXIO: a socket
        return UserError(f"{uri} cannot be read: {error.strerror}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{uri}: no space left on the disk; free some, or choose another place")
    return error


def _s3_error(uri: str, error: Exception) -> Exception:
    """What a person can do about an S3 failure."""
    from botocore import exceptions as boto

    endpoint = environment.S3_ENDPOINT_URL.get() or "AWS S3"
    if isinstance(error.__context__, boto.ClientError) and not isinstance(error, boto.ClientError):
        error = error.__context__  # of an upload in parts, wrapped
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return UserError(f"{uri}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, boto.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        message = error.response.get("Error", {}).get("Message") or ""
        if code in ("PreconditionFailed", "ConditionalRequestConflict") or status in (409, 412):
            return FileExistsError(f"{uri} exists already")
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"):
            return UserError(
                f"{uri}: {endpoint} refuses the credentials ({code}); check AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY"
            )
        if "virtual" in message.lower() or code in ("SecondLevelDomainForbidden", "PathStyleDomainForbidden"):
            return UserError(
                f"{uri}: {endpoint} wants the bucket in the host's name ({code}: {message}); set"
                " addressing_style = virtual below s3 = in ~/.aws/config, or where AWS_CONFIG_FILE says"
            )
        if status in (401, 403):
            return UserError(
                f"{uri}: {endpoint} denies {error.operation_name} ({code}); check AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY, and that they may list, read, write and delete in this bucket"
            )
        if code == "NoSuchBucket":
            return NotFound(
                f"{uri}: bucket {split(uri)[0]} does not exist at {endpoint}; create it or name another"
            )
        if status == 404:
            return NotFound(f"{uri} does not exist")
        kind = Unavailable if status >= 500 or status == 429 or code in BUSY else UserError
        return kind(f"{uri}: {endpoint} answers {error.operation_name} with {status} {code}: {message}")
    if isinstance(error, boto.SSLError):
        return UserError(
            f"{uri}: {error}; if the certificate of {endpoint} is signed by an authority of your own, set"
            " AWS_CA_BUNDLE to that one's file"
        )
    if isinstance(error, boto.ProxyConnectionError):
        return UserError(
            f"{uri}: {endpoint} cannot be reached through the proxy that HTTP_PROXY or HTTPS_PROXY names;"
            " mend that, or name the host in NO_PROXY"
        )
    if isinstance(error, boto.ConnectTimeoutError | boto.ReadTimeoutError):
        return Unavailable(
            f"{uri}: {endpoint} does not answer; check that it runs and S3_ENDPOINT_URL is right"
        )
    if isinstance(error, boto.ConnectionError | boto.HTTPClientError):
        return Unavailable(
            f"{uri}: {endpoint} cannot be reached; check that it runs and S3_ENDPOINT_URL is right"
        )
    return UserError(f"{uri}: {' '.join(str(error).split())}")
