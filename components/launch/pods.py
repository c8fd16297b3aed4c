"""What the pods of a job say: whether they run, what they wait for, why they ended.

A job's own conditions have no reasons. The pods do, until they are deleted; so each is kept as it was seen
last.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from model.plumbing import outcome
from model.plumbing.outcome import EXIT_CODES, Outcome

OUT_OF_MEMORY, EVICTED = "OOMKilled", "Evicted"
HOPELESS = {  # what no waiting mends
    "InvalidImageName": "give the image a valid name",
    "ErrImageNeverPull": "allow the image to be pulled, or bring it to the node",
}
IMAGE = ("ImagePullBackOff", "ErrImagePull", "RegistryUnavailable", *HOPELESS)
SILENT = ("", "ContainerCreating", "PodInitializing")  # of a container that waits: on its way
STARTING = "is being started"  # what is said of it
CAUSES = ("lost", "unmet", "stopped")  # kinds of outcome whose cause is elsewhere


@dataclass(frozen=True)
class Ended:
    """How a worker's container, or its pod, ended."""

    code: int  # exit code; -1: there is none
    reason: str  # in Kubernetes' word, e.g. OOMKilled
    message: str  # what the container left, or what the node says
    when: float  # seconds since 1970


@dataclass(frozen=True)
class Pod:
    """A worker's pod, as it was seen last."""

    name: str
    uid: str
    worker: int  # its number in the job
    created: float  # seconds since 1970
    job: str = ""  # the UID of its job
    image: str = ""
    memory: str = ""  # its limit
    since: float = 0.0  # its container runs, in seconds since 1970; 0: it does not
    waits: str = ""  # for what, if it does
    hopeless: bool = False  # whether it would wait for ever
    ended: Ended | None = None
    gone: bool = False  # deleted, or about to be

    @property
    def running(self) -> bool:
        """Whether its container runs."""
        return self.since > 0 and not self.ended and not self.gone


def read(found: Mapping[str, Any], container: str, worker: int) -> Pod:
    """A pod that was found.

    Args:
        found: the pod.
        container: the name of the worker's.
        worker: its number in the job.
    """
    meta, status = found["metadata"], found.get("status", {})
    (spec,) = (one for one in found["spec"]["containers"] if one["name"] == container)
    state: dict[str, Any] = {}
    for one in status.get("containerStatuses") or []:
        if one["name"] == container:
            state = one.get("state") or {}
    image = spec.get("image", "")
    waits, hopeless = _waits(status, state, image)
    return Pod(
        name=meta["name"],
        uid=meta["uid"],
        worker=worker,
        created=seconds(meta["creationTimestamp"]),
        job=next((one["uid"] for one in meta.get("ownerReferences") or [] if one.get("controller")), ""),
        image=image,
        memory=spec.get("resources", {}).get("limits", {}).get("memory", ""),
        since=seconds(state["running"].get("startedAt")) if "running" in state else 0.0,
        waits=waits,
        hopeless=hopeless,
        ended=_ended(status, state),
        gone="deletionTimestamp" in meta,
    )


def _waits(status: Mapping[str, Any], state: Mapping[str, Any], image: str) -> tuple[str, bool]:
    if status.get("phase", "Pending") != "Pending" or "running" in state:
        return "", False
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            why = {"Unschedulable": "is unschedulable", "SchedulingGated": "is held back by a queue"}
            return _sentence(why.get(condition.get("reason", ""), "is not scheduled"), condition), False
    waiting = state.get("waiting", {})
    reason = waiting.get("reason", "")
    if reason in IMAGE:
        hint = HOPELESS.get(reason, "check its name, the registry and jobs.image_pull_secrets")
        return f"{_sentence(f'cannot pull its image {image}: {reason}', waiting)}; {hint}", reason in HOPELESS
    if reason in SILENT:
        return STARTING, False
    return _sentence(f"cannot be started: {reason}", waiting), False


def _sentence(start: str, says: Mapping[str, Any]) -> str:
    message = " ".join(says.get("message", "").split())[:300].rstrip(".")
    return f"{start}: {message}" if message else start


def _ended(status: Mapping[str, Any], state: Mapping[str, Any]) -> Ended | None:
    end = state.get("terminated")
    disrupted = next(
        (
            one
            for one in status.get("conditions") or []
            if one["type"] == "DisruptionTarget" and one["status"] == "True"
        ),
        None,
    )
    failed = status.get("phase") in ("Failed", "Succeeded")
    if not end and not failed:
        return None
    end = end or {}
    reason, message = end.get("reason", ""), end.get("message", "")
    if status.get("reason"):  # of the pod: the node's word, as for an eviction
        reason, message = status["reason"], status.get("message", "")
    elif disrupted and end.get("exitCode") != 0:
        reason, message = EVICTED, disrupted.get("message", "")
    return Ended(end.get("exitCode", -1), reason, message, seconds(end.get("finishedAt")))


def seconds(time: str | None) -> float:
    """A time as Kubernetes writes it, in seconds since 1970; 0 for none."""
    return datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp() if time else 0.0


# ── how it came to that ─────────────────────────────────────────────────────────────────────────────────


def end_of(pod: Pod, told: Outcome | None = None) -> Outcome:
    """How a worker ended, with cause and remedy.

    Args:
        pod: the worker's, which has ended.
        told: what it stored of its end, if it did.
    """
    ended = pod.ended
    if ended is None:
        return told or Outcome(kind="stopped", reason=f"pod {pod.name} was deleted")
    if ended.reason == OUT_OF_MEMORY:
        return Outcome(
            kind="killed",
            reason=f"pod {pod.name} ran out of memory (OOMKilled): its limit is {pod.memory or 'the node'};"
            " raise jobs.memory",
            last_lines=told.last_lines if told else (),
            when=ended.when,
        )
    said = told or _message(ended)  # the same, but a message is cut off
    if said and ended.reason != EVICTED:
        if said.well or said.kind == "orphaned":
            return said
        return said.model_copy(update={"reason": said.told_of(f"pod {pod.name}")})
    if ended.reason == EVICTED:
        what = " ".join(ended.message.split())[:300].rstrip(".")
        return Outcome(kind="stopped", reason=f"pod {pod.name} was evicted: {what}", when=ended.when)
    return _of_code(pod.name, ended)


def _message(ended: Ended) -> Outcome | None:
    """The outcome that the container left as its termination message."""
    with suppress(ValidationError):
        return Outcome.model_validate_json(ended.message)
    return None


def _of_code(name: str, ended: Ended) -> Outcome:
    what = " ".join(ended.message.split())[:300]
    log = [what] if what else []
    number = ended.code - 128
    if ended.code == 0:
        return Outcome(kind="finished", when=ended.when)
    with suppress(ValueError):
        if number == signal.SIGTERM:
            return Outcome(kind="stopped", reason=f"pod {name} was told to end", when=ended.when)
        return outcome.of_status(f"pod {name}", -signal.Signals(number), log)
    for kind, code in EXIT_CODES.items():
        if code == ended.code >= 128:
            how = f"pod {name} ended with exit code {ended.code} ({kind})"
            return Outcome(kind=kind, reason=f"{how}: {what}" if what else how, when=ended.when)
    if ended.code < 0:
        return Outcome(kind="failed", reason=f"pod {name} failed: {ended.reason} {what}".strip())
    because = f" ({ended.reason})" if ended.reason not in ("", "Error") else ""
    return outcome.of_status(f"pod {name}{because}", ended.code, log)


def blamed(pods: Iterable[Pod], told: Mapping[str, Outcome]) -> Outcome | None:
    """How that worker ended which made its job fail or start again; None if none has ended badly.

    When one ends, the others lose it. So it is the first that refused its input or ran out of memory; else
    the first whose cause is not elsewhere; else the first.

    Args:
        pods: of the job, those before them included.
        told: the outcomes that pods stored, by the pod's UID.
    """
    last: dict[int, Pod] = {}
    for pod in sorted(pods, key=lambda one: one.created):
        if pod.ended or (pod.gone and pod.worker not in last):
            last[pod.worker] = pod
    ends = [
        (pod, end_of(pod, told.get(pod.uid)))
        for pod in sorted(last.values(), key=lambda one: one.ended.when if one.ended else 0.0)
    ]
    bad = [(pod, end) for pod, end in ends if not end.well]
    for cause in (
        [end for _, end in bad if end.kind in ("refused", "diverged")],
        [end for pod, end in bad if pod.ended and pod.ended.reason == OUT_OF_MEMORY],
        [end for _, end in bad if end.kind not in CAUSES],
        [end for pod, end in bad if pod.ended and pod.ended.reason == EVICTED],
        [end for _, end in bad],
    ):
        if cause:
            return cause[0]
    return None
