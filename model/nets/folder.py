"""Folders of models, `model.safetensors` beside `config.json`: every net is opened through this one door.

A folder may be a stranger's. Its description is read within bounds and may not lead anywhere else; the net
that it describes is laid out without memory and held against the file's table of contents before a byte of
weights is read; one of another project's has to do its work once, too. So what a folder can cost is the size
of its own file.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from model.config import without_retired
from model.errors import Diverged, UserError, one_line, reason
from model.plumbing import storage
from model.plumbing.cgroups import memory
from model.plumbing.checkpoints import CONFIG, WEIGHTS, load_model

Net = TypeVar("Net", bound=nn.Module)

LARGEST = 2**20  # bytes of a description
DEEPEST, LONGEST, GREATEST = 8, 1024, 2**31  # levels of a description, entries of one, a number in it
LARGEST_TABLE, MOST_TENSORS = 2**24, 2**14  # bytes of a table of contents, tensors in it
SLACK = 100  # parameters that a net may register beside those that it keeps
LONGEST_NAME = 200  # characters of a tensor's that are shown
NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # that weights are read from
MOST_LAYERS = 256  # under any of the names that nets have for how many parts they are built of
LAYERS = ("layers", "depth", "blocks", "num_res_blocks", "layers_per_block", "num_layers")
ELSEWHERE = ("hf_", "timm_", "auto_map", "attn_implementation", "_attn_implementation", "quantization_config")
# Keys with which open_clip, transformers and diffusers fetch code or weights from a hub.

_BUILDING = threading.RLock()  # torch's hooks must neither come nor go while another thread builds a net


def load(
    folder: str | Path,
    build: Callable[[dict[str, Any]], Net],
    work: Callable[[Net, dict[str, Any]], object] | None = None,
) -> tuple[Net, dict[str, Any]]:
    """The net of a folder on the CPU, in evaluation mode, and what its `config.json` says.

    Args:
        build: makes the net, with any weights, from what `config.json` says.
        work: has a net that is not all ours do what it is for, and raises where that fails; neither the net
            nor any tensor that is made meanwhile has memory.

    Raises:
        UserError: a file is missing or cannot be read, `config.json` describes no net that `build` knows or
            that does its work, the weights are of another one, or not all of them are finite (`Diverged`).
    """
    folder = Path(folder)
    description = read_description(folder)
    contents = _contents(folder)
    laid_out = _laid_out(build, description, folder, SLACK + 2 * len(contents))
    _check(laid_out, contents, str(folder))
    if work is not None:
        _tried(work, laid_out.eval(), description, folder)
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
    try:
        said = json.loads(storage.read_bytes(str(path), LARGEST))
    except storage.NotFound:
        raise _missing(path) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({reason(error)}); fetch the model again") from None
    if not isinstance(said, dict):
        raise UserError(f"{path} must be a table of settings, not {type(said).__name__}")
    _within_bounds(said, str(path))
    return said


def _missing(path: Path) -> UserError:
    return UserError(f"{path} does not exist; a model is a folder with {WEIGHTS} and {CONFIG}")


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
                raise UserError(f"{where}: {one_line(name)} asks for what is not in the folder; remove it")
            if name in LAYERS and isinstance(one, int) and one > MOST_LAYERS:
                raise UserError(f"{where}: {name} is {one}; nets of up to {MOST_LAYERS} are opened")
            _within_bounds(one, where, level + 1)


def _contents(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's weights, without their memory."""
    path = folder / WEIGHTS
    try:
        with storage.explained(str(path)), storage.open_local(path) as file:
            size = os.fstat(file.fileno()).st_size
            table = int.from_bytes(file.read(8), "little")  # bytes of the table of contents that follows
            storage.check_solid(file, path)
    except storage.NotFound:
        raise _missing(path) from None
    if LARGEST_TABLE < table < size:
        raise UserError(f"{path} has a table of contents of {table} bytes; a net has {LARGEST_TABLE} at most")
    if size > memory():
        raise UserError(f"{path} has {size} bytes, and there are {memory()} of memory here")
    try:
        with safe_open(path, framework="pt") as tensors:  # mapped into memory, not read
            names = list(tensors.keys())
            if len(names) > MOST_TENSORS:
                raise UserError(f"{path} holds {len(names)} tensors; a net has {MOST_TENSORS} at most")
            return {name: tensors.get_tensor(name).to("meta") for name in names}
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        raise UserError(
            f"{path} does not hold readable weights ({reason(error)}); fetch the model again"
        ) from None


def _laid_out(
    build: Callable[[dict[str, Any]], Net], description: dict[str, Any], folder: Path, most: int
) -> Net:
    """A net without memory, as long as it has no more than so many parameters: some nest without end."""
    registered = 0

    def count(*_: object) -> None:
        nonlocal registered
        registered += 1
        if registered > most:
            raise ValueError(f"this net has more parameters than its weights, which are in {WEIGHTS}")

    with _BUILDING:
        hook = register_module_parameter_registration_hook(count)
        try:
            with torch.device("meta"):
                return _built(build, description, folder)
        finally:
            hook.remove()


def _tried(
    work: Callable[[Net, dict[str, Any]], object], net: Net, description: dict[str, Any], folder: Path
) -> None:
    try:
        with torch.device("meta"), torch.no_grad():
            work(net, description)
    except Exception as error:  # as above
        raise UserError(f"{folder / CONFIG} is of a net that does not do its work: {reason(error)}") from None


def _built(build: Callable[[dict[str, Any]], Net], description: dict[str, Any], folder: Path) -> Net:
    try:
        with _BUILDING:
            return build(without_retired(description))
    except UserError:
        raise
    except Exception as error:  # whatever a net's own code makes of a stranger's description
        raise UserError(f"{folder / CONFIG}: {reason(error)}") from None


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
    wrong += [f"{one_line(name)[:LONGEST_NAME]} is unknown" for name in weights.keys() - own.keys()]
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            wrong.append(f"{name} is {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}")
        elif weights[name].dtype not in (NUMBERS if own[name].is_floating_point() else (own[name].dtype,)):
            wrong.append(f"{name} is of type {weights[name].dtype} instead of {own[name].dtype}")
    if wrong:
        shown = "; ".join(sorted(wrong)[:3])
        raise UserError(f"{where}: the weights do not fit {type(net).__name__}: {shown}")
