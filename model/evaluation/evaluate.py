"""What a model is worth: metrics between their floors and ceilings, pictures to look at, one report.

    python -m model.evaluation.evaluate SPEC_URI

Prompts, seeds and judge are pinned by config and data, so that two models are compared on equal terms:
`evaluate` measures the model of a run, `remeasure` another one by the same measure, `compare` decides.

Every score of samples stands between ceilings, the same score of real pictures and of what the tokenizer
leaves of them, and a floor, that of the samples with other captions. The judge is a CLIP of the pipeline's
own, trained from another seed and split than the one that reads prompts. Where the data are drawn shapes, an
exact detector counts which pictures show what was asked for.

Letters: N pictures, B batch, T tokens.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import RunConfig, config_hash
from model.data.image_shards import load_images
from model.data.images import to_tensor
from model.data.sources.shapes import Scene, parse
from model.errors import UserError
from model.evaluation import oracle, report, sheets
from model.inference.generate import Generator, write_bundle
from model.nets import metrics
from model.nets.clip import Judge, load_judge
from model.plumbing import assets, storage
from model.plumbing.assets import Manifest
from model.plumbing.curves import HISTORY
from model.plumbing.progress import Progress
from model.plumbing.worker import Job, run_worker

SPLITS = ("validation", "train", "composition")  # captions held out, captions seen, combinations held out
READ, READ_BYTES = 10_000, 2**30  # pictures of a split looked at, at most
SEARCH_SIDE = 32  # near-duplicates are searched among pictures of this size, pixels
SEARCH_SHIFT = 2  # and up to so many pixels away, where training shifts its pictures
FORWARD = 64  # pictures per forward pass
PROMPTS, UNCONDITIONAL, PAIRS = 12, 16, 12  # rows of a grid, pictures without text, reconstructions shown
GRID_SEEDS = 1_000_000  # seeds of the grids start here, so that they show none of the scored pictures


class Pictures(NamedTuple):
    """A pinned choice of captioned pictures of one split."""

    images: Tensor  # uint8 (N, 3, H, W)
    captions: list[str]  # one per picture


@dataclass(frozen=True)
class Benchmark:
    """What models are measured on: the same pictures, captions and seeds for all of them."""

    splits: dict[str, Pictures]  # of SPLITS those that the data have
    training: Tensor  # uint8 (M, 3, s, s): where copies are searched
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


@dataclass
class Measured:
    """Figures of a model, and the pictures they were taken from."""

    metrics: dict[str, float] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)  # one per prompt, what `compare` goes by
    samples: dict[str, Tensor] = field(default_factory=dict)  # per split, (N, 3, H, W)


@dataclass(frozen=True)
class Verdict:
    """Whether a challenger takes the champion's place, and why."""

    better: bool
    reason: str


# ── the step ────────────────────────────────────────────────────────────────────────────────────────────


def main(job: Job) -> Manifest:
    """Measure the model of `tokenizer`, `text`, `transformer`, `judge` on `images`; write its report.

    Raises:
        UserError: where an asset is damaged, or they do not belong together.
    """
    config, sets = job.config, job.inputs
    with tempfile.TemporaryDirectory() as scratch:
        generator = Generator.load(write_bundle(sets, config.sampling, Path(scratch) / "bundle"))
    judge = generator.judge
    assert judge is not None  # the bundle has one
    benchmark = load_benchmark(config, sets)
    progress = job.progress(_pictures_to_draw(config, benchmark), "img", counted="picture")
    drawn = Drawn(generator, progress)

    measured = Measured()
    measured.metrics |= tokenizer_metrics(generator, benchmark)
    measured.metrics |= likelihoods(generator, benchmark)
    score(measured, drawn, judge, benchmark)
    copies = originality(measured, generator, benchmark)
    sweep = guidance_sweep(config, drawn, judge, benchmark)

    page = report.Page(
        config=config,
        sets=sets,
        metrics=measured.metrics,
        parameters={
            "transformer": generator.gpt.parameter_count(),
            "tokenizer": _weights(generator.tokenizer),
        },
        grids=_grids(config, drawn, benchmark, measured, copies),
        reconstructions=_reconstructions(generator, benchmark),
        unconditional=drawn([""] * UNCONDITIONAL, GRID_SEEDS, unconditional=True),
        sweep=sweep,
        histories=_histories(sets),
        pictures={split: len(chosen.captions) for split, chosen in benchmark.splits.items()},
    )
    files = report.files(page)
    for file, data in files.items():
        job.output.add_bytes(file, data)
    info = {**measured.metrics, "scores": measured.scores, "benchmark": benchmark.key}
    job.output.add_bytes("metrics.json", json.dumps({**info, "guidance": sweep}, indent=1).encode())
    job.tracker.metrics(0, **measured.metrics)
    job.tracker.text("report.html", files["report.html"].decode())
    return job.output.finish(info)


def remeasure(config: RunConfig, sets: dict[str, Manifest], bundle: str | Path) -> dict[str, Any]:
    """Scores of another model, a bundle, on the pictures, prompts and seeds of this run and by its judge.

    The model draws with its own sampling settings. Returns what `compare` needs.
    """
    benchmark = load_benchmark(config, sets)
    with tempfile.TemporaryDirectory() as scratch:
        assets.fetch(sets["judge"], scratch)
        generator = Generator.load(bundle)
        judge = load_judge(scratch, generator.device)
    measured = Measured()
    total = sum(len(chosen.captions) for chosen in benchmark.splits.values())
    drawn = Drawn(generator, Progress("register", total, "img", counted="champion's picture"))
    score(measured, drawn, judge, benchmark)
    return {**measured.metrics, "scores": measured.scores, "benchmark": benchmark.key}


def compare(challenger: dict[str, Any], champion: dict[str, Any]) -> Verdict:
    """Whether the challenger is better, by more than chance explains.

    The scores of the same prompts and seeds are paired; the mean difference must exceed its standard error.

    Raises:
        UserError: where the two were not measured alike.
    """
    if challenger["benchmark"] != champion["benchmark"]:
        raise UserError("challenger and champion were measured on different prompts; measure both anew")
    if not all(math.isfinite(value) for value in challenger["scores"]):
        return Verdict(False, "the challenger's scores are not finite")
    difference, error = metrics.paired_difference(challenger["scores"], champion["scores"])
    ours, theirs = (sum(one["scores"]) / len(one["scores"]) for one in (challenger, champion))
    figures = f"score {ours:.3f} against {theirs:.3f} over {len(challenger['scores'])} prompts"
    margin = f"difference {difference:+.3f}, standard error {error:.3f}"
    if difference > error:
        return Verdict(True, f"better: {figures} ({margin})")
    return Verdict(False, f"not better: {figures} ({margin})")


# ── what is measured on ─────────────────────────────────────────────────────────────────────────────────


def load_benchmark(config: RunConfig, sets: dict[str, Manifest]) -> Benchmark:
    """The pinned pictures, captions and seeds of a config and its data."""
    images = sets["images"]
    limit = min(READ, READ_BYTES // (3 * images.info["image_size"] ** 2))
    splits, training = {}, torch.empty(0)
    for split in SPLITS:
        if not any(name.startswith(f"{split}-") for name in images.info["shards"]):
            continue  # few data may leave a split empty, and not every source holds combinations out
        pixels, captions = load_images(images, split, limit)
        chosen = _spread(len(pixels), config.evaluation.pictures)
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
        key=config_hash(images.sha256, sets["judge"].sha256, config.evaluation)[:16],
    )


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` places at even distances; all where there are fewer."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def _reduced(images: Tensor) -> Tensor:
    """uint8 pictures at the size at which copies are searched."""
    if images.shape[-1] <= SEARCH_SIDE:
        return images
    parts = (F.interpolate(part.float(), (SEARCH_SIDE,) * 2, mode="area") for part in images.split(512))
    return torch.cat([part.round().to(torch.uint8) for part in parts])


class Drawn:
    """Draws samples with a generator and counts them for the progress line."""

    def __init__(self, generator: Generator, progress: Progress) -> None:
        self.generator, self.progress, self.count = generator, progress, 0

    def __call__(
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
            prompts, seeds, sampling, unconditional, lambda done: self.progress.update(self.count + done)
        )
        self.count += len(prompts)
        return images.cpu()


# ── measures ────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def reconstruct(generator: Generator, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the tokenizer leaves of uint8 pictures, (N, 3, H, W) in [-1, 1], and the codes (N, T)."""
    left, codes = [], []
    for part in images.split(FORWARD):
        code = generator.tokenizer.encode(to_tensor(part).to(generator.device))
        left.append(generator.tokenizer.decode(code).cpu())
        codes.append(code.flatten(1).cpu())
    return torch.cat(left), torch.cat(codes)


def tokenizer_metrics(generator: Generator, benchmark: Benchmark) -> dict[str, float]:
    """PSNR per split; use of the codebook over all pictures looked at."""
    figures, seen = {}, []
    for split, chosen in benchmark.splits.items():
        left, codes = reconstruct(generator, chosen.images)
        figures[f"{split}/psnr"] = float(metrics.psnr(left, to_tensor(chosen.images)).mean())
        seen.append(codes)
    use, perplexity = metrics.codebook_use(torch.cat(seen), generator.tokenizer.vocabulary)
    return figures | {"codebook_use": use, "codebook_perplexity": perplexity}


@torch.no_grad()
def likelihoods(generator: Generator, benchmark: Benchmark) -> dict[str, float]:
    """NLL in nats per token, per split: of pictures given their captions, given others', given none."""
    gpt, figures = generator.gpt, {}
    for split, chosen in benchmark.splits.items():
        _, codes = reconstruct(generator, chosen.images)
        others = [chosen.captions[i] for i in metrics.mismatched(chosen.captions)]
        for name, captions in (
            ("nll", chosen.captions),
            ("nll_shuffled", others),
            ("nll_unconditional", None),
        ):
            total = 0.0
            for start in range(0, len(codes), FORWARD):
                part = codes[start : start + FORWARD].to(generator.device)
                states = mask = None
                if captions is not None:
                    ids = generator.text.tokenize(captions[start : start + FORWARD])
                    states, mask = generator.text.encode(ids)
                    states = states.to(gpt.embedding.weight.dtype)
                total += float(metrics.token_nll(gpt(part, states, mask), part).sum())
            figures[f"{split}/{name}"] = total / len(codes)
        figures[f"{split}/nll_text_gain"] = figures[f"{split}/nll_shuffled"] - figures[f"{split}/nll"]
    if "validation" in benchmark.splits:
        figures["nll_gap"] = figures["validation/nll"] - figures["train/nll"]
    return figures


def score(measured: Measured, drawn: Drawn, judge: Judge, benchmark: Benchmark) -> None:
    """Draw a sample for every caption and judge it; so are the real pictures and their reconstructions.

    Adds to `measured` the figures, the samples, and the scores that models are compared by: of the oracle
    where there is one, else the judge's.
    """
    for split, chosen in benchmark.splits.items():
        samples = drawn(chosen.captions, benchmark.seeds(split))
        measured.samples[split] = samples
        left, _ = reconstruct(drawn.generator, chosen.images)
        text = judge.text_features(chosen.captions)
        others = metrics.mismatched(chosen.captions)
        for suffix, images in (("", samples), ("_real", to_tensor(chosen.images)), ("_reconstructed", left)):
            features = torch.cat([judge.image_features(part) for part in images.split(FORWARD)])
            scores = metrics.clip_score(features, text)
            measured.metrics[f"{split}/clip_score{suffix}"] = float(scores.mean())
            measured.metrics[f"{split}/retrieval{suffix}"] = metrics.retrieval_accuracy(
                features, text, chosen.captions
            )
            if not suffix:
                measured.metrics[f"{split}/clip_score_shuffled"] = float(
                    metrics.clip_score(features, text[others]).mean()
                )
                judged = scores.cpu().tolist()
            if benchmark.shapes:
                shares = oracle.oracle_score(images, benchmark.scenes(split))
                measured.metrics |= {
                    f"{split}/oracle_{name}{suffix}": share for name, share in shares.items()
                }
        measured.metrics[f"{split}/retrieval_chance"] = _chance(chosen.captions)
        if benchmark.shapes:
            judged = [float(right) for right in oracle.correct(samples, benchmark.scenes(split))]
        measured.scores += [round(value, 4) for value in judged]


def _chance(captions: Sequence[str]) -> float:
    """Retrieval accuracy of a blind judge."""
    return sum(captions.count(caption) for caption in captions) / len(captions) ** 2


@dataclass(frozen=True)
class Nearest:
    """The nearest training picture of each sample for a held-out caption."""

    distance: Tensor  # (N,) RMS difference on [0, 1]
    which: Tensor  # (N,) row of Benchmark.training


def originality(measured: Measured, generator: Generator, benchmark: Benchmark) -> dict[str, Nearest]:
    """Share of samples that copy a training picture, with the two figures that say what it means:

    how many real held-out pictures count as copies (data may be that alike), and how many training pictures
    are recognised after the tokenizer (a copy must be found to be counted).
    """
    training = to_tensor(benchmark.training).to(generator.device)

    def nearest(images: Tensor) -> Nearest:
        reduced = to_tensor(_reduced((images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)))
        distance, which = metrics.nearest_pictures(
            reduced.to(generator.device), training, benchmark.shift, benchmark.flip
        )
        return Nearest(distance.cpu(), which.cpu())

    found = {split: nearest(samples) for split, samples in measured.samples.items()}
    for split, one in found.items():
        measured.metrics[f"{split}/copies"] = metrics.copy_share(one.distance)
        left, _ = reconstruct(generator, benchmark.splits[split].images)
        measured.metrics[f"{split}/copies_reconstructed"] = metrics.copy_share(nearest(left).distance)
    return found


def guidance_sweep(
    config: RunConfig, drawn: Drawn, judge: Judge, benchmark: Benchmark
) -> dict[str, list[list[float]]]:
    """Curves of [guidance scale, score] over held-out prompts; `{}` where the config compares none."""
    curves: dict[str, list[list[float]]] = {}
    split = _hardest(benchmark)
    chosen = benchmark.splits[split]
    text = judge.text_features(chosen.captions)
    for scale in config.evaluation.cfg_sweep:
        samples = drawn(chosen.captions, benchmark.seeds(split), cfg_scale=scale)
        features = torch.cat([judge.image_features(part) for part in samples.split(FORWARD)])
        figures = {
            "CLIP score": float(metrics.clip_score(features, text).mean()),
            "retrieval accuracy": metrics.retrieval_accuracy(features, text, chosen.captions),
        }
        if benchmark.shapes:
            figures["oracle, all right"] = oracle.oracle_score(samples, benchmark.scenes(split))["all_right"]
        for name, value in figures.items():
            curves.setdefault(name, []).append([scale, value])
    return curves


def _hardest(benchmark: Benchmark) -> str:
    """Of the splits there are, the one furthest from training."""
    return next(split for split in ("composition", "validation", "train") if split in benchmark.splits)


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────


def _pictures_to_draw(config: RunConfig, benchmark: Benchmark) -> int:
    sizes = {split: len(chosen.captions) for split, chosen in benchmark.splits.items()}
    rows = sum(min(size, PROMPTS) for split, size in sizes.items() if split != "train")
    rows += len(config.evaluation.prompts or _spread(sizes["train"], PROMPTS))
    scored = sum(sizes.values()) + sizes[_hardest(benchmark)] * len(config.evaluation.cfg_sweep)
    return scored + rows * config.evaluation.samples_per_prompt + UNCONDITIONAL


def _grids(
    config: RunConfig, drawn: Drawn, benchmark: Benchmark, measured: Measured, copies: dict[str, Nearest]
) -> list[report.Grid]:
    """Prompts and samples of each kind: known captions (or the config's prompts), held-out ones, held-out
    combinations; beside each the real picture and the training picture nearest to the first sample."""
    grids = []
    per_prompt = config.evaluation.samples_per_prompt
    first = GRID_SEEDS + UNCONDITIONAL
    for split in ("train", "validation", "composition"):
        if split not in benchmark.splits:
            continue
        chosen = benchmark.splits[split]
        own = config.evaluation.prompts if split == "train" else []
        rows = _spread(len(chosen.captions), PROMPTS)
        prompts = own or [chosen.captions[i] for i in rows]
        samples = drawn([prompt for prompt in prompts for _ in range(per_prompt)], first)
        first += len(samples)
        grids.append(
            report.Grid(
                kind="prompts" if own else split,
                prompts=list(prompts),
                samples=samples.unflatten(0, (len(prompts), per_prompt)),
                real=None if own else to_tensor(chosen.images[rows]),
            )
        )
    # The held-out samples that come closest to a training picture, beside it: what a copy would look like.
    split = "validation" if "validation" in copies else "train"
    one = copies[split]
    closest = one.distance.argsort()[:PROMPTS]
    grids.append(
        report.Grid(
            kind="closest",
            prompts=[benchmark.splits[split].captions[i] for i in closest],
            samples=measured.samples[split][closest][:, None],
            real=to_tensor(benchmark.training[one.which[closest]]),
            notes=[f"{distance:.3f}" for distance in one.distance[closest].tolist()],
        )
    )
    return grids


def _reconstructions(generator: Generator, benchmark: Benchmark) -> sheets.Pairs:
    """Held-out pictures and what the tokenizer leaves of them."""
    chosen = benchmark.splits["validation" if "validation" in benchmark.splits else "train"]
    images = chosen.images[_spread(len(chosen.images), PAIRS)]
    return sheets.Pairs(to_tensor(images), reconstruct(generator, images)[0])


def _histories(sets: dict[str, Manifest]) -> dict[str, dict[str, list[list[float]]]]:
    """The training curves that sets carry, by set; a set that was imported has none."""
    return {
        name: json.loads(storage.read_bytes(storage.join(manifest.uri, HISTORY)))
        for name, manifest in sets.items()
        if any(file.name == HISTORY for file in manifest.files)
    }


def _weights(net: object) -> int:
    return sum(weight.numel() for weight in net.parameters()) if isinstance(net, torch.nn.Module) else 0


if __name__ == "__main__":
    run_worker(main)
