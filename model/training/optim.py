"""What every training loop shares: the learning rate, the optimiser, the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model.config import TrainingConfig


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Of optimiser step `step` (0 is the first): linear warm-up, then a cosine down to its final share."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    done = (step - training.warmup_steps) / max(1, training.steps - 1 - training.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return training.learning_rate * (training.final_lr_share + (1 - training.final_lr_share) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let every parameter group learn at `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay, and QK-norm's gains, which are one tensor for queries and keys; biases and
    other vectors do not."""
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for p in learning if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(parameters: nn.Module | Iterable[nn.Parameter], training: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW over parameters, one kernel per group instead of several per tensor."""
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    groups = [group for group in parameter_groups(parameters, training.weight_decay) if group["params"]]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=True)


def muon(module: nn.Module, blocks: nn.Module, training: TrainingConfig) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else of the module: step both.

    Muon makes the step of a matrix orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon), scaled
    to the size of AdamW's so that one learning rate serves both (Liu et al. 2025, arXiv:2502.16982).
    """
    matrices = {id(p): p for p in blocks.parameters() if p.ndim == 2}
    rest = [p for p in module.parameters() if id(p) not in matrices]
    turning = torch.optim.Muon(
        matrices.values(),
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return {"muon": turning, "adamw": adamw(rest, training)}


class Ema:
    """Exponential moving average of a module's parameters and floating-point persistent buffers.

    The decay warms up as (1 + n) / (10 + n), so that short runs do not remember their initialisation.
    With decay 0 nothing is kept, and `applied` leaves the module as it is.

    `torch.optim.swa_utils.AveragedModel` will not do: with buffers it averages integers as well, its first
    update copies, and n reaches the averaging function as a tensor, so that a warm-up would wait for the GPU.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._live = {
            name: tensor
            for name, tensor in module.state_dict(keep_vars=True).items()
            if tensor.is_floating_point()
        }
        self.average = {name: t.detach().clone() for name, t in self._live.items()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module as it is now; once per optimiser step."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        live = [self._live[name].detach() for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), live, 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the module holds the average; its own weights come back after it."""
        with torch.no_grad():
            kept = {name: self._live[name].detach().clone() for name in self.average}
            self._copy(self.average)
        try:
            yield
        finally:
            self._copy(kept)

    def state_dict(self) -> dict[str, Any]:
        """The average and its number of updates, for a checkpoint."""
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue what `state_dict` returned."""
        if state["average"].keys() != self.average.keys():
            raise ValueError("the checkpoint's average is of another module")
        for name, tensor in state["average"].items():
            self.average[name].copy_(tensor)
        self.updates = state["updates"]

    @torch.no_grad()
    def _copy(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._live[name].detach().copy_(tensor)
