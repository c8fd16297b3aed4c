"""A folder of pictures, here or in S3, captioned by a list, by files beside them, or by names.

- Lists (Hugging Face imagefolder), in any folder for it and those below; the first of `metadata.jsonl`,
  `captions.csv`, `captions.tsv`, `metadata.csv`, `metadata.parquet`. Each entry has `file_name` (or `file`,
  `image`), relative to the list, and `caption` (or `text`, or a list `captions`). Neighbouring entries that
  name the same picture give it several captions; pictures that no entry names are left out.
- Beside `cat.jpg`, the first of these that is there: `cat.jpg.txt`, `cat.txt`, `cat.jpg.caption`,
  `cat.caption`, with one caption per line; `cat.jpg.json`, `cat.json`, with `caption`, `text` or `captions`.
- Where the config says so, names: those of pictures that have no caption in a file, or of their folders.
"""

from __future__ import annotations

import csv
import hashlib
import os
import posixpath
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from io import BufferedReader
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple

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
from model.data.names import folder_words, words
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
from model.data.sources.tree import Folder, Tree, Unreadable, joined, meant, nfc, open_tree, within
from model.errors import UserError

SIDECARS = (".txt", ".caption", ".json")
FIRST = 3  # pictures that a look always sees
MOST_EMPTY = 100  # files without a caption, after which no more are sought
CAPTIONED = 0.75  # of pictures, by names that count: as many as `presets/auto.yaml` takes
TOLD_APART = 10_000  # captions by which names of files and of folders are weighed
AHEAD = 4  # pictures under way for each reader
AHEAD_BYTES = 1 << 28  # of them
NAMES = {"names": "the names of files", "folders": "the names of folders"}  # that are captions
Entry = tuple[str, list[Any], str]  # a picture's name as a list has it, its captions, what is wrong with them


class Found(NamedTuple):
    """A picture that is not read yet, and where its captions are."""

    record: Record  # with its captions, where a list or its name says them
    sidecar: str = ""  # the file of its captions
    place: str = ""  # of its captions, for people


def iterate(
    config: FolderSource, side: int, start: int = 0, known: Known = nothing_known
) -> Iterator[Record]:
    """Pictures in the order of paths, those of a list in the list's. Each is a unit, with its captions."""
    tree = _tree(config)

    def marked_ones() -> Iterator[Found]:
        for one in islice(_found(tree, config), start, None):
            unit, mark = one.record.key, _mark(tree, one)  # of before it is read
            if one.record.problem or one.record.others:
                yield one
            elif known(unit, mark):
                yield Found(Record(unit, b"", unit=unit, mark=mark, known=True))
            else:
                yield one._replace(record=replace(one.record, unit=unit, mark=mark))

    yield from _read(tree, marked_ones())


def fingerprint(config: FolderSource) -> str:
    """A hash over names, sizes and times of change (in S3 ETags) of every file; contents are not read."""
    tree = _tree(config)
    digest = hashlib.sha256()
    kinds: Counter[str] = Counter()
    for folder in tree.folders():
        for name in folder.names:
            path = joined(folder.path, name)
            with suppress(Unreadable):  # somebody has just deleted it
                size, changed = tree.state(path)
                digest.update(f"{path}\0{size}\0{changed}\n".encode(errors="surrogateescape"))
                kinds[suffix(name)] += 1
    if not any(kinds[known] for known in SUFFIXES + OTHER_SUFFIXES):
        raise UserError(f"data.source.path: {tree.place} holds no picture ({', '.join(SUFFIXES)})")
    return digest.hexdigest()


def count(config: FolderSource) -> int:
    """Pictures in the lists, or in the folder where there is none."""
    return sum(not one.record.others for one in _found(_tree(config), config))


def sample(config: FolderSource, most: int, seconds: float) -> Sample:
    """The first pictures, for people to see, and others spread over the folder, each equally likely.

    Names are looked through to the end, however long that takes: a list at the root may be the last of them.
    """
    tree, chance = _tree(config), random.Random(0)
    chosen: list[tuple[int, Found]] = []
    others: list[Record] = []
    number = 0
    for one in _found(tree, config):
        if one.record.others:
            others.append(one.record)
            continue
        if (place := number if number < most else chance.randrange(min(FIRST, most), number + 1)) < most:
            chosen[place : place + 1] = [(number, one)]
        number += 1
    chosen.sort(key=itemgetter(0))
    places = Counter(one.place for _, one in chosen if one.place)
    said = " and in ".join(place for place, _ in places.most_common(3))
    kind = f"a folder with captions in {said}" if said else "a folder without captions"
    return Sample(chain(others, _read(tree, (one for _, one in chosen))), kind, number)


def best_captions(tree: Tree) -> str:
    """Where captions of a folder are to come from, a value of `FolderSource.captions`; "" if there are none.

    Names count where no file says anything: those of most pictures, or of their folders, have to be words.
    Of both the ones that tell more apart: in `nevus/ISIC_0024306.jpg` the file's begins like all others.
    """
    pictures = looked = named = 0
    said: Counter[str] = Counter()
    different: dict[str, set[str]] = {"names": set(), "folders": set()}
    for folder in tree.folders():
        if _list_of(folder.names):
            return "files"
        for one in _captioned(folder, Counter(), "files"):
            if one.sidecar and looked < MOST_EMPTY:
                looked += 1
                if _says(tree, one.sidecar):
                    return "files"
        above = folder_words(folder.path)
        for name in folder.names:
            if suffix(name) in SUFFIXES:
                own = words(stem(name))
                pictures += 1
                named += bool(own)
                for where, caption in (("names", own or above), ("folders", above)):
                    said[where] += bool(caption)
                    if caption and len(different[where]) < TOLD_APART:
                        different[where].add(caption)
    if named * 2 <= pictures:
        said["names"] = 0
    enough = [where for where in different if 0 < CAPTIONED * pictures <= said[where]]
    return max(enough, key=lambda where: len(different[where]), default="")


def _tree(config: FolderSource) -> Tree:
    try:
        return open_tree(config.path)
    except UserError as error:
        raise type(error)(f"data.source.path: {error}") from None


def _mark(tree: Tree, one: Found) -> str:
    """Over what changes with a picture and its captions' file, or what a list says."""
    found: list[object] = [one.sidecar, one.record.captions]
    try:
        for name in filter(None, (one.record.key, one.sidecar)):
            found += tree.state(name)
    except Unreadable:
        return ""
    return marked(*found)


# ── what is there ───────────────────────────────────────────────────────────────────────────────────────


def _found(tree: Tree, config: FolderSource) -> Iterator[Found]:
    """Every picture, not read yet; what is none is counted."""
    others: Counter[str] = Counter()
    covering: str | None = None  # the folder whose list says which pictures count
    listed: set[str] = set()
    for folder in tree.folders():
        for record in folder.apart:
            others.update(record.others)
            if record.problem:
                yield Found(record)
        if covering is not None and not within(covering, folder.path):
            covering = None
            listed.clear()
        if name := _list_of(folder.names):
            folder.names.remove(name)
            covering = folder.path if covering is None else covering
            for record in _entries(tree, joined(folder.path, name)):
                listed.add(nfc(posixpath.normpath(record.key)))
                yield Found(record, place=name)
        if covering is None:
            yield from _captioned(folder, others, config.captions)
            continue
        for name in folder.names:
            if nfc(joined(folder.path, name)) not in listed:
                picture = suffix(name) in SUFFIXES
                pass_over(others, "pictures that no list names" if picture else suffix(name))
    if others:
        yield Found(Record(tree.place, b"", others=others))


def _list_of(names: list[str]) -> str:
    """The list among a folder's files."""
    present = {name.lower(): name for name in names}
    return next((present[name] for name in LISTS if name in present), "")


def _captioned(folder: Folder, others: Counter[str], captions: str) -> Iterator[Found]:
    """Pictures of a folder with the files of their captions; what is neither is counted."""
    texts = {nfc(stem(name)) + suffix(name): name for name in folder.names if suffix(name) in SIDECARS}
    used = set()
    for name in folder.names:
        wanted = (nfc(base) + kind for kind in SIDECARS for base in (name, stem(name)))
        text = next((texts[one] for one in wanted if one in texts), "")
        if suffix(name) in SUFFIXES or (text and suffix(name) in OTHER_SUFFIXES):
            used |= {name, text}
            said = _said_by_names(folder.path, name, captions)
            place = f"{suffix(text)} files beside the pictures" if text else NAMES[captions] if said else ""
            record = Record(joined(folder.path, name), b"", said)
            yield Found(record, text and joined(folder.path, text), place)
    for name in folder.names:
        if name not in used:
            pass_over(others, suffix(name))


def stem(name: str) -> str:
    """A file's name without its suffix."""
    return name[: -len(suffix(name)) or None]


def _said_by_names(folder: str, name: str, captions: str) -> list[Any]:
    """The caption that a picture's name is, or its folder's."""
    if captions == "files":
        return []
    said = (captions == "names" and words(stem(name))) or folder_words(folder)
    return [said] if said else []


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────


def _read(tree: Tree, found: Iterable[Found]) -> Iterator[Record]:
    """Records with their bytes, in order; where that pays, several are read at a time, ahead of their use."""
    fill = partial(_filled, tree)
    if tree.readers == 1:
        yield from map(fill, found)
        return
    flying: deque[tuple[int, Future[Record]]] = deque()
    size = 0
    pool = ThreadPoolExecutor(tree.readers)
    try:
        for one in found:
            wanted = min(tree.size(one.record.key), LARGEST_PICTURE)
            while flying and (size + wanted > AHEAD_BYTES or len(flying) >= AHEAD * tree.readers):
                landed, record = flying.popleft()
                size -= landed
                yield record.result()
            size += wanted
            flying.append((wanted, pool.submit(fill, one)))
        for _, record in flying:
            yield record.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _filled(tree: Tree, one: Found) -> Record:
    """A record with the bytes of its picture, and the captions of the file beside it."""
    record = one.record
    if record.problem or record.others or record.known:
        return record
    problem = ""
    try:
        data = tree.read(record.key, LARGEST_PICTURE)
        problem = f"{one.sidecar}: "
        captions = (_told(tree, one.sidecar) if one.sidecar else []) or record.captions
    except Unreadable as error:
        return replace(record, problem=f"{problem}{error}", unit="", mark="")
    return replace(record, image=data, captions=captions)


def _told(tree: Tree, sidecar: str) -> list[Any]:
    """The captions in a file beside a picture; none where they are all empty."""
    text = decode(tree.read(sidecar, LARGEST_TEXT))
    if suffix(sidecar) != ".json":
        told: list[Any] = list(lines(text))
    else:
        try:
            notes = parse(text)
        except ValueError as error:
            raise Unreadable(f"not valid JSON: {error}") from None
        found = lookup(notes, CAPTION_FIELDS) if isinstance(notes, dict) else None
        told = as_list(found[1]) if found else []
    return told if any(isinstance(one, str) and one.strip() for one in told) else []


def _says(tree: Tree, sidecar: str) -> bool:
    """Whether a file beside a picture holds a caption."""
    try:
        return bool(_told(tree, sidecar))
    except Unreadable:
        return False


# ── lists ───────────────────────────────────────────────────────────────────────────────────────────────


def _entries(tree: Tree, path: str) -> Iterator[Record]:
    """Pictures as a list has them, neighbouring entries of one picture together.

    Raises:
        UserError: it cannot be read, or an entry has no name or no caption.
    """
    folder, name = posixpath.split(path)
    where = shown(joined(tree.place, path))
    try:
        with tree.open(path) as file:
            for picture, group in groupby(LISTS[name.lower()](file, where), key=itemgetter(0)):
                captions: list[Any] = []
                problem = ""
                size = 0
                for _, more, trouble in group:
                    size += sum(len(caption) for caption in more if isinstance(caption, str)) + len(more)
                    too_much = too_large(size, LARGEST_TEXT) if size > LARGEST_TEXT else ""
                    problem = problem or trouble or (too_much and f"captions: {too_much}")
                    captions += [] if problem else more
                try:
                    picture = meant(tree, folder, picture)
                except Unreadable as error:
                    problem = problem or str(error)
                yield Record(picture, b"", captions, problem=problem)
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


def _csv(file: BufferedReader, where: str, delimiter: str = ",") -> Iterator[Entry]:
    # strict: an open quote would swallow the lines after it
    rows = csv.DictReader(file_lines(file), delimiter=delimiter, strict=True)
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
    "captions.tsv": partial(_csv, delimiter="\t"),
    "metadata.csv": _csv,
    "metadata.parquet": _parquet,
}
