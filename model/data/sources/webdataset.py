"""Tar shards as img2dataset writes them, local or in S3, read as streams.

A sample is the files that share a name up to its last dot: a picture, the first if there are more, and its
captions in `.txt` or under `captions`, `caption` or `text` in `.json`. A text that the JSON holds too is one
caption; of any other, each line is one. `000.seg.png` is a part of the sample `000`, unless it has its own
captions.

Files of a sample need not be neighbours: what is incomplete waits until the shard ends, its picture on disk.
Samples before the place where a shard breaks off are used; the break is quarantined under the shard's name.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from webdataset.shardlists import expand_urls

from model.config import WebDatasetSource
from model.data import listing, tars
from model.data.captions import LARGEST_TEXT, as_list, clean_captions, decode, lines, lookup, parse, shown
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
from model.plumbing import storage

SIDE_BY_SIDE = 16  # shards looked at together
LOOKED_AT = 4  # shards that a look opens
LARGEST_UNPACKED = 1 << 30  # bytes of a member of a compressed shard: to pass over it, it has to be unpacked
MOST_SHARDS = 1 << 20
MOST_WAITING = 1 << 17  # samples that are not complete
MOST_TEXT = 1 << 26  # characters of their captions
MOST_SPOOLED = 1 << 33  # bytes of their pictures; what they take on disk is some twice that at most
TEXTS = (".txt", ".json")


def iterate(
    config: WebDatasetSource, side: int, start: int = 0, known: Known = nothing_known
) -> Iterator[Record]:
    """Samples of all shards, in the order of the range and of each tar. A shard is a unit."""
    yield from islice(_records(config, known), start, None)


def _records(config: WebDatasetSource, known: Known) -> Iterator[Record]:
    for uri, state in _marks(config):  # of before any of them is read
        mark = marked(state)
        if known(uri, mark):
            yield Record(uri, b"", unit=uri, mark=mark, known=True)
            continue
        with storage.open_read(uri) as stream:
            for place, record in enumerate(_shard(uri, stream, _Samples())):
                yield replace(record, unit=uri, mark=mark, place=place)


def fingerprint(config: WebDatasetSource) -> str:
    """A hash over every shard's name and mark."""
    digest = hashlib.sha256()
    for uri, mark in _marks(config):
        digest.update(f"{uri}\0{mark}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _marks(config: WebDatasetSource) -> list[tuple[str, str]]:
    uris = _uris(config)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return list(zip(uris, pool.map(storage.mark, uris), strict=True))


def count(config: WebDatasetSource) -> int:
    """Samples of all shards, from img2dataset's `_stats.json` beside each; 0 where one is missing."""
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        counts = list(pool.map(_samples, _uris(config)))
    return sum(counts) if all(counts) else 0


def sample(config: WebDatasetSource, most: int, seconds: float) -> Sample:
    """The first samples of a few shards; how many there are in all follows from the bytes that these took.

    Where captions come behind all pictures, most of a shard is read before there is a sample: until then no
    time counts.
    """
    uris = _uris(config)
    chosen = uris[:: -(-len(uris) // LOOKED_AT)]
    counted = count(config)
    found = Sample(iter(()), f"{len(uris)} tar shard{'s' * (len(uris) > 1)}", counted, counted > 0)

    def records() -> Iterator[Record]:
        lengths: list[float] = []  # samples in each shard
        whole = len(chosen) == len(uris)
        until = math.inf
        for uri in chosen:
            with storage.open_read(uri) as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                stream, samples, taken = _Until(file, until), _Samples(), 0
                shard = _shard(uri, stream, samples)  # type: ignore[arg-type]
                lengths.append(0)
                try:
                    for record in islice(shard, -(-most // len(chosen))):
                        stream.until = until = min(until, time.monotonic() + seconds)
                        taken += not record.others
                        lengths[-1] = (taken + samples.unfinished) * size / max(1, stream.tell())
                        if not counted:
                            found.total = round(len(uris) * sum(lengths) / len(lengths))
                        yield record
                    if next(shard, None) is None:
                        lengths[-1] = taken
                    else:
                        whole = False
                except _Enough:
                    return
        if not counted:
            found.total, found.exact = round(len(uris) * sum(lengths) / len(lengths)), whole

    found.records = records()
    return found


class _Enough(UserError):
    """The time for a look is over."""


class _Until(io.RawIOBase):
    """A stream that ends a look in time: gigabytes of a tar may come before a sample is complete."""

    def __init__(self, stream: BinaryIO, until: float) -> None:
        self._stream, self.until = stream, until

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int = -1) -> bytes:
        if time.monotonic() > self.until:
            raise _Enough("the time for a look is over")
        return self._stream.read(size)


def _samples(uri: str) -> int:
    try:
        stats = json.loads(storage.read_bytes(f"{uri.removesuffix('.tar')}_stats.json"))
        return int(stats["successes"])
    except (UserError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0  # another program's shards, or none of our business: pictures are judged without it


def _expands_to(urls: str) -> int:
    """How many names its braces stand for, at most."""
    count = 1
    for inside in re.findall(r"\{([^{}]*)\}", urls):
        if bounds := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\..*)?", inside):
            digits = max(map(len, bounds.groups()))
            count *= abs(int(bounds[2]) - int(bounds[1])) + 1 if digits < 18 else MOST_SHARDS + 1
        elif bounds := re.fullmatch(r"(.)\.\.(.)(?:\.\..*)?", inside):
            count *= abs(ord(bounds[2]) - ord(bounds[1])) + 1
        else:
            count *= inside.count(",") + 1
    return count


def _uris(config: WebDatasetSource) -> list[str]:
    """Shards in the order of the range, those of a folder or glob by their names."""
    uris: list[str] = []
    if _expands_to(config.urls) > MOST_SHARDS:
        raise UserError(f"data.source.urls: {shown(config.urls)} stands for more than {MOST_SHARDS:,} shards")
    for url in expand_urls(config.urls):
        uri = os.path.expanduser(url)
        if uri.endswith(tars.SUFFIXES) and "*" not in uri:
            uris.append(uri)
            continue
        try:
            uris += listing.files(uri, tars.SUFFIXES)
        except UserError as error:
            raise UserError(f"data.source.urls: {error}") from None
    if not uris:
        raise UserError(
            f"data.source.urls: no tar shard at {config.urls}; name them, e.g. s3://b/p/{{000..999}}.tar, or"
            " their folder"
        )
    return uris


# ── members of a tar ────────────────────────────────────────────────────────────────────────────────────


class _Member(NamedTuple):
    name: str
    size: int
    kind: str  # its suffix
    data: bytes  # of pictures and captions, unless they are too large


def _members(stream: BinaryIO) -> Iterator[_Member]:
    """Members in their order. Raises tarfile.ReadError: the archive breaks off."""
    for member in tars.members(stream, LARGEST_UNPACKED):
        kind = suffix(member.name) if member.is_file else tars.SPECIAL
        data = b"".join(member.parts()) if member.size <= _most(kind) else b""
        yield _Member(member.name, member.size, kind, data)


def _most(kind: str) -> int:
    """Bytes of a member that are read at most; -1 where nobody needs any."""
    if kind in TEXTS:
        return LARGEST_TEXT
    return LARGEST_PICTURE if kind in SUFFIXES + OTHER_SUFFIXES else -1


# ── members to samples ──────────────────────────────────────────────────────────────────────────────────


def _shard(uri: str, stream: BinaryIO, samples: _Samples) -> Iterator[Record]:
    problem = ""
    try:
        for member in _members(stream):
            yield from samples.add(member)
    except tarfile.ReadError as error:  # what was read before it is whole
        problem = f"the tar breaks off: {error}"
    yield from samples.rest()
    if problem:
        yield Record(uri, b"", problem=problem)
    if samples.others:
        yield Record(uri, b"", others=samples.others)


@dataclass
class _Sample:
    """Files that share a name."""

    name: str
    kind: str = ""  # of its picture; "" where there is none yet
    image: bytes = b""
    spooled: tuple[int, int] = (0, 0)  # where the picture waits, and its size; 0 where it does not
    texts: list[str] = field(default_factory=list)
    notes: list[Any] = field(default_factory=list)  # captions of its JSON
    problem: str = ""

    @property
    def group(self) -> str:
        """Its name up to the first dot."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def size(self) -> int:
        """Characters of its captions."""
        return sum(map(len, self.texts)) + sum(len(note) for note in self.notes if isinstance(note, str))

    @property
    def captioned(self) -> bool:
        return bool(self.texts or self.notes or self.problem)

    def add(self, member: _Member) -> None:
        """A picture or a caption."""
        if member.size > _most(member.kind):
            self.problem = f"{member.kind}: {too_large(member.size, _most(member.kind))}"
        if member.kind not in TEXTS:
            self.kind, self.image, self.spooled = member.kind, member.data, (0, 0)
        elif member.kind == ".txt":
            self.texts.append(decode(member.data))
        elif not self.problem:
            try:
                notes = parse(decode(member.data))
            except ValueError as error:
                self.problem = f"its .json is not valid JSON: {error}"
                return
            for name in ("captions", "caption", "text"):
                found = lookup(notes, [name]) if isinstance(notes, dict) else None
                if found and found[1]:
                    self.notes += as_list(found[1])
                    break

    def record(self, image: bytes, problem: str = "") -> Record:
        """The finished sample."""
        said = set(clean_captions(self.notes))
        found: list[Any] = []
        for text in self.texts:
            told = lines(text.strip())
            if len(told) == 1 or not said.intersection(clean_captions([text])):
                found += told
        return Record(self.name, image, found + self.notes, problem=self.problem or problem)


class _Samples:
    """Puts the members of a shard together."""

    def __init__(self) -> None:
        self.others: Counter[str] = Counter()
        self.unfinished = 0  # samples that wait for the rest of them; not a cat.mask.png, part of another
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the samples
        self._end = 0  # of what is written there
        self._group = ""
        self._near: dict[str, _Sample] = {}  # of the group that is being read
        self._near_bytes = 0
        self._waiting: dict[str, _Sample] = {}  # incomplete ones of others
        self._text = 0  # characters of their captions
        self._spooled = 0  # bytes of their pictures
        self._done: set[int] = set()  # hashes of names: a hostile shard has millions

    def add(self, member: _Member) -> Iterator[Record]:
        """Take a member; yields what is complete now."""
        if any(part.startswith(".") and part != "." for part in member.name.split("/")):
            return
        if _most(member.kind) < 0:
            pass_over(self.others, member.kind)
            return
        name = member.name[: -len(member.kind)]
        group = _Sample(name).group
        if group != self._group or self._near_bytes > LARGEST_PICTURE:
            yield from self._settle()
            self._group = group
        self._near_bytes += len(member.data)
        sample = self._near.get(name)
        if sample is None:
            if hash(name) in self._done and member.kind in TEXTS:  # the metadata behind all captions
                pass_over(self.others, "texts of complete samples")
                return
            if hash(name) in self._done:
                yield Record(member.name, b"", problem="its sample was complete before; sort the tar by name")
                return
            sample = self._near[name] = self._called(name) or _Sample(name)
        if member.kind in TEXTS or not sample.kind:
            sample.add(member)
        elif member.kind == sample.kind:
            yield Record(member.name, b"", problem="a second file of this name")
        else:
            pass_over(self.others, "further pictures of a sample")

    def rest(self) -> Iterator[Record]:
        """What the shard ends with: samples that stayed incomplete."""
        yield from self._settle()
        dotted = Counter(sample.group for sample in self._waiting.values() if sample.kind)
        for name in list(self._waiting):
            sample = self._called(name)
            if sample and sample.kind and sample.group != name:
                if self._is_part(sample):
                    pass_over(self.others, "parts of a sample")
                    continue
                if dotted[sample.group] == 1 and (text := self._called(sample.group)):
                    sample.texts, sample.notes, sample.problem = text.texts, text.notes, text.problem
            if sample:
                yield from self._incomplete(sample)

    def _settle(self) -> Iterator[Record]:
        """What is complete goes out; the rest waits, but not without end."""
        before = self._end
        for name, sample in self._near.items():
            if sample.kind and sample.captioned:
                self._done.add(hash(name))
                yield sample.record(self._image(sample))
                continue
            if sample.image:
                self._spool_out(sample, sample.image)
            self._waiting[name] = sample
            self._text += sample.size
            self._spooled += sample.spooled[1]
            self.unfinished += sample.group == name
            while len(self._waiting) > MOST_WAITING or self._text > MOST_TEXT or self._spooled > MOST_SPOOLED:
                name, oldest = next(iter(self._waiting.items()))
                self._called(name)
                if self._is_part(oldest):
                    pass_over(self.others, "parts of a sample")
                    continue
                yield from self._incomplete(oldest, "what belongs to it is not near it; sort the tar by name")
        self._near.clear()
        self._near_bytes = 0
        if self._end > max(before, 2 * self._spooled + LARGEST_PICTURE):
            self._close_ranks()

    def _called(self, name: str) -> _Sample | None:
        """Take a sample out of those that wait."""
        if sample := self._waiting.pop(name, None):
            self._text -= sample.size
            self._spooled -= sample.spooled[1]
            self.unfinished -= sample.group == name
        return sample

    def _is_part(self, sample: _Sample) -> bool:
        """Whether one that has no captions is a mask or the like of another, which has a picture."""
        if not sample.kind or sample.group == sample.name:
            return False
        whole = self._waiting.get(sample.group) or self._near.get(sample.group)
        return hash(sample.group) in self._done or bool(whole and whole.kind)

    def _incomplete(self, sample: _Sample, problem: str = "") -> Iterator[Record]:
        if not sample.kind and sample.captioned:
            yield sample.record(b"", problem or "no picture beside its other files")
        elif sample.kind in SUFFIXES or (sample.kind and sample.captioned):
            yield sample.record(self._image(sample), problem)
        else:
            pass_over(self.others, sample.kind or ".json")

    def _spool_out(self, sample: _Sample, image: bytes) -> None:
        """Put a sample's picture at the end of the spool."""
        self._spool.seek(self._end)
        self._spool.write(image)
        sample.image, sample.spooled = b"", (self._end, len(image))
        self._end += len(image)

    def _close_ranks(self) -> None:
        """Move pictures that wait to the places of those that do not any more."""
        self._end = 0
        for sample in sorted(self._waiting.values(), key=lambda sample: sample.spooled):
            if sample.spooled[1]:
                self._spool_out(sample, self._image(sample))
        self._spool.truncate(self._end)

    def _image(self, sample: _Sample) -> bytes:
        if not sample.spooled[1]:
            return sample.image
        self._spool.seek(sample.spooled[0])
        return self._spool.read(sample.spooled[1])
