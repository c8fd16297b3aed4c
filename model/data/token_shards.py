"""Token shards: their layout, and batches of them as training reads them.

A **token shard** is a safetensors file for the pictures of one image shard:

| tensor | shape | holds |
|---|---|---|
| `codes` | (N, V, T) uint16 or uint32 | image tokens of V views of each picture, view 0 the plain one |
| `caption_ids` | (L,) uint16 or uint32 | token ids of all captions, one after the other, without padding |
| `caption_ends` | (C,) uint32 | where each caption ends in `caption_ids` |
| `picture_ends` | (N,) uint32 | where each picture's captions end in `caption_ends` |

Ids of captions, not states: states of a CLIP text tower weigh hundreds of times the picture's tokens, and the
tower costs a small share of a training step (figures in `docs/EXPERIMENTS.md`).
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from model.data.order import WINDOW, Window, shards_of, share_of, shuffled
from model.errors import UserError
from model.plumbing import cache
from model.plumbing.assets import Manifest

STRETCH = 2048  # pictures of a rank that are gathered together
DOWNLOADS = 4  # shards fetched or verified side by side, a window ahead


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
    """A split of a `tokens` asset as batches; all work is on whole arrays.

    Shards are downloaded and verified in other threads, a window ahead. Batches are made in the caller's: a
    thread of their own was not faster, as the two wait for each other's hold of Python's lock.

    Args:
        manifest: of the `tokens` asset.
        split: train, validation or composition.
        batch_size: pictures of all ranks together.
        seed: of order, views and captions.
        rank: of this process, of `world`.
        world: number of processes; each gets its slice of every batch.

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
    ) -> None:
        if batch_size % world:
            raise UserError(f"batch_size ({batch_size}) must be a multiple of the processes ({world})")
        shards = shards_of(manifest, split)
        self.names, self.sizes = list(shards), list(shards.values())
        self.count = sum(self.sizes)  # pictures of the split
        self.tokens: int = manifest.info["tokens"]  # of a picture: T
        self.context_length: int = manifest.info["context_length"]  # of a caption: S
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.manifest = manifest
        self._masks = np.tri(self.context_length + 1, self.context_length, -1, bool)  # row n: n tokens

    def batches(self, start: int = 0) -> Iterator[TokenBatch]:
        """Endless shuffled batches from position `start` on: pictures of all ranks, step x batch size."""
        share = self.batch_size // self.world
        with ThreadPoolExecutor(DOWNLOADS, "token-shards") as downloads:
            for stretch in self._stretches(start, downloads):
                for first in range(0, len(stretch.codes), share):
                    yield self._batch(stretch, slice(first, first + share))

    def ordered(self, limit: int = 0) -> Iterator[TokenBatch]:
        """The plain view of each picture with its first caption, once, in the asset's order.

        A shard's last batch may be short. Of each batch this rank gets consecutive pictures, so that the
        parts of all ranks are the same ones whatever their number, as long as a rank's share is; the last
        batch may leave nothing to some. `limit` is the pictures of all ranks (0: all of them).
        """
        left, share = limit or self.count, self.batch_size // self.world
        for name in self.names:
            if not left:
                return
            shard = self._shard(name)
            rows = np.arange(min(left, len(shard.codes)))
            left -= len(rows)
            captions = Captions.of([shard]).choose(rows, np.zeros(len(rows)), self.context_length)
            whole = Stretch(shard.codes[: len(rows), 0], *captions)
            for first in range(0, len(rows), self.batch_size):
                mine = first + self.rank * share
                yield self._batch(whole, slice(mine, mine + share))

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
        name = self.names[number]
        shard = self._shard(name)
        if shard.codes.shape[::2] != (self.sizes[number], self.tokens):
            raise UserError(
                f"{self.manifest.uri}/{name}: codes of shape {shard.codes.shape}; the manifest says"
                f" {self.sizes[number]} pictures of {self.tokens} tokens; delete the asset, so that it is"
                " made again"
            )
        return shard

    def _shard(self, name: str) -> TokenShard:
        manifest = self.manifest
        return cache.use(manifest, [name], lambda: TokenShard.open(cache.path(manifest, name)))

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
