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

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import UserError
from model.plumbing import storage

logger = logging.getLogger(__name__)

TENSORS, STATE, COMPLETE = "tensors.safetensors", "state.json", "complete.json"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
# Beside what storage and safetensors find, what Python says of JSON that is none, or not of our shape.
DAMAGE = (
    storage.NotFound, storage.Damaged, SafetensorError, ValueError, KeyError, TypeError, AttributeError,
)  # fmt: skip


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

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Store a checkpoint and then delete all but the newest `keep`. Call it on one rank only.

        Args:
            step: optimiser steps done.
            state: nested dicts of tensors and of what JSON can hold; keys hold no colon.

        Raises:
            UserError: the store cannot be written; the checkpoints before this one are untouched.
        """
        folder = storage.join(self.uri, f"step-{step:08d}")
        storage.delete(storage.join(folder, COMPLETE))  # left by an attempt whose data was damaged
        flat = leaves(state)
        tensors = {path: leaf for path, leaf in flat.items() if isinstance(leaf, Tensor)}
        plain = {path: leaf for path, leaf in flat.items() if path not in tensors}
        with tempfile.TemporaryDirectory(prefix="latent-gpt-checkpoint-") as temporary:
            path = Path(temporary) / TENSORS
            _save_file(tensors, path)
            sha256 = {TENSORS: storage.file_sha256(path)}
            storage.upload_file(path, storage.join(folder, TENSORS))
            path = Path(temporary) / STATE
            path.write_text(json.dumps(plain, allow_nan=False))
            sha256[STATE] = storage.file_sha256(path)
            storage.upload_file(path, storage.join(folder, STATE))
        storage.write_bytes(
            storage.join(folder, COMPLETE), json.dumps({"step": step, "sha256": sha256}).encode()
        )
        self._prune()

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint that is complete and whole: (step, state with tensors on the CPU); or None.

        Keys come back as text. A damaged one is reported and passed over for the one before it.
        """
        for name in reversed(self._complete()):
            folder = storage.join(self.uri, name)
            try:
                return self._load(folder)
            except DAMAGE as error:
                logger.warning("checkpoint %s cannot be used, trying the one before: %s", folder, error)
        return None

    def newest(self) -> str | None:
        """URI of the newest checkpoint that is complete; it is not read."""
        complete = self._complete()
        return storage.join(self.uri, complete[-1]) if complete else None

    def _load(self, folder: str) -> tuple[int, dict[str, Any]]:
        marker = json.loads(storage.read_bytes(storage.join(folder, COMPLETE)))
        with tempfile.TemporaryDirectory(prefix="latent-gpt-checkpoint-") as temporary:
            for name, sha256 in marker["sha256"].items():
                storage.download_file(storage.join(folder, name), Path(temporary) / name, sha256)
            tensors = load_file(Path(temporary) / TENSORS)
            plain = json.loads((Path(temporary) / STATE).read_text())
        return marker["step"], _tree(tensors | plain)

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


def leaves(state: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: `{"net": {"w": t}} -> {"net:w": t}`; an empty dict is a leaf."""
    flat: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping) and value:
            flat |= leaves(value, f"{prefix}{name}:")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What `leaves` was given, with keys as text."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split(":")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = leaf
    return tree


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
