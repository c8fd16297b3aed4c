"""An ordered map over all cores that holds only a window of the work in memory."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

from model.plumbing import cgroups, environment

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Cores this process may use: of those that its container gets, its part where ranks share them."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if quota := cgroups.cpu_quota():
        here = min(here, math.ceil(quota))
    return max(1, here // environment.ranks_here())


def processor() -> str:
    """What this process may use of which processor, as Linux names it: "2 x AMD EPYC 9B14"."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{cores()} x {line.partition(':')[2].strip()}"
    return f"{cores()} x {platform.machine()}"


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int = 0, threads: bool = False
) -> Iterator[Result]:
    """`map(function, items)` in order, over `workers` processes (0: one per core) or threads.

    At most four items per worker are under way, so neither a fast producer nor a slow consumer fills the
    memory. Processes are spawned, not forked: the caller may hold threads, a GPU, or open connections. An
    exception of the function comes out in its item's place. With one worker everything runs here.
    """
    workers = workers or cores()
    if workers == 1:
        yield from map(function, items)
        return
    pool: Executor
    if threads:
        pool = ThreadPoolExecutor(workers)
    else:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_alone)
    source = iter(items)
    window: deque[Future[Result]] = deque()
    try:
        window.extend(pool.submit(function, item) for item in islice(source, 4 * workers))
        while window:
            result = window.popleft().result()
            window.extend(pool.submit(function, item) for item in islice(source, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _alone() -> None:
    environment.put(
        {"OMP_NUM_THREADS": "1"}
    )  # read when torch is loaded: every core has a process of its own


@contextmanager
def single_threaded() -> Iterator[None]:
    """Within the block torch computes with one thread for each thread that calls it.

    Workers that each compute a part of their own are quicker than a team that meets at every layer.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
