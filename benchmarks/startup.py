"""Row 10: how long until the command line answers, and until the DAG module is imported."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.harness import Part, Row, compare

ROOT = Path(__file__).parents[1]
DAG = "import sys, pipelines.dag; print('torch' in sys.modules)"


def start(device: torch.device) -> Iterator[Row]:
    """Whole processes, beside an empty Python."""
    help_ = [sys.executable, "-c", "from pipelines.cli import main; main()", "--help"]
    yield _row("latent-gpt --help", help_, 0.5, "Usage: ", "")
    yield _row("import of pipelines.dag", [sys.executable, "-c", DAG], 1.0, "False", "it imports no torch")


def _row(work: str, command: list[str], limit: float, expected: str, note: str) -> Row:
    """`expected` must be in what the command prints, or the row fails."""

    def run(command: list[str]) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout

    empty = [sys.executable, "-c", "pass"]
    comparison = compare({"ours": lambda: run(command), "empty Python": lambda: run(empty)}, rounds=7)
    printed = run(command)
    right = expected in printed
    if not right:
        note = f"FAILED: it printed {printed.strip()[:80]!r}, and {expected!r} was expected"
    figures = {name: statistics.median(seconds) for name, seconds in comparison.seconds.items()}
    met = right and figures["ours"] < limit
    return Row(10, work, "s", figures, goal=f"< {limit:g} s", met=met, note=note, seconds=comparison.seconds)


ROWS = {10: [Part("start-up", start)]}
