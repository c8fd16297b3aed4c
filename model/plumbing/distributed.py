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
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

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

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, in place."""
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors of one shape from all processes, stacked by rank: (world, …), on every process."""
        if self.world == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def gather_json(self, value: Any) -> list[Any]:
        """What every process says, by rank, on every process; as JSON, so that nothing is unpickled."""
        data = json.dumps(value).encode()
        size = torch.tensor([len(data)], device=self.device)
        longest = int(self.gather(size).max())
        padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8).to(self.device)
        return [json.loads(bytes(row.tolist())) for row in self.gather(padded).cpu()]

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
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    if world > 1:
        if world == local_world:  # one machine: no name of the host has to resolve
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        on_gpu = device.type == "cuda" and torch.cuda.device_count() >= local_world
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    return Distributed(rank, world, local_rank, device)


def _keep_memory() -> None:
    """Let glibc keep what is freed, or each layer's output is given back and the next one takes new pages."""
    with suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30)


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


def rng_state() -> dict[str, Tensor]:
    """The state of Python's, NumPy's and torch's random numbers in this process, as tensors."""
    _, words, gauss = random.getstate()
    state: dict[str, Tensor] = {
        "rng.python": torch.tensor(words, dtype=torch.int64),
        "rng.python.gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "rng.torch": torch.get_rng_state(),
    }
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    assert numpy["bit_generator"] == "MT19937"
    numbers = [*numpy["state"]["key"].tolist(), numpy["state"]["pos"], numpy["has_gauss"]]
    state["rng.numpy"] = torch.tensor(numbers, dtype=torch.int64)
    state["rng.numpy.gauss"] = torch.tensor([numpy["gauss"]], dtype=torch.float64)
    if torch.cuda.is_available():
        state["rng.cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Put back what `rng_state` returned; other tensors in `state` are left alone."""
    gauss = float(state["rng.python.gauss"])
    random.setstate((3, tuple(state["rng.python"].tolist()), None if gauss != gauss else gauss))
    *keys, position, has_gauss = state["rng.numpy"].tolist()
    cached = float(state["rng.numpy.gauss"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["rng.torch"].cpu())
    if torch.cuda.is_available() and "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"].cpu())
