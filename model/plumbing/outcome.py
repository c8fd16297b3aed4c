"""How a process ended, as data: it says so itself, and whoever started it reads that instead of its log.

Who starts a process names a folder or S3 URI, a new one for each attempt, so that an older outcome is never
taken for this one's; `recorded` leaves one file there. A process that was killed leaves none, and its exit
status says the rest. On a cluster the container's termination message says it as well.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.errors import Diverged, Orphaned, Stopped, Unavailable, UserError
from model.plumbing import environment, storage

TERMINATION_LOG = Path("/dev/termination-log")
MESSAGE_BYTES = 4096  # more of a termination message Kubernetes does not keep
LAST_LINES = 15
SIGKILLED = "(SIGKILL; most often the machine ran out of memory)"
LINE = 200  # characters of a log line that stands within a reason

Kind = Literal[
    "finished",
    "refused",  # bad input, and the reason says what would be right
    "diverged",  # a training whose figures are no longer finite
    "failed",  # a defect, or a machine's fault
    "unavailable",  # a service did not answer, for longer than is waited
    "stopped",  # told to end, by SIGTERM or by another process that was
    "orphaned",  # no step wants any more what the job makes
    "lost",  # another process of the job ended, or could not be reached: the cause is there
    "unmet",  # the processes did not find each other, or not again
    "killed",  # by a signal
]

# Of a training pod's container. From 128 on the operator starts it again; below it takes the job for failed.
EXIT_CODES: dict[Kind, int] = {
    "finished": 0,
    "orphaned": 0,  # as nobody will look at it, and only a job that succeeded is removed by its TTL
    "refused": 1,
    "diverged": 1,
    "failed": 1,
    "stopped": 128 + signal.SIGTERM,
    "lost": 200,  # from here on numbers that no signal has
    "unmet": 201,
    "killed": 202,
    "unavailable": 203,
}


class Outcome(BaseModel):
    """How one process, or a job or step of several, ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    reason: str = ""  # one line for people
    last_lines: tuple[str, ...] = ()  # of its trace or log, for who has to find out more
    when: float = Field(default_factory=time.time)  # seconds since 1970

    @property
    def well(self) -> bool:
        """Whether it ended as it should."""
        return self.kind == "finished"

    @property
    def expected(self) -> bool:
        """Whether the reason says it all: what a person can put right, and no defect of ours."""
        return self.kind in ("refused", "diverged", "unavailable")

    @property
    def line(self) -> str:
        """It as JSON that fits into a termination message."""
        short = {"reason": self.reason[: MESSAGE_BYTES // 5], "last_lines": ()}
        return self.model_copy(update=short).model_dump_json()

    def told_of(self, who: str) -> str:
        """The reason with who ended so, where that is not plain from the reason itself."""
        if self.expected or self.well or self.kind in ("stopped", "orphaned"):
            return self.reason
        return f"{who} failed: {self.reason}"

    def error(self) -> UserError | JobFailed:
        """The exception that stands for it in the process that learns of it."""
        if self.kind == "diverged":
            return Diverged(self.reason)
        if self.kind == "unavailable":
            return Unavailable(self.reason)
        return UserError(self.reason) if self.kind == "refused" else JobFailed(self)


class JobFailed(Exception):
    """A job ended without its asset. The first line of the message is for people, the rest for the log."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__("\n".join((outcome.reason, *outcome.last_lines)))
        self.outcome = outcome


_EXPECTED: dict[type[UserError], Kind] = {Diverged: "diverged", Unavailable: "unavailable"}


def of(error: Exception) -> Outcome:
    """How a process ends that ends with this exception."""
    if isinstance(error, JobFailed):
        return Outcome(kind="failed", reason=error.outcome.reason, last_lines=error.outcome.last_lines)
    if isinstance(error, UserError):
        return Outcome(kind=_EXPECTED.get(type(error), "refused"), reason=str(error))
    if isinstance(error, Stopped):
        return Outcome(kind="orphaned" if isinstance(error, Orphaned) else "stopped", reason=str(error))
    said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".removesuffix(": ")
    trace = "".join(traceback.format_exception(error)).splitlines()
    kind: Kind = "lost" if _lost_another(error) else "failed"
    return Outcome(kind=kind, reason=said, last_lines=tuple(trace[-LAST_LINES:]))


def _lost_another(error: Exception) -> bool:
    """Whether torch says with this that another process did not answer; gloo has no type for it."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and (isinstance(error, dist.DistError) or "/gloo/transport/" in str(error))


def of_status(who: str, status: int, log: Sequence[str] = ()) -> Outcome:
    """How a process ended that left no outcome.

    Args:
        who: it is, for the reason.
        status: the exit code, or the negative number of the signal that ended it.
        log: the lines that it printed.
    """
    last = f" ({log[-1].strip()[:LINE]})" if log else ""
    lines = tuple(log[-LAST_LINES:])
    if status >= 0:
        return Outcome(kind="failed", reason=f"{who} ended with exit code {status}{last}", last_lines=lines)
    if status == -signal.SIGKILL:
        how = f"{who} was killed {SIGKILLED}"
    else:
        how = f"{who} was ended by signal {-status}"
        with suppress(ValueError):
            how += f" ({signal.Signals(-status).name})"
    return Outcome(kind="killed", reason=how + last, last_lines=lines)


@contextmanager
def recorded(who: str) -> Iterator[None]:
    """Leave how the block ends where this process's starter looks for it; exceptions go on.

    Args:
        who: what the starter calls this process, e.g. a step's name or a rank: the file's name.
    """
    folder = environment.OUTCOMES.get()  # now: what the block starts gets another folder
    try:
        yield
    except Exception as error:
        end = of(error)
        tell_container(end.line, if_silent=True)
        _leave(folder, who, end)
        raise
    except SystemExit as error:  # others may lose this process, and be gone before its exit code is there
        if error.code:
            code = error.code if isinstance(error.code, int) else f"1: {error.code}"
            _leave(folder, who, Outcome(kind="failed", reason=f"it left with exit code {code}"))
        raise
    _leave(folder, who, Outcome(kind="finished"))


def _leave(folder: str, who: str, end: Outcome) -> None:
    if not folder:
        return
    try:
        storage.write_bytes(storage.join(folder, f"{who}.json"), end.model_dump_json().encode())
    except (UserError, OSError) as error:  # how the process ended matters more
        print(f"warning: its outcome cannot be stored: {error}", file=sys.stderr, flush=True)


def left_in(folder: str) -> dict[str, Outcome]:
    """The outcomes that were left in a folder or below an S3 URI, by who left them."""
    found = {}
    for name in storage.list_sizes(folder):
        with suppress(ValidationError):  # not one of ours
            outcome = Outcome.model_validate_json(storage.read_bytes(storage.join(folder, name)))
            found[name.removesuffix(".json")] = outcome
    return found


def tell_container(text: str, if_silent: bool = False) -> None:
    """Make `text` the container's termination message, where there is a container.

    Args:
        if_silent: only if nobody in it has left one: of several processes the first to fail knows why.
    """
    with suppress(OSError):
        if TERMINATION_LOG.exists() and not (if_silent and TERMINATION_LOG.stat().st_size):
            TERMINATION_LOG.write_bytes(text.encode()[:MESSAGE_BYTES])
