"""What a run's steps say, which KFP's API does not tell: from their pods; when those are gone, from MLflow.

Both give lines as a step prints them (`model.plumbing.speech`), so that a run on a cluster reads as one here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from components.launch import pods
from model.errors import UserError
from model.plumbing import attempts, speech, storage, tracking
from pipelines.cluster.kubectl import Kubectl, Object

MAIN = "main"  # container of a step's pod that runs ours
RUN = "pipeline/runid"  # label of a run's pods
DRIVER = ("pipelines.kubeflow.org/runtime-role", "driver")  # annotation of pods that run KFP's own


@dataclass
class Steps:
    """What the pods of a run say, looked up anew each time."""

    kubectl: Kubectl
    run: str  # id in KFP
    found: bool = False  # whether there was any pod
    _upto: dict[str, str] = field(default_factory=dict)  # time of the last line known, by the pod's UID
    _over: set[str] = field(default_factory=set)  # UIDs of pods that have ended and whose log was read
    _errors: dict[str, str] = field(default_factory=dict)  # the last line of a pod that names an error
    _waits: dict[str, str] = field(default_factory=dict)

    def look(self) -> list[str]:
        """The lines that came since the last look, in the order in which they were printed.

        Raises:
            UserError: the cluster does not answer, or does not let us look.
        """
        new: list[tuple[str, str]] = []
        for pod in self._pods():
            uid = pod["metadata"]["uid"]
            if uid in self._over:
                continue
            read = pods.read(pod, MAIN, 0)
            if read.waits and not read.ended:
                continue
            lines = self._log(read.name, uid)
            if lines is None:
                continue
            if read.ended:
                self._over.add(uid)
            new += lines
        return [text for _, text in sorted(new, key=lambda one: one[0])]

    def waits(self) -> list[str]:
        """What pods wait for, each said once."""
        new = []
        for pod in self._pods():
            read = pods.read(pod, MAIN, 0)
            if read.waits and read.waits != pods.STARTING and self._waits.get(read.uid) != read.waits:
                self._waits[read.uid] = read.waits
                new.append(f"pod {read.name} {read.waits}")
        return new

    def reason(self) -> str:
        """Why the run failed, as the pod says that failed first; "": none did, or it is gone."""
        failed = []
        for pod in self._pods():
            read = pods.read(pod, MAIN, 0)
            if read.ended and read.ended.code:
                said = self._errors.get(read.uid, "")
                if read.ended.reason in (pods.OUT_OF_MEMORY, pods.EVICTED) or not said:
                    said = pods.end_of(read).reason
                failed.append((read.ended.when, said))
        return min(failed, default=(0.0, ""))[1]

    def _pods(self) -> list[Object]:
        found = self.kubectl.objects("get", "pods", "-l", f"{RUN}={self.run}")
        ours = [one for one in found if DRIVER not in (one["metadata"].get("annotations") or {}).items()]
        self.found = self.found or bool(ours)
        return sorted(ours, key=lambda one: one["metadata"]["creationTimestamp"])

    def _log(self, pod: str, uid: str) -> list[tuple[str, str]] | None:
        """New lines of a pod, each with its time; None: its log cannot be read now."""
        known = self._upto.get(uid, "")
        since = [f"--since-time={known}"] if known else []
        try:
            printed = self.kubectl("logs", pod, "-c", MAIN, "--timestamps", *since)
        except UserError:  # it is being made, or just gone, or the cluster is away
            return None
        lines = []
        for line in printed.splitlines():
            when, _, text = line.partition(" ")
            if when > known:
                lines.append((when, text))
                if text.startswith("error: "):
                    self._errors[uid] = text.removeprefix("error: ")
        if lines:
            self._upto[uid] = lines[-1][0]
        return lines


def condensed(lines: Iterable[str], names: Sequence[str]) -> list[str]:
    """Lines without progress that later progress of the same step has overtaken."""
    kept: list[str] = []
    last: dict[str, int] = {}  # place of a step's line, if that is progress
    for line in lines:
        said = speech.read(line, names)
        if said is None:
            continue
        if said.count and said.name in last:
            kept[last[said.name]] = ""
        last.pop(said.name, None)
        if said.count:
            last[said.name] = len(kept)
        kept.append(line)
    return [line for line in kept if line]


def remembered(run: str, names: Sequence[str]) -> tuple[list[str], str]:
    """What MLflow and the store know of a run whose pods are gone.

    Args:
        run: id in KFP.
        names: of its steps.

    Returns:
        lines: as its steps might have said them.
        reason: why it failed; "": it did not.

    Raises:
        UserError: MLflow cannot be reached, or knows no such run.
    """
    found = tracking.pipeline_run(run)
    lines = []
    for one in found.steps:
        lines.append(f"{one.step} | started")
        if one.step in found.assets and not one.seconds:
            lines += _progress(found.assets[one.step], names)
        if one.seconds:
            lines.append(f"{one.step} | done in {one.seconds:.1f} s")
    return lines, found.failure


def _progress(asset: str, names: Sequence[str]) -> list[str]:
    """The last progress of a job whose logs are in the store."""
    first = [one for one in attempts.attempts(asset) if one.worker == 0]
    with suppress(storage.NotFound, IndexError):
        text = storage.read_bytes(first[-1].log(0)).decode(errors="replace")
        return condensed(text.splitlines(), names)[-1:]
    return []
