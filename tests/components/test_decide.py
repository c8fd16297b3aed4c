"""What to do next about a job: the table."""

from __future__ import annotations

from typing import Any

import pytest

from components.launch.decide import Action, Create, End, Job, Remove, Seen, Wait, decide, waited
from components.launch.pods import Ended, Pod
from model.config import JobConfig
from model.plumbing.outcome import Outcome

HOUR = 3600.0
KILLED = Outcome(kind="killed", reason="pod w-1 ran out of memory")
ORPHANED = Outcome(kind="orphaned", reason="nobody wants it")
FINISHED = Outcome(kind="finished")


def job(**states: Any) -> Job:
    return Job(uid="u", created=0.0, workers=2, **states)


def pod(worker: int = 0, **states: Any) -> Pod:
    return Pod(name=f"w-{worker}", uid=f"u{worker}", worker=worker, created=0.0, **states)


RUNNING = (pod(0, since=1.0), pod(1, since=1.0))
ONE = (pod(0, since=1.0), pod(1, waits="is unschedulable: 1 Insufficient cpu"))
STARTING = (pod(0, waits="is being started"), pod(1, waits="is being started"))
NO_ROOM = (pod(0, waits="is being started"), pod(1, waits="is unschedulable: 1 Insufficient cpu"))
GONE = (pod(0, since=1.0), pod(1, since=1.0, gone=True))
ENDED = (pod(0, since=1.0), pod(1, since=1.0, ended=Ended(137, "OOMKilled", "", 2.0)))
BAD_NAME = (pod(0, waits="cannot pull its image ?: InvalidImageName", hopeless=True),)
EARLIER = "the job before this one"
MISSING = "all workers ended well, but the asset has no manifest"


def failed(reason: str) -> Outcome:
    return Outcome(kind="failed", reason=reason)


TABLE: dict[str, tuple[Seen, Action]] = {
    # nothing there
    "no job": (Seen(False, None), Create()),
    "a job that we followed is gone": (
        Seen(False, None, ours=True), Create("its job is gone and is made anew"),
    ),
    # the asset is there
    "made, no job": (Seen(True, None), End(FINISHED)),
    "made, its job runs on": (Seen(True, job()), End(FINISHED)),
    "made, its job succeeded, which its TTL removes": (Seen(True, job(succeeded=True)), End(FINISHED)),
    "made, its job failed, which nobody removes": (Seen(True, job(failed=True)), End(FINISHED, remove=True)),
    "made, its failed job is going": (Seen(True, job(failed=True, terminating=True)), End(FINISHED)),
    # it waits
    "an earlier job is going": (Seen(False, job(terminating=True)), Wait("an earlier job is being deleted")),
    "held by a queue": (
        Seen(False, job(suspended=True, queue="gpus")), Wait("queue 'gpus' has not admitted the job"),
    ),
    "held by hand": (Seen(False, job(suspended=True), waited=1e9), Wait("the job is suspended")),
    "no pods yet": (
        Seen(False, job()), Wait("its pods are not made yet; does the training operator run?"),
    ),
    "no pods, and why": (
        Seen(False, job(), events=("old", "FailedCreatePod: exceeded quota")),
        Wait("FailedCreatePod: exceeded quota"),
    ),
    "no room": (
        Seen(False, job(), pods=NO_ROOM, waited=1e9),
        Wait("pod w-1 is unschedulable: 1 Insufficient cpu (and 1 more)"),
    ),
    "starting": (Seen(False, job(), pods=STARTING), Wait("pod w-0 is being started (and 1 more)")),
    "starting, and why not": (
        Seen(False, job(), pods=STARTING, events=("FailedMount: no secret",)),
        Wait("pod w-0 is being started: FailedMount: no secret (and 1 more)"),
    ),
    "one of two": (Seen(False, job(), pods=ONE), Wait("pod w-1 is unschedulable: 1 Insufficient cpu")),
    "one of two was deleted": (Seen(False, job(), pods=GONE), Wait("1 of 2 workers run")),
    "one of two is to be started again": (Seen(False, job(), pods=ENDED), Wait("1 of 2 workers run")),
    "an image that is none": (
        Seen(False, job(), pods=BAD_NAME),
        End(failed("pod w-0 cannot pull its image ?: InvalidImageName"), remove=True),
    ),
    # it runs
    "all run": (Seen(False, job(), pods=RUNNING, ours=True), Wait()),
    "all run, a little before the deadline": (Seen(False, job(), pods=RUNNING, ran=71.9 * HOUR), Wait()),
    "the deadline": (
        Seen(False, job(), pods=RUNNING, ran=72.1 * HOUR),
        End(
            failed(
                "not done after jobs.deadline_hours (72) with all workers running; raise it, and it goes on"
                " from the last checkpoint"
            ),
            remove=True,
        ),
    ),
    "as many starts as are allowed": (Seen(False, job(), pods=RUNNING, restarts=3, end=KILLED), Wait()),
    "too many": (
        Seen(False, job(), pods=RUNNING, restarts=4, end=KILLED),
        End(
            KILLED.model_copy(
                update={
                    "reason": "pod w-1 ran out of memory; started 5 times without a new checkpoint"
                    " (jobs.max_restarts)"
                }
            ),
            remove=True,
        ),
    ),
    # it has ended
    "succeeded, no asset, ours": (
        Seen(False, job(succeeded=True), ours=True), End(failed(MISSING), remove=True),
    ),
    "succeeded, no asset, an earlier one": (
        Seen(False, job(succeeded=True)), Remove(f"{EARLIER} failed: {MISSING}"),
    ),
    "orphaned, an earlier one": (
        Seen(False, job(succeeded=True), end=ORPHANED), Remove(f"{EARLIER} ended when nobody wanted it"),
    ),
    "orphaned, while we follow": (
        Seen(False, job(succeeded=True), end=ORPHANED, ours=True),
        Remove(f"{EARLIER} ended when nobody wanted it"),
    ),
    "orphaned and going": (
        Seen(False, job(succeeded=True, terminating=True), end=ORPHANED),
        Wait("an earlier job is being deleted"),
    ),
    "failed, ours": (Seen(False, job(failed=True), ours=True, end=KILLED), End(KILLED, remove=True)),
    "failed, ours, another step deletes it": (
        Seen(False, job(failed=True, terminating=True), ours=True, end=KILLED), End(KILLED),
    ),
    "failed, an earlier one": (
        Seen(False, job(failed=True), end=KILLED), Remove(f"{EARLIER} failed: {KILLED.reason}"),
    ),
    "failed, an earlier one that is going": (
        Seen(False, job(failed=True, terminating=True), end=KILLED), Wait("an earlier job is being deleted"),
    ),
    "failed, and nobody is left to say why": (
        Seen(False, job(failed=True), ours=True),
        End(failed("the job failed; of its 2 workers none is left to say why"), remove=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_what_to_do_next(case: str) -> None:
    seen, expected = TABLE[case]
    found = decide(JobConfig(), seen)
    if isinstance(found, End) and isinstance(expected, End):  # but when they were made
        assert found.outcome.model_copy(update={"when": 0.0}) == expected.outcome.model_copy(
            update={"when": 0.0}
        )
        assert found.remove == expected.remove
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (Seen(False, job(), pods=NO_ROOM, waited=1.1 * HOUR), "pod w-1 is unschedulable: 1 Insufficient cpu"),
        (Seen(False, job(suspended=True, queue="gpus"), waited=1.1 * HOUR), "queue 'gpus' has not admitted"),
        (Seen(False, job(), waited=1.1 * HOUR), "its pods are not made yet"),
    ],
)
def test_it_waits_no_longer_than_pending_hours_where_they_are_set(seen: Seen, why: str) -> None:
    assert isinstance(decide(JobConfig(pending_hours=1.2), seen), Wait)
    ended = decide(JobConfig(pending_hours=1), seen)
    assert isinstance(ended, End)
    assert ended.remove
    assert ended.outcome.reason.startswith(f"not started within jobs.pending_hours (1): {why}")


def test_a_job_that_may_run_with_fewer_workers_runs_with_fewer() -> None:
    assert decide(JobConfig(workers=2, min_workers=1), Seen(False, job(), pods=ONE)) == Wait()
    assert decide(JobConfig(workers=2), Seen(False, job(), pods=ONE)) != Wait()


def test_for_how_long_it_waits_is_said_as_people_say_it() -> None:
    assert waited("no room", 125) == "waits since 2m05s: no room"
