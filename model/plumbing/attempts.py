"""The attempts at a job on a cluster: each start of each of its workers leaves a folder beside the asset.

    <output>/attempts/20261126T091500-0-1f3a9c02/start.json, rank-0.log, …, outcome.json

A pod takes its log and its exit code with it when it is deleted; these stay. Who follows the job reads from
them why a worker ended, whether it comes further from start to start, and what it said.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.plumbing import storage
from model.plumbing.outcome import Outcome

FOLDER, START, OUTCOME = "attempts", "start.json", "outcome.json"


class Attempt(BaseModel):
    """One start of one worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    worker: int  # its number in the job; worker 0 holds rank 0
    pod: str
    when: float = Field(default_factory=time.time)  # it started, in seconds since 1970
    step: int = 0  # of the newest complete checkpoint then; 0: there was none
    uri: str = ""  # its folder
    outcome: Outcome | None = None  # None: it runs, or was ended before it could say how

    def log(self, rank: int) -> str:
        """URI of a rank's log."""
        return storage.join(self.uri, f"rank-{rank}.log")


def begin(output: str, worker: int, pod: str, uid: str, step: int) -> Attempt:
    """Note that a worker of the job that makes `output` starts now.

    Args:
        output: URI of the asset.
        worker: its number in the job.
        pod: its pod's name.
        uid: that tells this pod from an earlier one of the same name.
        step: of the newest complete checkpoint; 0: there is none.

    Raises:
        UserError: the store cannot be written.
    """
    started = Attempt(worker=worker, pod=pod, step=step)
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(started.when))}-{worker}-{uid[:8]}"
    attempt = started.model_copy(update={"uri": storage.join(output, FOLDER, name)})
    told = started.model_dump_json(exclude={"uri", "outcome"}).encode()
    storage.write_bytes(storage.join(attempt.uri, START), told)
    return attempt


def finish(attempt: Attempt, outcome: Outcome) -> None:
    """Note how it ended.

    Raises:
        UserError: the store cannot be written.
    """
    storage.write_bytes(storage.join(attempt.uri, OUTCOME), outcome.model_dump_json().encode())


def attempts(output: str) -> list[Attempt]:
    """All attempts at the asset at `output`, the oldest first.

    Raises:
        UserError: the store cannot be read.
    """
    folder = storage.join(output, FOLDER)
    names = storage.list_sizes(folder)
    found = []
    for name in names:
        one, _, file = name.partition("/")
        if file != START:
            continue
        with suppress(storage.NotFound, ValidationError):  # deleted in between, or not one of ours
            change: dict[str, Any] = {"uri": storage.join(folder, one)}
            attempt = Attempt.model_validate_json(storage.read_bytes(storage.join(folder, name)))
            if f"{one}/{OUTCOME}" in names:
                told = storage.read_bytes(storage.join(folder, one, OUTCOME))
                change["outcome"] = Outcome.model_validate_json(told)
            found.append(attempt.model_copy(update=change))
    return sorted(found, key=lambda attempt: (attempt.when, attempt.worker))


def restarts(found: Iterable[Attempt]) -> int:
    """How often in a row, up to now, worker 0 started with no checkpoint that its start before did not have.

    Args:
        found: attempts, the oldest first.
    """
    count = 0
    for before, after in pairwise(attempt.step for attempt in found if attempt.worker == 0):
        count = 0 if after > before else count + 1
    return count
