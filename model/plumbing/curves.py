"""Figures of a training job: to MLflow as they come, into checkpoints, and into the set for the report."""

from __future__ import annotations

import json

from model.plumbing.tracking import Tracker

HISTORY = "history.json"
POINTS = 300  # of a curve in the report, at most


class Curves:
    """Named curves of (step, value); names as in MLflow: `train/loss`, `validation/psnr`."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.points: dict[str, list[list[float]]] = {}  # JSON-able: part of a checkpoint's state

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Record figures of an optimiser step."""
        for name, value in figures.items():
            self.points.setdefault(name, []).append([step, value])
        self.tracker.metrics(step, **figures)

    def history(self) -> bytes:
        """The content of a set's `history.json`: every n-th point of long curves, and always the last."""
        thinned = {}
        for name, points in self.points.items():
            stride = -(-len(points) // POINTS)
            thinned[name] = points[::-1][::stride][::-1]
        return json.dumps(thinned).encode()
