"""What the training jobs of a run said: from the store, where it outlives pods, or from a run's folder here.

Each attempt at a step is printed under a heading, the oldest first, with how it ended.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from model.errors import UserError
from model.plumbing import assets, attempts, outcome, storage, tracking
from model.plumbing.attempts import Attempt
from model.plumbing.outcome import EXIT_CODES, Outcome

ENDED = "ended"  # file in a run's folder, when the run is over
LOOK = 2.0  # seconds between two looks of who follows
AGAIN = 90.0  # seconds in which an attempt that was broken off is followed by another one, if at all


@dataclass(frozen=True)
class Try:
    """One attempt at a step by one worker, and what was printed in it."""

    step: str
    title: str
    when: float  # it began, in seconds since 1970
    logs: tuple[tuple[int, str], ...]  # rank and URI
    outcome: Outcome | None = None


@dataclass
class Logs:
    """What is known of a run's jobs, looked up anew each time."""

    tries: Callable[[], list[Try]]
    over: Callable[[str], bool]  # whether nothing more will come, of this step or ("") of all
    nothing: str  # what is said where there is none
    _shown: dict[str, int] = field(default_factory=dict)  # bytes, by URI
    _ended: set[tuple[str, str]] = field(default_factory=set)
    _heading: str = ""

    def show(self, step: str, rank: int | None, out: TextIO) -> int:
        """Print what has come since the last call; returns how many tries there are."""
        found = [one for one in self.tries() if step in ("", one.step)]
        for one in sorted(found, key=lambda one: one.when):
            for number, uri in one.logs:
                if rank is None or rank == number:
                    self._print(f"{one.step}, {one.title}, rank {number}", uri, out)
            if one.outcome and (one.step, one.title) not in self._ended:
                self._ended.add((one.step, one.title))
                how = f"{one.outcome.kind}: {one.outcome.reason}".removesuffix(": ")
                print(f"── {one.step}, {one.title}, ended: {how}", file=out, flush=True)
                self._heading = ""
        return len(found)

    def _print(self, heading: str, uri: str, out: TextIO) -> None:
        start = self._shown.get(uri, 0)
        try:
            data = storage.read_bytes(uri)[start:]
        except storage.NotFound:  # deleted since
            return
        if not data:
            return
        self._shown[uri] = start + len(data)
        if heading != self._heading:
            self._heading = heading
            print(f"── {heading}", file=out)
        out.write(data.decode(errors="replace"))
        if not data.endswith(b"\n"):
            out.write("\n")
        out.flush()


def print_logs(logs: Logs, step: str, rank: int | None, follow: bool, out: TextIO | None = None) -> None:
    """Print the logs of a run.

    Args:
        logs: of it.
        step: of this one only; "": of all.
        rank: of this one only; None: of all.
        follow: whether to wait for more, until nothing more can come.
        out: where to; the default is stdout.

    Raises:
        UserError: there are none.
    """
    while True:
        over = logs.over(step)  # before the last look: what comes in between is seen by that
        count = logs.show(step, rank, out or sys.stdout)
        if not follow or over:
            break
        time.sleep(LOOK)
    if not count:
        raise UserError(logs.nothing + (f" (step {step})" if step else ""))


# ── from the store ──────────────────────────────────────────────────────────────────────────────────────


def stored_logs(run: str) -> Logs:
    """Logs of the pods of a pipeline's run, which MLflow knows by this name or id."""

    def tries() -> list[Try]:
        _, noted = tracking.assets_noted(run)
        return [
            _stored(step, one, position)
            for step, uri in noted.items()
            for position, one in enumerate(attempts.attempts(uri), 1)
        ]

    def over(step: str) -> bool:
        running, noted = tracking.assets_noted(run)
        if step and step in noted:
            return _settled(noted[step])
        return not running

    _, noted = tracking.assets_noted(run)
    nothing = f"run '{run}' has no logs in the store: its jobs were no pods, or have not started"
    if not noted:
        nothing = f"run '{run}' has come to no training job so far"
    return Logs(tries, over, nothing)


def _stored(step: str, attempt: Attempt, position: int) -> Try:
    ranks = sorted(
        int(name.removeprefix("rank-").removesuffix(".log"))
        for name in storage.list_sizes(attempt.uri)
        if name.startswith("rank-") and name.endswith(".log")
    )
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.when))
    going_on = f", from step {attempt.step}" if attempt.step else ""
    title = f"worker {attempt.worker} (start {position}, {began}, pod {attempt.pod}{going_on})"
    logs = tuple((rank, attempt.log(rank)) for rank in ranks)
    return Try(step, title, attempt.when, logs, attempt.outcome)


def _settled(uri: str) -> bool:
    """Whether nothing more will be said by who makes an asset."""
    if assets.find(uri):
        return True
    first = [one for one in attempts.attempts(uri) if one.worker == 0]  # that of rank 0
    end = first[-1].outcome if first else None
    if end is None:
        return False
    started_again = EXIT_CODES[end.kind] >= 128
    return not started_again or time.time() - end.when > AGAIN


# ── from here ───────────────────────────────────────────────────────────────────────────────────────────


def local_logs(runs: Path, run: str) -> Logs | None:
    """Logs of processes of this machine, where `run` is a run's folder, or the name of one in `runs`."""
    folder = next((one for one in (runs / run, Path(run)) if (one / "log.txt").is_file()), None)
    if folder is None or not run:
        return None
    return Logs(
        lambda: [_local(attempt) for attempt in (folder / "jobs").glob("*-*")],
        lambda step: _over(folder, step),
        f"{folder} has no logs of training jobs: it reused what they make, or has not come to them; those of"
        " Slurm's jobs are found by MLflow's name of the run",
    )


def _local(attempt: Path) -> Try:
    logs = [
        (int(path.parent.name), str(path))
        for name in ("stdout.log", "stderr.log")
        for path in attempt.glob(f"*/attempt_0/*/{name}")
    ]
    left = outcome.left_in(str(attempt / "outcomes"))
    when = min((Path(path).parents[2].stat().st_mtime for _, path in logs), default=0.0)  # when it was made
    ends = [one for one in left.values() if not one.well] or list(left.values())
    end = min(ends, key=lambda one: one.when, default=None)
    return Try(
        attempt.name.rpartition("-")[0],
        f"under {attempt}",
        when,
        tuple(sorted(logs, key=lambda one: one[0])),
        end,
    )


def _over(folder: Path, step: str) -> bool:
    if (folder / ENDED).exists():
        return True
    ends = outcome.left_in(str(folder / "outcomes"))
    return step in ends or "register" in ends or any(not end.well for end in ends.values())
