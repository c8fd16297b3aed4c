"""What a model is worth: metrics between their floors and ceilings, pictures to look at, one report.

    python -m model.evaluation.evaluate SPEC_URI

Prompts, seeds and judge are pinned by config and data, so that two models are compared on equal terms:
`main` measures the model of a run, `remeasure` another one by the same measure, `compare` decides.

Every score of samples stands between ceilings, the same score of real pictures and of what the tokenizer
leaves of them, and a floor, that of the samples with other captions. The judge is a CLIP of the pipeline's
own, trained from another seed and split than the one that reads prompts. Where the data are drawn shapes, an
exact detector counts which pictures show what was asked for.

Letters: N pictures, B batch, T tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import EvaluationConfig, RunConfig
from model.data.images import to_tensor
from model.errors import UserError
from model.evaluation import oracle, report, sheets
from model.evaluation.benchmark import FORWARD, Benchmark, Drawn, load_benchmark, spread
from model.inference import bundle
from model.inference.generate import Generator, Unfit
from model.nets import metrics
from model.nets.clip import load_judge
from model.plumbing import cache
from model.plumbing.assets import Manifest
from model.plumbing.curves import HISTORY
from model.plumbing.speech import Progress
from model.plumbing.worker import Job, run_worker

PROMPTS, UNCONDITIONAL, PAIRS = 12, 16, 12  # rows of a grid, pictures without text, reconstructions shown
GRID_SEEDS = 1_000_000  # seeds of the grids start here, so that they show none of the scored pictures


@dataclass(frozen=True)
class Verdict:
    """Whether a challenger takes the champion's place, and why."""

    better: bool
    reason: str


# ── the step ────────────────────────────────────────────────────────────────────────────────────────────


def main(job: Job) -> Manifest:
    """Measure the job's `model` on its `images`; write the report.

    Raises:
        UserError: where an asset is damaged, the model's parts do not belong together, or what it draws is
            no picture (`Unfit`).
    """
    config, images, model = job.config, job.inputs["images"], job.inputs["model"]
    folder = cache.folder(model)
    benchmark = load_benchmark(config, images, model.inputs["judge"].sha256)
    total = _pictures_to_draw(config.evaluation, benchmark, config.sampling.cfg_scale)
    generator = Generator.load(folder, pictures=total)
    assert generator.judge is not None  # every bundle of ours has one
    drawn = Drawn(generator, generator.judge, benchmark, job.progress(total, "img", counted="picture"))

    figures: dict[str, float] = {"bundle_bytes": sum(file.size for file in model.files)}
    for measure in MEASURES:
        figures |= measure(drawn)
    _check(figures)
    sweep = guidance_sweep(drawn, config.evaluation.cfg_sweep)
    counts = {split: len(chosen.captions) for split, chosen in benchmark.splits.items()}
    page = report.Page(
        config=config,
        images=images,
        model=model,
        metrics=figures,
        pictures=counts,
        parameters={
            "transformer": generator.gpt.parameter_count(),
            "tokenizer": _weights(generator.tokenizer),
        },
        grids=_grids(config.evaluation, drawn),
        reconstructions=_reconstructions(drawn),
        unconditional=drawn.draw([""] * UNCONDITIONAL, GRID_SEEDS, unconditional=True),
        sweep=sweep,
        histories=_histories(folder),
    )
    files = report.files(page)
    measured = {"benchmark": benchmark.key, "figures": figures, **scores(drawn)}
    files["metrics.json"] = json.dumps({**measured, "guidance": sweep}, indent=1).encode()
    for name, data in files.items():
        job.output.add_bytes(name, data)
    job.tracker.metrics(0, **figures)
    job.tracker.text("report.html", files["report.html"].decode())
    said = {"headline": [list(figure) for figure in page.headline], "headline_of": page.headline_of}
    return job.output.finish({**measured, **said, "software": report.software()})


def remeasure(config: RunConfig, evaluation: Manifest, generator: Generator) -> dict[str, Any]:
    """Scores of another model on the pictures, prompts and seeds of an evaluation, and by its judge.

    Args:
        config: of the run that the evaluation belongs to.
        evaluation: names pictures and judge.
        generator: the other model, which draws with its own sampling settings.

    Returns:
        What `compare` needs.

    Raises:
        Unfit: what the other model makes of the pictures is no number.
    """
    images, model = evaluation.input("images"), evaluation.input("model")
    benchmark = load_benchmark(config, images, model.inputs["judge"].sha256)
    ours = cache.folder(model, [file.name for file in model.files if file.name.startswith("judge/")])
    judge = load_judge(ours / "judge", generator.device)
    total = sum(len(chosen.captions) for chosen in benchmark.splits.values())
    progress = Progress("register", total, "img", counted="champion's picture")
    drawn = Drawn(generator, judge, benchmark, progress)
    _check(likelihoods(drawn))
    return {"benchmark": benchmark.key, **scores(drawn)}


def _check(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        if not math.isfinite(value):
            raise Unfit(f"{name} is {value}; the training of this model has diverged")


def compare(challenger: dict[str, Any], champion: dict[str, Any]) -> Verdict:
    """Whether the challenger is better, by more than chance explains.

    The scores of the same prompts and seeds are paired; the mean difference must exceed its standard error.
    A score that is not finite loses to every one that is.

    Raises:
        UserError: where the two were not measured alike.
    """
    if challenger["benchmark"] != champion["benchmark"]:
        raise UserError("challenger and champion were measured on different prompts; measure both anew")
    ours, theirs = deciding(challenger), deciding(champion)
    if not finite(ours):
        return Verdict(False, "the challenger's scores are not finite")
    if not finite(theirs):
        return Verdict(True, "the champion's scores are not finite")
    difference, error = metrics.paired_difference(ours, theirs)
    means = f"score {sum(ours) / len(ours):.3f} against {sum(theirs) / len(theirs):.3f}"
    figures = f"{means} over {len(ours)} prompts"
    margin = f"difference {difference:+.3f}, standard error {error:.3f}"
    if difference > error:
        return Verdict(True, f"better: {figures} ({margin})")
    return Verdict(False, f"not better: {figures} ({margin})")


def deciding(measured: dict[str, Any]) -> list[float]:
    """The scores that a comparison rests on: the oracle's where there is one, else the judge's."""
    chosen = measured["scores"].get("oracle") or measured["scores"]["clip_score"]
    return [score for split in chosen.values() for score in split]


def finite(values: Sequence[float]) -> bool:
    """Whether all of them are finite numbers."""
    return all(math.isfinite(value) for value in values)


# ── measures ────────────────────────────────────────────────────────────────────────────────────────────


def tokenizer_metrics(drawn: Drawn) -> dict[str, float]:
    """PSNR per split; use of the codebook over all pictures looked at."""
    figures = {
        f"{split}/psnr": float(metrics.psnr(drawn.reconstructed[split], to_tensor(chosen.images)).mean())
        for split, chosen in drawn.benchmark.splits.items()
    }
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
    if "validation" in drawn.benchmark.splits:
        gap = figures["validation/bits_per_token"] - figures["train/bits_per_token"]
        figures["bits_per_token_gap"] = gap
    return figures


def judgement(drawn: Drawn) -> dict[str, float]:
    """What judge and oracle say of the samples, of the real pictures and of their reconstructions."""
    figures: dict[str, float] = {}
    for split, chosen in drawn.benchmark.splits.items():
        text = drawn.judge.text_features(chosen.captions)
        for suffix, images in (
            ("", None),
            ("_real", to_tensor(chosen.images)),
            ("_reconstructed", drawn.reconstructed[split]),
        ):
            for name, value in _judged(drawn, split, images, text).items():
                figures[f"{split}/{name}{suffix}"] = value
        others = metrics.mismatched(chosen.captions)
        shuffled = metrics.clip_score(drawn.features(split), text[others])
        figures[f"{split}/clip_score_shuffled"] = float(shuffled.mean())
        figures[f"{split}/retrieval_chance"] = metrics.retrieval_chance(chosen.captions)
    return figures


def _judged(drawn: Drawn, split: str, images: Tensor | None, text: Tensor) -> dict[str, float]:
    """The scores of pictures, or where there are none of the model's own samples, of a split's captions."""
    features = drawn.features(split) if images is None else drawn.look(images)
    figures = {
        "clip_score": float(metrics.clip_score(features, text).mean()),
        "retrieval": metrics.retrieval_accuracy(features, text, drawn.benchmark.splits[split].captions),
    }
    if drawn.benchmark.shapes:
        images = drawn.samples(split) if images is None else images
        shares = oracle.oracle_score(images, drawn.benchmark.scenes(split))
        figures |= {f"oracle_{name}": share for name, share in shares.items()}
    return figures


def originality(drawn: Drawn) -> dict[str, float]:
    """Memorisation: the share of samples that are near-duplicates of a training picture, the median distance
    to the nearest one, and the figure that says what the share means:

    how many real pictures count as near-duplicates after the tokenizer. Of training pictures these must be
    found for a copy to be counted; held-out ones say how alike the data are by nature.
    """
    figures: dict[str, float] = {}
    for split, one in drawn.nearest.items():
        figures[f"{split}/near_duplicates"] = metrics.near_duplicate_share(one.distance)
        figures[f"{split}/nearest_distance"] = float(one.distance.median())
        left = drawn.nearest_to(drawn.reconstructed[split])
        figures[f"{split}/near_duplicates_reconstructed"] = metrics.near_duplicate_share(left.distance)
    return figures


MEASURES: tuple[Callable[[Drawn], dict[str, float]], ...] = (
    tokenizer_metrics,
    likelihoods,
    judgement,
    originality,
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


def guidance_sweep(drawn: Drawn, scales: Sequence[float]) -> dict[str, list[list[float]]]:
    """Curves of [guidance scale, score] over the hardest prompts; `{}` where there are no scales.

    At the model's own scale the samples are those that were scored.
    """
    curves: dict[str, list[list[float]]] = {}
    split = drawn.benchmark.hardest
    captions, seeds = drawn.benchmark.splits[split].captions, drawn.benchmark.seeds(split)
    text = drawn.judge.text_features(captions)
    for scale in scales:
        own = scale == drawn.generator.sampling.cfg_scale
        figures = _judged(drawn, split, None if own else drawn.draw(captions, seeds, scale), text)
        for name, key in (
            ("CLIP score", "clip_score"),
            ("retrieval accuracy", "retrieval"),
            ("oracle, all right", "oracle_all_right"),
        ):
            if key in figures:
                curves.setdefault(name, []).append([scale, figures[key]])
    return curves


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────


def _pictures_to_draw(config: EvaluationConfig, benchmark: Benchmark, own_scale: float) -> int:
    sizes = {split: len(chosen.captions) for split, chosen in benchmark.splits.items()}
    rows = sum(min(size, PROMPTS) for split, size in sizes.items() if split != "train")
    rows += len(config.prompts or spread(sizes["train"], PROMPTS))
    swept = [scale for scale in config.cfg_sweep if scale != own_scale]
    scored = sum(sizes.values()) + sizes[benchmark.hardest] * len(swept)
    return scored + rows * config.samples_per_prompt + UNCONDITIONAL


def _grids(config: EvaluationConfig, drawn: Drawn) -> list[report.Grid]:
    """Prompts and samples of each kind: known captions (or the config's prompts), held-out ones, held-out
    combinations; beside each the real picture and the training picture nearest to the first sample."""
    grids, benchmark = [], drawn.benchmark
    first = GRID_SEEDS + UNCONDITIONAL
    for split in ("train", "validation", "composition"):
        if split not in benchmark.splits:
            continue
        chosen = benchmark.splits[split]
        own = config.prompts if split == "train" else []
        rows = spread(len(chosen.captions), PROMPTS)
        prompts = own or [chosen.captions[i] for i in rows]
        samples = drawn.draw([prompt for prompt in prompts for _ in range(config.samples_per_prompt)], first)
        first += len(samples)
        grids.append(
            report.Grid(
                kind="prompts" if own else split,
                prompts=list(prompts),
                samples=samples.unflatten(0, (len(prompts), config.samples_per_prompt)),
                real=None if own else to_tensor(chosen.images[rows]),
            )
        )
    # The held-out samples that come closest to a training picture, beside it: what a copy would look like.
    split = "validation" if "validation" in benchmark.splits else "train"
    one = drawn.nearest[split]
    closest = one.distance.argsort()[:PROMPTS]
    grids.append(
        report.Grid(
            kind="closest",
            prompts=[benchmark.splits[split].captions[i] for i in closest],
            samples=drawn.samples(split)[closest][:, None],
            real=to_tensor(benchmark.training[one.which[closest]]),
            notes=[f"{distance:.3f}" for distance in one.distance[closest].tolist()],
        )
    )
    return grids


def _reconstructions(drawn: Drawn) -> sheets.Pairs:
    """Held-out pictures and what the tokenizer leaves of them."""
    split = "validation" if "validation" in drawn.benchmark.splits else "train"
    images = drawn.benchmark.splits[split].images
    chosen = spread(len(images), PAIRS)
    return sheets.Pairs(to_tensor(images[chosen]), drawn.reconstructed[split][chosen])


def _histories(folder: Path) -> dict[str, dict[str, list[list[float]]]]:
    """The training curves that came with a model's parts, by part; one that was imported has none."""
    paths = ((part, folder / part / HISTORY) for part in bundle.PARTS)
    return {part: json.loads(path.read_bytes()) for part, path in paths if path.is_file()}


def _weights(net: object) -> int:
    return sum(weight.numel() for weight in net.parameters()) if isinstance(net, torch.nn.Module) else 0


if __name__ == "__main__":
    run_worker(main)
