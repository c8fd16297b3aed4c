"""A folder of pictures, captioned by a list or by files beside them.

- Lists (Hugging Face imagefolder), in any folder for it and those below; the first of `metadata.jsonl`,
  `captions.csv`, `metadata.csv`, `metadata.parquet`. Each entry has `file_name` (or `file`, `image`),
  relative to the list, and `caption` (or `text`, or a list `captions`). Neighbouring entries that name the
  same picture give it several captions; pictures that no entry names are left out.
- Beside `cat.jpg`, one caption per line, the first of these that is there: `cat.jpg.txt`, `cat.txt`,
  `cat.jpg.caption`, `cat.caption`.

Links are followed within the folder only.
"""

from __future__ import annotations

import csv
import hashlib
import os
import random
import stat
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from io import BufferedReader
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Any

from model.config import FolderSource
from model.data.captions import (
    CAPTION_FIELDS,
    FILE_FIELDS,
    LARGEST_TEXT,
    as_list,
    decode,
    file_lines,
    lines,
    lookup,
    parse,
    shown,
)
from model.data.sources import (
    LARGEST_PICTURE,
    OTHER_SUFFIXES,
    SUFFIXES,
    Known,
    Record,
    Sample,
    marked,
    nothing_known,
    pass_over,
    suffix,
    too_large,
)
from model.errors import UserError

SIDECARS = (".txt", ".caption")
Entry = tuple[str, list[Any], str]  # a picture's name as a list has it, its captions, what is wrong with them


class Unreadable(Exception):
    """A file that is not read; the message is the reason."""


def iterate(
    config: FolderSource, side: int, start: int = 0, known: Known = nothing_known
) -> Iterator[Record]:
    """Pictures in the order of paths, those of a list in the list's. Each is a unit, with its captions."""
    root = _root(config)
    for record, sidecar in islice(_found(root), start, None):
        if record.problem or record.others:
            yield record
            continue
        unit, mark = record.key, _mark(root, record, sidecar)  # of before it is read
        if known(unit, mark):
            yield Record(unit, b"", unit=unit, mark=mark, known=True)
            continue
        yield _filled(root, replace(record, unit=unit, mark=mark), sidecar)


def _filled(root: str, record: Record, sidecar: str) -> Record:
    """A record with the bytes of its picture, and the captions of the file beside it."""
    if record.problem or record.others:
        return record
    problem = ""
    try:
        data = _read(root, record.key, LARGEST_PICTURE)
        problem = f"{sidecar}: "
        captions = lines(decode(_read(root, sidecar, LARGEST_TEXT))) if sidecar else record.captions
    except Unreadable as error:
        return replace(record, problem=f"{problem}{error}", unit="", mark="")
    return replace(record, image=data, captions=captions)


def sample(config: FolderSource, most: int, until: float) -> Sample:
    """Pictures spread over the folder, each as likely as any other."""
    root, chance = _root(config), random.Random(0)
    chosen: list[tuple[int, Record, str]] = []
    others: list[Record] = []
    number, exact = 0, True
    for record, sidecar in _found(root):
        if record.others:
            others.append(record)
            continue
        if (place := number if number < most else chance.randrange(number + 1)) < most:
            chosen[place : place + 1] = [(number, record, sidecar)]
        number += 1
        if number % 1000 == 0 and time.monotonic() > until:
            exact = False
            break
    chosen.sort(key=itemgetter(0))
    filled = (_filled(root, record, sidecar) for _, record, sidecar in chosen)
    return Sample(
        chain(others, filled), _kind((record, sidecar) for _, record, sidecar in chosen), number, exact
    )


def _kind(found: Iterable[tuple[Record, str]]) -> str:
    """What the folder is, for people."""
    places = Counter(
        f"{suffix(sidecar)} files beside the pictures" if sidecar else "a list" if record.captions else ""
        for record, sidecar in found
    )
    del places[""]
    places_said = " and in ".join(place for place, _ in places.most_common())
    return f"a folder with captions in {places_said}" if places else "a folder without captions"


def fingerprint(config: FolderSource) -> str:
    """A hash over names, sizes and times of change of every file; contents are not read."""
    root = _root(config)
    digest = hashlib.sha256()
    kinds: Counter[str] = Counter()
    for folder, names, _ in _folders(root):
        for name in names:
            path = os.path.join(folder, name)
            try:
                status = os.stat(os.path.join(root, path))
            except OSError:  # a link that leads nowhere
                status = os.lstat(os.path.join(root, path))
            digest.update(
                f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape")
            )
            kinds[suffix(name)] += 1
    if not any(kinds[known] for known in SUFFIXES + OTHER_SUFFIXES):
        raise UserError(f"data.source.path: {root} holds no picture ({', '.join(SUFFIXES)})")
    return digest.hexdigest()


def count(config: FolderSource) -> int:
    """Pictures in the lists, or in the folder where there is none."""
    return sum(not record.others for record, _ in _found(_root(config)))


def _root(config: FolderSource) -> str:
    root = os.path.realpath(os.path.expanduser(config.path))
    try:
        os.scandir(root).close()
    except PermissionError:
        raise UserError(f"data.source.path: {root}: permission denied; give this user access") from None
    except (OSError, ValueError):
        raise UserError(f"data.source.path: {config.path} is not a folder") from None
    return root


# ── what is there ───────────────────────────────────────────────────────────────────────────────────────


def _folders(root: str) -> Iterator[tuple[str, list[str], list[Record]]]:
    """Each folder before those in it: its path, its files' names, and subfolders that are not entered."""
    closed: list[OSError] = []
    for path, subfolders, names in os.walk(root, onerror=closed.append):
        folder = "" if path == root else os.path.relpath(path, root)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        links = [name for name in subfolders if os.path.islink(os.path.join(path, name))]
        yield (
            folder,
            sorted(name for name in names if not name.startswith(".")),
            [_linked(root, os.path.join(folder, name)) for name in links],
        )
    for error in closed:
        name = os.path.relpath(error.filename, root)
        yield name, [], [Record(name, b"", problem=f"this folder cannot be read: {error.strerror}")]


def _linked(root: str, name: str) -> Record:
    if _within(root, os.path.realpath(os.path.join(root, name))):
        return Record(
            name, b"", others=Counter({"linked folders": 1})
        )  # its pictures are found where they are
    return Record(
        name, b"", problem="a folder that is a link out of this one; copy what it leads to (cp -rL)"
    )


def _found(root: str) -> Iterator[tuple[Record, str]]:
    """Every picture, not read yet, with the file of its captions where no list says them."""
    others: Counter[str] = Counter()
    covering: str | None = None  # the folder whose list says which pictures count
    listed: set[str] = set()
    for folder, names, apart in _folders(root):
        for record in apart:
            others.update(record.others)
            if record.problem:
                yield record, ""
        if covering is not None and not _within(covering, folder):
            covering = None
            listed.clear()
        known = {name.lower(): name for name in names}
        if found := next((known[name] for name in LISTS if name in known), None):
            names.remove(found)
            covering = folder if covering is None else covering
            for record in _entries(root, os.path.join(folder, found)):
                listed.add(_nfc(os.path.normpath(record.key)))
                yield record, ""
        if covering is None:
            yield from _captioned(folder, names, others)
            continue
        for name in names:
            if _nfc(os.path.join(folder, name)) not in listed:
                picture = suffix(name) in SUFFIXES
                pass_over(others, "pictures that no list names" if picture else suffix(name))
    if others:
        yield Record(root, b"", others=others), ""


def _captioned(folder: str, names: list[str], others: Counter[str]) -> Iterator[tuple[Record, str]]:
    """Pictures of a folder with the files of their captions; what is neither is counted."""
    texts = {
        _nfc(name[: -len(suffix(name))]) + suffix(name): name for name in names if suffix(name) in SIDECARS
    }
    used = set()
    for name in names:
        wanted = (
            _nfc(stem) + kind for kind in SIDECARS for stem in (name, name[: -len(suffix(name)) or None])
        )
        text = next((texts[stem] for stem in wanted if stem in texts), "")
        if suffix(name) in SUFFIXES or (text and suffix(name) in OTHER_SUFFIXES):
            used |= {name, text}
            yield Record(os.path.join(folder, name), b""), text and os.path.join(folder, text)
    for name in names:
        if name not in used:
            pass_over(others, suffix(name))


# ── files of the folder ─────────────────────────────────────────────────────────────────────────────────


def _within(root: str, path: str) -> bool:
    return not root or path == root or path.startswith(f"{root.rstrip('/')}/")


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # a Mac writes names decomposed, lists have them composed


def _mark(root: str, record: Record, sidecar: str) -> str:
    """Over sizes and times of change of a picture and its captions' file, or what a list says."""
    found: list[object] = [sidecar, record.captions]
    try:
        for name in filter(None, (record.key, sidecar)):
            status = os.stat(_located(root, name))
            found += [status.st_size, status.st_mtime_ns]
    except (OSError, ValueError):
        return ""
    return marked(*found)


def _located(root: str, name: str) -> str:
    """The path of a file, whichever way its name is composed."""
    path = os.path.join(root, name)
    if not os.path.lexists(path):
        forms = (os.path.join(root, unicodedata.normalize(form, name)) for form in ("NFC", "NFD"))
        path = next(filter(os.path.lexists, forms), path)
    return path


def _open(root: str, name: str) -> BufferedReader:
    """A regular file of the folder, wherever in it links lead."""
    if os.path.isabs(name) or os.path.normpath(name).split("/")[0] == "..":
        raise Unreadable("lies outside the folder")
    try:
        path = os.path.realpath(_located(root, name), strict=True)
        if not _within(root, path):
            raise Unreadable("a link that leads out of the folder; copy what it leads to (cp -rL)")
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise Unreadable("cannot be read: no file can have this name") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Unreadable("cannot be read: not a regular file")
    return open(handle, "rb")


def _read(root: str, name: str, most: int) -> bytes:
    with _open(root, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise Unreadable(too_large(size, most))
        return file.read(size)


# ── lists ───────────────────────────────────────────────────────────────────────────────────────────────


def _entries(root: str, path: str) -> Iterator[Record]:
    """Pictures as a list has them, neighbouring entries of one picture together.

    Raises:
        UserError: it cannot be read, or an entry has no name or no caption.
    """
    folder, name = os.path.split(path)
    where = shown(os.path.join(root, path))
    try:
        with _open(root, path) as file:
            for picture, group in groupby(LISTS[name.lower()](file, where), key=itemgetter(0)):
                captions: list[Any] = []
                problem = ""
                size = 0
                for _, more, trouble in group:
                    size += sum(len(caption) for caption in more if isinstance(caption, str)) + len(more)
                    too_much = too_large(size, LARGEST_TEXT) if size > LARGEST_TEXT else ""
                    problem = problem or trouble or (too_much and f"captions: {too_much}")
                    captions += [] if problem else more
                yield Record(os.path.join(folder, picture), b"", captions, problem=problem)
    except (Unreadable, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def _jsonl(file: BufferedReader, where: str) -> Iterator[Entry]:
    for number, line in enumerate(file_lines(file), 1):
        if not line.strip():
            continue
        try:
            entry = parse(line)
        except ValueError as error:
            raise UserError(f"{where}, line {number}: not valid JSON: {error}") from None
        if not isinstance(entry, dict):
            raise UserError(f"{where}, line {number}: an object with file_name and text is needed")
        yield _entry(entry, where, number)


def _csv(file: BufferedReader, where: str) -> Iterator[Entry]:
    rows = csv.DictReader(file_lines(file), strict=True)  # an open quote would swallow the lines after it
    while True:
        try:
            row: dict[Any, Any] | None = next(rows, None)
        except csv.Error as error:
            yield _nameless(where, rows.reader.line_num, f"this line cannot be read: {error}")
            continue
        if row is None:
            return
        surplus = any(row.pop(None, []))
        entry = _entry(row, where, rows.line_num)
        problem = "its line has more fields than the header; quote captions that have commas"
        yield (entry[0], [], problem) if surplus else entry


def _parquet(file: BufferedReader, where: str) -> Iterator[Entry]:
    from model.data.sources.parquet import opened, plain, rows

    with opened(file, where, texts=[*FILE_FIELDS, *CAPTION_FIELDS]) as table:
        names = {name: name for name in table.schema_arrow.names}
        found = [column for fields in (FILE_FIELDS, CAPTION_FIELDS) if (column := lookup(names, fields))]
        if len(found) < 2:
            raise UserError(_needed(names, where))
        wanted = [column for _, column in found]
        for number, row in enumerate(rows(table, file, where, wanted), 1):
            try:
                yield _entry({name: plain(row[name], LARGEST_TEXT) for name in wanted}, where, number)
            except ValueError as error:
                yield _nameless(where, number, f"captions: {error}")


def _entry(entry: dict[Any, Any], where: str, number: int) -> Entry:
    file, caption = lookup(entry, FILE_FIELDS), lookup(entry, CAPTION_FIELDS)
    if not file or not caption:
        raise UserError(_needed(entry, f"{where}, line {number}"))
    if file[1] is None or file[1] == "":
        return _nameless(where, number, "this entry names no picture")
    return str(file[1]), as_list(caption[1]), ""


def _needed(present: Iterable[Any], where: str) -> str:
    return (
        f"{where}: fields {shown(', '.join(map(str, present)))}; needed are one of {', '.join(FILE_FIELDS)}"
        f" and one of {', '.join(CAPTION_FIELDS)}"
    )


def _nameless(where: str, number: int, problem: str) -> Entry:
    return f"{os.path.basename(where)}, line {number}", [], problem


LISTS: dict[str, Callable[[BufferedReader, str], Iterator[Entry]]] = {
    "metadata.jsonl": _jsonl,
    "captions.csv": _csv,
    "metadata.csv": _csv,
    "metadata.parquet": _parquet,
}
