"""Image shards as training reads them: WebDataset tars whose pictures are normalised already."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from model.data.order import shards_of, share_of, shuffled
from model.plumbing import cache
from model.plumbing.assets import Manifest
from model.plumbing.parallel import parallel_map

IMAGE_WINDOW = 32_768  # pictures shuffled together; their shards are some hundred times larger than tokens
RESIDENT_BYTES = 1 << 31  # decoded pictures of a split that are held in memory at most; more are streamed


class ImageBatch(NamedTuple):
    """Pictures, each with one of its captions."""

    images: torch.Tensor  # uint8 (B, 3, H, W)
    captions: list[str]


def load_images(manifest: Manifest, split: str, limit: int = 0) -> tuple[torch.Tensor, list[list[str]]]:
    """A split's first `limit` pictures (0: all) in their fixed order: uint8 (N, 3, H, W), and all captions.

    Raises:
        UserError: when the split is empty, or a shard is not what the manifest says.
    """
    entries = index(manifest, split, limit)
    return pixels_of(manifest, entries), [entry.captions for entry in entries]


def load_places(manifest: Manifest, split: str, places: Sequence[int]) -> Iterator[torch.Tensor]:
    """The pictures at some places of a split's fixed order, ascending: uint8 (n, 3, H, W) for each shard.

    Every shard with such a picture is fetched, and no more than one is held in memory.

    Raises:
        UserError: as `load_images`.
    """
    first = 0
    for name, count in shards_of(manifest, split).items():
        rows = [place - first for place in places if first <= place < first + count]
        if rows:
            entries = shard_index(manifest, name)
            yield pixels_of(manifest, [entries[row] for row in rows])
        first += count


def index(manifest: Manifest, split: str, limit: int = 0) -> list[TarEntry]:
    """A split's first `limit` pictures (0: all) in their fixed order, from headers and captions alone.

    Raises:
        UserError: as `load_images`.
    """
    shards = shards_of(manifest, split)
    count = min(limit or sum(shards.values()), sum(shards.values()))
    return list(islice((entry for name in shards for entry in shard_index(manifest, name)), count))


def stored(manifest: Manifest, entry: TarEntry) -> bytes:
    """The bytes of a picture's file, PNG or JPEG. Raises UserError: its shard cannot be had."""
    return cache.use(manifest, [entry.tar.name], lambda: _bytes(entry))


def image_batches(
    manifest: Manifest,
    split: str,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[ImageBatch]:
    """Endless shuffled batches; rank `rank` of `world` gets its `batch_size / world` pictures of each.

    A split that fits `RESIDENT_BYTES` is decoded once; a larger one is read and decoded ahead on all cores.
    Which captions are taken follows from (seed, epoch) as the order does.

    Args:
        batch_size: pictures of all ranks together.
        start: pictures that all ranks have consumed together before: step x batch size.
    """
    shards = shards_of(manifest, split)
    side = manifest.info["image_size"]
    picks = _picks(list(shards.values()), batch_size, seed, start, rank, world)
    if sum(shards.values()) * side * side * 3 <= RESIDENT_BYTES:
        images, captions = load_images(manifest, split)
        first = np.cumsum([0, *shards.values()])
        for shard, row, chance in picks:
            index = first[shard] + row
            chosen = [_choose(captions[i], c) for i, c in zip(index, chance, strict=True)]
            yield ImageBatch(images[torch.from_numpy(index)], chosen)
    names = list(shards)
    # Two windows of shards of the mean size: by the smallest one, one tiny shard would have all indexes held.
    index_of = lru_cache(maxsize=2 * IMAGE_WINDOW * len(shards) // sum(shards.values()) + 2)(
        lambda number: shard_index(manifest, names[number])
    )

    def load(pick: tuple[np.ndarray, np.ndarray, np.ndarray]) -> ImageBatch:
        entries = [index_of(shard)[row] for shard, row in zip(*pick[:2], strict=True)]
        chosen = [_choose(entry.captions, c) for entry, c in zip(entries, pick[2], strict=True)]
        return ImageBatch(_decode(manifest, entries), chosen)

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
    name: str  # of the member
    offset: int
    size: int
    captions: list[str]

    @property
    def content(self) -> str:
        """The hash of its pixels, hex digits."""
        return self.name.partition(".")[0]


def shard_index(manifest: Manifest, name: str) -> list[TarEntry]:
    """The pictures of a shard, in its order, from headers and captions alone; wherever it lies."""
    return cache.use(manifest, [name], lambda: tar_index(cache.path(manifest, name)))


def pixels_of(manifest: Manifest, entries: list[TarEntry]) -> torch.Tensor:
    """Some pictures of an asset, decoded on all cores: uint8 (N, 3, H, W). Raises UserError as `stored`."""
    parts = [entries[first : first + 64] for first in range(0, len(entries), 64)]

    def decode(part: list[TarEntry]) -> torch.Tensor:
        return _decode(manifest, part)

    pixels = map(decode, parts) if len(parts) == 1 else parallel_map(decode, parts, threads=True)
    return torch.cat(list(pixels))


def _decode(manifest: Manifest, entries: Sequence[TarEntry]) -> torch.Tensor:
    """As `decode_entries`; shards that had to make room in the cache since are fetched again."""
    return cache.use(manifest, {entry.tar.name for entry in entries}, lambda: decode_entries(entries))


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
                entries.append(TarEntry(path, member.name, member.offset_data, member.size, []))
    return entries


def decode_entries(entries: Sequence[TarEntry]) -> torch.Tensor:
    """Pictures of shards as uint8 (B, 3, H, W); they are normalised already."""
    pixels = []
    for entry in entries:
        with Image.open(io.BytesIO(_bytes(entry)), formats=("PNG", "JPEG")) as image:
            pixels.append(np.asarray(image))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def _bytes(entry: TarEntry) -> bytes:
    with entry.tar.open("rb") as tar:
        tar.seek(entry.offset)
        return tar.read(entry.size)
