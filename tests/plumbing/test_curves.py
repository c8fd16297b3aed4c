"""The curves that a training job leaves behind."""

import json
import math

import pytest

from model.errors import Diverged
from model.plumbing.curves import POINTS, Curves


class Recorder:
    """Stands where the tracker stands."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, float]]] = []

    def metrics(self, step: int, **values: float) -> None:
        self.calls.append((step, values))


def test_figures_reach_the_tracker_and_the_history() -> None:
    curves = Curves(recorder := Recorder())
    curves.add(1, "train", {"loss": 2.0})
    curves.add(1, "validation", {"psnr": 20.0})
    curves.add(2, "train", {"loss": 1.0})
    assert recorder.calls == [
        (1, {"train/loss": 2.0}),
        (1, {"validation/psnr": 20.0}),
        (2, {"train/loss": 1.0}),
    ]
    assert json.loads(curves.history()) == {
        "train/loss": [[1, 2.0], [2, 1.0]],
        "validation/psnr": [[1, 20.0]],
    }


def test_what_is_only_shown_is_in_no_history() -> None:
    curves = Curves(recorder := Recorder())
    curves.show(1, "train", {"tokens_per_second": 2.0})
    assert recorder.calls == [(1, {"train/tokens_per_second": 2.0})]
    assert curves.state_dict() == {"points": {}}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(bad: float) -> None:
    curves = Curves(recorder := Recorder())
    with pytest.raises(Diverged, match=f"train/loss is {bad} at step 7"):
        curves.add(7, "train", {"learning_rate": 1.0, "loss": bad})
    assert recorder.calls == []
    assert json.loads(curves.history()) == {}


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    curves = Curves(Recorder())
    for step in range(1000):
        curves.add(step, "train", {"loss": float(step)})
    points = json.loads(curves.history())["train/loss"]
    assert POINTS / 2 < len(points) <= POINTS
    assert points[-1] == [999, 999.0]
    assert points == sorted(points)
