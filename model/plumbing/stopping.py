"""Ends before the end: a process was told to stop, or nobody wants any more what the job makes.

A training loop heeds it at the end of a step, with all its processes at the same one, after a checkpoint.
Before such a loop, and in a job that has none, `Stopped` is raised where the process just is.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist

from model.errors import Orphaned, Stopped, UserError
from model.plumbing import environment, leases
from model.plumbing.distributed import Distributed

EVERY = 30.0  # seconds between two looks at the leases
NOTHING, TOLD, UNWANTED = range(3)  # what processes tell each other: the largest counts


class Keeper(Protocol):
    """Who stores what a loop has done."""

    def save(self, done: int) -> None:
        """Begin to store a checkpoint of that step; on every process."""

    def wait(self) -> None:
        """Return when it is stored."""


@contextmanager
def unwrapped() -> Iterator[None]:
    """Within the block `Stopped` leaves as itself where torch made an error of its own of it, as it does of
    all that ends a compilation. What others raise stays as it is, as it may say more."""
    try:
        yield
    except Exception as error:
        within: BaseException | None = error
        while within is not None and type(within).__module__.startswith("torch."):
            within = within.__cause__ or within.__context__
        if within is not error and isinstance(within, Stopped):
            raise within from None
        raise


class Stopping:
    """Why this process is to end before its end, if it is. A context manager of the job's work."""

    def __init__(self) -> None:
        self.why = NOTHING
        self._listens = self._heeded = self._raised = False
        self._group: Any = None
        self._said: tuple[dist.Work, torch.Tensor] | None = None  # at the step before
        self._orphan_minutes = 0.0
        self._over = threading.Event()
        self._watch: threading.Thread | None = None

    def listen(self) -> Self:
        """Take SIGTERM for what it is from here on."""
        signal.signal(signal.SIGTERM, lambda *_: self._told())
        self._listens = True
        return self

    def _told(self) -> None:
        self.why = max(self.why, TOLD)
        if not self._heeded and not self._raised:  # a second one must not hit what the first one has unwound
            self._raised = True
            raise self._error("its work was done")

    def of(self, processes: Distributed, orphan_minutes: float) -> Self:
        """The same within a job of these processes, which is orphaned after that time without a lease."""
        self._orphan_minutes = orphan_minutes
        if processes.world > 1:
            # Of its own: what is said here never waits for a GPU, nor for another message.
            self._group = dist.new_group(backend="gloo")
        uri = environment.LEASES.get()
        if uri and processes.is_main:
            self._watch = threading.Thread(target=self._look, args=(uri,), name="leases", daemon=True)
        return self

    def __enter__(self) -> Self:
        if self._watch:
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    # ── in a loop ────────────────────────────────────────────────────────────────────────────────────────

    def heed(self, done: int, steps: int, keeper: Keeper) -> None:
        """At the end of step `done` of `steps`: if a process is to stop, all save this step and end.

        What processes say after one step is heard after the next: nobody waits for a message. After the last
        one nothing is stopped, as little is left to do.

        Raises:
            Stopped: on all processes, when the checkpoint is stored.
            Orphaned: the same, and nobody wants the work.
        """
        self._heeded = True
        why = self._heard()
        if done == steps:
            return
        if why == NOTHING:
            self._say()
            return
        keeper.wait()  # nothing is in the way of this one
        keeper.save(done)
        keeper.wait()
        self._say()
        self._heard()  # whoever leaves first is taken for lost by the others, and they are ended
        self.why = why
        raise self._error(f"step {done + 1}; a checkpoint of step {done} is kept")

    def _say(self) -> None:
        if self._group is not None:
            why = torch.tensor(self.why)
            work = dist.all_reduce(why, dist.ReduceOp.MAX, group=self._group, async_op=True)
            assert work is not None
            self._said = work, why

    def _heard(self) -> int:
        if self._group is None:
            return self.why
        if self._said is None:  # the first step
            return NOTHING
        (work, why), self._said = self._said, None
        work.wait()
        return int(why)

    def _error(self, before: str) -> Stopped:
        if self.why == UNWANTED:
            return Orphaned(
                f"no step has wanted it for {self._orphan_minutes:g} minutes: it ends before {before}"
            )
        return Stopped(f"told to end (SIGTERM), before {before}")

    # ── whether anybody wants it ─────────────────────────────────────────────────────────────────────────

    def _look(self, uri: str) -> None:
        """Until the job is over, or orphaned."""
        alone = None  # since when there has been no lease at all
        unwanted = leases.Unwanted(self._orphan_minutes)
        while True:
            try:
                age = leases.age(uri)
            except (UserError, OSError):
                age = 0.0  # nobody knows
            if age is None:
                alone = alone or time.monotonic()
                age = time.monotonic() - alone
            else:
                alone = None
            if unwanted.by(age):
                self.why = UNWANTED
                if self._listens and not self._heeded:
                    os.kill(os.getpid(), signal.SIGTERM)  # raises where the main thread is
                return
            if self._over.wait(EVERY):
                return
