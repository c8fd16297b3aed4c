"""From a source to verified image shards: judge, normalise, drop duplicates, split, pack.

The source is worked through in chunks of `shard_images` records. A chunk becomes one tar per split
(`train-00007.tar`, `validation-00007.tar`, …) and then one journal entry beside them, so a run that is killed
continues behind the last whole chunk and ends with the same bytes. Nothing grows with the source but a table
of content hashes on disk.

Content is the normalised pixels: their hash names the picture, finds duplicates in other files or formats,
and decides the split, so the same picture is always on the same side.
"""

from __future__ import annotations

import hashlib
import io
import json
import sqlite3
import tarfile
import tempfile
from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

from model.config import DataConfig
from model.data import sources
from model.data.captions import clean_captions, damage, shown
from model.data.sources import Record
from model.errors import UserError
from model.plumbing import speech, storage
from model.plumbing.assets import AssetWriter, File, Manifest, find
from model.plumbing.parallel import cores, parallel_map, single_threaded
from model.plumbing.speech import Progress

SPLITS = ("train", "validation", "composition")
QUARANTINE = "quarantine.jsonl"
JOURNAL = "journal"  # folder of an entry per chunk, until all are done
BATCH = 32  # pictures per task of a worker, at most
BATCH_BYTES = 1 << 22  # of those, as they are found; fewer are taken when they are larger
IN_FLIGHT = 1 << 28  # bytes of all tasks under way
LISTED = 1000  # bad pictures that a refusal names one by one
THREADS_ENOUGH = 4  # cores; with more, Python's lock holds threads up and processes pay for their start


class Refused(UserError):
    """The data itself is not good enough: nothing of it is kept. (What S3 refuses leaves the journal.)"""


def ingest(config: DataConfig, writer: AssetWriter) -> Manifest:
    """Make the images of a config, or find them made.

    Raises:
        UserError: the source is missing, holds no usable picture, or more bad ones than `max_bad_share`; then
            nothing is left behind.
    """
    if done := find(writer.uri):
        speech.reused("images", done.uri)
        return done
    with tempfile.TemporaryDirectory(prefix="latent-gpt-ingest-") as scratch:
        try:
            return _ingest(config, writer, Path(scratch))
        except Refused:
            storage.delete_prefix(writer.uri)
            raise


def _ingest(config: DataConfig, writer: AssetWriter, scratch: Path) -> Manifest:
    counts: Counter[str] = Counter(dict.fromkeys((*SPLITS, "duplicates", "quarantined", "read"), 0))
    seen = Seen(scratch / "seen.sqlite")
    journal = storage.join(writer.uri, JOURNAL)
    finished = storage.list_uris(journal)
    shards: dict[str, int] = {}  # pictures in each tar
    others: Counter[str] = Counter()
    total = sources.count(config.source)
    with (scratch / QUARANTINE).open("w", encoding="utf-8") as quarantine:

        def account(chunk: Chunk) -> None:
            counts.update(chunk.counts)
            others.update(chunk.others)
            shards.update({file.name: chunk.counts[file.name.partition("-")[0]] for file in chunk.files})
            for entry in chunk.quarantined:
                quarantine.write(json.dumps(entry, ensure_ascii=False) + "\n")
            quarantine.flush()
            _check_share(config, counts, total, scratch / QUARANTINE)

        for entry in finished:
            chunk = Chunk.from_json(storage.read_bytes(entry))
            for file in chunk.files:
                writer.add(file)
            seen.add(chunk.hashes)
            account(chunk)

        progress = Progress("images", total, "img", counted="picture", done=counts["read"])
        start = len(finished) * config.shard_images
        records = sources.iterate(config.source, config.image_size, start)
        with closing(_chunks(records, config, len(finished))) as chunks:
            for number, outcomes in chunks:
                chunk = _pack(outcomes, number, config, writer, seen, scratch, progress, counts["read"])
                storage.write_bytes(storage.join(journal, f"{number:06d}.json"), chunk.to_json())
                seen.add(chunk.hashes)
                account(chunk)
        _check_share(config, counts, counts["read"], scratch / QUARANTINE)
    if not counts["train"]:
        raise Refused(
            f"data.source ({config.source.kind}) gave no picture to train on: {_tally(counts, others, total)}"
        )
    progress.update(counts["read"])
    speech.say("images", _tally(counts, others, total))
    writer.add_file(QUARANTINE, scratch / QUARANTINE)
    return writer.finish(
        {**counts, "others": others, "image_size": config.image_size, "shards": shards}, scratch=JOURNAL
    )


# ── records to pictures, in the workers ─────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Picture:
    """A record that was found good."""

    content: bytes  # hash of the normalised pixels, 16 bytes
    suffix: str  # png or jpg
    data: bytes
    captions: list[str]
    composition: bool
    source: str  # the record's key


@dataclass(frozen=True, slots=True)
class Bad:
    """A record that was not."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Others:
    """No picture, but how many files of which kind are none."""

    kinds: Counter[str]


Outcome = Picture | Bad | Others


def normalise(records: list[Record], config: DataConfig) -> list[Outcome]:
    """Judge and normalise records; what was lossy stays lossy (JPEG), what was not stays exact (PNG)."""
    return [_normalise(record, config) for record in records]


def _normalise(record: Record, config: DataConfig) -> Outcome:
    from model.data.images import (
        BadImage,
        decode,
        encode,
        is_jpeg,
    )  # torch: what is found needs none

    if record.others:
        return Others(record.others)
    name = shown(record.key)
    captions = clean_captions(record.captions)
    problem = record.problem or damage(record.captions) or ("" if captions else "no caption")
    if problem:
        return Bad(name, shown(problem))
    try:
        pixels = decode(record.image, config)
    except BadImage as error:
        return Bad(name, shown(str(error)))
    content = hashlib.sha256(pixels.data).digest()[:16]
    suffix, data = encode(pixels, lossless=not is_jpeg(record.image))
    return Picture(content, suffix, data, captions, record.composition, name)


def _chunks(
    records: Iterator[Record], config: DataConfig, first: int
) -> Generator[tuple[int, Iterator[Outcome]], None, None]:
    """Outcomes of each chunk of records, in order, worked out on all cores ahead of their use."""

    flying: deque[int] = deque()  # bytes of each task under way

    def batches() -> Iterator[tuple[int, list[Record]]]:
        for number in count(first):
            chunk = islice(records, config.shard_images)
            empty = True
            while batch := _batch(chunk):
                empty = False
                size = sum(map(_size, batch))
                while sum(flying) + size > IN_FLIGHT:
                    flying.append(0)
                    yield number, []  # nothing, until an older one has landed
                flying.append(size)
                yield number, batch
            if empty:
                return

    def landed() -> Iterator[tuple[int, list[Outcome]]]:
        for result in parallel_map(partial(_work, config=config), batches(), threads=threads):
            flying.popleft()
            yield result

    threads = cores() <= THREADS_ENOUGH
    with single_threaded() if threads else nullcontext():
        for number, group in groupby(landed(), key=itemgetter(0)):
            yield number, (outcome for _, outcomes in group for outcome in outcomes)


def _batch(records: Iterator[Record]) -> list[Record]:
    """A task for a worker; empty when there are no more records."""
    batch: list[Record] = []
    size = 0
    while len(batch) < BATCH and size < BATCH_BYTES and (record := next(records, None)):
        batch.append(record)
        size += _size(record)
    return batch


def _size(record: Record) -> int:
    return len(record.image) + sum(len(caption) for caption in record.captions if isinstance(caption, str))


def _work(task: tuple[int, list[Record]], config: DataConfig) -> tuple[int, list[Outcome]]:
    return task[0], normalise(task[1], config)


# ── pictures to shards ──────────────────────────────────────────────────────────────────────────────────


@dataclass
class Chunk:
    """What became of one chunk: its journal entry."""

    counts: Counter[str]
    files: list[File]
    hashes: list[bytes]  # contents that are now part of the asset
    quarantined: list[dict[str, str]]
    others: Counter[str]  # files that are no pictures, by kind

    def to_json(self) -> bytes:
        """For the journal."""
        return json.dumps(
            {
                "counts": self.counts,
                "files": [file.model_dump() for file in self.files],
                "hashes": [content.hex() for content in self.hashes],
                "quarantined": self.quarantined,
                "others": self.others,
            }
        ).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Chunk:
        """The inverse of `to_json`."""
        values = json.loads(data)
        return cls(
            Counter(values["counts"]),
            [File.model_validate(file) for file in values["files"]],
            [bytes.fromhex(content) for content in values["hashes"]],
            values["quarantined"],
            Counter(values["others"]),
        )


@dataclass
class Entry:
    """A picture that waits in the spool file until its chunk is complete."""

    suffix: str
    offset: int
    size: int
    captions: list[str]
    composition: bool
    sources: list[str] = field(default_factory=list)


def _pack(
    outcomes: Iterator[Outcome],
    number: int,
    config: DataConfig,
    writer: AssetWriter,
    seen: Seen,
    scratch: Path,
    progress: Progress,
    before: int,
) -> Chunk:
    """Write one chunk's tars.

    A duplicate within the chunk adds its captions to the first; one of an earlier chunk is left out.
    """
    entries: dict[bytes, Entry] = {}
    chunk = Chunk(Counter(), [], [], [], Counter())
    with tempfile.TemporaryFile(dir=scratch) as spool:
        for outcome in outcomes:
            if isinstance(outcome, Others):
                chunk.others.update(outcome.kinds)
                continue
            chunk.counts["read"] += 1
            if isinstance(outcome, Bad):
                chunk.counts["quarantined"] += 1
                chunk.quarantined.append({"source": outcome.source, "reason": outcome.reason})
            elif same := entries.get(outcome.content):
                chunk.counts["duplicates"] += 1
                same.captions = list(dict.fromkeys(same.captions + outcome.captions))
                same.composition |= outcome.composition
                same.sources.append(outcome.source)
            elif outcome.content in seen:
                chunk.counts["duplicates"] += 1
            else:
                entries[outcome.content] = Entry(
                    outcome.suffix,
                    spool.tell(),
                    spool.write(outcome.data),
                    outcome.captions,
                    outcome.composition,
                    [outcome.source],
                )
            progress.update(before + chunk.counts["read"])
        chunk.hashes = list(entries)
        for split in SPLITS:
            members = {c: e for c, e in entries.items() if split_of(c, e.composition, config) == split}
            if members:
                chunk.counts[split] += len(members)
                path = scratch / f"{split}.tar"
                _write_tar(path, members, spool)
                chunk.files.append(writer.add_file(f"{split}-{number:06d}.tar", path))
                path.unlink()
    return chunk


def split_of(content: bytes, composition: bool, config: DataConfig) -> str:
    """The split of a picture, from its content alone (and from its source's rule for compositions)."""
    if composition:
        return "composition"
    return "validation" if int.from_bytes(content[:8], "big") < config.validation_share * 2**64 else "train"


def _write_tar(path: Path, members: dict[bytes, Entry], spool: BinaryIO) -> None:
    """WebDataset layout; the same members give the same bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for content, entry in members.items():
            spool.seek(entry.offset)
            notes = {"captions": entry.captions, "sources": entry.sources}
            text = json.dumps(notes, ensure_ascii=False).encode()
            for suffix, data in ((entry.suffix, spool.read(entry.size)), ("json", text)):
                info = tarfile.TarInfo(f"{content.hex()}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


class Seen:
    """Content hashes of all earlier chunks, on disk: 20 bytes each, and no memory."""

    def __init__(self, path: Path) -> None:
        self._table = sqlite3.connect(path, isolation_level=None)
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute("PRAGMA synchronous = OFF")
        self._table.execute("CREATE TABLE seen (content BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, hashes: list[bytes]) -> None:
        """Remember a chunk."""
        self._table.execute("BEGIN")
        self._table.executemany("INSERT OR IGNORE INTO seen VALUES (?)", ((content,) for content in hashes))
        self._table.execute("COMMIT")

    def __contains__(self, content: bytes) -> bool:
        return self._table.execute("SELECT 1 FROM seen WHERE content = ?", (content,)).fetchone() is not None


# ── what to say ─────────────────────────────────────────────────────────────────────────────────────────


def _check_share(config: DataConfig, counts: Counter[str], total: int, quarantine: Path) -> None:
    """Refuse as soon as more are bad than may be of all: of `total`, or of those read where it says less."""
    bad, read = counts["quarantined"], counts["read"]
    if bad <= config.max_bad_share * max(total, read):
        return
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    with quarantine.open(encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            if reasons.total() < LISTED:
                speech.say("images", f"bad: {entry['source']}: {entry['reason']}")
            reasons[entry["reason"]] += 1
            examples.setdefault(entry["reason"], entry["source"])
    shown = "; ".join(f"{n} x {reason} ({examples[reason]})" for reason, n in reasons.most_common(5))
    raise Refused(
        f"data: {bad} of the first {read} pictures are bad, more than max_bad_share"
        f" {config.max_bad_share:g}: {shown}"
    )


def _tally(counts: Counter[str], others: Counter[str], announced: int) -> str:
    """What became of all; `announced` is what the source said of itself, 0 if nothing."""
    tally = ", ".join(f"{counts[name]} {name}" for name in ("read", *SPLITS, "duplicates", "quarantined"))
    if announced > counts["read"]:
        tally += f"; the source announces {announced}"
    if others:
        tally += f"; not pictures: {', '.join(f'{n} {kind}' for kind, n in others.most_common())}"
    return tally
