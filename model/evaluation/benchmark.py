"""The benchmark, pinned by config and data, and what one model makes of it: each part computed once.

Letters: N pictures, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import RunConfig, config_hash
from model.data.image_shards import load_images
from model.data.images import to_tensor
from model.data.sources.shapes import Scene, parse
from model.inference.generate import Generator
from model.nets import metrics
from model.nets.clip import Judge
from model.plumbing.assets import Manifest
from model.plumbing.speech import Progress

SPLITS = ("validation", "train", "composition")  # captions held out, captions seen, combinations held out
READ, READ_BYTES = 10_000, 2**30  # pictures of a split looked at, at most
SEARCH_SIDE = 32  # near-duplicates are searched among pictures of this size, pixels
SEARCH_SHIFT = 2  # and up to so many pixels away, where training shifts its pictures
FORWARD = 64  # pictures per forward pass


class Pictures(NamedTuple):
    """A pinned choice of captioned pictures of one split."""

    images: Tensor  # uint8 (N, 3, H, W)
    captions: list[str]  # one per picture


@dataclass(frozen=True)
class Benchmark:
    """What models are measured on: the same pictures, captions and seeds for all of them."""

    splits: dict[str, Pictures]  # of SPLITS those that the data have
    training: Tensor  # uint8 (M, 3, s, s): where near-duplicates are searched
    seed: int
    shapes: bool  # captions describe scenes that the oracle reads
    shift: int  # at SEARCH_SIDE, pixels
    flip: bool
    key: str  # hash: scores with the same key can be compared

    def scenes(self, split: str) -> list[Scene]:
        """What the pictures of a split should show."""
        return [parse(caption) for caption in self.splits[split].captions]

    def seeds(self, split: str) -> list[int]:
        """The seed of each sample."""
        first = self.seed + SPLITS.index(split) * 100_000
        return list(range(first, first + len(self.splits[split].captions)))

    @property
    def hardest(self) -> str:
        """Of the splits there are, the one furthest from training."""
        return next(split for split in ("composition", "validation", "train") if split in self.splits)


def load_benchmark(config: RunConfig, images: Manifest, judge: str) -> Benchmark:
    """The pinned pictures, captions and seeds of a config and its data.

    Args:
        config: `evaluation` decides.
        images: the asset that pictures and captions are taken from.
        judge: hash of the asset that judges.
    """
    limit = min(READ, READ_BYTES // (3 * images.info["image_size"] ** 2))
    splits, training = {}, torch.empty(0)
    for split in SPLITS:
        if not any(name.startswith(f"{split}-") for name in images.info["shards"]):
            continue  # few data may leave a split empty, and not every source holds combinations out
        pixels, captions = load_images(images, split, limit)
        chosen = spread(len(pixels), config.evaluation.pictures)
        # The pictures take turns in which of their captions stands for them.
        said = [captions[i][turn % len(captions[i])] for turn, i in enumerate(chosen)]
        splits[split] = Pictures(pixels[chosen], said)
        if split == "train":
            training = _reduced(pixels)
    augment = config.data.augment
    moved = augment.shift > 0 or augment.scale > 0
    return Benchmark(
        splits=splits,
        training=training,
        seed=config.evaluation.seed,
        shapes=config.data.source.kind == "shapes",
        shift=SEARCH_SHIFT if moved else 0,
        flip=augment.flip,
        key=config_hash(images.sha256, judge, config.evaluation)[:16],
    )


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` places at even distances; all where there are fewer."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


class Nearest(NamedTuple):
    """The nearest training picture of each of N pictures."""

    distance: Tensor  # (N,) RMS difference on [0, 1]
    which: Tensor  # (N,) row of Benchmark.training


class Drawn:
    """What a model makes of the benchmark, per split. Nothing is encoded, decoded or drawn twice."""

    def __init__(self, generator: Generator, judge: Judge, benchmark: Benchmark, progress: Progress) -> None:
        """
        Args:
            generator: the model.
            judge: scores what it draws; not of the model where a champion is measured by this run's.
            benchmark: what it is measured on.
            progress: hears of every picture drawn.
        """
        self.generator, self.judge, self.benchmark = generator, judge, benchmark
        self._progress, self._count = progress, 0
        self._samples: dict[str, Tensor] = {}
        self._features: dict[str, Tensor] = {}

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

    def draw(
        self,
        prompts: Sequence[str],
        seeds: int | Sequence[int],
        cfg_scale: float | None = None,
        unconditional: bool = False,
    ) -> Tensor:
        """(N, 3, H, W) in [-1, 1], on the CPU; `seeds` may be the first of consecutive ones."""
        if isinstance(seeds, int):
            seeds = range(seeds, seeds + len(prompts))
        sampling = self.generator.sampling
        if cfg_scale is not None:
            sampling = sampling.model_copy(update={"cfg_scale": cfg_scale})
        images = self.generator.draw(
            prompts, seeds, sampling, unconditional, lambda done: self._progress.update(self._count + done)
        )
        self._count += len(prompts)
        return images.cpu()

    def samples(self, split: str) -> Tensor:
        """A sample for every caption, by the model's own settings: (N, 3, H, W) in [-1, 1]."""
        if split not in self._samples:
            captions = self.benchmark.splits[split].captions
            self._samples[split] = self.draw(captions, self.benchmark.seeds(split))
        return self._samples[split]

    def features(self, split: str) -> Tensor:
        """What the judge sees in the samples: (N, width of the judge)."""
        if split not in self._features:
            self._features[split] = self.look(self.samples(split))
        return self._features[split]

    def look(self, images: Tensor) -> Tensor:
        """What the judge sees in pictures (N, 3, H, W) in [-1, 1]."""
        return torch.cat([self.judge.image_features(part) for part in images.split(FORWARD)])

    @cached_property
    def nearest(self) -> dict[str, Nearest]:
        """For each sample the training picture that is most like it."""
        return {split: self.nearest_to(self.samples(split)) for split in self.benchmark.splits}

    def nearest_to(self, images: Tensor) -> Nearest:
        """For pictures (N, 3, H, W) in [-1, 1] the training pictures that are most like them."""
        reduced = to_tensor(_reduced((images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)))
        distance, which = metrics.nearest_pictures(
            reduced.to(self.generator.device), self._training, self.benchmark.shift, self.benchmark.flip
        )
        return Nearest(distance.cpu(), which.cpu())

    @cached_property
    def _training(self) -> Tensor:
        return to_tensor(self.benchmark.training).to(self.generator.device)


def _reduced(images: Tensor) -> Tensor:
    """uint8 pictures at the size at which near-duplicates are searched."""
    if images.shape[-1] <= SEARCH_SIDE:
        return images
    parts = (F.interpolate(part.float(), (SEARCH_SIDE,) * 2, mode="area") for part in images.split(512))
    return torch.cat([part.round().to(torch.uint8) for part in parts])
