"""The processes of a job: alone, and two of them over gloo."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model.plumbing.distributed import derive_seed, peak_flops, seed_all, setup
from model.recipe import HARDWARE
from tests import ROOT

PROGRAM = """
import json, sys, torch
from model.plumbing.distributed import setup
with setup() as dist:
    mine = torch.tensor([float(dist.rank + 1)])
    dist.barrier()
    result = {
        "world": dist.world,
        "main": dist.is_main,
        "sum": dist.sum(mine.clone()).item(),
        "mean": dist.mean(mine.clone()).item(),
        "gather": dist.gather(mine).tolist(),
        "leader": dist.of_leader(f"/tmp/of rank {dist.rank} \u00e9"),
    }
    open(f"{sys.argv[1]}/{dist.rank}.json", "w").write(json.dumps(result))
"""


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with setup() as dist:
        assert (dist.rank, dist.world, dist.is_main) == (0, 1, True)
        assert dist.mean(torch.tensor([3.0])).item() == 3.0
        assert dist.gather(torch.tensor([3.0])).tolist() == [[3.0]]
        assert dist.of_leader("/tmp/é") == "/tmp/é"
        dist.barrier()
        assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_two_processes_hear_each_other(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    subprocess.run(
        [*command, str(program), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [result.pop("main") for result in results] == [True, False]
    assert [result.pop("leader") for result in results] == ["/tmp/of rank 0 é"] * 2
    assert results[0] == results[1]
    assert results[0] == {
        "world": 2,
        "sum": 3.0,
        "mean": 1.5,
        "gather": [[1.0], [2.0]],
    }


def draw() -> list[float]:
    return [random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.rand(1).item()]


@pytest.mark.parametrize(
    ("name", "known"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA L40S", "")],
)
def test_a_gpus_peak_is_known_by_a_word_of_its_name(
    name: str, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (HARDWARE[known]["bf16"] if known else 0)
    assert peak_flops(torch.device("cpu")) == 0


def test_seeds_are_streams_of_their_own() -> None:
    seeds = {derive_seed(seed, rank, step) for seed in range(5) for rank in range(5) for step in range(5)}
    assert len(seeds) == 125
    assert derive_seed(1, "a") == derive_seed(1, "a") != derive_seed(1, "b")
    seed_all(7, 0)
    expected = draw()
    seed_all(7, 1)
    assert draw() != expected
    seed_all(7, 0)
    assert draw() == expected
