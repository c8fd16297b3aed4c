"""Row 11: how much of the main job's wall time is not its own work.

Runs `latent-gpt run --preset openmoji-tiny` in a state folder of its own and stamps its lines as they come: a
step's start, its progress, its end. The environment's `BENCH_PRESET` names another preset.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.harness import Part, Row
from model.plumbing.speech import Said

ROOT = Path(__file__).parents[1]
LIMIT = 0.2


@dataclass
class Step:
    """Seconds since the run's start."""

    started: float
    worked: float | None = None  # its work began: processes are up, data is there
    ended: float | None = None


@dataclass
class Timeline:
    """What a run's lines say about where its time went."""

    wall: float = 0.0
    steps: dict[str, Step] = field(default_factory=dict)

    @classmethod
    def read(cls, lines: Iterable[tuple[float, str]]) -> Timeline:
        """From lines of the terminal, each with its time in seconds since the start.

        A first line of progress comes after many counts (20 to 50 optimiser steps); its ETA, which carries
        their mean pace on, says how long they took.
        """
        timeline, step = cls(), None
        for when, line in lines:
            timeline.wall = when
            if match := re.fullmatch(r"\[\d+/\d+\] (\w+)", line.strip()):
                step = timeline.steps[match[1]] = Step(when)
            elif step:
                said = Said("", line.strip())
                if said.seconds is not None:
                    step.ended = when
                elif step.worked is None and (count := said.count):
                    behind = count.eta * count.done / max(1, count.total - count.done)
                    step.worked = max(step.started, when - behind)
        return timeline

    @property
    def inside(self) -> float:
        """Seconds within steps."""
        return sum(step.ended - step.started for step in self.steps.values() if step.ended is not None)

    @property
    def working(self) -> float:
        """Seconds from where steps' work began to their end; a step without progress has only work."""
        return sum(
            step.ended - (step.started if step.worked is None else step.worked)
            for step in self.steps.values()
            if step.ended is not None
        )


def main_job(device: torch.device) -> Iterator[Row]:
    """The job, once; it is minutes long, and compared with nothing but itself."""
    preset = os.environ.get("BENCH_PRESET", "openmoji-tiny")
    with tempfile.TemporaryDirectory(prefix="latent-gpt-bench-") as state:
        timeline = Timeline.read(_run(preset, state))
    share = 1 - timeline.working / timeline.wall
    starts = ", ".join(
        f"{name} {(step.worked or step.started) - step.started:.1f} of {step.ended - step.started:.1f} s"
        for name, step in timeline.steps.items()
        if step.ended is not None
    )
    yield Row(
        11,
        f"orchestration of the main job, {preset}",
        "s",
        {
            "wall": timeline.wall,
            "outside the steps": timeline.wall - timeline.inside,
            "before the steps' work": timeline.inside - timeline.working,
        },
        goal=f"≤ {LIMIT:.0%} of the wall time outside the steps' own work",
        met=share <= LIMIT,
        note=f"{share:.0%}, what a step does before its first count taken whole, though data is loaded in it:"
        f" {starts}",
    )


def _run(preset: str, state: str) -> Iterator[tuple[float, str]]:
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "run", "--preset", preset]
    environment = {**os.environ, "LATENT_GPT_STATE": state, "PYTHONUNBUFFERED": "1"}
    for name in ("S3_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "LATENT_GPT_STORE"):
        environment.pop(name, None)
    start = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        for line in run.stdout:
            yield time.monotonic() - start, line
        code = run.wait()
        yield time.monotonic() - start, ""
    if code:
        raise RuntimeError(f"latent-gpt run --preset {preset} ended with status {code}")


ROWS = {11: [Part("the main job", main_job)]}
