"""The loop around a job of a cluster: it looks, has `decide` say what to do, and does it.

It waits as long as it takes. What it must not miss, the ends of pods that the operator deletes at once, its
watches remember; all else is asked anew each time.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Protocol

from kubernetes.client.exceptions import ApiException  # type: ignore[import-untyped]

from components.launch import cluster, pods
from components.launch.cluster import ALL, DELETED, NETWORK, Cluster, Farewell, Kind, Object
from components.launch.decide import Create, End, Job, Remove, Seen, Wait, at_work, decide, waited
from components.launch.pods import Pod
from components.step import told_to_end
from model.errors import Unavailable, UserError
from model.plumbing import assets, attempts, speech, storage
from model.plumbing.jobs import JobSpec, write_spec
from model.plumbing.leases import Lease
from model.plumbing.outcome import Outcome

LOOKS = 10.0  # seconds between two looks when nothing is told to have changed
AT_LEAST = 0.2  # seconds between two looks when much is
FIRST_WORD, NEXT_WORD = 5.0, 60.0  # seconds of waiting after which it is said for what, and said again
LAST_LINES = 5.0  # seconds for the last lines of a log to arrive
ADOPTED_LINES = 10  # lines of a log that was there before us
STORE_AWAY = 600.0  # seconds that the store may be away when it is to say whether the asset is made
NO_LOG = (400, 404)  # answers about the log of a pod that is not there yet, or not any more


class JobKind(Protocol):
    """A module that knows one kind of job objects."""

    RESOURCE: Kind
    CONTAINER: str

    def name(self, spec: JobSpec) -> str:
        """The name of the job that makes an asset."""

    def labels(self, spec: JobSpec) -> dict[str, str]:
        """Labels of a job and of its pods."""

    def job(self, spec: JobSpec, spec_uri: str, image: str, namespace: str, labels: Mapping[str, str]) -> Any:
        """The object."""

    def read(self, found: Object) -> Job:
        """What an object that was found is."""

    def pods(self, name: str) -> str:
        """What selects a job's pods."""

    def worker(self, pod: Object) -> int:
        """A pod's number."""


def follow(spec: JobSpec, kind: JobKind) -> Outcome:
    """See `Backend.run`, by jobs of this kind."""
    with Lease(spec.leases, spec.name, spec.tracking.run) as lease:
        followed = Followed(spec, kind, cluster.here(lambda text: say(spec.name, text)), lease)
        with told_to_end(followed.leave):
            return followed.to_its_end()


class Followed:
    """A piece of work and the job that does it, whichever that is now."""

    def __init__(self, spec: JobSpec, kind: JobKind, server: Cluster, lease: Lease) -> None:
        self.spec, self.kind, self.server, self.lease = spec, kind, server, lease
        self.name = kind.name(spec)
        self.farewell = Farewell(server, kind.RESOURCE, self.name)
        self.changed = threading.Event()
        self.uid = ""  # of the job that we saw last; "" while one is made, or none was looked for yet
        self.alive = False  # it was at work when we saw it
        self.job: Job | None = None  # as a watch saw it last
        self.pods: dict[str, Pod] = {}  # of that job, all that ever were, by UID
        self.lock = threading.Lock()  # of the two above
        self.step = self.restarts = self.starts = 0  # the checkpoint at the last start, starts since without
        self.ran = 0.0
        self.looked = self.idle_since = time.time()
        self.waits_since = self.spoke = 0.0
        self.excused = False  # workers that start after the job was suspended have not failed
        self.before: set[str] = set()  # UIDs of pods that ran before we came
        self.log = Log(self)

    def to_its_end(self) -> Outcome:
        """Do what is decided until it is over."""
        server, kind = self.server, self.kind
        server.watch_kind(kind.RESOURCE, self.name, self._job_changed).start()
        server.watch_pods(kind.pods(self.name), self._pods_changed).start()
        self.log.start()
        try:
            while True:
                self.changed.clear()
                seen = self._look()
                action = decide(self.spec.jobs, seen)
                if isinstance(action, End):
                    return self._over(action)
                self._do(action, seen)
                time.sleep(AT_LEAST)
                self.changed.wait(self._until_next_word())
        finally:
            server.end.set()

    def leave(self) -> None:
        """Somebody tells this process to end: first of all the job goes, unless another step wants it."""
        if self.lease.last:
            self.farewell(self.uid)

    # ── acting ──────────────────────────────────────────────────────────────────────────────────────────

    def _do(self, action: Create | Wait | Remove, seen: Seen) -> None:
        if isinstance(action, Create):
            if action.why:
                say(self.spec.name, action.why)
            self._create()
        elif isinstance(action, Remove):
            say(self.spec.name, f"{action.why}; it is made anew")
            self.server.delete(self.kind.RESOURCE, self.name, self.uid)
        elif not action.why:
            self.waits_since = 0.0
        elif self._is_time_to_say():
            wait = decide(self.spec.jobs, replace(seen, events=self._events(seen)))
            why = wait.why if isinstance(wait, Wait) else action.why
            say(self.spec.name, waited(why, time.time() - self.waits_since))

    def _create(self) -> None:
        spec, kind = self.spec, self.kind
        body = kind.job(spec, write_spec(spec), self.server.image(), self.server.namespace, kind.labels(spec))
        self.uid, self.alive = "", False
        try:
            made = self.server.create(kind.RESOURCE, body)
        except ApiException as error:  # a quota is used up
            if self._is_time_to_say():
                say(spec.name, waited(cluster.told(error), time.time() - self.waits_since))
            self.changed.wait(LOOKS)
            return
        if made:
            self._meet(kind.read(made), of_us=True)
            pod = f"{spec.jobs.workers} x {spec.jobs.processes_per_worker} processes"
            say(spec.name, f"made job {self.name}: {pod}")
        self.changed.set()

    def _over(self, end: End) -> Outcome:
        """Let the last lines arrive, and clean up."""
        if self.uid:
            self.log.drain(LAST_LINES)
        if end.remove:
            self.server.delete(self.kind.RESOURCE, self.name, self.uid)
        return end.outcome

    def _is_time_to_say(self) -> bool:
        now = time.time()
        if not self.waits_since:
            self.waits_since, self.spoke = now, now - NEXT_WORD + FIRST_WORD
        if now - self.spoke < NEXT_WORD:
            return False
        self.spoke = now
        return True

    def _until_next_word(self) -> float:
        left = self.spoke + NEXT_WORD - time.time() if self.waits_since else LOOKS
        return min(LOOKS, max(left, 0.0))

    def _events(self, seen: Seen) -> tuple[str, ...]:
        return tuple(self.server.events(self.name, *(pod.name for pod in seen.pods[:3])))

    # ── looking ─────────────────────────────────────────────────────────────────────────────────────────

    def _look(self) -> Seen:
        found = self.server.get(self.kind.RESOURCE, self.name)
        job = self.kind.read(found) if found else None
        if job and job.uid != self.uid:
            self._meet(job)
        if job is None and self.alive and self.job and self.job.uid == self.uid and self.job.failed:
            job = replace(self.job, terminating=True)  # another step was quicker to delete it
        if job is None or job.finished:
            self._list_pods()
        made = (job is None or job.finished or job.terminating) and self._made()
        ours, self.alive = self.alive, self.alive or bool(job and not job.finished and not job.terminating)
        there, ended = self._pods()
        self._count_starts(job)
        return Seen(
            made=made,
            job=job,
            ours=ours,
            pods=there,
            end=pods.blamed(ended, self._told()) if self._wants_end(job) else None,
            restarts=self.restarts,
            ran=self._clock(job, there),
            waited=time.time() - self.idle_since,
        )

    def _wants_end(self, job: Job | None) -> bool:
        return bool(job and job.finished) or self.restarts > self.spec.jobs.max_restarts

    def _meet(self, job: Job, of_us: bool = False) -> None:
        """Another job than the one before."""
        with self.lock:
            self.uid, self.alive = job.uid, of_us
            self.pods = {uid: pod for uid, pod in self.pods.items() if pod.job == job.uid}
        self.ran, self.starts, self.restarts, self.step = 0.0, 0, 0, self._checkpoint()
        self.looked = self.idle_since = time.time()
        if of_us or job.finished or job.terminating:
            return
        say(self.spec.name, f"adopts {self.name}, a job that is there already")
        self._list_pods()
        there, ended = self._pods()
        moments = [job.created, *(pod.since for pod in there)]
        moments += [pod.ended.when for pod in ended if pod.ended]
        self.before = {pod.uid for pod in there if pod.since}
        if self._enough(job, there):
            self.ran = time.time() - max(pod.since for pod in there)
        with suppress(UserError, OSError):
            earlier = [one for one in attempts.attempts(self.spec.output) if one.when >= job.created]
            self.restarts = attempts.restarts(earlier)
            self.ran += sum(one.outcome.when - one.when for one in earlier if one.outcome and not one.worker)
            moments += [one.outcome.when if one.outcome else one.when for one in earlier]
        self.idle_since = min(self.idle_since, max(moments))

    def _clock(self, job: Job | None, there: tuple[Pod, ...]) -> float:
        """Count the time with all workers running; returns it."""
        now = time.time()
        if job and self._enough(job, there):
            self.ran += now - self.looked
        if job and at_work(self.spec.jobs, job, there):
            self.idle_since = now
        self.looked = now
        return self.ran

    def _enough(self, job: Job, there: tuple[Pod, ...]) -> bool:
        return sum(pod.running for pod in there) >= job.workers

    def _count_starts(self, job: Job | None) -> None:
        """Count the starts of workers in a row without a checkpoint between them."""
        with self.lock:
            workers = [pod.worker for pod in self.pods.values() if pod.job == self.uid]
        starts = max((workers.count(worker) for worker in set(workers)), default=0)
        if job and job.suspended:
            self.excused = True
        if job is None or starts <= self.starts:
            return
        if self.starts and not self.excused:
            step = self._checkpoint()
            self.restarts = 0 if step > self.step else self.restarts + (starts - self.starts)
            self.step = step
            if self.restarts <= self.spec.jobs.max_restarts:
                self._say_restart()
        self.starts, self.excused = starts, False

    def _say_restart(self) -> None:
        _, ended = self._pods()
        end = pods.blamed(ended, self._told())
        why = end.reason if end else "a worker was replaced"
        count = f"{self.restarts} of {self.spec.jobs.max_restarts} times without a new checkpoint"
        say(self.spec.name, f"{why}; its workers start again ({count})")

    def _checkpoint(self) -> int:
        """Steps done at the newest complete checkpoint; 0 where none is seen."""
        with suppress(UserError, OSError):
            names = storage.list_sizes(self.spec.checkpoints)
            found = [re.fullmatch(r"step-(\d+)/complete\.json", name) for name in names]
            return max((int(match[1]) for match in found if match), default=0)
        return 0

    def _made(self) -> bool:
        """Whether the asset is complete; the store may be away for a while."""
        began = time.monotonic()
        while True:
            try:
                return assets.find(self.spec.output) is not None
            except UserError as error:
                if time.monotonic() - began > STORE_AWAY or not isinstance(error, Unavailable):
                    raise
                say(self.spec.name, f"waits for the store: {error}")
                time.sleep(LOOKS)

    def _told(self) -> dict[str, Outcome]:
        """The outcomes that workers stored, by the UIDs of their pods."""
        with suppress(UserError, OSError):
            ends = {one.uri.rpartition("-")[2]: one.outcome for one in attempts.attempts(self.spec.output)}
            with self.lock:
                return {uid: end for uid in self.pods if (end := ends.get(uid[:8]))}
        return {}

    def _pods(self) -> tuple[tuple[Pod, ...], tuple[Pod, ...]]:
        """The job's pods: those that are there, by number, and all that have ended or gone."""
        with self.lock:
            ours = [pod for pod in self.pods.values() if pod.job == self.uid]
        there: dict[int, Pod] = {}
        for pod in sorted(ours, key=lambda one: (one.created, not one.gone)):
            if not pod.gone:
                there[pod.worker] = pod
        return tuple(there[number] for number in sorted(there)), tuple(p for p in ours if p.ended or p.gone)

    def worker_zero(self) -> Pod | None:
        """The newest pod of worker 0 that has run."""
        with self.lock:
            ours = [
                pod
                for pod in self.pods.values()
                if pod.job == self.uid and pod.worker == 0 and (pod.since or pod.ended)
            ]
        return max(ours, key=lambda pod: pod.created, default=None)

    # ── what watches tell; in their threads ─────────────────────────────────────────────────────────────

    def _job_changed(self, what: str, found: list[Object]) -> None:
        for one in found:
            with self.lock:
                self.job = self.kind.read(one)
        self.changed.set()

    def _pods_changed(self, what: str, found: list[Object]) -> None:
        self._remember(what, found)
        self.changed.set()

    def _remember(self, what: str, found: list[Object]) -> None:
        seen = [pods.read(one, self.kind.CONTAINER, self.kind.worker(one)) for one in found]
        with self.lock:
            if what == ALL:
                there = {pod.uid for pod in seen}
                self.pods = {
                    uid: pod if uid in there else replace(pod, gone=True) for uid, pod in self.pods.items()
                }
            for pod in seen:
                before = self.pods.get(pod.uid)
                if before and before.ended and not pod.ended:
                    pod = replace(pod, ended=before.ended)
                self.pods[pod.uid] = replace(pod, gone=True) if what == DELETED else pod

    def _list_pods(self) -> None:
        """Do not wait for a watch: the job has ended, and its pods say why."""
        self._remember(ALL, self.server.pods(self.kind.pods(self.name)))


class Log(threading.Thread):
    """Repeats what rank 0 prints, each line once, through dropped connections and new pods."""

    def __init__(self, followed: Followed) -> None:
        super().__init__(name="log", daemon=True)
        self.followed = followed
        self.done: set[str] = set()  # UIDs of pods whose last line was printed
        self.last, self.times = "", 0  # time of the last line, and lines of that time
        self.uid = ""

    def run(self) -> None:
        """Until nobody follows the job any more."""
        end, tries = self.followed.server.end, 0
        while not end.is_set():
            pod = self.followed.worker_zero()
            if pod is None or pod.uid in self.done:
                end.wait(AT_LEAST)
                continue
            try:
                self._repeat(pod)
                tries = 0
                if pod.ended or pod.gone:
                    self.done.add(pod.uid)
                end.wait(AT_LEAST)
            except (ApiException, *NETWORK) as error:
                status = error.status if isinstance(error, ApiException) else 0
                if status in NO_LOG and (pod.ended or pod.gone):
                    self.done.add(pod.uid)
                end.wait(max(AT_LEAST, cluster.pause(tries)))
                tries = min(tries + 1, 3)

    def _repeat(self, pod: Pod) -> None:
        if pod.uid != self.uid:
            self.uid, self.last, self.times = pod.uid, "", 0
        before, again = self.last, self.times  # what was printed of that time is not printed again
        server = self.followed.server
        last = ADOPTED_LINES if pod.uid in self.followed.before else 0
        for when, text in server.log(pod.name, self.followed.kind.CONTAINER, before, last):
            if when < before:
                continue
            if when == before and again:
                again -= 1
                continue
            self.times = self.times + 1 if when == self.last else 1
            self.last = when
            put(text)

    def drain(self, patience: float) -> None:
        """Wait until the last line is printed of a pod that has ended."""
        until = time.monotonic() + patience
        while time.monotonic() < until:
            pod = self.followed.worker_zero()
            if pod is None or not (pod.ended or pod.gone) or pod.uid in self.done:
                return
            time.sleep(0.1)


def say(name: str, text: str) -> None:
    """Say something of a step, if anybody listens."""
    with _heard():
        speech.say(name, text)


def put(line: str) -> None:
    """Repeat a worker's line."""
    with _heard():
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


@contextmanager
def _heard() -> Iterator[None]:
    """Whoever reads our output may have ended before us, as KFP's launcher has on Terminate."""
    try:
        yield
    except OSError:
        with suppress(OSError, ValueError):  # what is still in the buffer would be an error at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
