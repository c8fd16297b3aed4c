"""From a source to verified image shards: judge, normalise, drop duplicates, split, pack.

The source is worked through in chunks of `shard_images` records. A chunk becomes one tar per split
(`train-00007.tar`, `validation-00007.tar`, …) and then one journal entry beside them, so a run that is killed
continues behind the last whole chunk and ends with the same bytes. Nothing grows with the source but a table
of content hashes on disk.

Content is the normalised pixels: their hash names the picture, finds duplicates in other files or formats,
and decides the split, so the same picture is always on the same side.

Where the asset grows from an earlier one (`growth.py`), what is as it was comes from there, undecoded. The
tar of a chunk then holds what is new, beside the journal, until all chunks are done and shards are made.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from model.config import DataConfig
from model.data import growth, sources
from model.data.captions import clean_captions, damage, shown
from model.data.growth import Earlier, Part, Wanted, Wish, pinned
from model.data.packing import SPLITS, Entry, Seen, add_shard, shard_name, write_tar
from model.data.records import Outcome, digest, record_lines, records_name
from model.data.sources import Record
from model.errors import UserError
from model.plumbing import speech, storage
from model.plumbing.assets import PICTURES, AssetWriter, File, Manifest, find, load, place
from model.plumbing.parallel import cores, parallel_map, single_threaded
from model.plumbing.speech import Progress

QUARANTINE = "quarantine.jsonl"
QUARANTINED = "quarantined.json"  # beside the asset: small pictures of some of these, for people
SHOWN, SHOWN_OF_ONE = 24, 6  # of them, in all and of one kind of reason
JOURNAL = "journal"  # folder of an entry per chunk, until all are done
BATCH = 32  # pictures per task of a worker, at most
BATCH_KNOWN = 2048  # records of a task of which nothing is to be done
BATCH_BYTES = 1 << 22  # of those, as they are found; fewer are taken when they are larger
IN_FLIGHT = 1 << 28  # bytes of all tasks under way
# Sides (the shorter one) and shapes (longer / shorter) of pictures as they were found are counted from these
# bounds on.
SIDES = (1, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
LONGER = (1.0, 1.1, 1.3, 1.45, 1.6, 2.0, 3.0)
KNOWN = "known"  # counted among sizes until all chunks are done: pictures that were not read again
LISTED = 1000  # bad pictures that a refusal names one by one
THREADS_ENOUGH = 4  # cores; with more, Python's lock holds threads up and processes pay for their start


class Refused(UserError):
    """The data itself is not good enough: nothing of it is kept. (What S3 refuses leaves the journal.)"""


def ingest(config: DataConfig, writer: AssetWriter) -> Manifest:
    """Make the images of a config, or find them made; they grow from those that the writer's settings name.

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


def is_as_it_was(config: DataConfig, images: Manifest) -> bool:
    """Whether the images that a source grows to from these would have the same pictures, splits and captions.

    Only units that have another mark are read, and none after the first chunk that has something new in it.

    Raises:
        UserError: the source is not there, or a file of the images is damaged or gone.
    """
    with tempfile.TemporaryDirectory(prefix="latent-gpt-ingest-") as folder:
        scratch = Path(folder)
        earlier, seen = Earlier(images, scratch), Seen(scratch / "seen.sqlite")
        left = sum(images.info["shards"].values())
        with closing(_chunks(_records(config, 0, earlier), config, 0)) as chunks:
            for _, outcomes in chunks:
                entries: dict[bytes, Entry] = {}
                for one in outcomes:
                    if same := entries.get(one.content):
                        same.join(one.captions, one.composition, one.source)
                    elif one.content and one.content not in seen:
                        entries[one.content] = Entry(one.suffix, 0, 0, one.captions, one.composition)
                for content, entry in entries.items():
                    split, captions = earlier.picture(content)
                    now = pinned(split, split_of(content, entry.composition, config))
                    if (split, captions) != (now, digest(entry.captions)):
                        return False
                seen.add(list(entries))
                left -= len(entries)
    return left == 0


def _ingest(config: DataConfig, writer: AssetWriter, scratch: Path) -> Manifest:
    counts: Counter[str] = Counter(dict.fromkeys((*SPLITS, "duplicates", "quarantined", "read"), 0))
    earlier = _earlier(writer, scratch)
    seen = Wanted(scratch) if earlier else Seen(scratch / "seen.sqlite")
    journal = storage.join(writer.uri, JOURNAL)
    finished = [entry for entry in storage.list_uris(journal) if entry.endswith(".json")]
    shards: dict[str, int] = {}  # pictures in each tar
    others: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    small: list[Quarantined] = _small(earlier.manifest) if earlier else []
    parts: list[Part] = []  # of what is new, where the asset grows
    total = sources.count(config.source)
    with (scratch / QUARANTINE).open("w", encoding="utf-8") as quarantine:

        def account(chunk: Chunk) -> None:
            if isinstance(seen, Wanted):
                seen.add(chunk.wanted)
            else:
                seen.add(chunk.hashes)
            counts.update(chunk.counts)
            others.update(chunk.others)
            sizes.update(chunk.sizes)
            small.extend(chunk.small[: 10 * SHOWN - len(small)])
            tars = (file.name for file in chunk.files if file.name.endswith(".tar"))
            shards.update({name: chunk.counts[growth.split_of_shard(name)] for name in tars})
            if chunk.part:
                parts.append(chunk.part)
            for entry in chunk.quarantined:
                quarantine.write(json.dumps(entry, ensure_ascii=False) + "\n")
            quarantine.flush()
            _check_share(config, counts, total, scratch / QUARANTINE)

        for entry in finished:
            chunk = Chunk.from_json(storage.read_bytes(entry))
            for file in chunk.files:
                writer.add(file)
            account(chunk)

        progress = Progress("images", total, "img", counted="picture", done=counts["read"])
        start = len(finished) * config.shard_images
        with closing(_chunks(_records(config, start, earlier), config, len(finished))) as chunks:
            for number, outcomes in chunks:
                packer = Packer(number, config, writer, seen, earlier, scratch)
                chunk = _pack(outcomes, packer, progress, counts["read"])
                storage.write_bytes(storage.join(journal, f"{number:06d}.json"), chunk.to_json())
                account(chunk)
        _check_share(config, counts, counts["read"], scratch / QUARANTINE)
    if not counts["train"]:
        raise Refused(
            f"data.source ({config.source.kind}) gave no picture to train on: {_tally(counts, others, total)}"
        )
    progress.update(counts["read"])
    speech.say("images", _tally(counts, others, total))
    grown = {}
    if earlier and isinstance(seen, Wanted):
        shards, tally = growth.settle(writer, earlier, seen, parts, config.shard_images, scratch)
        speech.say("images", _said(tally))
        if missing := sum(counts[split] for split in SPLITS) - sum(shards.values()):
            raise UserError(
                f"{earlier.manifest.uri} has not all pictures that its records name: {missing} are missing;"
                " delete it, and run once more"
            )
        grown = {"grown": {**tally, "from": earlier.manifest.sha256}}
    writer.add_file(QUARANTINE, scratch / QUARANTINE)
    _leave(writer.uri, small, scratch / QUARANTINE)
    if known := sizes.pop(KNOWN, 0):
        assert earlier
        sizes.update(_sizes_of(known, earlier.manifest.info.get("sizes", {})))
    info = {**counts, "others": others, "image_size": config.image_size, "shards": shards, "sizes": sizes}
    info |= grown
    return writer.finish(info, scratch=JOURNAL)


def _earlier(writer: AssetWriter, scratch: Path) -> Earlier | None:
    """The asset that this one grows from."""
    key = writer.settings.get(growth.GROWN_FROM)
    return Earlier(load(place("images", key)), scratch) if key else None


def _records(config: DataConfig, start: int, earlier: Earlier | None) -> Iterator[Record | Outcome]:
    """Records of the source from number `start` on; in place of known ones, what had become of them."""
    if not earlier:
        yield from sources.iterate(config.source, config.image_size, start)
        return
    records = sources.iterate(config.source, config.image_size, 0, earlier.knows)
    yield from islice(earlier.expanded(records), start, None)


# ── records to pictures, in the workers ─────────────────────────────────────────────────────────────────


def normalise(records: Iterable[Record | Outcome], config: DataConfig) -> list[Outcome]:
    """Judge and normalise records; what was lossy stays lossy (JPEG), what was not stays exact (PNG)."""
    return [one if isinstance(one, Outcome) else _normalise(one, config) for one in records]


def _normalise(record: Record, config: DataConfig) -> Outcome:
    # torch: what is found needs none
    from model.data.images import BadImage, decode, dimensions, encode, is_jpeg, thumbnail

    found = Outcome(shown(record.key), record.unit, record.mark, record.place)
    if record.others:
        return replace(found, others=record.others)
    captions = clean_captions(record.captions)
    problem = record.problem or damage(record.captions) or ("" if captions else "no caption")
    if problem:
        return replace(found, reason=shown(problem), data=thumbnail(record.image, config))
    try:
        pixels = decode(record.image, config)
    except BadImage as error:
        return replace(found, reason=shown(str(error)), data=thumbnail(record.image, config))
    content = hashlib.sha256(pixels.data).digest()[:16]
    suffix, data = encode(pixels, lossless=not is_jpeg(record.image))
    return replace(
        found,
        content=content,
        suffix=suffix,
        data=data,
        size=dimensions(record.image),
        captions=captions,
        composition=record.composition,
    )


def _chunks(
    records: Iterator[Record | Outcome], config: DataConfig, first: int
) -> Generator[tuple[int, Iterator[Outcome]], None, None]:
    """Outcomes of each chunk of records, in order, worked out on all cores ahead of their use."""

    flying: deque[int] = deque()  # bytes of each task under way

    def batches() -> Iterator[tuple[int, list[Record | Outcome]]]:
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


def _batch(records: Iterator[Record | Outcome]) -> list[Record | Outcome]:
    """A task for a worker; empty when there are no more records."""
    batch: list[Record | Outcome] = []
    size = unjudged = 0
    while (
        unjudged < BATCH
        and len(batch) < BATCH_KNOWN
        and size < BATCH_BYTES
        and (record := next(records, None))
    ):
        batch.append(record)
        unjudged += isinstance(record, Record)
        size += _size(record)
    return batch


def _size(record: Record | Outcome) -> int:
    data = record.image if isinstance(record, Record) else record.data
    return len(data) + sum(len(caption) for caption in record.captions if isinstance(caption, str))


def _work(task: tuple[int, list[Record | Outcome]], config: DataConfig) -> tuple[int, list[Outcome]]:
    return task[0], normalise(task[1], config)


# ── pictures to shards ──────────────────────────────────────────────────────────────────────────────────


class Quarantined(NamedTuple):
    """A small picture of one that was left out."""

    source: str
    reason: str
    jpeg: str  # base64


@dataclass
class Chunk:
    """What became of one chunk: its journal entry."""

    counts: Counter[str] = field(default_factory=Counter)
    files: list[File] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # contents that are now part of the asset
    quarantined: list[dict[str, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)  # files that are no pictures, by kind
    sizes: Counter[str] = field(default_factory=Counter)  # of pictures as they were found, see `_sizes`
    small: list[Quarantined] = field(default_factory=list)
    # Where the asset grows, in place of shards and hashes:
    wanted: list[Wish] = field(default_factory=list)
    part: Part | None = None  # those of them that are new, if any are

    def show(self, outcome: Outcome) -> None:
        """Keep the small picture of one that is quarantined, unless there are enough of its kind."""
        kind = kind_of(outcome.reason)
        alike = sum(kind_of(one.reason) == kind for one in self.small)
        if outcome.data and alike < SHOWN_OF_ONE and len(self.small) < SHOWN:
            jpeg = base64.b64encode(outcome.data).decode()
            self.small.append(Quarantined(outcome.source, outcome.reason, jpeg))

    def to_json(self) -> bytes:
        """For the journal."""
        return json.dumps(
            {
                "counts": self.counts,
                "files": [file.model_dump() for file in self.files],
                "hashes": [content.hex() for content in self.hashes],
                "quarantined": self.quarantined,
                "others": self.others,
                "sizes": self.sizes,
                "small": self.small,
                "wanted": self.wanted,
                "part": self.part,
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
            Counter(values.get("sizes", {})),  # of a journal that an earlier release began
            [Quarantined(*one) for one in values.get("small", [])],
            [Wish(*wish) for wish in values["wanted"]],
            Part(*values["part"]) if values["part"] else None,
        )


@dataclass(frozen=True)
class Packer:
    """What the packing of a chunk needs."""

    number: int  # of the chunk
    config: DataConfig
    writer: AssetWriter
    seen: Seen | Wanted  # pictures of the chunks before it
    earlier: Earlier | None  # the asset that this one grows from
    scratch: Path

    def had(self, content: bytes) -> str:
        """The split in which the earlier asset has a picture; "" if it has not."""
        return self.earlier.split(content) if self.earlier else ""

    def split(self, content: bytes, composition: bool) -> str:
        """The split of a picture."""
        return pinned(self.had(content), split_of(content, composition, self.config))


def _pack(outcomes: Iterable[Outcome], packer: Packer, progress: Progress, before: int) -> Chunk:
    """Write one chunk's tars, and what became of its records.

    A duplicate within the chunk adds its captions to the first; one of an earlier chunk is left out.
    """
    entries: dict[bytes, Entry] = {}
    chunk = Chunk()
    records = packer.scratch / records_name(packer.number)
    with tempfile.TemporaryFile(dir=packer.scratch) as spool:

        def take(outcome: Outcome) -> None:
            if outcome.others:
                chunk.others.update(outcome.others)
                return
            chunk.counts["read"] += 1
            if outcome.reason:
                chunk.counts["quarantined"] += 1
                chunk.quarantined.append({"source": outcome.source, "reason": outcome.reason})
                chunk.show(outcome)
            elif same := entries.get(outcome.content):
                chunk.counts["duplicates"] += 1
                same.join(outcome.captions, outcome.composition, outcome.source)
            elif outcome.content in packer.seen:
                chunk.counts["duplicates"] += 1
            else:
                entries[outcome.content] = Entry(
                    outcome.suffix,
                    spool.tell(),
                    spool.write(b"" if packer.had(outcome.content) else outcome.data),
                    outcome.captions,
                    outcome.composition,
                    [outcome.source],
                )
            if outcome.content:
                known = outcome.size == (0, 0)
                chunk.sizes.update([KNOWN] if known else _sizes(*outcome.size, packer.config))
            progress.update(before + chunk.counts["read"])

        def taken() -> Iterator[Outcome]:
            for outcome in outcomes:
                take(outcome)
                yield outcome

        with records.open("w", encoding="utf-8") as lines:
            lines.writelines(record_lines(taken()))
        splits = {c: packer.split(c, entry.composition) for c, entry in entries.items()}
        chunk.counts.update(splits.values())
        if packer.earlier:
            chunk.wanted = [Wish(c.hex(), splits[c], e.captions, e.sources) for c, e in entries.items()]
            if new := {content: entry for content, entry in entries.items() if entry.size}:
                path = packer.scratch / "new.tar"
                uri = storage.join(packer.writer.uri, JOURNAL, f"{packer.number:06d}.tar")
                write_tar(path, new, spool)
                storage.upload_file(path, uri)
                chunk.part = Part(uri, storage.file_sha256(path))
        else:
            chunk.hashes = list(entries)
            for split in SPLITS:
                if members := {
                    content: entry for content, entry in entries.items() if splits[content] == split
                }:
                    name = shard_name(split, packer.number)
                    chunk.files += add_shard(packer.writer, name, members, spool, packer.scratch)
    chunk.files.append(_records_file(records, packer))
    records.unlink()
    return chunk


def _sizes(width: int, height: int, config: DataConfig) -> list[str]:
    """What a picture's size counts for: the bounds of its side and shape, and whether it was enlarged."""
    shorter, longer = sorted((width, height))
    side = max(bound for bound in SIDES if bound <= shorter)
    shape = max(bound for bound in LONGER if bound <= longer / shorter)
    enlarged = (shorter if config.fit == "crop" else longer) < config.image_size
    return ["pictures", f"side {side}", f"longer {shape}", *(["enlarged"] if enlarged else [])]


def _sizes_of(pictures: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Of pictures whose sizes were counted, those of some; which of them are gone since nobody knows."""
    share = min(1.0, pictures / max(1, sizes.get("pictures", 0)))
    return {name: round(number * share) for name, number in sizes.items()}


def _small(images: Manifest) -> list[Quarantined]:
    """The small pictures beside an asset; none where there are none, or they cannot be read."""
    try:
        found = json.loads(storage.read_bytes(storage.join(images.uri, PICTURES, QUARANTINED)))
        return [Quarantined(one["source"], one["reason"], one["jpeg"]) for one in found]
    except (storage.NotFound, ValueError, KeyError, TypeError):  # they are only looked at
        return []


def kind_of(reason: str) -> str:
    """A reason without its figures: those that differ in nothing else are of one kind."""
    return re.sub(r"\d[\d,.]*", "N", reason)


def _leave(uri: str, small: list[Quarantined], quarantine: Path) -> None:
    """Leave some small pictures beside the asset at `uri`, of those that are quarantined now."""
    asked = {(one.source, one.reason) for one in small}
    with quarantine.open(encoding="utf-8") as lines:
        left = ((entry["source"], entry["reason"]) for entry in map(json.loads, lines))
        now = asked.intersection(left)
    chosen: list[Quarantined] = []
    kinds: Counter[str] = Counter()
    for one in small:
        kind = kind_of(one.reason)
        if (one.source, one.reason) in now and kinds[kind] < SHOWN_OF_ONE and len(chosen) < SHOWN:
            kinds[kind] += 1
            chosen.append(one)
            now.discard((one.source, one.reason))
    if chosen:
        data = json.dumps([one._asdict() for one in chosen]).encode()
        storage.write_bytes(storage.join(uri, PICTURES, QUARANTINED), data)


def _records_file(path: Path, packer: Packer) -> File:
    """The records of a chunk, stored, or taken over where they are what they were."""
    before = packer.earlier.files.get(path.name) if packer.earlier else None
    if packer.earlier and before and before.sha256 == storage.file_sha256(path):
        return packer.writer.add(packer.earlier.manifest.lent(before))
    return packer.writer.add_file(path.name, path)


def split_of(content: bytes, composition: bool, config: DataConfig) -> str:
    """The split of a picture, from its content alone (and from its source's rule for compositions)."""
    if composition:
        return "composition"
    return "validation" if int.from_bytes(content[:8], "big") < config.validation_share * 2**64 else "train"


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


def _said(tally: Counter[str]) -> str:
    """What was taken over, and what is other than it was."""
    found = ", ".join(f"{tally[name]} {name}" for name in ("new", "deleted", "changed"))
    return f"takes over {tally['shards']} shards of {tally['taken']} pictures; {found}"
