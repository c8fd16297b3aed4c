"""A Kubernetes API server as far as a launcher speaks to one, with an operator that a test plays, and faults.

It keeps objects, versions and what happened; it schedules nothing and runs nothing. What it says in which
words was read off a real one (`../shared/cluster`).
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import http.server
import json
import re
import select
import socket
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

Object = dict[str, Any]

JOBS, PODS, EVENTS = "pytorchjobs", "pods", "events"
KINDS = {  # what is there, by the name in its paths
    JOBS: ("kubeflow.org/v1", "PyTorchJob"),
    PODS: ("v1", "Pod"),
    EVENTS: ("v1", "Event"),
    "configmaps": ("v1", "ConfigMap"),
    "secrets": ("v1", "Secret"),
    "resourcequotas": ("v1", "ResourceQuota"),
    "deployments": ("apps/v1", "Deployment"),
    "workflows": ("argoproj.io/v1alpha1", "Workflow"),
    "nodes": ("v1", "Node"),  # of no namespace, but of the same table here
}
REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}
LABELS = "training.kubeflow.org"
USER = "system:serviceaccount:kubeflow:pipeline-runner"


class Refused(Exception):
    """A request is answered with a Status."""

    def __init__(self, code: int, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.code, self.reason = code, reason or REASONS.get(code, "Unknown")

    @property
    def status(self) -> Object:
        """As Kubernetes says it."""
        told = {"status": "Failure", "message": str(self), "reason": self.reason, "code": self.code}
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, **told}


@dataclass
class Fault:
    """What is done to the next requests that it meets, instead of answering them."""

    status: int  # 0: the connection is closed without a word
    times: int
    method: str  # "" is any
    where: str  # part of the path with its query; "" is any
    done: bool  # the request is carried out all the same, and only its answer is lost
    headers: dict[str, str]


@dataclass(frozen=True)
class Request:
    """One that came."""

    method: str
    path: str  # with its query
    body: Object
    when: float  # seconds of time.monotonic


def now() -> str:
    """The time as Kubernetes writes it: whole seconds."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class ApiServer:
    """On loopback, while the block runs. Methods but `__init__` may be called from any thread."""

    def __init__(self, namespace: str = "kubeflow") -> None:
        self.namespace = namespace
        self.kinds = dict(KINDS)  # take one out: that API is not installed
        self.requests: list[Request] = []
        self.denied: set[tuple[str, str]] = set()  # (verb, resource, e.g. "pods/log") that are forbidden
        self.token = ""  # that clients must show; "" is none
        self.refuses = ""  # why no pod is made
        self.warns = ""  # of a pod that is made
        self.lingers = 0.2  # seconds between the deletion of a job or pod and its end
        self.on_create: Callable[[Object], None] | None = None  # the operator sees a new job
        self._objects: dict[tuple[str, str], Object] = {}
        self._history: list[tuple[int, str, str, Object]] = []  # version, type of the event, plural, object
        self._logs: dict[str, list[tuple[str, str]]] = {}  # by pod's UID: (time, line)
        self._version = 100
        self._oldest = 0  # versions before are forgotten: 410
        self._faults: list[Fault] = []
        self._dropped = 0  # how often all streams were broken off
        self._quiet_until = 0.0
        self._changed = threading.Condition(threading.RLock())
        self._end = threading.Event()

    # ── what a test does as the operator and the kubelet ────────────────────────────────────────────────

    def job(self, name: str) -> Object:
        """A copy of a job's object. Raises KeyError: there is none."""
        return self.get(JOBS, name)

    def get(self, plural: str, name: str) -> Object:
        """A copy of any object. Raises KeyError: there is none."""
        with self._changed:
            return copy.deepcopy(self._objects[plural, name])

    def names(self, plural: str) -> list[str]:
        """Of all objects of a kind, sorted."""
        with self._changed:
            return sorted(name for kind, name in self._objects if kind == plural)

    def add(self, plural: str, name: str, **content: Any) -> None:
        """Make any object, e.g. `add("configmaps", "latent-gpt", data={...})`."""
        self._create(plural, {"metadata": {"name": name}, **content})

    def condition(self, job: str, kind: str, message: str = "", status: str = "True") -> None:
        """The operator gives a job a condition, e.g. Created, Running, Restarting, Suspended, Failed."""

        def change(found: Object) -> None:
            told = found.setdefault("status", {})
            conditions = [one for one in told.get("conditions", []) if one["type"] != kind]
            reason = f"PyTorchJob{kind}"
            new = {"type": kind, "status": status, "reason": reason, "message": message}
            times = {"lastTransitionTime": now(), "lastUpdateTime": now()}
            told["conditions"] = [*conditions, new | times]
            if kind == "Succeeded":
                told["completionTime"] = now()

        self._change(JOBS, job, change)

    def pod(
        self,
        job: str,
        number: int,
        phase: str = "Running",
        *,
        terminated: Object | None = None,
        waiting: Object | None = None,
        unschedulable: str = "",
        reason: str = "",
        message: str = "",
    ) -> str:
        """Make a job's worker, or change how it is; returns its name.

        Args:
            job: its job's name.
            number: of the worker.
            phase: Pending, Running, Succeeded or Failed.
            terminated: how its container ended, e.g. `{"exitCode": 137, "reason": "OOMKilled"}`.
            waiting: why its container does not run, e.g. `{"reason": "ImagePullBackOff", "message": "…"}`.
            unschedulable: what the scheduler says of a pod without a node.
            reason: of the pod's own status, e.g. Evicted.
            message: to it.
        """
        name = f"{job}-worker-{number}"
        with self._changed:
            if (PODS, name) not in self._objects:
                self._make_pod(name, self._objects[JOBS, job], number)
            self._change(
                PODS,
                name,
                lambda found: found.update(
                    status=_pod_status(found, phase, terminated, waiting, unschedulable, reason, message)
                ),
            )
        return name

    def _make_pod(self, name: str, owner: Object, number: int) -> None:
        template = copy.deepcopy(owner["spec"]["pytorchReplicaSpecs"]["Worker"]["template"])
        labels = {
            f"{LABELS}/job-name": owner["metadata"]["name"],
            f"{LABELS}/operator-name": "pytorchjob-controller",
            f"{LABELS}/replica-index": str(number),
            f"{LABELS}/replica-type": "worker",
        }
        metadata = template.get("metadata") or {}
        owned = {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
        metadata |= {
            "name": name,
            "labels": {**(metadata.get("labels") or {}), **labels},
            "ownerReferences": [owned],
        }
        status = {"phase": "Pending"}
        self._create(PODS, {"metadata": metadata, "spec": template["spec"], "status": status})

    def restart(self, job: str, number: int, phase: str = "Pending") -> str:
        """The operator replaces a worker by a new pod of the same name, as under restartPolicy ExitCode."""
        with self._changed:
            self.remove(PODS, f"{job}-worker-{number}")
            return self.pod(job, number, phase)

    def remove(self, plural: str, name: str) -> None:
        """An object is gone, at once; its pods with a job."""
        with self._changed:
            found = self._objects.pop((plural, name), None)
            if found is None:
                return
            self._happened("DELETED", plural, found)
            for kind, other in list(self._objects):
                owners = self._objects[kind, other]["metadata"].get("ownerReferences", [])
                if any(owner["uid"] == found["metadata"]["uid"] for owner in owners):
                    self._delete(kind, other)

    def log(self, pod: str, *lines: str) -> None:
        """The container of a pod prints."""
        with self._changed:
            uid = self._objects[PODS, pod]["metadata"]["uid"]
            for line in lines:
                stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")
                self._logs.setdefault(uid, []).append((stamp, line))
            self._changed.notify_all()

    def event(self, plural: str, name: str, reason: str, message: str, kind: str = "Warning") -> None:
        """Something happens to an object, e.g. FailedScheduling to a pod, and is told as an event."""
        with self._changed:
            about = self._objects[plural, name]
            of = {"kind": self.kinds[plural][1], "name": name, "uid": about["metadata"]["uid"]}
            self._create(
                EVENTS,
                {
                    "metadata": {"name": f"{name}.{uuid.uuid4().hex[:16]}"},
                    "involvedObject": {**of, "namespace": self.namespace},
                    "reason": reason,
                    "message": message,
                    "type": kind,
                    "count": 1,
                    "firstTimestamp": now(),
                    "lastTimestamp": now(),
                },
            )

    # ── how it misbehaves ───────────────────────────────────────────────────────────────────────────────

    def fail(
        self,
        status: int = 500,
        times: int = 1,
        method: str = "",
        where: str = "",
        done: bool = False,
        retry_after: int | None = None,
    ) -> None:
        """Answer the next requests so, see `Fault`; those before in this list come first."""
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        with self._changed:
            self._faults.append(Fault(status, times, method, where, done, headers))

    def drop(self) -> None:
        """Break off all watches and logs that are followed, in the middle of a line."""
        with self._changed:
            self._dropped += 1
            self._changed.notify_all()

    def forget(self) -> None:
        """Forget what happened until now: a watch from an older version gets an ERROR event with 410."""
        with self._changed:
            self._version += 1
            self._oldest = self._version

    def silent(self, seconds: float) -> None:
        """Take connections and requests, and say nothing for that long; streams stand still, too."""
        self._quiet_until = time.monotonic() + seconds

    def away(self, seconds: float) -> None:
        """Refuse connections for that long, and break off those that are open; returns afterwards."""
        self._stop()
        time.sleep(seconds)
        self._start(self._port)

    # ── the server ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._start(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._stop()

    def _start(self, port: int) -> None:
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.api = self
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()

    def hold(self) -> None:
        """Wait while it is silent."""
        while (left := self._quiet_until - time.monotonic()) > 0 and not self._end.is_set():
            self._end.wait(min(left, 0.1))

    def fault(self, method: str, path: str) -> Fault | None:
        """What is done to this request."""
        with self._changed:
            for fault in self._faults:
                if fault.times and fault.method in ("", method) and fault.where in path:
                    fault.times -= 1
                    return fault
        return None

    # ── objects ─────────────────────────────────────────────────────────────────────────────────────────

    def _happened(self, kind: str, plural: str, found: Object) -> None:
        self._version += 1
        found["metadata"]["resourceVersion"] = str(self._version)
        self._history.append((self._version, kind, plural, copy.deepcopy(found)))
        self._changed.notify_all()

    def _create(self, plural: str, given: Object) -> Object:
        with self._changed:
            version, kind = self.kinds[plural]
            made = copy.deepcopy(given) | {"apiVersion": version, "kind": kind}
            metadata = made.setdefault("metadata", {})
            name = metadata.setdefault("name", f"{metadata.get('generateName', '')}{uuid.uuid4().hex[:5]}")
            if (plural, name) in self._objects:
                raise Refused(409, f'{plural} "{name}" already exists', "AlreadyExists")
            metadata |= {
                "namespace": self.namespace,
                "uid": str(uuid.uuid4()),
                "creationTimestamp": now(),
                "generation": 1,
            }
            self._objects[plural, name] = made
            self._happened("ADDED", plural, made)
            made = copy.deepcopy(made)
        if plural == JOBS and self.on_create:
            threading.Thread(target=self.on_create, args=(made,), daemon=True).start()
        return made

    def _change(self, plural: str, name: str, change: Callable[[Object], object]) -> Object:
        with self._changed:
            found = self._objects[plural, name]
            change(found)
            self._happened("MODIFIED", plural, found)
            return copy.deepcopy(found)

    def _delete(self, plural: str, name: str) -> Object:
        """Mark an object, and take it away after a while; what is no job and no pod at once."""
        with self._changed:
            found = self._objects[plural, name]
            uid = found["metadata"]["uid"]
            if plural not in (JOBS, PODS) or not self.lingers:
                self.remove(plural, name)
                return copy.deepcopy(found)
            if "deletionTimestamp" in found["metadata"]:
                return copy.deepcopy(found)
            self._change(plural, name, lambda one: one["metadata"].update(deletionTimestamp=now()))
            for kind, other in list(self._objects):
                owners = self._objects[kind, other]["metadata"].get("ownerReferences", [])
                if any(owner["uid"] == uid for owner in owners):
                    self._delete(kind, other)

        def finish() -> None:
            with self._changed:
                now_there = self._objects.get((plural, name))
                if now_there and now_there["metadata"]["uid"] == uid:
                    self.remove(plural, name)

        timer = threading.Timer(self.lingers, finish)
        timer.daemon = True
        timer.start()
        return copy.deepcopy(found)

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────

    def answer(self, request: Request, query: dict[str, str]) -> tuple[int, Object]:
        """Carry a request out: status and body."""
        path = urllib.parse.unquote(request.path.partition("?")[0])
        if path == "/version":
            return 200, {"major": "1", "minor": "34", "gitVersion": "v1.34.4"}
        if path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
            asked = request.body["spec"]["resourceAttributes"]
            resource = "/".join(filter(None, [asked.get("resource"), asked.get("subresource")]))
            allowed = (asked.get("verb"), resource) not in self.denied
            return 201, request.body | {"status": {"allowed": allowed}}
        if path == "/apis/authentication.k8s.io/v1/selfsubjectreviews":
            return 201, request.body | {"status": {"userInfo": {"username": USER}}}
        if match := re.fullmatch(r"/apis/([\w.-]+/v\w+)", path):
            resources = [{"name": one} for one, (version, _) in self.kinds.items() if version == match[1]]
            if not resources:
                raise Refused(404, "the server could not find the requested resource")
            return 200, {"kind": "APIResourceList", "groupVersion": match[1], "resources": resources}
        plural, name, below = self.place(path.replace("/v1/nodes", f"/v1/namespaces/{self.namespace}/nodes"))
        verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(
            request.method, "get" if name else "list"
        )
        self.allow(verb, plural + (f"/{below}" if below else ""), name)
        with self._changed:
            if request.method == "POST":
                if plural == PODS and self.refuses:
                    raise Refused(403, f'pods "latent-gpt-" is forbidden: {self.refuses}')
                if query.get("dryRun"):
                    return 201, request.body
                return 201, self._create(plural, request.body)
            if not name:
                return 200, self._list(plural, query)
            if (plural, name) not in self._objects:
                group = "" if plural in (PODS, EVENTS) else ".kubeflow.org" if plural == JOBS else ""
                raise Refused(404, f'{plural}{group} "{name}" not found')
            found = self._objects[plural, name]
            if request.method == "DELETE":
                wanted = (request.body.get("preconditions") or {}).get("uid")
                if wanted and wanted != found["metadata"]["uid"]:
                    raise Refused(
                        409,
                        f'Operation cannot be fulfilled on {plural} "{name}": the UID in the precondition'
                        f" ({wanted}) does not match the UID in record ({found['metadata']['uid']}). The"
                        " object might have been deleted and then recreated",
                    )
                return 200, self._delete(plural, name)
            if request.method == "PATCH":
                return 200, self._change(plural, name, lambda one: _merge(one, request.body))
            if request.method == "PUT":
                version = request.body["metadata"].get("resourceVersion")
                if version not in (None, found["metadata"]["resourceVersion"]):
                    raise Refused(409, f'{plural} "{name}": the object has been modified')
                return 200, self._change(plural, name, lambda one: one.update(request.body))
            return 200, copy.deepcopy(found)

    def place(self, path: str) -> tuple[str, str, str]:
        """Kind, name and subresource that a path names."""
        match = re.fullmatch(
            r"/(?:api|apis)/((?:[\w.-]+/)?\w+)/namespaces/([\w-]+)/(\w+)(?:/([\w.-]+))?(?:/(\w+))?", path
        )
        if not match or self.kinds.get(match[3], ("",))[0] != match[1]:
            raise Refused(404, "the server could not find the requested resource")
        if match[2] != self.namespace:
            raise Refused(403, f'{match[3]} is forbidden: User cannot list in the namespace "{match[2]}"')
        return match[3], match[4] or "", match[5] or ""

    def allow(self, verb: str, resource: str, name: str = "") -> None:
        """Refuse what is denied."""
        if (verb, resource) in self.denied:
            named = f' "{name}"' if name else ""
            raise Refused(
                403,
                f'{resource}{named} is forbidden: User "{USER}" cannot {verb} resource "{resource}" in API'
                f' group "" in the namespace "{self.namespace}"',
            )

    def _list(self, plural: str, query: dict[str, str]) -> Object:
        version, kind = self.kinds[plural]
        items = [
            copy.deepcopy(found)
            for (one, _), found in sorted(self._objects.items())
            if one == plural and selects(query, found)
        ]
        metadata = {"resourceVersion": str(self._version)}
        return {"apiVersion": version, "kind": f"{kind}List", "metadata": metadata, "items": items}

    def watch(self, plural: str, query: dict[str, str], send: Callable[[str | None], bool]) -> None:
        """Tell what happens, until the time is over.

        Args:
            plural: the kind.
            query: of the request.
            send: takes a line, or None to see whether the client is still there; False: it is not.
        """
        end = time.monotonic() + float(query.get("timeoutSeconds") or 1800)
        with self._changed:
            dropped = self._dropped
            seen = int(query.get("resourceVersion") or 0)
            lines = []
            if not seen:
                items = self._list(plural, query)["items"]
                lines = [json.dumps({"type": "ADDED", "object": one}) for one in items]
                seen = self._version
            elif seen < self._oldest:
                gone = Refused(410, f"too old resource version: {seen} ({self._oldest})").status
                send(json.dumps({"type": "ERROR", "object": gone}) + "\n")
                return
        while time.monotonic() < end and not self._end.is_set():
            self.hold()
            for line in lines:
                if not send(f"{line}\n"):
                    return
            with self._changed:
                if self._dropped != dropped:
                    send('{"type": "MODIFIED", "obj')
                    raise ConnectionAbortedError
                new = [one for one in self._history if one[0] > seen and one[2] == plural]
                lines = [
                    json.dumps({"type": kind, "object": found})
                    for _, kind, _, found in new
                    if selects(query, found)
                ]
                seen = self._version
                if not lines:
                    self._changed.wait(0.2)
            if not send(None):
                return

    def follow(self, pod: str, query: dict[str, str], send: Callable[[str | None], bool]) -> None:
        """Tell what a pod has printed, and with `follow` what it prints until its container ends."""
        with self._changed:
            uid = self._objects[PODS, pod]["metadata"]["uid"]
            dropped = self._dropped
        since = query.get("sinceTime", "")[:19]  # whole seconds, as Kubernetes takes it
        if seconds := query.get("sinceSeconds"):
            start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=int(seconds))
            since = start.strftime("%Y-%m-%dT%H:%M:%S")
        told = 0
        if tail := query.get("tailLines"):
            told = max(0, len(self._logs.get(uid, [])) - int(tail))
        stamps = query.get("timestamps", "").lower() == "true"
        on = query.get("follow", "").lower() == "true"
        while not self._end.is_set():
            self.hold()
            with self._changed:
                new = self._logs.get(uid, [])[told:]
                told += len(new)
                found = self._objects.get((PODS, pod))
                over = not found or found["metadata"]["uid"] != uid or _ended(found)
            for stamp, line in new:
                if stamp[:19] >= since and not send(f"{stamp} {line}\n" if stamps else f"{line}\n"):
                    return
            if not on or (over and not new):
                return
            with self._changed:
                if self._dropped != dropped:
                    send("half a li")
                    raise ConnectionAbortedError
                if len(self._logs.get(uid, [])) == told:
                    self._changed.wait(0.2)
            if not send(None):
                return

    def has_log(self, pod: str) -> None:
        """Refuse logs of what never ran."""
        with self._changed:
            found = self._objects.get((PODS, pod))
            if not found:
                raise Refused(404, f'pods "{pod}" not found')
            states = [one["state"] for one in found.get("status", {}).get("containerStatuses", [])]
            if not states or "waiting" in states[0]:
                why = states[0]["waiting"].get("reason", "") if states else "not scheduled"
                raise Refused(
                    400, f'container "pytorch" in pod "{pod}" is waiting to start: {why}', "BadRequest"
                )


def _pod_status(
    pod: Object,
    phase: str,
    terminated: Object | None,
    waiting: Object | None,
    unschedulable: str,
    reason: str,
    message: str,
) -> Object:
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": now()}
    if unschedulable:
        scheduled |= {"status": "False", "reason": "Unschedulable", "message": unschedulable}
    status: Object = {"phase": phase, "conditions": [scheduled]}
    if reason:
        status |= {"reason": reason, "message": message}
    container = pod["spec"]["containers"][0]
    if terminated is not None:
        state: Object = {"terminated": {"startedAt": now(), "finishedAt": now(), **terminated}}
    elif waiting is not None:
        state = {"waiting": waiting}
    elif phase == "Running":
        state = {"running": {"startedAt": now()}}
    elif phase == "Succeeded":
        state = {"terminated": {"exitCode": 0, "reason": "Completed", "finishedAt": now()}}
    else:
        return status
    if phase == "Running" and terminated is None:
        status["conditions"].append({"type": "Ready", "status": "True", "lastTransitionTime": now()})
        status["startTime"] = now()
    one = {"name": container["name"], "image": container.get("image", ""), "imageID": "", "restartCount": 0}
    status["containerStatuses"] = [one | {"ready": "running" in state, "state": state}]
    return status


def _ended(pod: Object) -> bool:
    states = [one["state"] for one in pod.get("status", {}).get("containerStatuses", [])]
    return any("terminated" in state for state in states)


def _merge(target: Object, change: Object) -> None:
    """A JSON merge patch."""
    for name, value in change.items():
        if value is None:
            target.pop(name, None)
        elif isinstance(value, dict) and isinstance(target.get(name), dict):
            _merge(target[name], value)
        else:
            target[name] = value


def selects(query: dict[str, str], found: Object) -> bool:
    """Whether label and field selectors of a request take an object."""
    labels = found["metadata"].get("labels") or {}
    for part in filter(None, re.split(r",(?![^(]*\))", query.get("labelSelector", ""))):
        if match := re.fullmatch(r"\s*(\S+)\s+(in|notin)\s+\((.*)\)\s*", part):
            among = labels.get(match[1]) in [one.strip() for one in match[3].split(",")]
            if among != (match[2] == "in"):
                return False
        elif match := re.fullmatch(r"\s*([^=!]+?)\s*(==|=|!=)\s*(\S*)\s*", part):
            if (labels.get(match[1]) == match[3]) != (match[2] != "!="):
                return False
        elif part.strip() not in labels:
            return False
    for part in filter(None, query.get("fieldSelector", "").split(",")):
        name, _, wanted = part.replace("==", "=").partition("=")
        value: Any = found
        for step in name.split("."):
            value = value.get(step, {}) if isinstance(value, dict) else {}
        if value != wanted:
            return False
    return True


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    api: ApiServer

    def __init__(self, *args: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*args)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Close what is open."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients come and go."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def go(self) -> None:
        api = self.server.api
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}") or {}
        request = Request(self.command, self.path, body, time.monotonic())
        api.requests.append(request)
        api.hold()
        fault = api.fault(self.command, self.path)
        try:
            if fault and not fault.done:
                raise Refused(fault.status, "provoked")
            if api.token and self.headers.get("Authorization") != f"Bearer {api.token}":
                raise Refused(401, "Unauthorized")
            split = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(split.query))
            if self.stream(split.path, query):
                return
            status, found = api.answer(request, query)
            if fault:
                raise Refused(fault.status, "provoked, but done")
            self.reply(status, found, {"Warning": f'299 - "{api.warns}"'} if api.warns else {})
        except Refused as refusal:
            if not refusal.code:
                self.close_connection = True
                return
            self.reply(refusal.code, refusal.status, fault.headers if fault else {})

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = go

    def reply(self, status: int, found: Object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def stream(self, path: str, query: dict[str, str]) -> bool:
        """Answer a watch or a log, piece by piece; False: it is neither."""
        api = self.server.api
        watch = self.command == "GET" and query.get("watch", "").lower() in ("true", "1")
        if not watch and not path.endswith("/log"):
            return False
        plural, name, below = api.place(urllib.parse.unquote(path))
        if watch:
            api.allow("watch", plural)
        else:
            api.allow("get", f"{plural}/{below}", name)
            api.has_log(name)
        self.send_response(200)
        self.send_header("Content-Type", "application/json" if watch else "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            if watch:
                api.watch(plural, query, self.piece)
            else:
                api.follow(name, query, self.piece)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True
        return True

    def piece(self, text: str | None) -> bool:
        """Send a chunk, or see whether the client is still there."""
        if text is None:
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionAbortedError
            return True
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()
        return True
