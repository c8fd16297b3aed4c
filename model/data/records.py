"""What an asset of images says of its source and of its shards, so that a later one can grow from it.

- `records-000000.jsonl` …, one for each chunk of the source: what became of each record, a line each, in
  order. A **unit** is what a source can tell the state of without reading it (a picture's file, a tar), and
  its **mark** is that state. They are said where a unit begins, and hold for the lines after it.
- `train-000000.contents` … beside each shard: hash of the pixels and digest of the captions of each picture
  in it, a line each. It is taken over together with its shard.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.plumbing import cache
from model.plumbing.assets import Manifest

RECORDS = "records-"  # begins the names of these files


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a record of the source: a picture, a reason why it is none, or files of other kinds."""

    source: str = ""  # its key, for people
    unit: str = ""  # of the source that it belongs to
    mark: str = ""  # of that unit; empty where it has to be read each time
    place: int = 0  # number within its unit
    content: bytes = b""  # hash of the normalised pixels, 16 bytes; empty where it is no picture
    captions: list[str] = field(default_factory=list)
    composition: bool = False  # a combination that training must not see
    reason: str = ""  # why it is quarantined
    others: Counter[str] = field(default_factory=Counter)  # files that are no pictures, by kind
    suffix: str = ""  # png or jpg
    # The picture; empty where the asset that this one grows from has it. Of what is quarantined a small one,
    # where anything can be seen of it.
    data: bytes = b""
    size: tuple[int, int] = (0, 0)  # width and height at the source, pixels; (0, 0) where it was not read now

    def to_json(self) -> dict[str, Any]:
        """All but unit, mark, place, picture and its size."""
        if self.others:
            return {"others": self.others}
        if self.reason:
            return {"source": self.source, "reason": self.reason}
        held_out = {"composition": True} if self.composition else {}
        return {
            "source": self.source,
            "content": self.content.hex(),
            "captions": self.captions,
            **held_out,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any], unit: str, mark: str, place: int) -> Outcome:
        """The inverse of `to_json`."""
        known = {name: value for name, value in values.items() if name not in ("content", "others")}
        return cls(
            unit=unit,
            mark=mark,
            place=place,
            content=bytes.fromhex(values.get("content", "")),
            others=Counter(values.get("others", {})),
            **known,
        )


def records_name(chunk: int) -> str:
    """The file of a chunk's records."""
    return f"{RECORDS}{chunk:06d}.jsonl"


def record_lines(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """The lines of a chunk's file."""
    before = None
    for outcome in outcomes:
        follows = before == (outcome.unit, outcome.mark, outcome.place - 1)
        where = {"unit": outcome.unit, "mark": outcome.mark, "place": outcome.place}
        yield json.dumps({**({} if follows else where), **outcome.to_json()}) + "\n"
        before = (outcome.unit, outcome.mark, outcome.place)


def read_records(images: Manifest) -> Iterator[Outcome]:
    """What became of every record of an asset's source, in order; none where an earlier release made it."""
    for name in sorted(file.name for file in images.files if file.name.startswith(RECORDS)):
        with cache.use(images, [name], lambda name=name: cache.path(images, name).open()) as lines:  # type: ignore[misc]
            unit, mark, place = "", "", 0
            for line in lines:
                values = json.loads(line)
                if "unit" in values:
                    unit, mark, place = (values.pop(name) for name in ("unit", "mark", "place"))
                yield Outcome.from_json(values, unit, mark, place)
                place += 1


def contents_name(shard: str) -> str:
    """The file of a shard's contents."""
    return shard.removesuffix(".tar") + ".contents"


def digest(captions: Sequence[str]) -> str:
    """16 hex digits over a picture's captions."""
    return hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:16]


def contents_lines(pictures: Iterable[tuple[bytes, Sequence[str]]]) -> bytes:
    """The contents of a shard with these hashes and captions."""
    return "".join(f"{content.hex()} {digest(captions)}\n" for content, captions in pictures).encode()


def read_contents(images: Manifest, shard: str) -> list[tuple[bytes, str]]:
    """Hash of the pixels and digest of the captions of each picture of a shard, in its order."""
    name = contents_name(shard)
    text = cache.use(images, [name], lambda: cache.path(images, name).read_text())
    return [(bytes.fromhex(line[:32]), line[33:]) for line in text.splitlines()]


def contents(images: Manifest, split: str) -> Iterator[bytes]:
    """The hashes of a split's pixels, 16 bytes each, in its order, without reading shards of this release.

    Raises:
        UserError: a file of the asset is damaged or gone.
    """
    names = {file.name for file in images.files}
    for shard in sorted(name for name in images.info["shards"] if name.startswith(f"{split}-")):
        if contents_name(shard) in names:
            yield from (content for content, _ in read_contents(images, shard))
            continue
        with open_shard(images, shard) as tar:  # of an earlier release
            for member in tar:
                if not member.name.endswith(".json"):
                    yield bytes.fromhex(Path(member.name).stem)


def open_shard(images: Manifest, shard: str) -> tarfile.TarFile:
    """A shard of an asset, opened."""
    return cache.use(images, [shard], lambda: tarfile.open(cache.path(images, shard)))
