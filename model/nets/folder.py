"""Folders of models, `model.safetensors` beside `config.json`: every net is opened through this one door.

A folder may be a stranger's. Its description is read within bounds and may not lead anywhere else; the net
that it describes is laid out without memory and held against the file's table of contents before a byte of
weights is read. So what a folder can cost is the size of its own file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.config import without_retired
from model.errors import Diverged, UserError
from model.plumbing.checkpoints import CONFIG, WEIGHTS, load_model

Net = TypeVar("Net", bound=nn.Module)

LARGEST = 2**20  # bytes of a description
DEEPEST, LONGEST, GREATEST = 8, 1024, 2**31  # levels of a description, entries of one, a number in it
MOST_LAYERS = 256  # under any of the names that nets have for how many parts they are built of
LAYERS = ("layers", "depth", "blocks", "num_res_blocks", "layers_per_block", "num_layers")
ELSEWHERE = ("hf_", "timm_", "auto_map", "attn_implementation", "_attn_implementation", "quantization_config")
# Keys with which open_clip, transformers and diffusers fetch code or weights from a hub.


def load(folder: str | Path, build: Callable[[dict[str, Any]], Net]) -> tuple[Net, dict[str, Any]]:
    """The net of a folder on the CPU, in evaluation mode, and what its `config.json` says.

    Args:
        build: makes the net, with any weights, from what `config.json` says.

    Raises:
        UserError: a file is missing or cannot be read, `config.json` describes no net that `build` knows, the
            weights are of another one, or not all of them are finite (`Diverged`).
    """
    folder = Path(folder)
    description = read_description(folder)
    contents = _contents(folder)
    with torch.device("meta"):
        _check(_built(build, description, folder), contents, str(folder))
    weights, _ = load_model(folder)
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise Diverged(f"{folder}: {name} holds what is no finite number; train this net anew")
    net = _built(build, description, folder)
    fit(net, weights, str(folder))
    return net.eval(), description


def read_description(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """What a JSON file of a model's folder says, within bounds.

    Raises:
        UserError: it is missing, too large, no JSON, or asks for something outside of the folder.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} does not exist; a model is a folder with {WEIGHTS} and {CONFIG}")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} has {path.stat().st_size} bytes; a description has {LARGEST} at most")
    try:
        said = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({_reason(error)}); fetch the model again") from None
    if not isinstance(said, dict):
        raise UserError(f"{path} must be a table of settings, not {type(said).__name__}")
    _within_bounds(said, str(path))
    return said


def _within_bounds(value: Any, where: str, level: int = 0) -> None:
    if level > DEEPEST or (isinstance(value, dict | list) and len(value) > LONGEST):
        raise UserError(f"{where}: a description has {DEEPEST} levels of {LONGEST} entries at most")
    if isinstance(value, int | float) and not abs(value) <= GREATEST:
        raise UserError(f"{where}: {str(value)[:20]} is no number of a net; {GREATEST} is the greatest")
    if isinstance(value, list):
        for one in value:
            _within_bounds(one, where, level + 1)
    elif isinstance(value, dict):
        for name, one in value.items():
            if name.startswith(ELSEWHERE) and one:
                raise UserError(f"{where}: {name} asks for what is not in the folder; remove it")
            if name in LAYERS and isinstance(one, int) and one > MOST_LAYERS:
                raise UserError(f"{where}: {name} is {one}; nets of up to {MOST_LAYERS} are opened")
            _within_bounds(one, where, level + 1)


def _contents(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's weights, without their memory."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path} does not exist; a model is a folder with {WEIGHTS} and {CONFIG}")
    try:
        with safe_open(path, framework="pt") as file:  # mapped into memory, not read
            return {name: file.get_tensor(name).to("meta") for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} does not hold readable weights ({error}); fetch the model again") from None


def _built(build: Callable[[dict[str, Any]], Net], description: dict[str, Any], folder: Path) -> Net:
    try:
        return build(without_retired(description))
    except UserError:
        raise
    except Exception as error:  # whatever a net's own code makes of a stranger's description
        raise UserError(f"{folder / CONFIG}: {_reason(error)}") from None


def fit(net: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Put weights into a net, all of them and no others.

    Raises:
        UserError: naming `where` they are from and the first that are missing, unknown or of another shape.
    """
    _check(net, weights, where)
    net.load_state_dict(weights)


def _check(net: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    own = net.state_dict()
    wrong = [f"{name} is missing" for name in own.keys() - weights.keys()]
    wrong += [f"{name} is unknown" for name in weights.keys() - own.keys()]
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            wrong.append(f"{name} is {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}")
        elif own[name].is_floating_point() != weights[name].is_floating_point():
            wrong.append(f"{name} is of type {weights[name].dtype} instead of {own[name].dtype}")
    if wrong:
        shown = "; ".join(sorted(wrong)[:3])
        raise UserError(f"{where}: the weights do not fit {type(net).__name__}: {shown}")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"'{where}' is missing" if first["type"] == "missing" else f"{where}: {first['msg']}"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    known = isinstance(error, TypeError | ValueError | RecursionError)
    return " ".join(f"{'' if known else f'{type(error).__name__}: '}{error}".split())[:300]
