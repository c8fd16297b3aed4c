"""The step that measures a run's model on the run's own benchmark, and draws its report.

    python -m model.evaluation.evaluate SPEC_URI

What is measured is said in `measure.py`; here are pictures to look at, and one page.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from model.config import EvaluationConfig
from model.data.images import to_tensor
from model.evaluation import report, sheets
from model.evaluation.benchmark import Benchmark, Drawn, count_of_training, load_benchmark, spread
from model.evaluation.measure import measure, open_drawn
from model.inference import bundle
from model.inference.generate import Generator
from model.plumbing import cache
from model.plumbing.assets import Manifest
from model.plumbing.curves import HISTORY
from model.plumbing.worker import Job, run_worker

PROMPTS, UNCONDITIONAL, PAIRS = 12, 16, 12  # rows of a grid, pictures without text, reconstructions shown
GRID_SEEDS = 1_000_000  # seeds of the grids start here, so that they show none of the scored pictures


# ── the step ────────────────────────────────────────────────────────────────────────────────────────────


def main(job: Job) -> Manifest:
    """Measure the job's `model` on its `benchmark`, and write the report.

    Raises:
        UserError: as `measure.main`.
    """
    config, model = job.config, job.inputs["model"]
    benchmark, folder = load_benchmark(job.inputs["benchmark"]), cache.folder(model)
    total = _pictures_to_draw(config.evaluation, benchmark)
    generator = Generator.load(folder, pictures=total)
    drawn = open_drawn(job, generator, benchmark, total)
    measured = measure(drawn, model)
    page = report.Page(
        config=config,
        images=job.inputs["images"],
        model=model,
        benchmark=job.inputs["benchmark"],
        metrics=measured["figures"],
        pictures={split: len(chosen.captions) for split, chosen in benchmark.splits.items()},
        searched=(len(drawn.training), count_of_training(job.inputs["images"])),
        parameters={
            "transformer": generator.gpt.parameter_count(),
            "tokenizer": _weights(generator.tokenizer),
        },
        grids=_grids(config.evaluation, drawn),
        reconstructions=_reconstructions(drawn),
        unconditional=drawn.draw([""] * UNCONDITIONAL, GRID_SEEDS, unconditional=True),
        sampling=generator.sampling,
        histories=_histories(folder),
    )
    files = report.files(page)
    files["metrics.json"] = json.dumps(measured, indent=1).encode()
    for name, data in files.items():
        job.output.add_bytes(name, data)
    job.tracker.metrics(0, **measured["figures"])
    job.tracker.text("report.html", files["report.html"].decode())
    said = {"headline": [list(figure) for figure in page.headline], "headline_of": page.headline_of}
    said |= {"prompt": page.grids[0].prompts[0]}  # one that it draws
    return job.output.finish({**measured, **said, "software": report.software()})


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────


def _pictures_to_draw(config: EvaluationConfig, benchmark: Benchmark) -> int:
    sizes = {split: len(chosen.captions) for split, chosen in benchmark.splits.items()}
    rows = sum(min(size, PROMPTS) for split, size in sizes.items() if split != "train")
    rows += len(config.prompts or spread(sizes["train"], PROMPTS))
    return benchmark.count + rows * config.samples_per_prompt + UNCONDITIONAL


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
    split = benchmark.shown
    one = drawn.nearest[split]
    closest = one.distance.argsort()[:PROMPTS]
    grids.append(
        report.Grid(
            kind="closest",
            prompts=[benchmark.splits[split].captions[i] for i in closest],
            samples=drawn.samples(split)[closest][:, None],
            real=to_tensor(drawn.training[one.which[closest]]),
            notes=[f"{distance:.3f}" for distance in one.distance[closest].tolist()],
        )
    )
    return grids


def _reconstructions(drawn: Drawn) -> sheets.Pairs:
    """Held-out pictures and what the tokenizer leaves of them."""
    split = drawn.benchmark.shown
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
