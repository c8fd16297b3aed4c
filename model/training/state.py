"""What the training loops share beside their science: when it is time, what is remembered, what is kept.

Nothing here drives a loop. A loop says once which parts make up its state; what is saved and what is
restored is then the same. And nothing that is not finite is ever kept: figures are summed on the device,
where one bad addend spoils the sum, and are looked at only where the loop stops to speak, validate or save.
"""

from __future__ import annotations

import io
import math
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.config import TrainingConfig
from model.errors import Diverged, UserError
from model.plumbing import speech, storage
from model.plumbing.assets import PICTURES, Manifest
from model.plumbing.checkpoints import CONFIG, WEIGHTS, Checkpointer, leaves, save_model
from model.plumbing.curves import HISTORY, Curves
from model.plumbing.distributed import Distributed, peak_flops
from model.plumbing.worker import Job
from model.training.optim import learning_rate

MANY = 2**62  # steps


def itstime(done: int, every: int, total: int) -> bool:
    """Whether what happens every so many steps is due after `done` of `total`; at the end it always is."""
    return done % every == 0 or done == total


def synced(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """The context of a micro-batch: ranks exchange gradients after the last one of a step only."""
    if last or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


# ── what is remembered ──────────────────────────────────────────────────────────────────────────────────


class Part(Protocol):
    """What a state is made of: modules, optimisers, and the classes below."""

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors and of what JSON can hold; on every rank, as ranks may have to confer."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Continue what `state_dict` returned, here or on another rank; its keys are text now."""


class Resumable:
    """All that a job needs to go on where it was, declared once."""

    def __init__(self, checkpoints: Checkpointer, processes: Distributed, **parts: Part) -> None:
        self.checkpoints, self.processes, self.parts = checkpoints, processes, parts

    def restore(self) -> int:
        """Put all parts back as the newest good checkpoint has them; returns the steps done, 0 without one.

        One process of each machine fetches it for all that are there, whether or not there were as many when
        it was saved.
        """
        processes = self.processes
        leads = processes.local_rank == 0
        with tempfile.TemporaryDirectory(prefix="latent-gpt-checkpoint-") as folder:
            found = self.checkpoints.fetch(folder) if leads else MANY
            done = min(processes.gather(torch.tensor(found, device=processes.device)).tolist())
            if leads and found != done:  # another machine could not read this one, or did not see it yet
                self.checkpoints.fetch(folder, done)
            fetched = processes.of_leader(folder)
            states = self.checkpoints.read(fetched) if done else {}
            for name, part in self.parts.items() if done else ():
                if isinstance(part, torch.optim.Optimizer):
                    _restore_optimizer(part, states[name])
                else:
                    part.load_state_dict(states[name])
            processes.barrier()  # all have read it
        return done

    def save(self, done: int) -> None:
        """Begin to store a checkpoint of all parts. Call it on every rank; the main one writes.

        Raises:
            Diverged: a part is not finite, on every rank alike; nothing is stored.
            UserError: the checkpoint before this one could not be stored.
        """
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if bad := not_finite(states):
            raise Diverged(f"{bad} is not finite at step {done}", done)
        if self.processes.is_main:
            self.checkpoints.begin(done, states)

    def wait(self) -> None:
        """Return when what `save` began is stored. Raises UserError: it cannot be."""
        self.checkpoints.wait()


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    moments = {int(index): moments for index, moments in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": moments})
    for parameter, restored in optimizer.state.items():
        for key, value in restored.items():
            # A file knows no strides, and fused kernels read moments in the order of the parameter's memory.
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                restored[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class RunningSums:
    """What is summed up on each rank since the last log line; to add waits for no device and no rank."""

    def __init__(self, processes: Distributed, *names: str) -> None:
        self.processes = processes
        self.since = 0  # step of the last log line
        self._sums = {name: torch.zeros((), device=processes.device) for name in names}

    def add(self, parts: int = 1, /, **values: Tensor) -> None:
        """Add values () of a step, or of one of the `parts` micro-batches that make it up."""
        for name, value in values.items():
            self._sums[name] += value.detach() / parts

    def means(self, done: int) -> dict[str, float]:
        """Means per step since the last call, over all ranks; the next ones start from here."""
        steps, self.since = done - self.since, done
        means = (self._mean() / steps).tolist()
        for value in self._sums.values():
            value.zero_()
        return dict(zip(self._sums, means, strict=True))

    def check(self, done: int) -> None:
        """Look whether all that was added is finite.

        Raises:
            Diverged: it is not; on every rank alike.
        """
        for name, value in zip(self._sums, self._mean().tolist(), strict=True):
            if not math.isfinite(value):
                raise Diverged(f"train/{name} is {value} at step {done}", done)

    def _mean(self) -> Tensor:
        return self.processes.mean(torch.stack(list(self._sums.values())))

    def state_dict(self) -> dict[str, Any]:
        """Every rank's sums, one column (ranks,) per name."""
        columns = self.processes.gather(torch.stack(list(self._sums.values()))).unbind(dim=1)
        return {"since": self.since, "sums": dict(zip(self._sums, columns, strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Every rank takes its own sums back; where there were more or fewer ranks, the mean of all."""
        self.since = state["since"]
        for name, column in state["sums"].items():
            same = len(column) == self.processes.world
            self._sums[name].copy_(column[self.processes.rank] if same else column.mean())


class Pace:
    """How fast a loop goes and how much memory it takes, between two log lines."""

    def __init__(self, device: torch.device, unit: str, per_step: int, done: int, work: float = 0.0) -> None:
        """
        Args:
            device: where it goes.
            unit: what is counted, e.g. "tokens".
            per_step: such units in a step, over all processes.
            done: steps behind us.
            work: operations of a step on each device, for their share of its peak (MFU); 0: not known.
        """
        peak = peak_flops(device)
        self.mfu: dict[str, float] = {}  # of the last interval; nothing where work or peak is not known
        self._share = work / peak if peak else 0.0  # in a step of one second
        self._device, self._name, self._per_step = device, f"{unit}_per_second", per_step
        self._done, self._then = done, time.monotonic()

    def since(self, done: int) -> dict[str, float]:
        """Figures since the last call."""
        now = time.monotonic()
        rate = (done - self._done) / (now - self._then)
        self._done, self._then = done, now
        self.mfu = {"mfu": self._share * rate} if self._share else {}
        return {self._name: self._per_step * rate, "peak_memory_gib": _peak_memory(self._device)} | self.mfu


def _peak_memory(device: torch.device) -> float:
    """GiB that this process has taken at most: of the GPU, or of the machine where it uses none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in KiB on Linux


class Best:
    """The weights to keep, and what was measured of them."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.figures: dict[str, float] = {}
        self.score: float | None = None

    def offer(self, score: float, module: nn.Module, figures: dict[str, float]) -> None:
        """Keep the module as it is now if its score is above all before it."""
        if self.score is None or score > self.score:
            self.weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            self.figures, self.score = figures, score

    def state_dict(self) -> dict[str, Any]:
        """Weights, figures and score, for a checkpoint."""
        return {"weights": self.weights, "figures": self.figures, "score": self.score}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue what `state_dict` returned."""
        self.weights, self.figures, self.score = state["weights"], state["figures"], state["score"]


class Patience:
    """Ends a training that has not become better for so many validations."""

    def __init__(self, limit: int, processes: Distributed) -> None:
        """
        Args:
            limit: validations in a row, none of them the best; 0: it never ends.
            processes: of the job, who all do what the main one decides.
        """
        self.limit, self.processes = limit, processes
        self.best: float | None = None
        self.since = 0  # validations

    @property
    def parts(self) -> dict[str, Part]:
        """What a checkpoint holds of it."""
        return {"patience": self} if self.limit else {}

    def over(self, score: float) -> bool:
        """Whether to end after a validation with this score, on every rank alike; above is better."""
        if not self.limit:
            return False
        if self.best is None or score > self.best:
            self.best, self.since = score, 0
        else:
            self.since += 1
        over = torch.tensor(self.since >= self.limit, device=self.processes.device)
        return bool(self.processes.gather(over)[0])

    def state_dict(self) -> dict[str, Any]:
        """The best score and the count, for a checkpoint."""
        return {"best": self.best, "since": self.since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue what `state_dict` returned."""
        self.best, self.since = state["best"], state["since"]


class Clock:
    """Fits the number of steps of a training to the time that there is for it: once, at the end of warm-up.

    Before that nothing that is learned depends on it, so a training that is told those steps at its start
    makes the same weights. Where no two steps of warm-up were timed (it has one, or was resumed late), the
    first two that are decide, after it.
    """

    FEWEST, MOST = 0.5, 2.0  # times the steps that were foreseen
    VALIDATIONS = 1.05  # a step's share of all validations, with it

    def __init__(self, training: TrainingConfig, until: float, processes: Distributed) -> None:
        """
        Args:
            training: with the steps that were foreseen.
            until: when it should end, in seconds since 1970; 0: after those steps, whenever that is.
            processes: of the job, who all do what the main one decides.
        """
        self.training = training  # with the steps as they are fitted
        self.until, self.processes = until, processes
        self._first: tuple[int, float] | None = None
        self._fitted = False

    @property
    def parts(self) -> dict[str, Part]:
        """What a checkpoint holds of it."""
        return {"clock": self} if self.until else {}

    def fitted(self, done: int) -> TrainingConfig:
        """The training with its steps, on every rank alike; called after each step.

        Args:
            done: steps so far.
        """
        warmup = self.training.warmup_steps
        if (
            not self.until or self._fitted or done < warmup // 4
        ):  # at first comes what comes once: compilation
            return self.training
        if self._first is None:
            self._first = done, self._now()
        elif done >= warmup:
            each = (self._now() - self._first[1]) / (done - self._first[0]) * self.VALIDATIONS
            foreseen, room = self.training.steps, done + int((self.until - time.time()) / each)
            steps = max(int(self.FEWEST * foreseen), min(int(self.MOST * foreseen), room), done + 1)
            agreed = self.processes.gather(torch.tensor(steps, device=self.processes.device))[0]
            self.training = self.training.model_copy(update={"steps": int(agreed)})
            self._fitted = True
        return self.training

    def _now(self) -> float:
        """Seconds, when all devices have done what they were told."""
        self.processes.sum(torch.zeros((), device=self.processes.device)).item()
        return time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The steps, and whether they were fitted, for a checkpoint."""
        return {"steps": self.training.steps, "fitted": self._fitted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue what `state_dict` returned."""
        self.training = self.training.model_copy(update={"steps": state["steps"]})
        self._fitted = state["fitted"]


# ── what is kept ────────────────────────────────────────────────────────────────────────────────────────


def not_finite(state: Mapping[str, Any]) -> str | None:
    """The first floating-point tensor in nested dicts that is not finite, by name; waits for the device."""
    floats = {
        path: leaf
        for path, leaf in leaves(state).items()
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    if not floats:
        return None
    flags = [tensor.isfinite().all() for tensor in floats.values()]
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return next((path.replace(":", ".") for path, fine in zip(floats, finite, strict=True) if not fine), None)


def show(job: Job, name: str, picture: Image.Image) -> None:
    """Leave a picture beside the asset, for whoever looks at the step; without one the asset is as good."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    try:
        storage.write_bytes(storage.join(job.output.uri, PICTURES, name), data.getvalue())
    except UserError as error:
        speech.warn(job.spec.name, f"{name} is not shown: {error}")


def publish(
    job: Job,
    weights: dict[str, Tensor],
    description: dict[str, Any],
    info: dict[str, Any],
    curves: Curves | None = None,
) -> Manifest | None:
    """Make weights and what they are, with the curves of their training, the job's asset.

    Returns:
        The manifest, on the main process; None on the others.

    Raises:
        UserError: a weight or a number of `info` is not finite; there is no asset then.
    """
    if bad := not_finite(weights):
        raise UserError(f"{job.spec.kind}: weight {bad} is not finite; such a model is not kept")
    if not job.processes.is_main:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        save_model(scratch, weights, description)
        for name in (WEIGHTS, CONFIG):
            job.output.add_file(name, Path(scratch, name))
    if curves:
        job.output.add_bytes(HISTORY, curves.history())
    try:
        job.checkpoints.wait()  # they are about to be deleted
    except UserError as error:
        speech.warn(job.spec.name, f"a checkpoint that nobody needs any more could not be stored: {error}")
    return job.output.finish(info)


@contextmanager
def explained(job: Job, section: str, training: TrainingConfig) -> Iterator[None]:
    """Tell a person of a training that diverged within the block what to do; `section` is of the config."""
    try:
        yield
    except Diverged as error:
        if not error.step:  # of what it was given, and not of what it learned
            raise
        rate, good = learning_rate(error.step - 1, training), job.checkpoints.newest()
        raise Diverged(
            f"{job.spec.kind} diverged: {error} with learning rate {rate:.3g};"
            f" {f'the last good checkpoint is {good}' if good else 'there is no good checkpoint'};"
            f" lower {section}.learning_rate or {section}.grad_clip, or raise {section}.warmup_steps",
            error.step,
        ) from None
