"""The benchmark: what models are measured on, as an asset that can be read alone, and what one model makes of
it, each part computed once.

`benchmark.json`: flags, and of each split content hash, caption and seed of its pictures. The pictures lie in
shards like those they came from, the judge in `judge/`. The asset is made from the data and the judge of one
run, and later runs are measured on the same: so it names its data by hash alone and keeps none of them alive.
Captions are parted for ever, by their hash: a quarter is for sampling sweeps, the others are measured on.

Letters: N pictures, T tokens.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from model import steps
from model.config import RunConfig
from model.data.image_shards import TarEntry, index, load_images, load_places, stored
from model.data.images import to_tensor
from model.data.order import shards_of
from model.data.records import contents
from model.data.sources.shapes import Scene, parse
from model.inference.bundle import FILES
from model.inference.generate import Generator
from model.nets import metrics
from model.nets.clip import Judge, load_judge
from model.plumbing import assets, cache, storage
from model.plumbing.assets import AssetWriter, Input, Manifest
from model.plumbing.speech import Progress

SPLITS = ("validation", "train", "composition")  # captions held out, captions seen, combinations held out
HELD_OUT = ("validation", "composition")
FEWEST = 16  # held-out pictures that the figures named first may rest on
NAME = "benchmark.json"
JUDGE = "judge"
READ, READ_BYTES = 10_000, 2**30  # pictures of a split looked at, at most
SWEEPS = 64  # of 256 parts of the captions those that sweeps choose by
SEARCH_SIDE = 32  # near-duplicates are searched among pictures of this size, pixels
SEARCH_SHIFT = 2  # and up to so many pixels away, where training shifts its pictures
FORWARD = 64  # pictures per forward pass


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Pinned(_Part):
    """A picture of the benchmark."""

    content: str  # hash of its pixels, the name of its files
    caption: str
    seed: int  # that a sample of its caption is drawn by


class Description(_Part):
    """`benchmark.json`."""

    image_size: int  # pixels
    shapes: bool  # captions describe scenes that the oracle reads
    shift: int  # up to which training moves its pictures, at SEARCH_SIDE, pixels
    flip: bool
    splits: dict[str, list[Pinned]]  # of SPLITS those that the data have


class Pictures(NamedTuple):
    """The captioned pictures of one split."""

    images: Tensor  # uint8 (N, 3, H, W)
    captions: list[str]  # one per picture
    seeds: list[int]  # of a sample of each caption


@dataclass(frozen=True)
class Benchmark:
    """What models are measured on: the same pictures, captions and seeds for all of them."""

    key: str  # of the asset: scores of the same one can be compared
    splits: dict[str, Pictures]  # of SPLITS those that there are
    image_size: int = 0  # pixels
    shapes: bool = False  # captions describe scenes that the oracle reads
    shift: int = 0  # at SEARCH_SIDE, pixels
    flip: bool = False

    def scenes(self, split: str) -> list[Scene]:
        """What the pictures of a split should show."""
        return [parse(caption) for caption in self.splits[split].captions]

    @property
    def count(self) -> int:
        """Pictures of all splits."""
        return sum(len(chosen.captions) for chosen in self.splits.values())

    @property
    def shown(self) -> str:
        """The split that pictures to look at are taken from: what is held out, where there is any."""
        return next(split for split in SPLITS if split in self.splits)


# ── the asset ───────────────────────────────────────────────────────────────────────────────────────────


def benchmark_writer(config: RunConfig, images: Manifest, judge: Manifest) -> AssetWriter:
    """The writer of the benchmark of a run's data and judge, at its place."""
    settings = {**steps.settings("benchmark", config), "images": images.sha256}
    return AssetWriter("benchmark", settings, {JUDGE: judge}, steps.STEPS["benchmark"].version)


def make_benchmark(config: RunConfig, images: Manifest, judge: Manifest) -> Manifest:
    """The benchmark of a run's data and judge; found where it is already.

    Args:
        config: `evaluation` says how many pictures, and the first seed.
        images: the asset that pictures and captions are taken from.
        judge: the asset that judges.

    Raises:
        UserError: an asset is damaged.
    """
    writer = benchmark_writer(config, images, judge)
    if found := assets.find(writer.uri):
        return found
    chosen: dict[str, list[tuple[TarEntry, Pinned]]] = {}
    for split in SPLITS:
        if any(name.startswith(f"{split}-") for name in images.info["shards"]):
            # Few data may leave a split empty, and not every source holds combinations out.
            first = config.evaluation.seed + SPLITS.index(split) * 100_000
            chosen[split] = _choose(index(images, split, READ), config.evaluation.pictures, first)
    augment = config.data.augment
    described = Description(
        image_size=images.info["image_size"],
        shapes=config.data.source.kind == "shapes",
        shift=SEARCH_SHIFT if augment.shift > 0 or augment.scale > 0 else 0,
        flip=augment.flip,
        splits={split: [pinned for _, pinned in rows] for split, rows in chosen.items()},
    )
    entries = {split: [entry for entry, _ in rows] for split, rows in chosen.items()}
    return _write(writer, described, images, entries, judge, {name: name for name in FILES})


def _choose(entries: Sequence[TarEntry], wanted: int, seed: int) -> list[tuple[TarEntry, Pinned]]:
    """Pictures at even distances; they take turns in which of their captions stands for them."""
    ours = [(entry, [one for one in entry.captions if not for_sweeps(one)]) for entry in entries]
    # A handful of captions, such as the names of classes, may all be of one part.
    ours = [one for one in ours if one[1]] or [(entry, entry.captions) for entry in entries]
    chosen = []
    for turn, place in enumerate(spread(len(ours), wanted)):
        entry, said = ours[place]
        pinned = Pinned(content=entry.content, caption=said[turn % len(said)], seed=seed + turn)
        chosen.append((entry, pinned))
    return chosen


def _write(
    writer: AssetWriter,
    described: Description,
    holder: Manifest,
    entries: dict[str, list[TarEntry]],
    judge: Manifest,
    weights: dict[str, str],
) -> Manifest:
    """Write the asset: pictures from `holder`, the judge's files, by their names there, from `judge`."""
    for split, rows in described.splits.items():
        with tempfile.NamedTemporaryFile() as scratch:
            with tarfile.open(scratch.name, "w", format=tarfile.USTAR_FORMAT) as tar:
                for one, entry in zip(rows, entries[split], strict=True):
                    text = json.dumps({"captions": [one.caption]}, ensure_ascii=False).encode()
                    notes = f"{one.content}.json"
                    for name, data in ((entry.name, stored(holder, entry)), (notes, text)):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
            writer.add_file(_shard(split), scratch.name)
    for name, there in weights.items():
        file = judge.file(there)
        storage.copy(judge.where(there), storage.join(writer.uri, JUDGE, name), file.sha256)
        writer.add(file.model_copy(update={"name": f"{JUDGE}/{name}", "asset": ""}))
    writer.add_bytes(NAME, described.model_dump_json(indent=1).encode())
    counts = {split: len(rows) for split, rows in described.splits.items()}
    shards = {_shard(split): count for split, count in counts.items()}
    return writer.finish({"image_size": described.image_size, "shards": shards, **counts})


def _shard(split: str) -> str:
    return f"{split}-000000.tar"


def load_benchmark(manifest: Manifest) -> Benchmark:
    """The content of a benchmark but for its judge. Raises UserError: the asset is damaged."""
    described = _describe(manifest)
    return Benchmark(
        key=manifest.key,
        splits={
            split: Pictures(
                load_images(manifest, split)[0],
                [one.caption for one in rows],
                [one.seed for one in rows],
            )
            for split, rows in described.splits.items()
        },
        image_size=described.image_size,
        shapes=described.shapes,
        shift=described.shift,
        flip=described.flip,
    )


def _describe(manifest: Manifest) -> Description:
    def read() -> Description:
        return Description.model_validate_json(cache.path(manifest, NAME).read_bytes())

    return cache.use(manifest, [NAME], read)


def load_benchmarks_judge(manifest: Manifest, device: torch.device | str = "cpu") -> Judge:
    """The judge of a benchmark. Raises UserError: its files are damaged."""
    names = [file.name for file in manifest.files if file.name.startswith(f"{JUDGE}/")]
    return load_judge(cache.folder(manifest, names) / JUDGE, device)


def without(
    benchmark: Manifest, images: Manifest, announce: Callable[[str], object] = lambda uri: None
) -> Manifest | None:
    """A benchmark without those pictures that are not in `images` any more: deleted ones leave it, too.

    Args:
        benchmark: the whole one.
        images: those that there are.
        announce: hears where a smaller one is, before it is looked for or made: see `uses`.

    Returns:
        The benchmark itself where all are there; None where none is.

    Raises:
        UserError: an asset is damaged.
    """
    described = _describe(benchmark)
    pinned = {one.content for rows in described.splits.values() for one in rows}
    there = set[str]().union(*(_among(pinned, images, split) for split in SPLITS))
    left = {split: [one for one in rows if one.content in there] for split, rows in described.splits.items()}
    gone = pinned - there
    if not gone:
        return benchmark
    left = {split: rows for split, rows in left.items() if rows}
    if not left:
        return None
    entries = {
        split: [entry for entry in index(benchmark, split) if entry.content in there] for split in left
    }
    settings = {**benchmark.settings, "without": sorted(gone | set(benchmark.settings.get("without", [])))}
    judge: dict[str, Input] = {JUDGE: benchmark.inputs[JUDGE]}
    writer = AssetWriter("benchmark", settings, judge, steps.STEPS["benchmark"].version)
    announce(writer.uri)
    if found := assets.find(writer.uri):
        return found
    weights = {
        file.name.removeprefix(f"{JUDGE}/"): file.name
        for file in benchmark.files
        if file.name.startswith(f"{JUDGE}/")
    }
    smaller = described.model_copy(update={"splits": left})
    return _write(writer, smaller, benchmark, entries, benchmark, weights)


def mostly_deleted(benchmark: Manifest) -> bool:
    """Whether most of the pictures that it had once are deleted."""
    gone = len(benchmark.settings.get("without", []))
    return gone > sum(benchmark.info["shards"].values())


def shares(benchmark: Manifest, images: Manifest) -> bool:
    """Whether any picture of a benchmark is in `images`. Raises UserError: an asset is damaged."""
    pinned = {one.content for rows in _describe(benchmark).splits.values() for one in rows}
    return any(content.hex() in pinned for split in SPLITS for content in contents(images, split))


def moved_into_training(benchmark: Manifest, images: Manifest) -> list[str]:
    """The held-out pictures of a benchmark, by content, that `images` trains on: nothing that was trained on
    them may be measured by them. Raises UserError: an asset is damaged."""
    described = _describe(benchmark)
    held_out = [one.content for split in HELD_OUT for one in described.splits.get(split, [])]
    trained = _among(set(held_out), images, "train")
    return [content for content in held_out if content in trained]


def _among(pinned: set[str], images: Manifest, split: str) -> set[str]:
    """Those of some pictures that a split has, which may have many more."""
    return {content for one in contents(images, split) if (content := one.hex()) in pinned}


def for_sweeps(caption: str) -> bool:
    """Whether a caption is among those that sampling sweeps choose by, and that nothing is measured on."""
    return hashlib.sha256(caption.encode()).digest()[0] < SWEEPS


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` places at even distances; all where there are fewer."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


# ── what a model makes of it ────────────────────────────────────────────────────────────────────────────


def training_pictures(images: Manifest) -> Tensor:
    """The training pictures among which near-duplicates are searched: uint8 (M, 3, s, s).

    Of larger sets a part: of each shard its share, at even distances, and at least one, so that those that a
    set has grown by are among them. All shards are fetched.
    """
    wanted = min(READ, READ_BYTES // (3 * images.info["image_size"] ** 2))
    total, first, places = count_of_training(images), 0, []
    for count in shards_of(images, "train").values():
        places += [first + row for row in spread(count, max(1, count * wanted // total))]
        first += count
    return torch.cat([reduced(part) for part in load_places(images, "train", places)])


def count_of_training(images: Manifest) -> int:
    """How many training pictures there are."""
    return sum(shards_of(images, "train").values())


class Nearest(NamedTuple):
    """The nearest training picture of each of N pictures."""

    distance: Tensor  # (N,) RMS difference on [0, 1]
    which: Tensor  # (N,) row of Drawn.training


class Drawn:
    """What a model makes of the benchmark, per split. Nothing is encoded, decoded or drawn twice."""

    def __init__(
        self, generator: Generator, judge: Judge, benchmark: Benchmark, training: Tensor, progress: Progress
    ) -> None:
        """
        Args:
            generator: the model.
            judge: the benchmark's, which need not be the model's own.
            benchmark: what it is measured on.
            training: `training_pictures`, which the model may have learned by heart.
            progress: hears of every picture drawn.
        """
        self.generator, self.judge, self.benchmark = generator, judge, benchmark
        self.training = training
        self._progress, self._count = progress, 0
        self._samples: dict[str, Tensor] = {}
        self._seen: dict[tuple[str, str], Tensor] = {}

    @cached_property
    @torch.no_grad()
    def _left(self) -> dict[str, tuple[Tensor, Tensor]]:
        tokenizer, found = self.generator.tokenizer, {}
        for split, chosen in self.benchmark.splits.items():
            left, codes = [], []
            for part in chosen.images.split(FORWARD):
                code = tokenizer.encode(to_tensor(part).to(self.generator.device))
                left.append(tokenizer.decode(code).cpu())
                codes.append(code.flatten(1).cpu())
            found[split] = torch.cat(left), torch.cat(codes)
        return found

    @property
    def reconstructed(self) -> dict[str, Tensor]:
        """What the tokenizer leaves of the real pictures: (N, 3, H, W) in [-1, 1]."""
        return {split: left for split, (left, _) in self._left.items()}

    @property
    def codes(self) -> dict[str, Tensor]:
        """The codes of the real pictures: (N, T)."""
        return {split: codes for split, (_, codes) in self._left.items()}

    def draw(self, prompts: Sequence[str], seeds: int | Sequence[int], unconditional: bool = False) -> Tensor:
        """(N, 3, H, W) in [-1, 1], on the CPU; `seeds` may be the first of consecutive ones."""
        if isinstance(seeds, int):
            seeds = range(seeds, seeds + len(prompts))
        images = self.generator.draw(
            prompts, seeds, None, unconditional, lambda done: self._progress.update(self._count + done)
        )
        self._count += len(prompts)
        return images.cpu()

    def samples(self, split: str) -> Tensor:
        """A sample for every caption, by the model's own settings: (N, 3, H, W) in [-1, 1]."""
        if split not in self._samples:
            chosen = self.benchmark.splits[split]
            self._samples[split] = self.draw(chosen.captions, chosen.seeds)
        return self._samples[split]

    def real(self, split: str) -> Tensor:
        """The pictures themselves: (N, 3, H, W) in [-1, 1]."""
        return to_tensor(self.benchmark.splits[split].images)

    def pictures(self, split: str, what: str) -> Tensor:
        """`samples`, `real` or `reconstructed`: (N, 3, H, W) in [-1, 1]."""
        if what == "samples":
            return self.samples(split)
        return self.real(split) if what == "real" else self.reconstructed[split]

    def features(self, split: str, what: str = "samples") -> Tensor:
        """What the judge sees in the same: (N, width of the judge)."""
        if (split, what) not in self._seen:
            self._seen[split, what] = look(self.judge, self.pictures(split, what))
        return self._seen[split, what]

    @cached_property
    def nearest(self) -> dict[str, Nearest]:
        """For each sample the training picture that is most like it."""
        return {split: self.nearest_to(self.samples(split)) for split in self.benchmark.splits}

    def nearest_to(self, images: Tensor) -> Nearest:
        """For pictures (N, 3, H, W) in [-1, 1] the training pictures that are most like them."""
        small = to_tensor(reduced((images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)))
        distance, which = metrics.nearest_pictures(
            small.to(self.generator.device), self._training, self.benchmark.shift, self.benchmark.flip
        )
        return Nearest(distance.cpu(), which.cpu())

    @cached_property
    def _training(self) -> Tensor:
        return to_tensor(self.training).to(self.generator.device)


def look(judge: Judge, images: Tensor) -> Tensor:
    """What a judge sees in pictures (N, 3, H, W) in [-1, 1]: (N, its width)."""
    return torch.cat([judge.image_features(part) for part in images.split(FORWARD)])


def reduced(images: Tensor) -> Tensor:
    """uint8 pictures (N, 3, H, W) at the size at which near-duplicates are searched."""
    if images.shape[-1] <= SEARCH_SIDE:
        return images
    parts = (F.interpolate(part.float(), (SEARCH_SIDE,) * 2, mode="area") for part in images.split(512))
    return torch.cat([part.round().to(torch.uint8) for part in parts])
