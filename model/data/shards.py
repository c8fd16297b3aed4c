"""Shards as training reads them: one shuffled order for pictures and tokens, a verified local cache, readers.

A **token shard** is a safetensors file for the pictures of one image shard:

| tensor | shape | holds |
|---|---|---|
| `codes` | (N, V, T) uint16 or uint32 | image tokens of V views of each picture, view 0 the plain one |
| `caption_ids` | (L,) uint16 or uint32 | token ids of all captions, one after the other, without padding |
| `caption_ends` | (C,) uint32 | where each caption ends in `caption_ids` |
| `picture_ends` | (N,) uint32 | where each picture's captions end in `caption_ends` |

Ids of captions, not states: states of a CLIP text tower weigh hundreds of times the picture's tokens, and the
tower costs a small share of a training step (figures in `docs/EXPERIMENTS.md`).

**Order.** An epoch visits every picture once. Shards are shuffled, packed into windows of about `WINDOW`
pictures, and shuffled as one within each window; all of it follows from (seed, epoch) alone. A position is
the number of pictures that all ranks have consumed together, and rank r of a global batch takes its r-th
slice, so a run resumes exactly at any position with any number of ranks. Sets of up to `WINDOW` pictures are
shuffled globally; larger ones as well as MosaicML's blocks of the same size do.
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import mmap
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from model.errors import UserError
from model.plumbing.parallel import parallel_map
from model.plumbing import storage
from model.plumbing.assets import Manifest

WINDOW = 262_144  # pictures shuffled together when tokens are read
IMAGE_WINDOW = 32_768  # the same when pictures are read, whose shards are some hundred times larger
STRETCH = 2048  # pictures of a rank that are gathered together
DOWNLOADS = 4  # shards fetched or verified side by side, a window ahead
RESIDENT_BYTES = 1 << 31  # decoded pictures of a split that are held in memory at most; more are streamed
CACHE_GIB = 64  # of downloaded shards kept on the local disk, where the environment says nothing else


# ── order ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Window:
    """Consecutive positions of the order, and where their pictures lie."""

    epoch: int
    position: int  # of the first, counted from the start of training
    shards: np.ndarray  # numbers of its shards, ascending
    shard: np.ndarray  # (n,) number of the shard
    row: np.ndarray  # (n,) number within the shard
    chance: np.ndarray  # (n, 2) in [0, 1): which view, which caption


def shuffled(sizes: Sequence[int], seed: int, start: int = 0, window: int = WINDOW) -> Iterator[Window]:
    """Endless windows over shards of the given sizes, from the one that holds position `start` on."""
    total = sum(sizes)
    counts = np.asarray(sizes)
    epoch, position = start // total, start // total * total
    while True:
        for number, shards in enumerate(_packed(counts, seed, epoch, window)):
            size = int(counts[shards].sum())
            if position + size > start:
                rng = np.random.default_rng([seed, epoch, number])
                order = rng.permutation(size)
                shard = np.repeat(shards, counts[shards])[order]
                row = np.concatenate([np.arange(counts[s]) for s in shards])[order]
                yield Window(epoch, position, shards, shard, row, rng.random((size, 2)))
            position += size
        epoch += 1


def _packed(counts: np.ndarray, seed: int, epoch: int, window: int) -> Iterator[np.ndarray]:
    """Shards of an epoch in chance order, as many at a time as make at least a window."""
    order = np.random.default_rng([seed, epoch]).permutation(len(counts))
    first, size = 0, 0
    for last, shard in enumerate(order, 1):
        size += counts[shard]
        if size >= window or last == len(order):
            if size:
                yield np.sort(order[first:last])  # neighbours on disk are read together
            first, size = last, 0


def share_of(window: Window, start: int, batch_size: int, rank: int, world: int) -> np.ndarray:
    """Which entries of a window rank `rank` of `world` sees, of those at `start` or later.

    Raises:
        UserError: when the batch cannot be shared evenly.
    """
    if batch_size % world:
        raise UserError(f"training.batch_size ({batch_size}) must be a multiple of the processes ({world})")
    position = window.position + np.arange(len(window.shard))
    part = position % batch_size // (batch_size // world)
    return np.flatnonzero((part == rank) & (position >= start))


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────


class ShardCache:
    """Verified local copies of a set's files, `limit` bytes of them at most, shared by a machine's ranks.

    Files of a local set are used where they are. A copy from S3 is checked against the manifest's SHA-256
    before it takes its name; when room is needed those go first that were not asked for the longest.
    """

    def __init__(
        self, manifest: Manifest, folder: str | Path | None = None, limit: int | None = None
    ) -> None:
        """`folder` defaults to the environment's `LATENT_GPT_CACHE`, or `~/.cache/latent-gpt`; `limit` to its
        `LATENT_GPT_CACHE_GIB`, or 64 GiB.

        Raises:
            UserError: `LATENT_GPT_CACHE_GIB` is no number above 0.
        """
        self.manifest = manifest
        self.limit = _cache_bytes() if limit is None else limit
        self.files = {file.name: file for file in manifest.files}
        self.local = not storage.is_s3(manifest.uri)
        default = os.environ.get("LATENT_GPT_CACHE") or Path.home() / ".cache" / "latent-gpt"
        self.folder = Path(manifest.uri if self.local else folder or default)
        self._verified: set[str] = set()

    def path(self, name: str) -> Path:
        """Where a verified copy lies.

        Raises:
            UserError: when its checksum is not the manifest's.
        """
        file = self.files[name]
        path = self.folder / (name if self.local else f"{file.sha256}{Path(name).suffix}")
        uri = storage.join(self.manifest.uri, name)
        if self.local and name not in self._verified and (found := storage.file_sha256(path)) != file.sha256:
            raise storage.checksum_error(uri, found, file.sha256)
        if not self.local and not (name in self._verified and path.exists()):

            def is_there() -> bool:
                return path.exists() and storage.file_sha256(path) == file.sha256

            self.folder.mkdir(parents=True, exist_ok=True)
            if not is_there():
                with _locked(
                    self.folder / "lock"
                ):  # one download a time, itself in parallel parts, per machine
                    if not is_there():
                        self._make_room(file.size)
                        storage.download_file(uri, path, file.sha256)
        if not self.local:
            with suppress(FileNotFoundError):  # gone again already; the caller asks once more
                os.utime(path)
        self._verified.add(name)
        return path

    def _make_room(self, wanted: int) -> None:
        if wanted > self.limit:
            raise UserError(f"a shard of {wanted} bytes does not fit into a cache of {self.limit} bytes")
        copies = [entry for entry in self.folder.iterdir() if entry.suffix in (".tar", ".safetensors")]
        stats = sorted((entry.stat().st_mtime_ns, entry.stat().st_size, entry) for entry in copies)
        used = sum(size for _, size, _ in stats)
        for _, size, entry in stats:
            if used + wanted <= self.limit:
                break
            entry.unlink(missing_ok=True)  # who has it open keeps it until it is done
            used -= size


def _cache_bytes() -> int:
    return int(storage.number_from_environment("LATENT_GPT_CACHE_GIB", CACHE_GIB, "GiB") * 2**30)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def shards_of(manifest: Manifest, split: str) -> dict[str, int]:
    """A split's shards in order, with the number of pictures in each.

    Raises:
        UserError: when the split is empty.
    """
    shards = {n: size for n, size in sorted(manifest.info["shards"].items()) if n.startswith(f"{split}-")}
    if not shards:
        raise UserError(
            f"{manifest.uri} holds no picture of split '{split}'; raise data.{split}_share or count"
        )
    return shards


# ── pictures ────────────────────────────────────────────────────────────────────────────────────────────


class ImageBatch(NamedTuple):
    """Pictures, each with one of its captions."""

    images: torch.Tensor  # uint8 (B, 3, H, W)
    captions: list[str]


def load_images(
    manifest: Manifest, split: str, limit: int = 0, cache: ShardCache | None = None
) -> tuple[torch.Tensor, list[list[str]]]:
    """A split's first `limit` pictures (0: all) in their fixed order: uint8 (N, 3, H, W), and all captions.

    Raises:
        UserError: when the split is empty, or a shard is not what the manifest says.
    """
    cache = cache or ShardCache(manifest)
    shards = shards_of(manifest, split)
    count = min(limit or sum(shards.values()), sum(shards.values()))
    entries = list(islice((entry for name in shards for entry in tar_index(cache.path(name))), count))
    parts = [entries[first : first + 64] for first in range(0, count, 64)]
    pixels = (
        [decode_entries(part) for part in parts]
        if count <= 64
        else parallel_map(decode_entries, parts, threads=True)
    )
    return torch.cat(list(pixels)), [entry.captions for entry in entries]


def image_batches(
    manifest: Manifest,
    split: str,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    cache: ShardCache | None = None,
) -> Iterator[ImageBatch]:
    """Endless shuffled batches; rank `rank` of `world` gets its `batch_size / world` pictures of each.

    A split that fits `RESIDENT_BYTES` is decoded once; a larger one is read and decoded ahead on all cores.
    Which captions are taken follows from (seed, epoch) as the order does.

    Args:
        batch_size: pictures of all ranks together.
        start: pictures that all ranks have consumed together before: step x batch size.
    """
    cache = cache or ShardCache(manifest)
    shards = shards_of(manifest, split)
    side = manifest.info["image_size"]
    picks = _picks(list(shards.values()), batch_size, seed, start, rank, world)
    if sum(shards.values()) * side * side * 3 <= RESIDENT_BYTES:
        images, captions = load_images(manifest, split, cache=cache)
        first = np.cumsum([0, *shards.values()])
        for shard, row, chance in picks:
            index = first[shard] + row
            chosen = [_choose(captions[i], c) for i, c in zip(index, chance, strict=True)]
            yield ImageBatch(images[torch.from_numpy(index)], chosen)
    names = list(shards)
    index_of = lru_cache(maxsize=2 * IMAGE_WINDOW // max(1, min(shards.values())) + 2)(
        lambda number: tar_index(cache.path(names[number]))
    )

    def load(pick: tuple[np.ndarray, np.ndarray, np.ndarray]) -> ImageBatch:
        entries = [index_of(shard)[row] for shard, row in zip(*pick[:2], strict=True)]
        chosen = [_choose(entry.captions, c) for entry, c in zip(entries, pick[2], strict=True)]
        return ImageBatch(decode_entries(entries), chosen)

    yield from parallel_map(load, picks, threads=True)


def _picks(
    sizes: list[int], batch_size: int, seed: int, start: int, rank: int, world: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Shard, row and chance of a caption, for each of a rank's batches."""
    share = batch_size // world
    rest: list[np.ndarray] = [np.empty(0, int), np.empty(0, int), np.empty(0)]
    for window in shuffled(sizes, seed, start, IMAGE_WINDOW):
        mine = share_of(window, start, batch_size, rank, world)
        parts = (window.shard[mine], window.row[mine], window.chance[mine, 1])
        rest = [np.concatenate(pair) for pair in zip(rest, parts, strict=True)]
        while len(rest[0]) >= share:
            shard, row, chance = (part[:share] for part in rest)
            yield shard, row, chance
            rest = [part[share:] for part in rest]


def _choose(captions: list[str], chance: float) -> str:
    return captions[int(chance * len(captions))]


class TarEntry(NamedTuple):
    """Where a picture lies in a local tar, and its captions."""

    tar: Path
    offset: int
    size: int
    captions: list[str]


def tar_index(path: Path) -> list[TarEntry]:
    """The pictures of an image shard, in its order, from headers and captions alone."""
    entries: list[TarEntry] = []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".json"):
                notes = tar.extractfile(member)
                assert notes
                entries[-1].captions.extend(json.load(notes)["captions"])
            else:
                entries.append(TarEntry(path, member.offset_data, member.size, []))
    return entries


def decode_entries(entries: Sequence[TarEntry]) -> torch.Tensor:
    """Pictures of shards as uint8 (B, 3, H, W); they are normalised already."""
    pixels = []
    for entry in entries:
        with entry.tar.open("rb") as tar:
            tar.seek(entry.offset)
            data = tar.read(entry.size)
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            pixels.append(np.asarray(image))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────


class TokenBatch(NamedTuple):
    """One view of each picture, and one of its captions."""

    codes: torch.Tensor  # int64 (B, T)
    ids: torch.Tensor  # int64 (B, S), padded with 0
    mask: torch.Tensor  # bool (B, S), True = a token of the caption


@dataclass(frozen=True)
class TokenShard:
    """The arrays of a token shard (see the module's docstring)."""

    codes: np.ndarray
    caption_ids: np.ndarray
    caption_ends: np.ndarray
    picture_ends: np.ndarray

    @classmethod
    def open(cls, path: Path) -> TokenShard:
        """Map a shard into memory; nothing is read yet."""
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin = 8 + int.from_bytes(mapped[:8], "little")
        arrays = {}
        for name, entry in json.loads(mapped[8:begin]).items():
            if name != "__metadata__":
                dtype = {"U16": np.uint16, "U32": np.uint32}[entry["dtype"]]
                shape = tuple(entry["shape"])
                offset = begin + entry["data_offsets"][0] if 0 not in shape else 0
                arrays[name] = np.frombuffer(mapped, dtype, math.prod(shape), offset).reshape(shape)
        return cls(**arrays)

    @staticmethod
    def to_bytes(codes: np.ndarray, captions: Sequence[Sequence[Sequence[int]]], vocabulary: int) -> bytes:
        """A shard of codes (N, V, T) below `vocabulary`, and for each picture the ids of its captions."""
        from safetensors.numpy import save

        flat = [caption for picture in captions for caption in picture]
        ids = np.fromiter((i for caption in flat for i in caption), np.uint32)
        return save(
            {
                "codes": np.ascontiguousarray(codes, dtype=_narrowest(vocabulary)),
                "caption_ids": ids.astype(_narrowest(int(ids.max(initial=0)) + 1)),
                "caption_ends": np.cumsum([len(caption) for caption in flat], dtype=np.uint32),
                "picture_ends": np.cumsum([len(picture) for picture in captions], dtype=np.uint32),
            }
        )


class Captions(NamedTuple):
    """Captions of the pictures of one shard after the other, as one shard has them."""

    ids: np.ndarray
    ends: np.ndarray  # (C + 1,) of each caption in `ids`, after a 0
    picture_ends: np.ndarray  # (N + 1,) of each picture's captions in `ends`, after a 0

    @classmethod
    def of(cls, shards: Sequence[TokenShard]) -> Captions:
        """A copy of the captions of all shards."""
        return cls(
            np.concatenate([shard.caption_ids for shard in shards]),
            _joined([shard.caption_ends for shard in shards]),
            _joined([shard.picture_ends for shard in shards]),
        )

    def choose(self, pictures: np.ndarray, chance: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One caption of each picture, cut to `length`: ids, padded with 0, and how many of each."""
        begins, ends = self.picture_ends[pictures], self.picture_ends[pictures + 1]
        caption = begins + (chance * (ends - begins)).astype(np.int64)
        first = self.ends[caption]
        count = np.minimum(self.ends[caption + 1] - first, length)
        steps = np.arange(count.max(initial=0))
        ids = self.ids.take(first[:, None] + steps, mode="clip")
        ids[steps >= count[:, None]] = 0
        return ids, count


def _joined(ends: Sequence[np.ndarray]) -> np.ndarray:
    """Ends within each part as ends within all parts, after a 0: int64."""
    sizes = [np.diff(part, prepend=part.dtype.type(0)) for part in ends]
    return np.concatenate([[0], np.cumsum(np.concatenate(sizes), dtype=np.int64)])


def _narrowest(vocabulary: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


class TokenReader:
    """A split of a `tokens` set as batches; all work is on whole arrays.

    Shards are downloaded and verified in other threads, a window ahead. Batches are made in the caller's: a
    thread of their own was not faster, as the two wait for each other's hold of Python's lock.

    Args:
        manifest: of the `tokens` set.
        split: train, validation or composition.
        batch_size: pictures of all ranks together.
        seed: of order, views and captions.
        rank: of this process, of `world`.
        world: number of processes; each gets its slice of every batch.
        cache: where copies of remote shards are kept.

    Raises:
        UserError: the split is empty, the batch cannot be shared evenly, or a shard is damaged.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        cache: ShardCache | None = None,
    ) -> None:
        if batch_size % world:
            raise UserError(f"batch_size ({batch_size}) must be a multiple of the processes ({world})")
        shards = shards_of(manifest, split)
        self.names, self.sizes = list(shards), list(shards.values())
        self.count = sum(self.sizes)  # pictures of the split
        self.tokens: int = manifest.info["tokens"]  # of a picture: T
        self.context_length: int = manifest.info["context_length"]  # of a caption: S
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.cache = cache or ShardCache(manifest)
        self._masks = np.tri(self.context_length + 1, self.context_length, -1, bool)  # row n: n tokens

    def batches(self, start: int = 0) -> Iterator[TokenBatch]:
        """Endless shuffled batches from position `start` on: pictures of all ranks, step x batch size."""
        share = self.batch_size // self.world
        with ThreadPoolExecutor(DOWNLOADS, "token-shards") as downloads:
            for stretch in self._stretches(start, downloads):
                for first in range(0, len(stretch.codes), share):
                    yield self._batch(stretch, slice(first, first + share))

    def ordered(self, limit: int = 0) -> Iterator[TokenBatch]:
        """The plain view of each picture with its first caption, once, in the set's order.

        A shard's last batch may be short. Of each batch this rank gets every `world`-th picture; `limit` is
        the pictures of all ranks (0: all of them).
        """
        left = limit or self.count
        for name in self.names:
            shard = TokenShard.open(self.cache.path(name))
            rows = np.arange(min(left, len(shard.codes)))
            left -= len(rows)
            captions = Captions.of([shard]).choose(rows, np.zeros(len(rows)), self.context_length)
            whole = Stretch(shard.codes[: len(rows), 0], *captions)
            for first in range(0, len(rows), self.batch_size):
                mine = slice(first + self.rank, min(first + self.batch_size, len(rows)), self.world)
                yield self._batch(whole, mine)

    def _stretches(self, start: int, downloads: ThreadPoolExecutor) -> Iterator[Stretch]:
        """Whole batches of this rank, some `STRETCH` pictures at a time.

        The files of a window are downloaded and verified while the window before is consumed.
        """
        share = self.batch_size // self.world
        windows = shuffled(self.sizes, self.seed, start, WINDOW)
        shards: dict[int, TokenShard] = {}
        rest: Stretch | None = None

        def fetched(window: Window) -> dict[int, Future[TokenShard]]:
            missing = (number for number in window.shards.tolist() if number not in shards)
            return {number: downloads.submit(self._open, number) for number in missing}

        window = next(windows)
        coming = fetched(window)
        while True:
            shards |= {number: shard.result() for number, shard in coming.items()}
            shards = {number: shards[number] for number in window.shards.tolist()}
            following = next(windows)
            coming = fetched(following)
            captions = Captions.of(list(shards.values()))
            mine = share_of(window, start, self.batch_size, self.rank, self.world)
            for first in range(0, len(mine), STRETCH):
                stretch = self._gather(window, mine[first : first + STRETCH], shards, captions)
                if rest is not None:  # a batch may lie across stretches
                    stretch = rest.followed_by(stretch)
                whole = len(stretch.codes) // share * share
                yield stretch.part(0, whole)
                rest = stretch.part(whole, len(stretch.codes)) if whole < len(stretch.codes) else None
            window = following

    def _open(self, number: int) -> TokenShard:
        for _ in range(100):
            path = self.cache.path(self.names[number])
            with suppress(FileNotFoundError):  # a small cache may have made room for the next one meanwhile
                shard = TokenShard.open(path)
                if shard.codes.shape[::2] != (self.sizes[number], self.tokens):
                    raise UserError(
                        f"{path}: codes of shape {shard.codes.shape}; the manifest says {self.sizes[number]}"
                        f" pictures of {self.tokens} tokens; delete the set, so that it is made again"
                    )
                return shard
        raise UserError(f"{self.names[number]} vanishes from {self.cache.folder} as soon as it is there")

    def _gather(
        self, window: Window, part: np.ndarray, shards: dict[int, TokenShard], captions: Captions
    ) -> Stretch:
        """These pictures of a window, from its shards, which come in the order of their captions."""
        number, row, chance = window.shard[part], window.row[part], window.chance[part]
        numbers = np.fromiter(shards, np.int64)
        place = np.searchsorted(numbers, number).astype(np.uint16)  # 16 bits: a radix sort
        by_shard = np.argsort(place, kind="stable")
        edges = np.searchsorted(place[by_shard], np.arange(len(numbers) + 1))
        codes = np.empty((len(part), self.tokens), next(iter(shards.values())).codes.dtype)
        for shard, begin, end in zip(shards.values(), edges, edges[1:], strict=False):
            views, at = shard.codes.shape[1], by_shard[begin:end]
            flat = row[at] * views + (chance[at, 0] * views).astype(np.int64)
            codes[at] = shard.codes.reshape(-1, self.tokens).take(flat, axis=0, mode="clip")
        sizes = np.asarray(self.sizes)[numbers]
        in_window = (np.cumsum(sizes) - sizes)[place] + row
        return Stretch(codes, *captions.choose(in_window, chance[:, 1], self.context_length))

    def _batch(self, stretch: Stretch, which: slice) -> TokenBatch:
        """Some pictures of a stretch, as training wants them.

        NumPy widens them in the caller's thread, batch by batch: what is small stays in the core's cache, and
        torch would wake its pool for each batch.
        """
        codes, found, counts = stretch.codes[which], stretch.ids[which], stretch.counts[which]
        ids = np.zeros((len(codes), self.context_length), np.int64)
        ids[:, : found.shape[1]] = found
        mask = self._masks[counts]
        return TokenBatch(
            torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(ids), torch.from_numpy(mask)
        )


class Stretch(NamedTuple):
    """Consecutive pictures of a rank as shards hold them: narrow."""

    codes: np.ndarray  # (n, T)
    ids: np.ndarray  # (n, longest), padded with 0
    counts: np.ndarray  # (n,) ids of each caption

    def part(self, begin: int, end: int) -> Stretch:
        """Some of the pictures."""
        return Stretch(*(array[begin:end] for array in self))

    def followed_by(self, other: Stretch) -> Stretch:
        """Both, one after the other."""
        longest = max(self.ids.shape[1], other.ids.shape[1])
        ids = [np.pad(part.ids, ((0, 0), (0, longest - part.ids.shape[1]))) for part in (self, other)]
        codes, counts = (
            np.concatenate(pair) for pair in ((self.codes, other.codes), (self.counts, other.counts))
        )
        return Stretch(codes, np.concatenate(ids), counts)
