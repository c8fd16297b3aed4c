"""Folders of models, `model.safetensors` beside `config.json`: every net is opened through this one door."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import Tensor, nn

from model.config import without_retired
from model.errors import UserError
from model.plumbing.checkpoints import CONFIG, load_model

Net = TypeVar("Net", bound=nn.Module)


def load(folder: str | Path, build: Callable[[dict[str, Any]], Net]) -> tuple[Net, dict[str, Any]]:
    """The net of a folder on the CPU, in evaluation mode, and what its `config.json` says.

    Args:
        build: makes the net, with any weights, from what `config.json` says.

    Raises:
        UserError: a file is missing or cannot be read, `config.json` describes no net that `build` knows, the
            weights are of another one, or not all of them are finite.
    """
    weights, description = load_model(folder)
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(f"{folder}: {name} holds what is no finite number; train this net anew")
    try:
        net = build(without_retired(description))
    except (KeyError, TypeError, ValueError) as error:  # a pydantic ValidationError is a ValueError
        raise UserError(f"{Path(folder) / CONFIG}: {_reason(error)}") from None
    fit(net, weights, str(folder))
    return net.eval(), description


def fit(net: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Put weights into a net, all of them and no others.

    Raises:
        UserError: naming `where` they are from and the first that are missing, unknown or of another shape.
    """
    own = net.state_dict()
    wrong = [f"{name} is missing" for name in own.keys() - weights.keys()]
    wrong += [f"{name} is unknown" for name in weights.keys() - own.keys()]
    wrong += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    if wrong:
        shown = "; ".join(sorted(wrong)[:3])
        raise UserError(f"{where}: the weights do not fit {type(net).__name__}: {shown}")
    net.load_state_dict(weights)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
