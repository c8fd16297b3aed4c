"""What the attempts at a job leave, and how restarts are counted from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.plumbing import attempts, storage
from model.plumbing.attempts import Attempt
from model.plumbing.outcome import Outcome


def test_what_was_begun_and_finished_is_found_oldest_first(tmp_path: Path) -> None:
    output = str(tmp_path / "asset")
    first = attempts.begin(output, worker=0, pod="job-worker-0", uid="1f3a9c02-aaaa", step=0)
    second = attempts.begin(output, worker=1, pod="job-worker-1", uid="0c3a9c02-bbbb", step=0)
    third = attempts.begin(output, worker=0, pod="job-worker-0", uid="00000000-cccc", step=400)
    end = Outcome(kind="killed", reason="process 1 was killed")
    attempts.finish(first, end)
    assert attempts.attempts(output) == [first.model_copy(update={"outcome": end}), second, third]
    assert Path(first.uri).parent == tmp_path / "asset" / "attempts"
    assert Path(first.uri).name.endswith("-0-1f3a9c02")
    assert first.log(3) == f"{first.uri}/rank-3.log"


def test_what_is_none_of_ours_or_half_is_passed_over(tmp_path: Path) -> None:
    output = str(tmp_path / "asset")
    assert attempts.attempts(output) == []
    begun = attempts.begin(output, worker=0, pod="p", uid="1", step=0)
    for text in ("{", "[]", '{"worker": "who"}'):
        storage.write_bytes(storage.join(output, "attempts", "stranger", "start.json"), text.encode())
        assert attempts.attempts(output) == [begun]
    storage.write_bytes(storage.join(output, "attempts", "stranger", "rank-0.log"), b"hello")
    storage.write_bytes(storage.join(begun.uri, "rank-0.log"), b"hello")
    assert attempts.attempts(output) == [begun]


@pytest.mark.parametrize(
    ("steps", "count"),
    [
        pytest.param([], 0, id="never started"),
        pytest.param([0], 0, id="the first start is no restart"),
        pytest.param([0, 0, 0], 2, id="nothing won"),
        pytest.param([0, 0, 400], 0, id="a checkpoint won"),
        pytest.param([0, 400, 400, 400], 2, id="nothing won since"),
        pytest.param([0, 0, 0, 100, 200, 300, 400], 0, id="evicted again and again, and comes further"),
        pytest.param([400, 350, 350], 2, id="a checkpoint was damaged"),
    ],
)
def test_restarts_count_from_the_last_one_that_came_further(steps: list[int], count: int) -> None:
    starts = [
        Attempt(worker=worker, pod=f"p-{worker}", when=10.0 * number + worker, step=step)
        for number, step in enumerate(steps)
        for worker in (0, 1)
    ]
    assert attempts.restarts(starts) == count
