"""What one model is worth on one benchmark, by the benchmark's judge.

    python -m model.evaluation.measure SPEC_URI

An evaluation measures a run's model on the run's own benchmark and draws its report; a measurement measures
any model on any benchmark, so that two models are compared on equal terms.

Every score of samples stands between ceilings, the same score of real pictures and of what the tokenizer
leaves of them, and a floor, that of the samples with other captions. The judge is a CLIP of the pipeline's
own, trained from another seed and split than the one that reads prompts. Where the data are drawn shapes, an
exact detector counts which pictures show what was asked for.

Letters: N pictures, B batch, T tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.errors import Diverged, UserError
from model.evaluation import oracle
from model.evaluation.benchmark import (
    FORWARD,
    Benchmark,
    Drawn,
    load_benchmark,
    load_benchmarks_judge,
    training_pictures,
)
from model.inference.generate import Generator
from model.nets import metrics
from model.nets.tokenizers import neighbours
from model.plumbing import cache
from model.plumbing.assets import Manifest
from model.plumbing.worker import Job, run_worker

PICTURES = ("samples", "real", "reconstructed")
SHARES, SHARE = (0.01, 0.05, 0.1, 0.2), 0.05  # of codes replaced by neighbours; the one that is named first
ROBUST = 128  # pictures that they are replaced in


def main(job: Job) -> Manifest:
    """Measure the job's `model` on its `benchmark`; near-duplicates are searched among its `images`.

    Raises:
        UserError: where an asset is damaged, the model's parts do not belong together, it draws pictures of
            another size, or a figure of what it draws is no number (`Diverged`).
    """
    model, benchmark = job.inputs["model"], load_benchmark(job.inputs["benchmark"])
    generator = Generator.load(cache.folder(model), pictures=benchmark.count)
    drawn = open_drawn(job, generator, benchmark, benchmark.count)
    measured = measure(drawn, model)
    job.output.add_bytes("metrics.json", json.dumps(measured, indent=1).encode())
    job.tracker.metrics(0, **measured["figures"])
    return job.output.finish(measured)


def open_drawn(job: Job, generator: Generator, benchmark: Benchmark, total: int) -> Drawn:
    """What a model makes of a job's benchmark, nothing of it computed yet.

    Args:
        job: names `benchmark` and `images`.
        generator: the model.
        benchmark: the job's.
        total: pictures that will be drawn.

    Raises:
        UserError: the model draws pictures of another size, or an asset is damaged.
    """
    side = generator.gpt.grid[0] * generator.tokenizer.factor
    if side != benchmark.image_size:
        raise UserError(
            f"the model draws pictures of {side} px, and the benchmark {benchmark.key} holds some of"
            f" {benchmark.image_size} px; models of different sizes cannot be compared"
        )
    judge = load_benchmarks_judge(job.inputs["benchmark"], generator.device)
    training = training_pictures(job.inputs["images"])
    return Drawn(generator, judge, benchmark, training, job.progress(total, "img", counted="picture"))


def measure(drawn: Drawn, model: Manifest) -> dict[str, Any]:
    """All that a model is compared by, for the `info` of an asset: `benchmark` (its key), `figures`, `scores`
    and `chance`.

    Raises:
        Diverged: a figure is no number.
    """
    figures: dict[str, float] = {"bundle_bytes": sum(file.size for file in model.files)}
    for one in MEASURES:
        figures |= one(drawn)
    for name, value in figures.items():
        if not math.isfinite(value):
            raise Diverged(f"{name} is {value}; the training of this model has diverged")
    return {"benchmark": drawn.benchmark.key, "figures": figures, **scores(drawn)}


def tokenizer_metrics(drawn: Drawn) -> dict[str, float]:
    """PSNR, SSIM and Fréchet distance of what is left of pictures, per split; use of the codebook by all."""
    figures: dict[str, float] = {}
    for split in drawn.benchmark.splits:
        left, real = drawn.reconstructed[split], drawn.real(split)
        figures[f"{split}/psnr"] = float(metrics.psnr(left, real).mean())
        similar = [metrics.ssim(*pair) for pair in zip(left.split(FORWARD), real.split(FORWARD), strict=True)]
        figures[f"{split}/ssim"] = float(torch.cat(similar).mean())
        figures[f"{split}/reconstruction_frechet"] = metrics.frechet_distance(
            drawn.features(split, "reconstructed"), drawn.features(split, "real")
        )
    seen = torch.cat(list(drawn.codes.values()))
    use, perplexity = metrics.codebook_use(seen, drawn.generator.tokenizer.vocabulary)
    return figures | {"codebook_use": use, "codebook_perplexity": perplexity}


@torch.no_grad()
def likelihoods(drawn: Drawn) -> dict[str, float]:
    """Bits per token, per split: of pictures given their captions, given others', given none."""
    generator, gpt = drawn.generator, drawn.generator.gpt
    figures: dict[str, float] = {}
    for split, chosen in drawn.benchmark.splits.items():
        codes = drawn.codes[split]
        others = [chosen.captions[i] for i in metrics.mismatched(chosen.captions)]
        for name, captions in (
            ("bits_per_token", chosen.captions),
            ("bits_per_token_shuffled", others),
            ("bits_per_token_unconditional", None),
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
            figures[f"{split}/{name}"] = metrics.bits(total / len(codes))
        gain = figures[f"{split}/bits_per_token_shuffled"] - figures[f"{split}/bits_per_token"]
        figures[f"{split}/bits_per_token_text_gain"] = gain
    if {"validation", "train"} <= drawn.benchmark.splits.keys():
        gap = figures["validation/bits_per_token"] - figures["train/bits_per_token"]
        figures["bits_per_token_gap"] = gap
    return figures


def judgement(drawn: Drawn) -> dict[str, float]:
    """What judge and oracle say of the samples, of the real pictures and of their reconstructions."""
    figures: dict[str, float] = {}
    for split, chosen in drawn.benchmark.splits.items():
        text = drawn.judge.text_features(chosen.captions)
        for what in PICTURES:
            features, suffix = drawn.features(split, what), "" if what == "samples" else f"_{what}"
            figures[f"{split}/clip_score{suffix}"] = float(metrics.clip_score(features, text).mean())
            found = metrics.retrieval_accuracy(features, text, chosen.captions)
            figures[f"{split}/retrieval{suffix}"] = found
            if drawn.benchmark.shapes:
                shares = oracle.oracle_score(drawn.pictures(split, what), drawn.benchmark.scenes(split))
                figures |= {f"{split}/oracle_{name}{suffix}": share for name, share in shares.items()}
        others = metrics.mismatched(chosen.captions)
        shuffled = metrics.clip_score(drawn.features(split), text[others])
        figures[f"{split}/clip_score_shuffled"] = float(shuffled.mean())
        figures[f"{split}/retrieval_chance"] = metrics.retrieval_chance(chosen.captions)
    return figures


def likeness(drawn: Drawn) -> dict[str, float]:
    """How far the samples as a set are like the real pictures of the same captions, as the judge sees them:
    distances (0 is best), precision, recall and diversity."""
    figures: dict[str, float] = {}
    for split in drawn.benchmark.splits:
        samples, real = drawn.features(split), drawn.features(split, "real")
        figures[f"{split}/frechet"] = metrics.frechet_distance(samples, real)
        figures[f"{split}/cmmd"] = metrics.cmmd(samples, real)
        precision, recall = metrics.precision_recall(samples, real)
        figures |= {f"{split}/precision": precision, f"{split}/recall": recall}
        figures[f"{split}/diversity"] = metrics.diversity(samples, real)
    return figures


def memorisation(drawn: Drawn) -> dict[str, float]:
    """The share of samples that are near-duplicates of a training picture, the median distance to the nearest
    one, and the figure that says what the share means.

    Some 10,000 training pictures at most are searched, evenly over all shards. The report
    says of how many: where they are a part, the share of samples that are copies may be larger than is found.
    What it means is how many real pictures count as near-duplicates after the tokenizer: of training pictures
    these must be found for a copy to be counted; held-out ones say how alike the data are by nature.
    """
    figures: dict[str, float] = {}
    for split, one in drawn.nearest.items():
        figures[f"{split}/near_duplicates"] = metrics.near_duplicate_share(one.distance)
        figures[f"{split}/nearest_distance"] = float(one.distance.median())
        left = drawn.nearest_to(drawn.reconstructed[split])
        figures[f"{split}/near_duplicates_reconstructed"] = metrics.near_duplicate_share(left.distance)
    return figures


@torch.no_grad()
def robustness(drawn: Drawn) -> dict[str, float]:
    """What small mistakes of a transformer cost: PSNR in dB (and all attributes right) of pictures of which a
    share of the codes is replaced by near neighbours, less that of the pictures' own codes.

    `robustness_psnr` and `robustness_oracle` are what is lost at `SHARE`; `robustness_psnr_1` and so on the
    points of the curves. `{}` for a tokenizer whose codebook is out of reach.
    """
    split, tokenizer, device = drawn.benchmark.shown, drawn.generator.tokenizer, drawn.generator.device
    codes, real = drawn.codes[split][:ROBUST], drawn.real(split)[:ROBUST]
    which, place = codes.unique(return_inverse=True)
    near = neighbours(tokenizer, which.to(device))
    if near is None or near.shape[1] == 0:
        return {}
    chance = torch.Generator().manual_seed(0)
    chosen = torch.randint(near.shape[1], codes.shape, generator=chance)
    others, when = near.cpu()[place, chosen], torch.rand(codes.shape, generator=chance)
    scenes = drawn.benchmark.scenes(split)[:ROBUST] if drawn.benchmark.shapes else []

    def figures(images: Tensor) -> dict[str, float]:
        found = {"psnr": float(metrics.psnr(images, real).mean())}
        return found | ({"oracle": oracle.oracle_score(images, scenes)["all_right"]} if scenes else {})

    whole, lost = figures(drawn.reconstructed[split][:ROBUST]), {}
    for share in SHARES:  # of the same codes more and more
        changed = torch.where(when < share, others, codes).view(-1, *drawn.generator.gpt.grid)
        images = [tokenizer.decode(part.to(device)).cpu() for part in changed.split(FORWARD)]
        for name, value in figures(torch.cat(images)).items():
            lost[f"robustness_{name}_{round(100 * share)}"] = whole[name] - value
            if share == SHARE:
                lost[f"robustness_{name}"] = whole[name] - value
    return lost


MEASURES: tuple[Callable[[Drawn], dict[str, float]], ...] = (
    tokenizer_metrics,
    likelihoods,
    judgement,
    likeness,
    memorisation,
    robustness,
)


def scores(drawn: Drawn) -> dict[str, Any]:
    """What models are compared by: `scores`, per figure and split a score for each prompt, and `chance`, what
    a blind model would reach on average."""
    found: dict[str, dict[str, list[float]]] = {"retrieval": {}, "clip_score": {}}
    chance: dict[str, dict[str, float]] = {"retrieval": {}}
    for split, chosen in drawn.benchmark.splits.items():
        features, text = drawn.features(split), drawn.judge.text_features(chosen.captions)
        right = metrics.retrieved(features, text, chosen.captions)
        found["retrieval"][split] = [float(one) for one in right]
        found["clip_score"][split] = [round(one, 4) for one in metrics.clip_score(features, text).tolist()]
        chance["retrieval"][split] = metrics.retrieval_chance(chosen.captions)
        if drawn.benchmark.shapes:
            shown = oracle.correct(drawn.samples(split), drawn.benchmark.scenes(split))
            found.setdefault("oracle", {})[split] = [float(one) for one in shown]
    return {"scores": found, "chance": chance}


if __name__ == "__main__":
    run_worker(main)
