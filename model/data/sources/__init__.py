"""Where captioned pictures come from: one module per kind of source, one interface.

A source module has two functions. `iterate(config, side, start, known)` yields every picture once, always in
one order and without holding all in memory; the first `start` are passed over, without reading them where the
format allows. `fingerprint(config)` says in a few bytes what it will yield, so that an asset made from the
same source is found again, and refuses a source that is not there. Pictures are passed on as the bytes that
were found, and only `model.data.images` judges them; sources that draw theirs draw them for a wanted `side`.
Where no picture has to be read to know, `count(config)` says how many records there are. `sample(config,
most, seconds)` takes some records for a look, spread over the source; without it, it is the first ones.

A **unit** is what a source can tell the state of without reading it: a picture's file with its captions, a
tar, a parquet file, a drawing's number. Before it reads one, `iterate` asks `known(unit, mark)`, and in place
of the records of one that is as it was yields a single one that says so.

One rule for what is found: it is a picture, and ends in the asset or in quarantine with its reason; or it
says what a picture shows; or it is counted among `others`. What is hidden (.name) is not looked at. Only
regular files are opened, and sizes are looked at before anything is read.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from types import ModuleType
from typing import Any, TypeVar

from model.config import Source
from model.data.captions import shown

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # of picture files
# Of files that are pictures where they have a caption; what is in them decides whether they can be read.
OTHER_SUFFIXES = (
    *(".apng", ".arw", ".avif", ".bmp", ".cr2", ".dng", ".gif", ".heic", ".heif", ".ico", ".jfif", ".jp2"),
    *(".jpe", ".jxl", ".nef", ".pbm", ".pgm", ".pnm", ".ppm", ".psd", ".svg", ".tga", ".tif", ".tiff"),
)
DRAWN = ("openmoji", "shapes")  # kinds that bring their own pictures
LARGEST_PICTURE = 128 << 20  # bytes of a picture's file; larger ones are quarantined and not read
KNOWN = (
    "tar shards (s3://bucket/{000..999}.tar), parquet files, a zip or tar of any of these, a data set of the"
    " hub (owner/name), `openmoji` or `shapes`"
)
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".txt")  # that captions of many pictures may be in
HOW_TO_CAPTION = "write what cat.jpg shows into cat.txt beside it, or into captions.csv (file_name, caption)"
KINDS = 50  # of other files that are told apart
NAMES = {  # of kinds of sources, for people
    "openmoji": "OpenMoji's pictures with their names in Unicode",
    "shapes": "coloured shapes, drawn from templates",
    "parquet": "parquet files",
}

Known = Callable[[str, str], bool]  # whether the unit of this name had this mark
T = TypeVar("T")

_remembered: dict[tuple[object, ...], Any] | None = None  # within a block of `remembered`


@dataclass(frozen=True, slots=True)
class Record:
    """A picture as its source has it."""

    key: str  # its name in the source, for people: code points, file name, row
    image: bytes  # JPEG, PNG or WEBP, not yet decoded
    captions: list[str] = field(default_factory=list)  # as found; `model.data.ingest` cleans them
    composition: bool = False  # a combination that training must not see
    problem: str = ""  # why the source could not even read it; such a record is quarantined
    others: Counter[str] = field(
        default_factory=Counter
    )  # no picture, but how many files of which kind are none
    unit: str = ""  # that it is part of
    mark: str = ""  # of that unit; empty where only reading tells its state
    place: int = 0  # number within its unit
    known: bool = False  # stands for all records of its unit, which is as it was


@dataclass
class Sample:
    """Some records of a source, for a look."""

    records: Iterator[Record]
    kind: str  # of the source, for people
    total: int = 0  # records in all; where it is estimated, it is right when the last record was taken
    exact: bool = True


def nothing_known(unit: str, mark: str) -> bool:
    """Whether a unit is as it was, where nobody knows how it was."""
    return False


def marked(*parts: object) -> str:
    """A mark over what a source knows of a unit's state: 16 hex digits."""
    text = "\0".join(map(str, parts))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def iterate(config: Source, side: int, start: int = 0, known: Known = nothing_known) -> Iterator[Record]:
    """Every record of a source from number `start` on.

    Args:
        config: of the source.
        side: of the pictures in the asset, pixels.
        start: records that are passed over; 0 where anything is known.
        known: whether a unit is as it was, and need not be read.

    Raises:
        UserError: when the source is missing, empty or not what its kind promises.
    """
    records: Iterator[Record] = _module(config).iterate(config, side, start, known)
    return records


def fingerprint(config: Source) -> str:
    """What the source holds, as a short string that changes when its content does.

    Raises:
        UserError: when the source is missing or empty.
    """
    mark: str = _module(config).fingerprint(config)
    return mark


def count(config: Source) -> int:
    """How many records a source has; 0 where only reading them would tell."""
    known = getattr(_module(config), "count", None)
    return known(config) if known else 0


def content(config: Source) -> Source:
    """The source in an archive or data set of the hub, which is unpacked or downloaded for it; else itself.

    Raises:
        UserError: it is not there, or nothing in it is a source that we read.
    """
    found = getattr(_module(config), "content", None)
    inner: Source = found(config) if found else config
    return inner


def sample(config: Source, side: int, most: int, seconds: float) -> Sample:
    """Some records of a source, without reading all of it.

    Args:
        config: of the source.
        side: of the pictures, pixels; for sources that draw theirs.
        most: records.
        seconds: for which more are looked for, from the first on.

    Raises:
        UserError: the source is missing, empty or not what its kind promises.
    """
    taken = getattr(_module(config), "sample", None)
    if taken:
        found: Sample = taken(config, most, seconds)
        return found
    few = config.model_copy(update={"limit": most}) if config.kind == "openmoji" else config  # the first ones
    return Sample(islice(iterate(few, side), most), NAMES.get(config.kind, config.kind), count(config))


def recognise(uri: str, look: bool = True) -> dict[str, Any] | None:
    """The values of `data.source` for what a person names as their data; None for nothing.

    Args:
        uri: a folder of pictures, of parquet files or of tar shards; shards with a {000..999} range; a file
            or a glob of either; a zip or tar of any of these; a data set of the hub; the word `openmoji` or
            `shapes`. All but data sets and words may be in S3.
        look: into S3; if not, a folder there is said to be one of pictures. (That of a cluster need not be in
            reach of who submits to it, and that of this machine may not have started.)

    Raises:
        UserError: it is none of these, or nothing in it can be used; with what was there and what would do.
    """
    recognition = import_module(f"{__name__}.recognition")
    found: dict[str, Any] | None = once(("recognise", uri, look), lambda: recognition.recognise(uri, look))
    return found and dict(found)  # overrides are put into it


@contextmanager
def remembered() -> Iterator[None]:
    """Within the block a source is recognised once, and a folder in S3 listed once: it is as it was then.

    A million objects are a thousand requests, and minutes.
    """
    global _remembered
    before, _remembered = _remembered, {} if _remembered is None else _remembered
    try:
        yield
    finally:
        _remembered = before


def once(what: tuple[object, ...], find: Callable[[], T]) -> T:
    """What `find` finds; within a block of `remembered`, what it found the first time."""
    if _remembered is None:
        return find()
    if what not in _remembered:
        _remembered[what] = find()
    found: T = _remembered[what]
    return found


def suffix(name: str) -> str:
    """The last suffix of a name in lower case, as `pathlib` has it, which takes ten times as long."""
    name = name.rpartition("/")[2]
    dot = name.rfind(".")
    return name[dot:].lower() if 0 < dot < len(name) - 1 else ""


def pass_over(others: Counter[str], kind: str) -> None:
    """Count a file that is no picture, for people; kinds without end share a name."""
    kind = shown(kind) or "files without suffix"
    others[kind if kind in others or len(others) < KINDS else "files of other kinds"] += 1


def too_large(size: int, most: int) -> str:
    """The reason of a file that is not read."""
    return f"{size:,} bytes, more than the {most:,} that are read"


def _module(config: Source) -> ModuleType:
    return import_module(f"model.data.sources.{config.kind}")
