"""How fast two models draw: by turns, in one process, so that whatever else the machine does slows both.

    python -m model.evaluation.race SPEC_URI

Only a gate whose `speed_ratio` is set asks for it.
"""

from __future__ import annotations

import json
import time
from statistics import median

from model.evaluation.benchmark import load_benchmark
from model.inference.generate import Generator
from model.plumbing import cache
from model.plumbing.assets import Manifest
from model.plumbing.worker import Job, run_worker
from model.steps import CHAMPION

RUNNERS = ("model", CHAMPION)  # names of the inputs
ROUNDS, PICTURES = 5, 16  # each draws so many pictures in each round, after one that does not count


def main(job: Job) -> Manifest:
    """Have the job's `model` and `champion` draw captions of its `benchmark` by turns.

    Raises:
        UserError: an asset is damaged, or a model cannot draw.
    """
    benchmark = load_benchmark(job.inputs["benchmark"])
    chosen = benchmark.splits[benchmark.shown]
    captions, seeds = chosen.captions[:PICTURES], chosen.seeds[:PICTURES]
    runners = {
        name: Generator.load(cache.folder(job.inputs[name]), pictures=(ROUNDS + 1) * len(captions))
        for name in RUNNERS
    }
    took: dict[str, list[float]] = {name: [] for name in RUNNERS}
    progress = job.progress(ROUNDS, "round", counted="round")
    for round in range(ROUNDS + 1):
        for name in RUNNERS if round % 2 else reversed(RUNNERS):  # nobody is always the one that comes first
            began = time.monotonic()
            runners[name].draw(captions, seeds).cpu()  # which waits for a GPU
            if round:
                took[name].append(time.monotonic() - began)
        if round:
            progress.update(round)
    speeds = {name: len(captions) / median(seconds) for name, seconds in took.items()}
    job.output.add_bytes("race.json", json.dumps({"seconds": took}, indent=1).encode())
    return job.output.finish({"pictures_per_second": speeds})


if __name__ == "__main__":
    run_worker(main)
