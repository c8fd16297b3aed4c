"""Weights on disk and in S3: safetensors beside JSON, with SHA-256; nothing is ever unpickled.

A checkpoint is a folder `step-00000340` with `tensors.safetensors`, `state.json` and, written last,
`complete.json`, which holds the SHA-256 of the other two. A kill at any instant leaves the one
before it whole.

Whoever trains waits for a copy in memory and no longer: files, hashes and the way to the store are the
business of a thread beside it.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import Unavailable, UserError
from model.plumbing import environment, storage

logger = logging.getLogger(__name__)

TENSORS, STATE, COMPLETE = "tensors.safetensors", "state.json", "complete.json"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
AWAY = 600.0  # seconds for which a store that does not answer is asked again; training goes on meanwhile
AGAIN = 5.0  # seconds between two tries
TRIES = 3  # of a request, before the store is taken to be away
# Beside what storage and safetensors find, what Python says of JSON that is none, or not of our shape.
DAMAGE = (
    storage.NotFound, storage.Damaged, SafetensorError, ValueError, KeyError, TypeError, AttributeError,
)  # fmt: skip


class Checkpointer:
    """Saves and finds the checkpoints of one job. A context manager: at its end all are stored."""

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
        self._beside = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[None] | None = None
        self._away = threading.Event()  # the store, which keeps the one under way from being stored
        self._memory: dict[str, Tensor] = {}  # of the copy, used again by the next one

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Store a checkpoint. As `begin` and `wait`."""
        self.begin(step, state)
        self.wait()

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Copy a state, which may change after this, and store it beside what goes on; on one rank only.

        One is under way at a time: the one before is waited for, unless the store is away; then there is no
        checkpoint of this step. When one is stored, all but the newest `keep` are deleted.

        Args:
            step: optimiser steps done.
            state: nested dicts of tensors and of what JSON can hold; keys hold no colon.

        Raises:
            UserError: the one before could not be stored; the checkpoints before that are untouched.
        """
        while self._under_way and not self._under_way.done():
            if self._away.is_set():
                logger.warning("no checkpoint of step %d: the one before is not stored yet", step)
                return
            wait_for([self._under_way], timeout=0.1)
        self.wait()
        flat = leaves(state)
        tensors = self._copied({path: leaf for path, leaf in flat.items() if isinstance(leaf, Tensor)})
        plain = {path: leaf for path, leaf in flat.items() if path not in tensors}
        text = json.dumps(plain, allow_nan=False)
        self._under_way = self._beside.submit(self._store_at_last, step, tensors, text)

    def wait(self) -> None:
        """Return when the checkpoint under way is stored. Raises as `begin`."""
        if under_way := self._under_way:
            self._under_way = None
            under_way.result()

    @torch.no_grad()
    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the CPU, in memory of their own; from a GPU at the speed that pinned memory has."""
        before, self._memory = self._memory, {}
        for path, tensor in tensors.items():
            copy = before.pop(path, None)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._memory[path] = copy.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return self._memory

    def _store_at_last(self, step: int, tensors: dict[str, Tensor], plain: str) -> None:
        """Store a checkpoint, also in a store that does not answer for a while."""
        until = time.monotonic() + AWAY
        while True:
            try:
                with storage.hasty(environment.S3_PATIENCE.get(), TRIES):
                    self._store(step, tensors, plain)
                self._away.clear()
                return
            except Unavailable as error:
                if time.monotonic() > until:
                    raise
                logger.warning("the checkpoint of step %d is not stored yet: %s", step, error)
                self._away.set()
                time.sleep(AGAIN)

    def _store(self, step: int, tensors: dict[str, Tensor], plain: str) -> None:
        folder = storage.join(self.uri, f"step-{step:08d}")
        storage.delete(storage.join(folder, COMPLETE))  # left by an attempt whose data was damaged
        sha256 = {}
        with tempfile.TemporaryDirectory(prefix="latent-gpt-checkpoint-") as temporary:
            with storage.explained(temporary):
                _save_file(tensors, Path(temporary, TENSORS))
                Path(temporary, STATE).write_text(plain)
            for name in (TENSORS, STATE):
                sha256[name] = storage.file_sha256(Path(temporary, name))
                storage.upload_file(Path(temporary, name), storage.join(folder, name))
        storage.write_bytes(
            storage.join(folder, COMPLETE), json.dumps({"step": step, "sha256": sha256}).encode()
        )
        self._prune()

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint that is complete and whole: (step, state with tensors on the CPU); or None.

        Keys come back as text. A damaged one is reported and passed over for the one before it.
        """
        with tempfile.TemporaryDirectory(prefix="latent-gpt-checkpoint-") as folder:
            step = self.fetch(folder)
            return (step, self.read(folder)) if step else None

    def fetch(self, folder: str | Path, step: int = 0) -> int:
        """Copy the newest checkpoint that is complete and whole into a local folder; returns its step.

        Args:
            folder: to be read by `read`, by as many processes as there are.
            step: of the only one that will do; 0: the newest, or where it is damaged the one before it.

        Returns:
            0 where there is none.

        Raises:
            UserError: there is no such checkpoint, or the store cannot be read.
        """
        names = [f"step-{step:08d}"] if step else self._complete()
        for name in reversed(names):
            uri = storage.join(self.uri, name)
            try:
                marker = json.loads(storage.read_bytes(storage.join(uri, COMPLETE)))
                for file, sha256 in marker["sha256"].items():
                    storage.download_file(storage.join(uri, file), Path(folder, file), sha256)
                self.read(folder)
                return int(marker["step"])
            except DAMAGE as error:
                if step:
                    raise UserError(f"checkpoint {uri} cannot be used: {error}") from None
                logger.warning("checkpoint %s cannot be used, trying the one before: %s", uri, error)
        return 0

    @staticmethod
    def read(folder: str | Path) -> dict[str, Any]:
        """The state that `fetch` left in a local folder; tensors are mapped from its file, not copied."""
        return _tree(load_file(Path(folder, TENSORS)) | json.loads(Path(folder, STATE).read_text()))

    def newest(self) -> str | None:
        """URI of the newest checkpoint that is complete; it is not read. One that is under way counts."""
        self._settle()
        complete = self._complete()
        return storage.join(self.uri, complete[-1]) if complete else None

    def _settle(self) -> None:
        """Wait for what is under way; if it comes to nothing, something else matters more."""
        try:
            self.wait()
        except Exception as error:
            logger.warning("a checkpoint could not be stored: %s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        else:
            self._settle()
        self._beside.shutdown()

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
