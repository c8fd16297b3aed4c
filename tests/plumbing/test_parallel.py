"""The ordered parallel map: order, how far it runs ahead, errors in their place, and threads of torch."""

from __future__ import annotations

import itertools
import threading
import time
from functools import partial

import pytest
import torch

from model.plumbing.parallel import cores, parallel_map, single_threaded


def late_if_even(number: int) -> int:
    time.sleep(0.01 if number % 2 == 0 else 0)
    return number * number


def torch_threads(_: int) -> int:
    import torch

    return torch.get_num_threads()


def refuse(number: int, wrong: int) -> int:
    if number == wrong:
        raise ValueError(f"{number} is refused")
    return number


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers: int) -> None:
    assert list(parallel_map(late_if_even, range(20), workers, threads=True)) == [n * n for n in range(20)]


def test_it_runs_ahead_by_a_window_only() -> None:
    taken = itertools.count()
    results = parallel_map(late_if_even, taken, workers=2, threads=True)
    assert next(results) == 0
    assert next(taken) <= 2 * 4 + 1
    results.close()
    assert not any(t.name.startswith("ThreadPool") and t.is_alive() for t in threading.enumerate())


def test_an_error_comes_out_in_its_place() -> None:
    results = parallel_map(partial(refuse, wrong=2), range(5), workers=2, threads=True)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="2 is refused"):
        next(results)


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(alone))
    assert cores() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * alone))
    assert cores() == 1


def test_threads_that_start_in_a_single_threaded_block_compute_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with single_threaded():
            assert set(parallel_map(torch_threads, range(8), workers=2, threads=True)) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_processes_compute_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert set(parallel_map(torch_threads, range(4), workers=2)) == {1}
