"""The processes of a job: who am I, on which device, and what do the others say.

`torchrun` sets the environment. Without it a job is one process, and every function here still works.
"""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import json
import os
import random
import re
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.plumbing.environment import MEETING
from model.plumbing.parallel import cores
from model.recipe import HARDWARE

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
PATIENCE = datetime.timedelta(minutes=30)  # for a rank that validates or uploads alone


@dataclass(frozen=True)
class Distributed:
    """This process among those of its job. A context manager: leaving it closes the process group."""

    rank: int
    world: int  # processes of the job
    local_rank: int  # among those on this machine
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process speaks, tracks and writes for all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.world > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a floating-point tensor over all processes, in place."""
        return self.sum(tensor).div_(self.world)

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors of one shape from all processes, stacked by rank: (world, …), on every process."""
        if self.world == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def of_leader(self, text: str) -> str:
        """The text that the first process of this machine has, of at most 4096 bytes."""
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        padded = torch.zeros(4096, dtype=torch.uint8)
        padded[: len(data)] = data
        told = self.gather(padded.to(self.device))[self.rank - self.local_rank]  # as torchrun numbers them
        return bytes(told.tolist()).rstrip(b"\0").decode()

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def setup() -> Distributed:
    """Join the job's processes: gloo between CPUs, nccl between GPUs, none for a single process."""
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        _keep_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(cores())
    if world > 1:
        if world == local_world:  # one machine: no name of the host has to resolve
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        on_gpu = device.type == "cuda" and torch.cuda.device_count() >= local_world
        meeting = MEETING.get()
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.FileStore(meeting, world) if meeting else None,
            rank=rank,
            world_size=world,
            timeout=PATIENCE,
        )
    return Distributed(rank, world, local_rank, device)


def _keep_memory() -> None:
    """Let glibc keep what is freed, or each layer's output is given back and the next one takes new pages."""
    with suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30)


def peak_flops(device: torch.device) -> float:
    """Of a GPU, in bf16 operations per second; 0 where the table does not have it."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    return next((HARDWARE[word]["bf16"] for word in re.split(r"\W+", name) if word in HARDWARE), 0.0)


# ── randomness ──────────────────────────────────────────────────────────────────────────────────────────


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from e.g. (seed, "dropout", rank, step): independent streams, the same everywhere."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_all(*parts: int | str) -> None:
    """Seed Python, NumPy and torch on every device from parts such as (seed, rank).

    Called with the step among the parts at each step, a resumed job needs no state of random numbers at all.
    """
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)
