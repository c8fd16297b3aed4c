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


class Trained:
    """The preset's transformer with all that trains it, on tokens drawn at random, after one step."""

    def __init__(self, device: torch.device) -> None:
        config = load_config(PRESET).transformer
        assert config
        self.device, self.training = device, config.training
        torch.manual_seed(0)
        self.gpt = GPT(config, VOCABULARY, GRID, config.width).to(device)
        shape = (self.training.batch_size, self.gpt.tokens)
        self.codes = torch.randint(VOCABULARY, shape, device=device)
        self.text = torch.randn(self.training.batch_size, TEXT, config.width, device=device)
        self.optimizer, self.ema = adamw(self.gpt, self.training), Ema(self.gpt, self.training.ema)
        self.step()
        best = Best()
        best.offer(0.0, self.gpt, {})
        self.parts = {"gpt": self.gpt, "adamw": self.optimizer, "ema": self.ema, "best": best}

    def step(self) -> tuple[Tensor, Tensor]:
        """Loss () and norm of the gradient () of one more step."""
        mixed = self.training.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            logits = self.gpt(self.codes, self.text).float()
            loss = F.cross_entropy(logits.flatten(0, 1), self.codes.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.gpt.parameters(), self.training.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        return loss.detach(), norm


def finite(device: torch.device) -> Iterator[Row]:
    """A whole step of the preset's transformer; the sums of a log interval; the look before a checkpoint."""
    trained = Trained(device)
    training, gpt = trained.training, trained.gpt
    loss, norm = trained.step()
    sums = RunningSums(Distributed(0, 1, 0, device), "nll", "grad_norm")
    parts = {"sums": sums, **trained.parts}
    done = 0

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

    comparison = compare(
        {"step": trained.step, "interval": interval, "look": look}, device, warmup=2, rounds=15
    )
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
