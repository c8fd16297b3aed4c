"""Two ranks of a job on this machine, without torchrun."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any


def two_ranks(work: Callable[..., None], store: str, *arguments: Any, patience: float = 120) -> None:
    """Call `work(*arguments)`, a module's function, in two processes that find each other and the store.

    Neither outlives the call, which takes `patience` seconds at most for each.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, port, store, work, arguments)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(patience)
        assert [process.exitcode for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()


def _rank(rank: int, port: int, store: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LATENT_GPT_STORE": store,
    }  # fmt: skip
    work(*arguments)
