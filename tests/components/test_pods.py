"""What pods say, read as Kubernetes writes it."""

from __future__ import annotations

from typing import Any

import pytest

from components.launch import pods
from components.launch.pods import Ended, Pod, blamed, end_of
from model.plumbing.outcome import EXIT_CODES, Outcome

SECRET = 'secret "latent-gpt" not found'


def found(state: dict[str, Any] | None = None, phase: str = "Pending", **status: Any) -> dict[str, Any]:
    """A pod as the API gives it; times and fields as they were seen on a real one."""
    statuses = [{"name": "sidecar", "state": {"running": {}}}]
    if state is not None:
        statuses.append({"name": "pytorch", "state": state, "restartCount": 0})
    return {
        "metadata": {
            "name": "w-0", "uid": "1", "creationTimestamp": "2026-11-26T09:00:00Z",
            "ownerReferences": [{"uid": "other"}, {"uid": "j", "controller": True}],
        },
        "spec": {
            "containers": [
                {"name": "sidecar", "image": "s"},
                {"name": "pytorch", "image": "r/i:1", "resources": {"limits": {"memory": "300Mi"}}},
            ]
        },
        "status": {"phase": phase, "containerStatuses": statuses, **status},
    }  # fmt: skip


def read(*args: Any, **status: Any) -> Pod:
    return pods.read(found(*args, **status), "pytorch", 0)


def scheduled(reason: str, message: str = "") -> list[dict[str, Any]]:
    condition = {"type": "PodScheduled", "status": "False", "reason": reason}
    return [condition | ({"message": message} if message else {})]


@pytest.mark.parametrize(
    ("pod", "said", "hopeless"),
    [
        (read(conditions=scheduled("Unschedulable", "1 Insufficient nvidia.com/gpu.")),
         "is unschedulable: 1 Insufficient nvidia.com/gpu", False),
        (read(conditions=scheduled("SchedulingGated")), "is held back by a queue", False),
        (read({"waiting": {"reason": "ContainerCreating"}}), "is being started", False),
        (read(), "is being started", False),
        (read({"waiting": {"reason": "ImagePullBackOff", "message": "Back-off"}}),
         "cannot pull its image r/i:1: ImagePullBackOff: Back-off; check its name, the registry and"
         " jobs.image_pull_secrets", False),
        (read({"waiting": {"reason": "ErrImageNeverPull"}}),
         "cannot pull its image r/i:1: ErrImageNeverPull; allow the image to be pulled, or bring it to the"
         " node",
         True),
        (read({"waiting": {"reason": "CreateContainerConfigError", "message": SECRET}}),
         f"cannot be started: CreateContainerConfigError: {SECRET}", False),
        (read({"running": {"startedAt": "2026-11-26T09:00:05Z"}}, "Running"), "", False),
    ],
)  # fmt: skip
def test_what_a_pod_waits_for(pod: Pod, said: str, hopeless: bool) -> None:
    assert (pod.waits, pod.hopeless) == (said, hopeless)


def test_a_pod_that_runs() -> None:
    pod = read({"running": {"startedAt": "2026-11-26T09:00:05Z"}}, "Running")
    assert pod.running
    assert pod.since - pod.created == 5
    assert (pod.name, pod.uid, pod.job, pod.image, pod.memory) == ("w-0", "1", "j", "r/i:1", "300Mi")
    going = found({"running": {"startedAt": "2026-11-26T09:00:05Z"}}, "Running")
    going["metadata"]["deletionTimestamp"] = "2026-11-26T09:01:00Z"
    assert not pods.read(going, "pytorch", 0).running


def terminated(code: int, reason: str = "Error", message: str = "") -> dict[str, Any]:
    end = {"exitCode": code, "reason": reason, "finishedAt": "2026-11-26T09:01:00Z"}
    return {"terminated": end | ({"message": message} if message else {})}


REFUSED = Outcome(kind="refused", reason="batch_size 7 is odd").model_dump_json()
DIVERGED = Outcome(kind="diverged", reason="train/loss is nan at step 40").model_dump_json()
DEFECT = Outcome(kind="failed", reason="ZeroDivisionError: by zero").model_dump_json()
EVICTED = {"reason": "Evicted", "message": "The node was low on resource: ephemeral-storage. "}
PREEMPTED = [
    {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "preempting"}
]


@pytest.mark.parametrize(
    ("pod", "kind", "reason"),
    [
        (read(terminated(137, "OOMKilled"), "Failed"), "killed",
         "pod w-0 ran out of memory (OOMKilled): its limit is 300Mi; raise jobs.memory"),
        (read(terminated(202, "OOMKilled", DEFECT), "Failed"), "killed",
         "pod w-0 ran out of memory (OOMKilled): its limit is 300Mi; raise jobs.memory"),
        (read(terminated(1, message=REFUSED), "Failed"), "refused", "batch_size 7 is odd"),
        (read(terminated(1, message=DIVERGED), "Failed"), "diverged", "train/loss is nan at step 40"),
        (read(terminated(1, message=DEFECT), "Failed"), "failed",
         "pod w-0 failed: ZeroDivisionError: by zero"),
        (read(None, "Failed", **EVICTED), "stopped",
         "pod w-0 was evicted: The node was low on resource: ephemeral-storage"),
        (read(terminated(143), "Failed", conditions=PREEMPTED), "stopped", "pod w-0 was evicted: preempting"),
        (read(terminated(143), "Failed"), "stopped", "pod w-0 was told to end"),
        (read(terminated(137), "Failed"), "killed",
         "pod w-0 was killed (SIGKILL; most often the machine ran out of memory)"),
        (read(terminated(139), "Failed"), "killed", "pod w-0 was ended by signal 11 (SIGSEGV)"),
        (read(terminated(3, message="the last words"), "Failed"), "failed",
         "pod w-0 ended with exit code 3 (the last words)"),
        (read(terminated(128, "StartError", "exec: python: not found"), "Failed"), "failed",
         "pod w-0 (StartError) ended with exit code 128 (exec: python: not found)"),
        *((read(terminated(code), "Failed"), kind, f"pod w-0 ended with exit code {code} ({kind})")
          for kind, code in EXIT_CODES.items() if code >= 200),
        (read(terminated(0, "Completed"), "Succeeded"), "finished", ""),
    ],
)  # fmt: skip
def test_how_a_pod_ended(pod: Pod, kind: str, reason: str) -> None:
    end = end_of(pod)
    assert (end.kind, end.reason) == (kind, reason)


def test_what_a_pod_stored_says_why_where_its_message_does_not() -> None:
    told = Outcome(kind="unavailable", reason="S3 does not answer")
    assert end_of(read(terminated(203), "Failed"), told).reason == "S3 does not answer"
    assert end_of(Pod("w-0", "1", 0, 0.0, gone=True), told) == told
    whole = Outcome(kind="failed", reason="ZeroDivisionError: by zero", last_lines=("its trace",))
    assert end_of(read(terminated(1, message=DEFECT), "Failed"), whole).last_lines == ("its trace",)
    assert end_of(Pod("w-0", "1", 0, 0.0, gone=True)).reason == "pod w-0 was deleted"


def ended(worker: int, when: float, code: int = 1, reason: str = "Error", message: str = "") -> Pod:
    name, uid = f"w-{worker}", f"{worker}-{when}"
    return Pod(name, uid, worker, when - 100, memory="1Gi", ended=Ended(code, reason, message, when))


LOST = Outcome(kind="lost", reason="gloo").model_dump_json()
STOPPED = Outcome(kind="stopped", reason="told to end").model_dump_json()


@pytest.mark.parametrize(
    ("those", "who"),
    [
        ([ended(0, 1, 200, message=LOST), ended(1, 2, message=DEFECT)], "w-1 failed: Zero"),
        ([ended(0, 1, 143, message=STOPPED), ended(1, 2, 137, "OOMKilled")], "w-1 ran out of memory"),
        ([ended(0, 1, message=DEFECT), ended(1, 2, message=REFUSED)], "batch_size 7 is odd"),
        ([ended(0, 1, message=DEFECT), ended(1, 2, 137, "OOMKilled")], "w-1 ran out of memory"),
        ([ended(0, 2, 200, message=LOST), ended(1, 1, 200, message=LOST)], "w-1 failed: gloo"),
        ([ended(0, 2, 139), ended(1, 1, 134)], "w-1 was ended by signal 6"),
        # the last start counts, whatever those before it ended of
        ([ended(0, 1, 137, "OOMKilled"), ended(0, 500, message=DEFECT)], "w-0 failed: Zero"),
        ([ended(0, 1, 200, message=LOST), ended(1, 1, -1, "Evicted", "low on memory")], "w-1 was evicted"),
    ],
)
def test_who_is_to_blame(those: list[Pod], who: str) -> None:
    for order in (those, those[::-1]):
        end = blamed(order, {})
        assert end
        assert who in end.reason


def test_nobody_is_to_blame_where_all_ended_well() -> None:
    assert blamed([ended(0, 1, 0, "Completed"), ended(1, 1, 0, "Completed")], {}) is None
    assert blamed([], {}) is None
