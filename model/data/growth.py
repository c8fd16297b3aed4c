"""A set of pictures that grows from an earlier one: what is as it was is not read again.

Ingest is the same: the stream of the source's records, cut into chunks, with duplicates dropped and captions
joined. But of a unit whose mark is as it was (see `records.py`) the records come from the earlier asset, and
without pictures. So which pictures there are, with which captions, is what a full ingest of the source as it
is now would find. Then (`settle`):

- an earlier shard whose pictures are all still wanted, in its split and with their captions, is taken over;
- of another one, those that are still wanted go to new shards, with their captions as they are now, and are
  not decoded;
- new pictures go to new shards. None has the name of an earlier one, as views of tokens follow from names.

Splits are pinned. What was held out stays where it was, whatever the source or `validation_share` say now:
it must not move into training. What was trained on stays there, unless the source now says that it is a
composition: then it leaves training. A picture that was deleted is forgotten, and its split with it. That is
all that tells the result from a full ingest, but for the names of `sources` within a shard that was taken
over, which are those of its time (`records-….jsonl` has them as they are), and for the format in which a
picture is kept that the source has in several.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from tarfile import TarFile
from typing import NamedTuple

from model.config import AssetRef, DataConfig
from model.data.packing import SPLITS, Entry, add_shard, shard_name, table
from model.data.records import Outcome, contents_name, digest, open_shard, read_contents, read_records
from model.data.sources import Record
from model.errors import UserError
from model.plumbing import storage
from model.plumbing.assets import AssetWriter, Input, Manifest, asset_key, find

GROWN_FROM = "grown_from"  # setting of an asset of images: the key of the one that it grows from
JUDGED_BY = ("image_size", "fit", "background", "min_side", "max_pixels")  # of `data`; they decide the pixels


class Unfit(UserError):
    """An asset of images that another cannot grow from; the message is the reason."""


def earlier(ref: AssetRef, data: DataConfig, version: int) -> Manifest:
    """The images that those of `data` can grow from.

    Raises:
        Unfit: they or a file of theirs are gone, another version of the step made them, or they were judged
            by other settings.
    """
    try:
        manifest = Input(kind="images", key=ref.key, sha256=ref.sha256).load()
        find(manifest.uri)  # or what is gone would be taken over again, each time that it is missed
    except UserError as error:
        raise Unfit(f"the earlier pictures are not there any more ({error})") from None
    if asset_key("images", manifest.settings, manifest.inputs, version) != manifest.key:
        raise Unfit("the earlier pictures were read by another release")
    now, then = data.model_dump(mode="json"), manifest.settings["data"]
    if changed := [f"data.{name} was {then[name]}" for name in JUDGED_BY if now[name] != then[name]]:
        raise Unfit(f"the earlier pictures were read by other settings: {', '.join(changed)}")
    return manifest


def pinned(before: str, now: str) -> str:
    """The split of a picture that was in split `before` ("" for a new one), and is in `now` by its own."""
    if before == "train" and now == "composition":
        return now
    return before or now


class Earlier:
    """What the asset that is grown from says of its source and pictures: tables on disk, and no memory."""

    def __init__(self, manifest: Manifest, scratch: Path) -> None:
        self.manifest = manifest
        self.files = {file.name: file for file in manifest.files}
        self._table = table(
            scratch / "earlier.sqlite",
            "CREATE TABLE units (unit BLOB PRIMARY KEY, first INTEGER, records INTEGER) WITHOUT ROWID",
            "CREATE TABLE records (number INTEGER PRIMARY KEY, record TEXT)",
            "CREATE TABLE pictures (content BLOB PRIMARY KEY, split TEXT, captions TEXT) WITHOUT ROWID",
            "BEGIN",
        )
        self._table.executemany("INSERT INTO pictures VALUES (?, ?, ?)", self._pictures())
        self._table.executemany("INSERT OR IGNORE INTO units VALUES (?, ?, ?)", self._units())
        self._table.execute("COMMIT")

    def _pictures(self) -> Iterator[tuple[bytes, str, str]]:
        for shard in self.manifest.info["shards"]:
            for content, captions in read_contents(self.manifest, shard):
                yield content, split_of_shard(shard), captions

    def _units(self) -> Iterator[tuple[bytes, int, int]]:
        """Each unit, its first record and how many it has; puts down the records on the way."""
        unit, first, number = b"", 0, 0
        for number, outcome in enumerate(read_records(self.manifest)):
            if outcome.place == 0:
                if unit:
                    yield unit, first, number - first
                unit, first = (_unit(outcome.unit, outcome.mark) if outcome.mark else b""), number
            row = (number, json.dumps(outcome.to_json()))
            self._table.execute("INSERT INTO records VALUES (?, ?)", row)
        if unit:
            yield unit, first, number + 1 - first

    def knows(self, unit: str, mark: str) -> bool:
        """Whether a unit of the source is as it was."""
        return bool(mark) and self._find(unit, mark) is not None

    def expanded(self, records: Iterable[Record]) -> Iterator[Record | Outcome]:
        """Records of the source; in the place of a unit that is as it was, what had become of its records."""
        for record in records:
            if not record.known:
                yield record
                continue
            found = self._find(record.unit, record.mark)
            assert found
            first, count = found
            rows = self._table.execute(
                "SELECT record FROM records WHERE number BETWEEN ? AND ? ORDER BY number",
                (first, first + count - 1),
            )
            for place, (row,) in enumerate(rows):
                yield Outcome.from_json(json.loads(row), record.unit, record.mark, place)

    def split(self, content: bytes) -> str:
        """The split in which a picture was; "" for a new one."""
        return self.picture(content)[0]

    def picture(self, content: bytes) -> tuple[str, str]:
        """The split in which a picture was, and the digest of its captions; both "" for a new one."""
        found: tuple[str, str] | None = self._table.execute(
            "SELECT split, captions FROM pictures WHERE content = ?", (content,)
        ).fetchone()
        return found or ("", "")

    def _find(self, unit: str, mark: str) -> tuple[int, int] | None:
        key = (_unit(unit, mark),)
        found: tuple[int, int] | None = self._table.execute(
            "SELECT first, records FROM units WHERE unit = ?", key
        ).fetchone()
        return found


def _unit(unit: str, mark: str) -> bytes:
    return hashlib.sha256(f"{unit}\0{mark}".encode(errors="surrogatepass")).digest()[:16]


def split_of_shard(shard: str) -> str:
    """The split that a shard belongs to."""
    return shard.partition("-")[0]


class Wish(NamedTuple):
    """A picture that is to be in the asset."""

    content: str  # 32 hex digits
    split: str
    captions: list[str]
    sources: list[str]


class Wanted:
    """All pictures that are to be in the asset, on disk."""

    def __init__(self, scratch: Path) -> None:
        self._table = table(
            scratch / "wanted.sqlite",
            "CREATE TABLE wanted (content TEXT PRIMARY KEY, split TEXT, captions TEXT, sources TEXT)"
            " WITHOUT ROWID",
        )

    def add(self, wishes: Iterable[Wish]) -> None:
        """Remember a chunk."""
        rows = ((one.content, one.split, json.dumps(one.captions), json.dumps(one.sources)) for one in wishes)
        self._table.execute("BEGIN")
        self._table.executemany("INSERT INTO wanted VALUES (?, ?, ?, ?)", rows)
        self._table.execute("COMMIT")

    def get(self, content: bytes) -> Wish | None:
        """The picture with this content, if it is wanted."""
        row = self._table.execute("SELECT * FROM wanted WHERE content = ?", (content.hex(),)).fetchone()
        return Wish(row[0], row[1], json.loads(row[2]), json.loads(row[3])) if row else None

    def __contains__(self, content: bytes) -> bool:
        found = self._table.execute("SELECT 1 FROM wanted WHERE content = ?", (content.hex(),))
        return found.fetchone() is not None


class Part(NamedTuple):
    """New pictures of a chunk, in a tar that is not part of the asset."""

    uri: str
    sha256: str


def settle(
    writer: AssetWriter,
    before: Earlier,
    wanted: Wanted,
    parts: Iterable[Part],
    shard_images: int,
    scratch: Path,
) -> tuple[dict[str, int], Counter[str]]:
    """Take over, write anew and add shards, until the asset has all that is wanted.

    Args:
        writer: of the asset.
        before: the asset that it grows from.
        wanted: the pictures that it is to have.
        parts: those that `before` has not.
        shard_images: pictures of a shard, at most.
        scratch: a folder for what is under way.

    Returns:
        Pictures in each shard; and for people: shards taken over and the pictures in them, and how many
        pictures are new, deleted, or changed in captions or split.
    """
    shards: dict[str, int] = {}
    tally: Counter[str] = Counter(shards=0, taken=0, new=0, deleted=0, changed=0)
    broken = []
    for shard, count in sorted(before.manifest.info["shards"].items()):
        whole = True
        for content, captions in read_contents(before.manifest, shard):
            wish = wanted.get(content)
            same = wish and (wish.split, digest(wish.captions)) == (split_of_shard(shard), captions)
            whole = whole and bool(same)
            tally["deleted"] += wish is None
            tally["changed"] += wish is not None and not same
        if whole:
            for name in (shard, contents_name(shard)):
                writer.add(before.manifest.lent(before.files[name]))
            shards[shard] = count
            tally.update(shards=1, taken=count)
        else:
            broken.append(shard)
    pools = {split: _Pool(writer, split, before.manifest, shard_images, scratch) for split in SPLITS}

    def pour(tar: TarFile) -> int:
        poured = 0
        for member in tar:
            if member.name.endswith(".json"):
                continue
            content, suffix = Path(member.name).stem, Path(member.name).suffix[1:]
            if wish := wanted.get(bytes.fromhex(content)):
                picture = tar.extractfile(member)
                assert picture
                pools[wish.split].add(wish, suffix, picture.read())
                poured += 1
        return poured

    for shard in broken:
        with open_shard(before.manifest, shard) as tar:
            pour(tar)
    for part in parts:
        storage.download_file(part.uri, scratch / "part.tar", part.sha256)
        with TarFile.open(scratch / "part.tar") as tar:
            tally["new"] += pour(tar)
    for pool in pools.values():
        pool.flush()
        shards |= pool.shards
    return shards, tally


class _Pool:
    """Pictures of a split on their way into new shards."""

    def __init__(
        self, writer: AssetWriter, split: str, before: Manifest, shard_images: int, scratch: Path
    ) -> None:
        used = [int(name.partition("-")[2].removesuffix(".tar")) for name in before.info["shards"]]
        self.shards: dict[str, int] = {}
        self._writer, self._split, self._number = writer, split, max(used, default=-1) + 1
        self._most, self._scratch = shard_images, scratch
        self._entries: dict[bytes, Entry] = {}
        self._spool = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  # closed with the pool

    def add(self, wish: Wish, suffix: str, data: bytes) -> None:
        """One more."""
        entry = Entry(
            suffix, self._spool.tell(), self._spool.write(data), wish.captions, sources=wish.sources
        )
        self._entries[bytes.fromhex(wish.content)] = entry
        if len(self._entries) == self._most:
            self.flush()

    def flush(self) -> None:
        """Those that wait become a shard."""
        if not self._entries:
            return
        name = shard_name(self._split, self._number)
        add_shard(self._writer, name, self._entries, self._spool, self._scratch)
        self.shards[name] = len(self._entries)
        self._number += 1
        self._entries.clear()
        self._spool.seek(0)
        self._spool.truncate()
