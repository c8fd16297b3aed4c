"""Weights on disk and in S3: safetensors beside JSON, with SHA-256; nothing is ever unpickled.

A checkpoint is a folder `step-00000340` with `tensors.safetensors`, `state.json` and, written last,
`complete.json`, which holds the SHA-256 of the other two. A kill at any instant leaves the one
before it whole.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import UserError
from model.plumbing import storage

logger = logging.getLogger(__name__)

TENSORS, STATE, COMPLETE = "tensors.safetensors", "state.json", "complete.json"
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Checkpointer:
    """Saves and finds the checkpoints of one job."""

    def __init__(self, uri: str, keep: int = 2) -> None:
        """
        Args:
            uri: folder of the checkpoints, S3 or local.
            keep: complete checkpoints kept; two survive even a damaged newest one.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}; it must be 1 or more")
        self.uri = uri
        self.keep = keep

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Store a checkpoint and then delete all but the newest `keep`. Call it on one rank only.

        Raises:
            UserError: the store cannot be written; the checkpoints before this one are untouched.
        """
        folder = storage.join(self.uri, f"step-{step:08d}")
        storage.delete(storage.join(folder, COMPLETE))  # left by an attempt whose data was damaged
        with tempfile.TemporaryDirectory(prefix="latent-gpt-checkpoint-") as temporary:
            path = Path(temporary) / TENSORS
            _save_file(tensors, path)
            sha256 = {TENSORS: storage.file_sha256(path)}
            storage.upload_file(path, storage.join(folder, TENSORS))
            path = Path(temporary) / STATE
            path.write_text(json.dumps(state))
            sha256[STATE] = storage.file_sha256(path)
            storage.upload_file(path, storage.join(folder, STATE))
        storage.write_bytes(
            storage.join(folder, COMPLETE), json.dumps({"step": step, "sha256": sha256}).encode()
        )
        self._prune()

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint that is complete and whole, on the CPU: (step, tensors, state); or None.

        A damaged one is reported and passed over for the one before it.
        """
        for name in reversed(self._complete()):
            folder = storage.join(self.uri, name)
            try:
                return self._load(folder)
            except (storage.NotFound, storage.Damaged, SafetensorError, ValueError, KeyError) as error:
                logger.warning("checkpoint %s cannot be used, trying the one before: %s", folder, error)
        return None

    def _load(self, folder: str) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
        marker = json.loads(storage.read_bytes(storage.join(folder, COMPLETE)))
        with tempfile.TemporaryDirectory(prefix="latent-gpt-checkpoint-") as temporary:
            for name, sha256 in marker["sha256"].items():
                storage.download_file(storage.join(folder, name), Path(temporary) / name, sha256)
            tensors = load_file(Path(temporary) / TENSORS)
            state = json.loads((Path(temporary) / STATE).read_text())
        return marker["step"], tensors, state

    def _complete(self) -> list[str]:
        """Folder names of complete checkpoints, oldest first."""
        names = storage.list_sizes(self.uri)
        return sorted({name.partition("/")[0] for name in names if name.endswith(f"/{COMPLETE}")})

    def _prune(self) -> None:
        """Delete what is older than the newest `keep`: complete ones and what kills left behind."""
        oldest_kept = self._complete()[-self.keep :][0]
        folders = {name.partition("/")[0] for name in storage.list_sizes(self.uri)}
        for name in sorted(folders):
            if name.startswith("step-") and name < oldest_kept:
                folder = storage.join(self.uri, name)
                storage.delete(storage.join(folder, COMPLETE))  # first, so that no half is taken for whole
                storage.delete_prefix(folder)


def flatten(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Named groups of tensors as one: `{"net": {"w": t}} -> {"net.w": t}`."""
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The group that `flatten` put below `prefix`, which ends at its dot."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as (tensors named `optimizer.INDEX.NAME`, JSON-able rest)."""
    values = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, state in values["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    return tensors, {"plain": plain, "groups": values["param_groups"]}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]
) -> None:
    """Put back what `optimizer_state` returned; tensors of other names are left alone."""
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in rest["plain"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            # A file knows no strides, and fused kernels read moments in the order of the parameter's memory.
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def save_model(folder: str | Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write `model.safetensors` and `config.json` into a local folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def load_model(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_model` wrote: (tensors on the CPU, config).

    Raises:
        UserError: a file is missing or cannot be read.
    """
    folder = Path(folder)
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} does not exist; a model is a folder with {WEIGHTS} and {CONFIG}"
            )
    try:
        return load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{folder} does not hold a readable model ({error}); fetch it again") from None


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors wants contiguous tensors that share no memory (tied weights do)."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen:
            tensor = tensor.clone()
        seen.add(pointer)
        plain[name] = tensor
    save_file(plain, path)
