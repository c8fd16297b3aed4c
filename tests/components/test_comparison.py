"""Two models side by side, where their speed counts: real tiny ones, and the real job that has them race."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.comparison import compare
from model.evaluation.gate import SPEED, Guard, Verdict
from model.plumbing.tracking import mlflow_client
from tests.components.test_registration import GATE, Bench, register

pytestmark = pytest.mark.slow


def speed(verdict: Verdict) -> Guard:
    """What the verdict says of pictures per second."""
    return next(guard for guard in verdict.guards if guard.figure == SPEED)


def test_pictures_per_second_are_measured_where_they_count(
    services: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much for a run that registers as for two that somebody names; nothing is missing of either."""
    monkeypatch.setenv("LATENT_GPT_CACHE", str(tmp_path / "cache"))
    bench = Bench(tmp_path)
    gate = GATE | {"above_chance": False, "speed_ratio": 0.01}
    register(bench.make(1, score=0.0, gate=gate))
    better = register(bench.make(2, gate=gate)).verdict
    assert better.outcome == "better", better.reason
    assert better.columns[SPEED] == (speed(better).value, speed(better).theirs)
    assert speed(better).bound == pytest.approx(0.01 * better.columns[SPEED][1])

    named = compare(f"models:/{bench.name}/1", f"models:/{bench.name}/2")
    assert named.outcome == "not better"
    assert None not in named.columns[SPEED]
    client = mlflow_client()
    ids = [one.experiment_id for one in client.search_experiments()]
    query = "attributes.status = 'RUNNING' and attributes.run_name LIKE 'evaluate-%'"
    assert not client.search_runs(ids, query), "nobody would ever end it"
