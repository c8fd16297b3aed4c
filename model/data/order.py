"""The order in which training visits pictures, and each rank's share of it.

An epoch visits every picture once. Shards are shuffled, packed into windows of about `WINDOW` pictures, and
shuffled as one within each window; all of it follows from (seed, epoch) alone. A position is the number of
pictures that all ranks have consumed together, and rank r of a global batch takes its r-th slice, so a run
resumes exactly at any position with any number of ranks. Sets of up to `WINDOW` pictures are shuffled
globally; larger ones as well as MosaicML's blocks of the same size do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from model.errors import UserError
from model.plumbing.assets import Manifest

WINDOW = 262_144  # pictures shuffled together


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
