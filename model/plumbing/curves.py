"""Figures of a training job: to MLflow as they come, into checkpoints, and into the asset for the report."""

from __future__ import annotations

import json
import math
from typing import Any

from model.errors import Diverged
from model.plumbing.tracking import Tracker

History = dict[str, list[list[float]]]  # name -> [[step, value], …]

HISTORY = "history.json"
POINTS = 300  # of a curve in the report, at most


class Curves:
    """Named curves of (step, value); names as in MLflow: `train/loss`, `validation/psnr`."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.points: History = {}

    def add(self, step: int, group: str, figures: dict[str, float]) -> None:
        """Record figures of an optimiser step, `loss` of the group `train` as `train/loss`.

        Raises:
            Diverged: one of them is not finite; then none is recorded.
        """
        named = {f"{group}/{name}": value for name, value in figures.items()}
        for name, value in named.items():
            if not math.isfinite(value):
                raise Diverged(f"{name} is {value} at step {step}", step)
        for name, value in named.items():
            self.points.setdefault(name, []).append([step, value])
        self.tracker.metrics(step, **named)

    def show(self, step: int, group: str, figures: dict[str, float]) -> None:
        """Record figures in MLflow alone: the clock's, say, that are never the same twice."""
        self.tracker.metrics(step, **{f"{group}/{name}": value for name, value in figures.items()})

    def history(self) -> bytes:
        """The content of an asset's `history.json`: every n-th point of long curves, and always the last."""
        thinned = {}
        for name, points in self.points.items():
            stride = -(-len(points) // POINTS)
            thinned[name] = points[::-1][::stride][::-1]
        return json.dumps(thinned).encode()

    def state_dict(self) -> dict[str, Any]:
        """All points, for a checkpoint."""
        return {"points": self.points}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue what `state_dict` returned."""
        self.points = state["points"]


def panels(curves: History) -> list[tuple[str, History]]:
    """Curves by quantity: `train/loss` and `validation/loss` share the panel `loss`."""
    grouped: dict[str, History] = {}
    for name, points in curves.items():
        where, _, quantity = name.rpartition("/")
        grouped.setdefault(quantity, {})[where or quantity] = points
    return list(grouped.items())
