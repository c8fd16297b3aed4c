"""Row 14: how long a training waits for its checkpoints, beside one that makes none."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import Part, Row, compare
from benchmarks.watch import GRID, PRESET, TEXT, VOCABULARY
from model.config import load_config
from model.nets.gpt import GPT
from model.plumbing import storage
from model.plumbing.checkpoints import Checkpointer
from model.plumbing.distributed import Distributed
from model.training.optim import Ema, adamw
from model.training.state import Best, Resumable, RunningSums

STEPS = 12  # of a round: enough for the other thread to store a checkpoint beside them
LIMIT = 0.01  # of the time between two checkpoints


def stall(device: torch.device) -> Iterator[Row]:
    """Steps of the preset's transformer, with a checkpoint that begins before them and without one."""
    config = load_config(PRESET).transformer
    assert config
    training = config.training
    torch.manual_seed(0)
    gpt = GPT(config, VOCABULARY, GRID, config.width).to(device)
    codes = torch.randint(VOCABULARY, (training.batch_size, gpt.tokens), device=device)
    text = torch.randn(training.batch_size, TEXT, config.width, device=device)
    optimizer, ema, best = adamw(gpt, training), Ema(gpt, training.ema), Best()
    processes = Distributed(0, 1, 0, device)
    sums = RunningSums(processes, "nll")

    def steps() -> None:
        for _ in range(STEPS):
            with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
                loss = F.cross_entropy(gpt(codes, text).float().flatten(0, 1), codes.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(gpt.parameters(), training.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            sums.add(nll=loss)

    steps()
    best.offer(0.0, gpt, {})
    waits: list[float] = []
    with tempfile.TemporaryDirectory() as folder, Checkpointer(folder) as checkpoints:
        parts = {"sums": sums, "gpt": gpt, "adamw": optimizer, "ema": ema, "best": best}
        state = Resumable(checkpoints, processes, **parts)
        done = 0

        def checkpointed() -> None:
            nonlocal done
            done += 1
            if device.type == "cuda":  # steps that are still under way are no wait for a checkpoint
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            state.save(done)
            waits.append(time.perf_counter() - began)
            steps()
            state.wait()  # within the round: what the other thread took from this one's steps shows

        comparison = compare({"checkpoint": checkpointed, "none": steps}, device, warmup=2, rounds=9)
        size = sum(storage.list_sizes(folder).values()) / len(checkpoints._complete())
    waits = waits[2:]
    interval = comparison.median("none") / STEPS * training.checkpoint_every
    pairs = zip(comparison.seconds["checkpoint"], comparison.seconds["none"], strict=True)
    slower = statistics.median(one - none for one, none in pairs)
    share = statistics.median(waits) / interval
    wait, step = 1e3 * statistics.median(waits), 1e3 * comparison.median("none") / STEPS
    note = (
        f"{wait:.1f} ms of wait (at most {1e3 * max(waits):.1f}) for {size / 1e6:.1f} MB every"
        f" {training.checkpoint_every} steps of {step:.1f} ms; with what storing takes from the steps beside"
        f" it {1e3 * slower:.1f} ms, {slower / interval:.2%}"
    )
    yield Row(
        14, f"wait for checkpoints, {PRESET}", "% of the time", {"ours": 100 * share, "none": 0.0},
        goal=f"≤ {LIMIT:.0%}", met=share <= LIMIT, note=note, seconds={**comparison.seconds, "wait": waits},
    )  # fmt: skip


ROWS = {14: [Part("wait for checkpoints", stall)]}
GPU_ROWS = ROWS
