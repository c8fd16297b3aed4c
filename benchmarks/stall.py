"""Row 14: how long a training waits for its checkpoints, beside one that makes none."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator

import torch

from benchmarks.harness import Part, Row, compare
from benchmarks.watch import PRESET, Trained
from model.plumbing import storage
from model.plumbing.checkpoints import Checkpointer
from model.plumbing.distributed import Distributed
from model.training.state import Resumable, RunningSums

STEPS = 12  # of a round: enough for the other thread to store a checkpoint beside them
LIMIT = 0.01  # of the time between two checkpoints


def stall(device: torch.device) -> Iterator[Row]:
    """Steps of the preset's transformer, with a checkpoint that begins before them and without one."""
    trained = Trained(device)
    training, processes = trained.training, Distributed(0, 1, 0, device)
    sums = RunningSums(processes, "nll")

    def steps() -> None:
        for _ in range(STEPS):
            loss, _norm = trained.step()
            sums.add(nll=loss)

    steps()
    waits: list[float] = []
    with tempfile.TemporaryDirectory() as folder, Checkpointer(folder) as checkpoints:
        state = Resumable(checkpoints, processes, sums=sums, **trained.parts)
        done = 0

        def checkpointed() -> None:
            nonlocal done
            done += 1
            if device.type == "cuda":  # steps that are still under way are no wait for a checkpoint
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            state.save(done)
            waits.append(time.perf_counter() - began)
            steps()
            state.wait()  # within the round: what the other thread took from this one's steps shows

        comparison = compare({"checkpoint": checkpointed, "none": steps}, device, warmup=2, rounds=9)
        size = sum(storage.list_sizes(folder).values()) / len(checkpoints._complete())
    waits = waits[2:]
    interval = comparison.median("none") / STEPS * training.checkpoint_every
    pairs = zip(comparison.seconds["checkpoint"], comparison.seconds["none"], strict=True)
    slower = statistics.median(one - none for one, none in pairs)
    share = statistics.median(waits) / interval
    wait, step = 1e3 * statistics.median(waits), 1e3 * comparison.median("none") / STEPS
    note = (
        f"{wait:.1f} ms of wait (at most {1e3 * max(waits):.1f}) for {size / 1e6:.1f} MB every"
        f" {training.checkpoint_every} steps of {step:.1f} ms; with what storing takes from the steps beside"
        f" it {1e3 * slower:.1f} ms, {slower / interval:.2%}"
    )
    yield Row(
        14, f"wait for checkpoints, {PRESET}", "% of the time", {"ours": 100 * share, "none": 0.0},
        goal=f"≤ {LIMIT:.0%}", met=share <= LIMIT, note=note, seconds={**comparison.seconds, "wait": waits},
    )  # fmt: skip


ROWS = {14: [Part("wait for checkpoints", stall)]}
GPU_ROWS = ROWS
