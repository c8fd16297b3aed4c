"""What to do next about a job, decided from what is seen: a pure function, and its words.

The loop that looks and acts is `follow.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from components.launch.pods import Pod
from model.config import JobConfig
from model.plumbing import speech
from model.plumbing.outcome import Outcome


@dataclass(frozen=True)
class Job:
    """A job object of a cluster."""

    uid: str
    created: float  # seconds since 1970
    workers: int  # pods
    terminating: bool = False  # it is being deleted
    suspended: bool = False  # as a queue leaves what it has not admitted
    failed: bool = False
    succeeded: bool = False
    queue: str = ""

    @property
    def finished(self) -> bool:
        """Whether it has ended, one way or the other."""
        return self.failed or self.succeeded


@dataclass(frozen=True)
class Seen:
    """All that a decision rests on."""

    made: bool  # the asset is complete
    job: Job | None
    ours: bool = False  # the job was alive when we looked before: how it ends, we answer for
    pods: tuple[Pod, ...] = ()  # of its workers, those that are there
    end: Outcome | None = None  # of the worker that is to blame, where some have ended
    restarts: int = 0  # in a row, without a checkpoint between them
    ran: float = 0.0  # seconds with all workers running
    waited: float = 0.0  # seconds without
    events: tuple[str, ...] = ()  # what the cluster says of the job, the newest last


@dataclass(frozen=True)
class Create:
    """Make the job."""

    why: str = ""


@dataclass(frozen=True)
class Wait:
    """Look again when something changes."""

    why: str = ""  # what is waited for; empty while the job works


@dataclass(frozen=True)
class Remove:
    """Delete the job, and wait until it is gone: it is made anew."""

    why: str


@dataclass(frozen=True)
class End:
    """It is over."""

    outcome: Outcome
    remove: bool = False  # the job stays for ever unless we delete it


Action = Create | Wait | Remove | End


def at_work(jobs: JobConfig, job: Job, pods: Iterable[Pod]) -> bool:
    """Whether so many workers run that the job goes on."""
    return sum(pod.running for pod in pods) >= (jobs.min_workers or job.workers)


def decide(jobs: JobConfig, seen: Seen) -> Action:
    """What to do next."""
    job = seen.job
    if seen.made:
        stays = job is not None and job.failed and not job.terminating
        return End(Outcome(kind="finished"), remove=stays)
    if job is None:
        return Create("its job is gone and is made anew" if seen.ours else "")
    if job.finished:
        return _finished(job, seen)
    if job.terminating:
        return Wait("an earlier job is being deleted")
    if seen.restarts > jobs.max_restarts:
        end = seen.end or Outcome(kind="failed", reason="its workers end again and again")
        often = f"; started {seen.restarts + 1} times without a new checkpoint (jobs.max_restarts)"
        return End(end.model_copy(update={"reason": end.reason + often}), remove=True)
    if seen.ran > jobs.deadline_hours * 3600:
        reason = f"not done after jobs.deadline_hours ({jobs.deadline_hours:g}) with all workers running"
        reason += "; raise it, and it goes on from the last checkpoint"
        return End(Outcome(kind="failed", reason=reason), remove=True)
    if at_work(jobs, job, seen.pods):
        return Wait()
    why = _waits_for(job, seen)
    for pod in seen.pods:
        if pod.hopeless:
            return End(Outcome(kind="failed", reason=why), remove=True)
    if jobs.pending_hours and seen.waited > jobs.pending_hours * 3600:
        reason = f"not started within jobs.pending_hours ({jobs.pending_hours:g}): {why}"
        return End(Outcome(kind="failed", reason=reason), remove=True)
    return Wait(why)


def _finished(job: Job, seen: Seen) -> Action:
    if job.succeeded:
        if seen.end and seen.end.kind == "orphaned":
            return _away(job, "the job before this one ended when nobody wanted it")
        end = Outcome(kind="failed", reason="all workers ended well, but the asset has no manifest")
    else:
        end = seen.end or Outcome(
            kind="failed", reason=f"the job failed; of its {job.workers} workers none is left to say why"
        )
    if seen.ours:
        return End(end, remove=not job.terminating)
    return _away(job, f"the job before this one failed: {end.reason}")


def _away(job: Job, why: str) -> Action:
    """It is not what we want, whether or not somebody deletes it already."""
    return Wait("an earlier job is being deleted") if job.terminating else Remove(why)


def _waits_for(job: Job, seen: Seen) -> str:
    """What a job waits for, in one line."""
    if job.suspended:
        return f"queue '{job.queue}' has not admitted the job" if job.queue else "the job is suspended"
    waiting = [pod for pod in seen.pods if pod.waits and not pod.gone]
    silent = [pod for pod in waiting if pod.waits == "is being started"]
    for pod in (*(pod for pod in waiting if pod not in silent), *silent):
        others = len(waiting) - 1
        more = f" (and {others} more)" if others else ""
        said = f": {seen.events[-1]}" if pod in silent and seen.events else ""
        return f"pod {pod.name} {pod.waits}{said}{more}"
    if seen.events:
        return seen.events[-1]
    running = sum(pod.running for pod in seen.pods)
    if not seen.pods:
        return "its pods are not made yet; does the training operator run?"
    return f"{running} of {job.workers} workers run"


def waited(why: str, seconds: float) -> str:
    """What is said of it while it lasts."""
    return f"waits since {speech.duration(seconds)}: {why}"
