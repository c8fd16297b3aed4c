"""Row 13: what it costs a training to know that it is finite, beside the step that it is a share of."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Part, Row, compare
from model.config import load_config
from model.nets.gpt import GPT
from model.plumbing.distributed import Distributed
from model.training.optim import Ema, adamw
from model.training.state import Best, RunningSums, not_finite

PRESET = "openmoji-tiny"  # the shortest step of a model worth having: others' are a smaller share
VOCABULARY, GRID, TEXT = 256, (8, 8), 24  # its codes, tokens and states of a caption
LIMIT = 0.005  # of a step


def finite(device: torch.device) -> Iterator[Row]:
    """A whole step of the preset's transformer; the sums of a log interval; the look before a checkpoint."""
    config = load_config(PRESET).transformer
    assert config
    training = config.training
    torch.manual_seed(0)
    gpt = GPT(config, VOCABULARY, GRID, config.width).to(device)
    codes = torch.randint(VOCABULARY, (training.batch_size, gpt.tokens), device=device)
    text = torch.randn(training.batch_size, TEXT, config.width, device=device)
    optimizer, ema, best = adamw(gpt, training), Ema(gpt, training.ema), Best()
    sums = RunningSums(Distributed(0, 1, 0, device), "nll", "grad_norm")
    done = 0

    def step() -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            loss = F.cross_entropy(gpt(codes, text).float().flatten(0, 1), codes.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(gpt.parameters(), training.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        return loss.detach(), norm

    loss, norm = step()
    best.offer(0.0, gpt, {})
    parts = {"sums": sums, "gpt": gpt, "adamw": optimizer, "ema": ema, "best": best}

    def interval() -> None:
        nonlocal done
        for _ in range(training.log_every):
            sums.add(nll=loss)
            sums.add(grad_norm=norm)
        done += training.log_every
        sums.check(done)
        sums.means(done)

    def look() -> None:
        assert not_finite({name: part.state_dict() for name, part in parts.items()}) is None

    comparison = compare({"step": step, "interval": interval, "look": look}, device, warmup=2, rounds=15)
    shares = [
        (interval / training.log_every + look / training.checkpoint_every) / step
        for step, interval, look in zip(*comparison.seconds.values(), strict=True)
    ]
    figures = {"ours": 100 * statistics.median(shares)}
    milliseconds = {name: 1e3 * comparison.median(name) for name in comparison.seconds}
    note = (
        f"step {milliseconds['step']:.1f} ms; sums of {training.log_every} steps, read twice,"
        f" {milliseconds['interval']:.2f} ms; look at {sum(p.numel() for p in gpt.parameters()) / 1e6:.1f} M"
        f" weights and all that is saved with them, every {training.checkpoint_every} steps,"
        f" {milliseconds['look']:.1f} ms"
    )
    yield Row(
        13, f"know that training is finite, {PRESET}", "% of a step", figures, goal=f"≤ {LIMIT:.1%}",
        met=statistics.median(shares) <= LIMIT, note=note, seconds=comparison.seconds,
    )  # fmt: skip


ROWS = {13: [Part("know that training is finite", finite)]}
GPU_ROWS = ROWS
