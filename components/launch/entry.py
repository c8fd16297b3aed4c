"""A worker of a training job on a cluster: what its pod's container runs, around the processes of the job.

    python -m components.launch.entry SPEC_URI

It says in the store that it has started, and from which step the job goes on; meets the other workers as the
operator tells it (torch's rendezvous), starts this pod's ranks, and shows what rank 0 prints. It outlives
them: the logs of all go to the store while they grow, the lines before a process ran out of memory among
them. It tells how the worker ended to the store, to Kubernetes (the container's termination message) and, by
its exit code (`outcome.EXIT_CODES`), to the operator, who starts a worker again or does not.

A worker is started anew as a whole: processes that run are never joined by others, since all resume from the
same checkpoint anyway. So nothing here waits for anybody who is gone; only who is told to end (SIGTERM) gets
`jobs.grace_seconds` to save a checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from components.launch.elastic import Meeting, Ranks, Unmet, blamed, meet
from model.errors import Orphaned, Stopped, UserError
from model.plumbing import assets, attempts, cgroups, environment, leases, outcome, speech, storage
from model.plumbing.attempts import Attempt
from model.plumbing.jobs import JobSpec, read_spec
from model.plumbing.outcome import Outcome
from model.plumbing.parallel import cores

TICK = 0.1  # seconds between two looks at the ranks
GRACE = 15.0  # seconds that ranks get beyond `jobs.grace_seconds`
STUCK = 10.0  # seconds for those who are left when one has failed: they may wait for it in a collective
UPLOAD = 10.0  # seconds between two uploads of logs; ten times as long as one took, at least
HASTE = (3.0, 2)  # at the end: seconds for an answer of the store, and tries; a pod's grace is not endless
SETTLED = 2.0  # seconds between two looks whether rank 0, in another pod, has written the asset
MEETING = 30 * 86400.0  # seconds for all workers to be there: some may be queued, or pull their image
WANTED = 30.0  # seconds between two looks whether anybody still wants the asset
HANGS = 600.0  # seconds until ranks that nobody wants are ended, which should have seen it themselves
AGAINST_MEMORY = ("killed", "lost", "failed")  # kinds that may stand for: memory was over
FINAL = ("finished", "orphaned", "refused", "diverged")  # what being told to end does not explain


class Told:
    """Whether this process was told to end. Before there are ranks, being told raises `Stopped` at once."""

    def __init__(self) -> None:
        self.yes = False
        self.unwanted = False  # it is we ourselves who say so
        self._raises = True

    def listen(self) -> None:
        """From here on."""
        for number in (signal.SIGTERM, signal.SIGINT):  # as process 1 it gets none that it does not ask for
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        first, self.yes = not self.yes, True
        if first and self._raises:
            raise self._error()

    def only_note(self) -> None:
        """Raise nothing from here on.

        Raises:
            Stopped: it came, and a library has swallowed it.
        """
        self._raises = False
        if self.yes:
            raise self._error()

    def _error(self) -> Stopped:
        if self.unwanted:
            return Orphaned("nobody wants the asset any more; its processes had not started")
        return Stopped("told to end (SIGTERM), before its processes had started")


def main() -> None:
    """See above."""
    told = Told()
    told.listen()
    end = attempted(told)
    sys.stdout.flush()
    sys.stderr.flush()
    # Torch's stores and threads stay behind; one that falls over while Python winds up would change the code.
    os._exit(outcome.EXIT_CODES[end.kind])


def attempted(told: Told) -> Outcome:
    """Do the work of the spec that the command line names; say how it ended, everywhere."""
    attempt = None
    name = "job"
    try:
        if len(sys.argv) != 2:
            raise UserError("usage: python -m components.launch.entry SPEC_URI")
        spec = read_spec(sys.argv[1])
        name = spec.name
        if made := assets.find(spec.output):
            speech.reused(name, made.uri)
            return Outcome(kind="finished")
        attempt = _begin(spec)
        end = _run(spec, attempt, told)
    except Unmet as error:
        end = Outcome(kind="unmet", reason=str(error))
    except Exception as error:
        end = outcome.of(error)
        if end.kind == "failed" or environment.DEBUG.get():
            traceback.print_exc()
    if end.kind not in FINAL and attempt and _made(attempt, spec):
        end = Outcome(kind="finished", reason=end.reason)
    if not end.well:
        speech.say(name, f"worker {environment.WORKER.get()} ends: {end.kind}: {end.reason}")
    outcome.tell_container(end.line)  # what the first of the ranks said may not have been why
    if attempt:
        try:
            with storage.hasty(*HASTE):
                attempts.finish(attempt, end)
        except (UserError, OSError) as error:
            speech.warn(name, f"its outcome cannot be stored: {error}")
    return end


def _begin(spec: JobSpec) -> Attempt:
    from model.plumbing.checkpoints import Checkpointer

    newest = Checkpointer(spec.checkpoints).newest()
    return attempts.begin(
        spec.output,
        int(environment.WORKER.get()),
        environment.POD.get(),
        environment.POD_UID.get() or os.urandom(4).hex(),
        int(newest.rpartition("-")[2]) if newest else 0,
    )


def _made(attempt: Attempt, spec: JobSpec) -> bool:
    """Whether the asset is complete all the same: another worker may have been quicker to leave."""
    try:
        with storage.hasty(*HASTE):
            return assets.find(spec.output) is not None
    except (UserError, OSError):
        return False


def _run(spec: JobSpec, attempt: Attempt, told: Told) -> Outcome:
    given = environment.PROCESSES.get()
    processes = int(given) if given.isdigit() else spec.jobs.processes_per_worker
    least, _, most = environment.WORKERS.get().partition(":")
    settings = dict(one.split("=", 1) for one in environment.MEETING_SETTINGS.get().split(",") if "=" in one)
    speech.say(spec.name, f"worker {attempt.worker} meets the others at {environment.MEETING_POINT.get()}")
    with _while_wanted(spec, told):
        meeting = meet(
            spec.name,
            Path(spec.output).name,
            processes,
            (int(least), int(most or least)),
            attempt.worker == 0,
            float(settings.get("join_timeout", MEETING)),
        )
    speech.say(
        spec.name,
        f"worker {attempt.worker} runs ranks {meeting.ranks[0]} to {meeting.ranks[-1]} of {meeting.world}",
    )
    with tempfile.TemporaryDirectory(prefix=f"{spec.name}-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        outcomes = folder / "outcomes"
        told_all = {
            environment.OUTCOMES.name: str(outcomes),
            environment.LEASES.name: spec.leases,
            "OMP_NUM_THREADS": str(max(1, cores() // processes)),
            "PYTHONUNBUFFERED": "1",  # a line must arrive when it is written, not when a buffer is full
        }
        told_all |= dict(environment.starting("OMP_NUM_THREADS"))
        killed_before = cgroups.out_of_memory_kills()
        told.only_note()
        ranks = Ranks(
            [sys.executable, "-m", spec.module, sys.argv[1]],
            {rank: environment.of_a_child(told_all, meeting.told(rank)) for rank in meeting.ranks},
            folder,
        )
        with _kept(spec.name, attempt, ranks.logs), _while_wanted(spec, told, HANGS):
            meeting.watch()
            told_first = _watched(ranks, meeting, told, spec.jobs.grace_seconds + GRACE)
        left = {int(who): end for who, end in outcome.left_in(str(outcomes)).items()}
        end = _judged(ranks, left, folder, meeting)
    if end.well:
        with _while_wanted(spec, told, HANGS):
            end = _settled(spec, meeting, told)
    if told.unwanted and end.kind not in FINAL:
        said = f": {end.reason}" if end.reason else ""
        return end.model_copy(update={"kind": "orphaned", "reason": f"nobody wants the asset any more{said}"})
    if told_first and end.kind not in FINAL:
        # Whoever is told to end in the middle of something may break in any way; the next attempt will tell.
        reason = end.reason if end.kind == "stopped" else f"told to end (SIGTERM); {end.reason}"
        return end.model_copy(update={"kind": "stopped", "reason": reason})
    if end.kind in AGAINST_MEMORY and cgroups.out_of_memory_kills() > killed_before:
        limit = cgroups.memory_limit()
        has = f"the container may have {limit / 2**30:.3g} GiB" if limit else "its node has no more"
        why = f"(out of memory; {has}: raise jobs.memory)"
        known = outcome.SIGKILLED in end.reason
        reason = end.reason.replace(outcome.SIGKILLED, why) if known else f"{end.reason} {why}"
        return end.model_copy(update={"kind": "killed", "reason": reason})
    return end


@contextmanager
def _while_wanted(spec: JobSpec, told: Told, more: float = 0.0) -> Iterator[None]:
    """Tell this process to end when nobody wants the asset: rank 0, which looks as well, may not be there
    yet, or wait for a rank of a worker that has ended for this reason.

    Args:
        spec: of the job.
        told: learns of it.
        more: seconds for which that must have been so, beyond what a late lease may take.
    """
    over = threading.Event()

    def look() -> None:
        wait = 0.0
        unwanted = leases.Unwanted(spec.jobs.orphan_minutes, more)
        while not over.wait(wait):
            wait = WANTED
            try:
                age = leases.age(spec.leases) or 0.0
            except (UserError, OSError):
                age = 0.0  # nobody knows
            if unwanted.by(age) and not over.is_set():
                told.unwanted = True
                os.kill(os.getpid(), signal.SIGTERM)  # raises where the main thread is, if nothing runs yet
                return

    threading.Thread(target=look, name="wanted", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watched(ranks: Ranks, meeting: Meeting, told: Told, grace: float) -> bool:
    """Return when all ranks have ended, and do what it takes: whether we were told to before one failed."""
    until = float("inf")  # when those who are left are killed
    told_first = asked = patient = False
    while ranks.running():
        time.sleep(TICK)
        ranks.show(sys.stdout.buffer)
        now = time.monotonic()
        if told.yes and not (asked or ranks.broken):
            told_first = asked = patient = True
            ranks.signal(signal.SIGTERM)
            until = now + grace
        elif ranks.broken or meeting.lost:
            if not asked or patient:
                meeting.leave()
                ranks.signal(signal.SIGTERM)
                until = min(until, now + STUCK)
            asked, patient = True, False
        elif ranks.failures and not asked:  # all were told to end, in another pod: they know, and save
            asked = patient = True
            until = now + grace
        if now > until:
            ranks.signal(signal.SIGKILL)
    if ranks.broken:
        meeting.leave()
    ranks.show(sys.stdout.buffer)
    return told_first


def _settled(spec: JobSpec, meeting: Meeting, told: Told) -> Outcome:
    """How a worker ends whose ranks ended well: when the asset is complete, no sooner.

    To the operator an elastic job has succeeded with the first worker that has, and the others are deleted:
    rank 0 may just upload.

    Raises:
        Unavailable: the store does not say whether it is.
    """
    while True:
        if assets.find(spec.output):
            return Outcome(kind="finished")
        if 0 in meeting.ranks:
            reason = f"all processes ended well, but {spec.output} has no manifest"
            return Outcome(kind="failed", reason=reason)
        if told.yes:
            return Outcome(
                kind="stopped", reason="told to end (SIGTERM), before rank 0 had written the asset"
            )
        if meeting.lost:
            return Outcome(kind="lost", reason=meeting.lost)
        time.sleep(SETTLED)


def _judged(ranks: Ranks, left: Mapping[int, Outcome], folder: Path, meeting: Meeting) -> Outcome:
    for end in left.values():
        if end.kind == "orphaned":  # on which all agree
            return end
    if not ranks.failures:
        return Outcome(kind="finished")
    end = blamed(ranks.failures, left, folder)
    if meeting.lost and end.kind in ("stopped", "killed"):  # by us
        return end.model_copy(update={"kind": "lost", "reason": meeting.lost})
    return end


@contextmanager
def _kept(name: str, attempt: Attempt, logs: Mapping[int, Path]) -> Iterator[None]:
    """Keep logs in the store, while the block runs and with their last lines."""
    sent: dict[int, int] = {}
    over = threading.Event()

    def send() -> None:
        with storage.hasty(*HASTE):
            for rank, path in logs.items():
                size = path.stat().st_size
                if size != sent.get(rank, 0):
                    storage.upload_file(path, attempt.log(rank))
                    sent[rank] = size

    def keep() -> None:
        said = False
        wait = UPLOAD
        while not over.wait(wait):
            began = time.monotonic()
            try:
                send()
                said = False
            except (UserError, OSError) as error:
                if not said:
                    speech.warn(name, f"the logs of worker {attempt.worker} are not stored for now: {error}")
                said = True
            wait = max(UPLOAD, 10 * (time.monotonic() - began))

    thread = threading.Thread(target=keep, name="logs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2 * HASTE[0] * HASTE[1])
        try:
            send()
        except (UserError, OSError) as error:
            speech.warn(name, f"the last lines of worker {attempt.worker} are not stored: {error}")


if __name__ == "__main__":
    main()
