"""How fast the hardware of a job takes the steps of a config, before any of them is trained.

    python -m model.training.speed SPEC_URI

Each net takes some steps of its training on data that is all zeros, on all processes of the job as the
training will: what it takes to read pictures is not in it.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from model.config import RunConfig, SamplingConfig
from model.nets.gpt import GPT
from model.nets.sampler import Sampler
from model.nets.vqvae import VQVAE
from model.plumbing.assets import Manifest
from model.plumbing.distributed import Distributed
from model.plumbing.worker import Job, run_worker
from model.recipe import Speeds
from model.training.optim import Ema
from model.training.rehearsal import Rehearsal, foresee, rehearsals

FIRST, SECONDS, FEWEST, MOST = 3, 3.0, 5, 200  # steps that do not count, and how long the others go on
DRAWN, ENCODED = 16, 128  # pictures


def main(job: Job) -> Manifest | None:
    """Time a step of each net, and the drawing and encoding of pictures; the same on all ranks.

    Raises:
        UserError: a net cannot be built, as the config does not say all of it.
    """
    config, processes = job.config, job.processes
    began = time.monotonic()
    device = processes.device.type
    found: dict[str, float] = {}
    encode = draw = 0.0
    progress = job.progress(len(rehearsals(config)), "net", counted="net")
    for number, rehearsal in enumerate(rehearsals(config), 1):
        if rehearsal.name == "judge":  # the same net as the text encoder's
            found["judge"] = found["text"]
        else:
            with torch.device(device):
                nets = rehearsal.build()
                found[rehearsal.name] = _step(rehearsal, nets, processes)
                if rehearsal.name == "tokenizer":
                    encode = _encode(nets[0], config)
                if rehearsal.name == "transformer":
                    draw = _draw(nets[0])
        progress.update(number)
    if not processes.is_main:
        return None
    info = {
        "step": found,
        "encode": encode / processes.world,
        "draw": draw,
        "start": began - _born(),
        "took": time.monotonic() - _born(),
    }
    job.output.add_bytes("speed.json", json.dumps(info, indent=1).encode())
    return job.output.finish(info)


def of(made: Manifest, spent: bool) -> Speeds:
    """What a job of this module has measured, and whether its time is the run's."""
    info = made.info
    took = info["took"] if spent else 0.0
    return Speeds(info["start"], info["step"], info["encode"], info["draw"], spent=took)


def foreseen(config: RunConfig, hardware: str, devices: int) -> Speeds:
    """What hardware of the table is expected to take; a pass forwards is a third of a step."""
    costs = {str(one.name): (one, foresee(one)) for one in rehearsals(config)}
    step: dict[str, float] = {
        name: cost.step_seconds(one.training, hardware, devices) for name, (one, cost) in costs.items()
    }
    each = {name: seconds / costs[name][0].training.batch_size / 3 for name, seconds in step.items()}
    return Speeds(
        start=START,
        step=step,
        encode=each.get("tokenizer", 0.0) / 2,  # encoder and decoder are alike
        draw=each.get("transformer", 0.0) * 2 * DRAWING,  # under guidance
    )


START = 2.1  # seconds until a process has imported what it needs; two cores
DRAWING = 4.0  # what a code alone takes, by what it takes among all of its picture; two cores


def _born() -> float:
    """When this process began, on the clock of `time.monotonic`."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


def _step(rehearsal: Rehearsal, nets: list[nn.Module], processes: Distributed) -> float:
    """Seconds of an optimiser step, in the median."""
    training = rehearsal.training
    share = training.batch_size // training.accumulate // processes.world
    learner: Any = nets[0]
    optimizers, ema = rehearsal.optimizers(learner), Ema(learner, training.ema)
    if training.compile:
        learner.compile()

    def step() -> None:
        for _ in range(training.accumulate):
            with rehearsal.autocast(processes.device.type):
                loss = rehearsal.loss(share, *nets)
            (loss / training.accumulate).backward()
        grads = [weight.grad for weight in learner.parameters() if weight.grad is not None]
        if processes.world > 1:
            processes.sum(torch.cat([grad.flatten() for grad in grads]))
        nn.utils.clip_grad_norm_(learner.parameters(), training.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update()
        if processes.device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(FIRST):
        step()
    took: list[float] = []
    going = True
    while going:
        began = time.monotonic()
        step()
        took.append(time.monotonic() - began)
        enough = len(took) >= FEWEST and (sum(took) > SECONDS or len(took) >= MOST)
        going = not processes.sum(torch.tensor(float(enough), device=processes.device))  # for all ranks
    return median(took)


@torch.no_grad()
def _encode(vqvae: nn.Module, config: RunConfig) -> float:
    """Seconds for a picture, on one process."""
    assert isinstance(vqvae, VQVAE)
    side = config.data.image_size
    pictures = torch.zeros(ENCODED, 3, side, side)
    vqvae.eval()
    vqvae.encode(pictures)
    began = time.monotonic()
    vqvae.encode(pictures).cpu()
    return (time.monotonic() - began) / ENCODED


@torch.no_grad()
def _draw(gpt: nn.Module) -> float:
    """Seconds for a picture, under guidance, among others."""
    assert isinstance(gpt, GPT)
    gpt.eval()
    sampler = Sampler(gpt)
    text = torch.zeros(DRAWN, 1, gpt.text_width)
    took = []
    for _ in range(2):
        began = time.monotonic()
        sampler(text, None, SamplingConfig(cfg_scale=2.0), list(range(DRAWN))).cpu()
        took.append(time.monotonic() - began)
    return min(took) / DRAWN


if __name__ == "__main__":
    run_worker(main)
