"""The API server of a cluster, asked with patience: it may be away for minutes, or have us come back later.

Nothing here knows what a job is; what is asked for goes by the names of the API.
"""

from __future__ import annotations

import json
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import urllib3
from kubernetes import client, config  # type: ignore[import-untyped]
from kubernetes.client.exceptions import ApiException  # type: ignore[import-untyped]

from model.errors import Unavailable, UserError
from model.plumbing import environment, speech

T = TypeVar("T")
Object = dict[str, Any]

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
STEP_CONTAINER = "main"  # of a step's pod, as Argo names it
PATIENCE = (10.0, 20.0)  # seconds to reach the server, and to wait for its answer
HASTE = (2.0, 4.0)  # the same of what is only tried
SILENCE = (10.0, 60.0)  # the same of a watch, or of a log that is followed
LONGEST_PAUSE = 30.0  # seconds between two tries
LONGEST_ASKED = 60.0  # seconds for which we leave a server alone that asks for more
TRIED_IN_VAIN = 60.0  # seconds for which a server may refuse us: one that has just started knows no roles
COMPLAINT = 60.0  # seconds between two lines on a server that is away
PASSING = (0, 408, 425, 429, 500, 502, 503, 504)  # answers that another try may mend
NETWORK = (urllib3.exceptions.HTTPError, OSError, json.JSONDecodeError)  # the last: an answer was cut off


class Kind(NamedTuple):
    """A kind of objects of our namespace."""

    group: str
    version: str
    plural: str


class Answer(NamedTuple):
    """What a server says."""

    found: Object
    headers: Mapping[str, str]


@dataclass
class Cluster:
    """One namespace of a cluster."""

    namespace: str
    configuration: Any
    say: Callable[[str], None] = lambda text: None  # what people should know while we wait
    end: threading.Event = field(default_factory=threading.Event)  # nobody needs answers any more

    def __post_init__(self) -> None:
        self.configuration.retries = False  # ours are visible, and a signal interrupts them
        self.api = client.ApiClient(self.configuration)
        self.objects = client.CustomObjectsApi(self.api)
        self.core = client.CoreV1Api(self.api)

    # ── asking ──────────────────────────────────────────────────────────────────────────────────────────

    def patiently(self, ask: Callable[[], T], limit: float = float("inf")) -> T:
        """The answer to a question, however long the server is away.

        Args:
            ask: puts the question.
            limit: seconds after which it has been away for too long.

        Raises:
            ApiException: the server refuses, and another try would not help.
            UserError: it does not know us, or does not let us.
            Unavailable: the limit is over.
        """
        began = said = time.monotonic()
        tries = 0
        while True:
            try:
                return ask()
            except ApiException as error:
                away = time.monotonic() - began
                denied = error.status in (401, 403) and "quota" not in told(error)
                if denied and away > TRIED_IN_VAIN:
                    raise UserError(
                        f"the cluster does not allow it: {told(error)}; apply k8s/base/rbac.yaml, and run"
                        " steps as its service account"
                    ) from None
                if not denied and error.status not in PASSING:
                    raise
                why, least = told(error), retry_after(error)
            except NETWORK as error:
                away, why, least = time.monotonic() - began, plain(error), 0.0
            if away > limit:
                raise Unavailable(
                    f"the cluster at {self.configuration.host} does not answer: {why}"
                ) from None
            if time.monotonic() - said > COMPLAINT:
                self.say(f"the cluster has not answered for {speech.duration(away)}: {why}")
                said = time.monotonic()
            time.sleep(max(least, pause(tries)))
            tries += 1

    # ── objects ─────────────────────────────────────────────────────────────────────────────────────────

    def get(self, kind: Kind, name: str) -> Object | None:
        """An object; None if there is none of this name."""
        try:
            found: Object = self.patiently(
                lambda: self.objects.get_namespaced_custom_object(
                    kind.group, kind.version, self.namespace, kind.plural, name, _request_timeout=PATIENCE
                )
            )
            return found
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    def create(self, kind: Kind, body: Any) -> Object | None:
        """Make an object; None if there is one of its name, ours from a try without an answer perhaps.

        Raises:
            ApiException: 403 where a quota is used up.
            UserError: the cluster does not take such an object.
        """
        try:
            made: Object = self.patiently(
                lambda: self.objects.create_namespaced_custom_object(
                    kind.group, kind.version, self.namespace, kind.plural, body, _request_timeout=PATIENCE
                )
            )
            return made
        except ApiException as error:
            if error.status == 409:
                return None
            if error.status == 404:
                raise UserError(
                    f"the cluster has no {kind.plural}.{kind.group} in namespace {self.namespace}; install"
                    f" the training operator, or create the namespace ({told(error)})"
                ) from None
            if error.status == 403:
                raise
            raise UserError(f"the cluster refuses the job: {told(error)}") from None

    def delete(self, kind: Kind, name: str, uid: str) -> None:
        """Delete an object with what it owns, if it is the one of this UID and still there."""
        try:
            self.patiently(lambda: remove(self.objects, self.namespace, kind, name, uid, PATIENCE))
        except ApiException as error:
            if error.status not in (404, 409):
                raise

    def pods(self, selector: str) -> list[Object]:
        """The pods with these labels."""

        def ask() -> list[Object]:
            answer = self.core.list_namespaced_pod(
                self.namespace, label_selector=selector, _preload_content=False, _request_timeout=PATIENCE
            )
            found: list[Object] = json.loads(answer.data)["items"]
            return found

        return self.patiently(ask)

    def events(self, *names: str) -> list[str]:
        """Warnings of the cluster about objects of ours, the newest last; none if it does not answer."""
        found: list[tuple[str, str]] = []
        for name in names:
            with suppress(ApiException, *NETWORK):
                answer = self.core.list_namespaced_event(
                    self.namespace,
                    field_selector=f"involvedObject.name={name},type=Warning",
                    limit=50,
                    _preload_content=False,
                    _request_timeout=(2.0, 5.0),
                )
                for one in json.loads(answer.data)["items"]:
                    when = one.get("lastTimestamp") or one.get("eventTime") or ""
                    text = " ".join(one.get("message", "").split())
                    found.append((when, f"{one.get('reason', '')}: {text}"))
        return [text[:300] for _, text in sorted(found)]

    def lacks(self, kind: Kind) -> dict[str, list[str]]:
        """What we are not allowed of what following a job needs: verbs, by resource and its group."""
        core = Kind("", "v1", "pods")
        wanted = [(kind, "", verb) for verb in ("get", "list", "watch", "create", "delete")]
        wanted += [(core, "", verb) for verb in ("list", "watch")] + [(core, "log", "get")]
        wanted += [(Kind("", "v1", "events"), "", "list")]
        found: dict[str, list[str]] = {}
        for one, below, verb in wanted:
            if not self._may(one, below, verb):
                resource = "/".join(filter(None, [one.plural, below]))
                found.setdefault(".".join(filter(None, [resource, one.group])), []).append(verb)
        return found

    def _may(self, kind: Kind, below: str, verb: str) -> bool:
        asked = {"namespace": self.namespace, "group": kind.group, "resource": kind.plural}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {**asked, "subresource": below, "verb": verb}},
        }
        answer = self.ask("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
        return bool(answer.found["status"]["allowed"])

    def ask(self, path: str, body: Any = None, **query: str) -> Answer:
        """What the server answers at a path, once and in haste: to a GET, or to a POST where there is a body.

        Raises:
            ApiException: it refuses.
            One of `NETWORK`: it does not answer.
        """
        answer = self.api.call_api(
            path,
            "GET" if body is None else "POST",
            {},
            list(query.items()),
            {"Content-Type": "application/json"},
            body=body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=HASTE,
        )
        return Answer(json.loads(answer.data), answer.headers)

    def image(self) -> str:
        """The image of workers: the environment's if it names one; else that of this very pod."""
        named = environment.IMAGE.get()
        if named == environment.IMAGE.default and in_pod():
            name = environment.pod()
            with suppress(ApiException):
                pod = self.patiently(
                    lambda: self.core.read_namespaced_pod(name, self.namespace, _request_timeout=PATIENCE)
                )
                for one in pod.spec.containers:
                    if one.name == STEP_CONTAINER:
                        return str(one.image)
        return named

    # ── what changes ────────────────────────────────────────────────────────────────────────────────────

    def watch_kind(self, kind: Kind, name: str, seen: Seen) -> Watch:
        """Follow one object of a kind."""

        def ask(**how: Any) -> Any:
            return self.objects.list_namespaced_custom_object(
                kind.group,
                kind.version,
                self.namespace,
                kind.plural,
                field_selector=f"metadata.name={name}",
                _preload_content=False,
                **how,
            )

        return Watch(ask, seen, self.end)

    def watch_pods(self, selector: str, seen: Seen) -> Watch:
        """Follow the pods with these labels."""

        def ask(**how: Any) -> Any:
            return self.core.list_namespaced_pod(
                self.namespace, label_selector=selector, _preload_content=False, **how
            )

        return Watch(ask, seen, self.end)

    def log(self, pod: str, container: str, since: str = "", last: int = 0) -> Iterator[tuple[str, str]]:
        """The lines that a container prints, with the time of each, until it ends or the connection does.

        Args:
            pod: its name.
            container: of the pod.
            since: time of the first one.
            last: of those that are there already only so many; 0: all of them.
        """
        query: list[tuple[str, Any]] = [("container", container), ("follow", "true"), ("timestamps", "true")]
        if since:
            query.append(("sinceTime", since))
        elif last:
            query.append(("tailLines", last))
        answer = self.api.call_api(
            "/api/v1/namespaces/{namespace}/pods/{name}/log",
            "GET",
            {"namespace": self.namespace, "name": pod},
            query,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=SILENCE,
        )
        try:
            for line in lines(answer):
                when, _, text = line.decode(errors="replace").partition(" ")
                yield when, text
        finally:
            answer.close()


Seen = Callable[[str, list[Object]], None]
"""Called with `ALL` and all objects there are, and then with each change's type and its one object."""

ALL, DELETED = "ALL", "DELETED"


class Watch(threading.Thread):
    """Follows objects, through dropped connections and servers that are away; misses no change in between."""

    def __init__(self, ask: Callable[..., Any], seen: Seen, end: threading.Event) -> None:
        """
        Args:
            ask: lists the objects, or watches them; its answer has not been read.
            seen: is told.
            end: when set, this ends, too.
        """
        super().__init__(name="watch", daemon=True)
        self._ask, self._seen, self._end = ask, seen, end
        self._version = ""  # up to which all changes are known; empty: nothing is

    def run(self) -> None:
        """Until the end."""
        tries = 0
        while not self._end.is_set():
            version = self._version
            wait = 0.0
            try:
                if not version:
                    self._list()
                self._follow()
            except urllib3.exceptions.ReadTimeoutError:
                pass  # silence: perhaps nothing happened, perhaps nobody is there any more
            except ApiException as error:
                if error.status == 410:
                    self._version = ""  # the server does not remember as far back
                wait = max(retry_after(error), pause(tries))
            except NETWORK:
                wait = pause(tries)
            except Exception:  # an object that is not as we know them: a watch that ended would tell nothing
                traceback.print_exc()
                self._version, wait = "", pause(tries)
            tries = 0 if self._version != version else tries + 1
            self._end.wait(wait or 0.2)

    def _list(self) -> None:
        found = json.loads(self._ask(_request_timeout=PATIENCE).data)
        self._tell(ALL, found["items"])
        self._version = found["metadata"]["resourceVersion"]

    def _follow(self) -> None:
        answer = self._ask(
            watch=True,
            resource_version=self._version,
            allow_watch_bookmarks=True,
            timeout_seconds=300,
            _request_timeout=SILENCE,
        )
        try:
            for line in lines(answer):
                change = json.loads(line)
                found = change["object"]
                if change["type"] == "ERROR":
                    raise ApiException(status=found.get("code", 500), reason=found.get("message"))
                if change["type"] != "BOOKMARK":
                    self._tell(change["type"], [found])
                self._version = found["metadata"]["resourceVersion"]
        finally:
            answer.close()

    def _tell(self, what: str, found: list[Object]) -> None:
        if not self._end.is_set():
            self._seen(what, found)


class Farewell:
    """Deletes a job as a process's last act but one, within tenths of a second.

    It has a connection of its own, which it keeps open by a question every few seconds.
    """

    EVERY = 10.0  # seconds
    PATIENCE = (1.0, 2.0)  # seconds to reach the server, and to wait for its answer
    UNDER_WAY = 0.3  # seconds for which a job may still come that was asked for

    def __init__(self, cluster: Cluster, kind: Kind, name: str) -> None:
        self._objects = client.CustomObjectsApi(client.ApiClient(cluster.configuration))
        self._namespace, self._kind, self._name, self._end = cluster.namespace, kind, name, cluster.end
        threading.Thread(target=self._stay, name="farewell", daemon=True).start()

    def _stay(self) -> None:
        while True:
            with suppress(ApiException, *NETWORK):
                self._objects.get_namespaced_custom_object(
                    self._kind.group,
                    self._kind.version,
                    self._namespace,
                    self._kind.plural,
                    self._name,
                    _request_timeout=self.PATIENCE,
                )
            if self._end.wait(self.EVERY):
                return

    def __call__(self, uid: str) -> bool:
        """Delete the job if it is the one of this UID; returns whether the server has heard it.

        Args:
            uid: of the job. "": whatever job has the name, or gets it now: a request that makes one may be
                under way.
        """
        until = time.monotonic() + self.UNDER_WAY
        tries = 2  # the open connection may have been closed by the other side
        while tries:
            try:
                remove(self._objects, self._namespace, self._kind, self._name, uid, self.PATIENCE)
                return True
            except ApiException as error:
                if error.status == 404 and not uid and time.monotonic() < until:
                    time.sleep(0.01)
                elif error.status in (404, 409):
                    return True
                else:
                    tries -= 1
            except NETWORK:
                tries -= 1
        return False


def remove(
    objects: Any, namespace: str, kind: Kind, name: str, uid: str, patience: tuple[float, float]
) -> None:
    """Delete an object if it is the one of this UID; "" is any. Raises ApiException: 404, 409 if not."""
    objects.delete_namespaced_custom_object(
        kind.group,
        kind.version,
        namespace,
        kind.plural,
        name,
        body=client.V1DeleteOptions(
            preconditions=client.V1Preconditions(uid=uid) if uid else None, propagation_policy="Background"
        ),
        _request_timeout=patience,
    )


def here(say: Callable[[str], None] = lambda text: None) -> Cluster:
    """The cluster that this process belongs to, or that its kubeconfig names.

    Raises:
        UserError: it knows no cluster, or no namespace.
    """
    configuration = client.Configuration()
    namespace = environment.NAMESPACE.get()
    try:
        if not in_pod():
            file = environment.KUBECONFIG.get() or None  # now, where kubernetes read it when it was imported
            config.load_kube_config(file, client_configuration=configuration)
            if not namespace:
                _, context = config.list_kube_config_contexts(file)
                namespace = context["context"].get("namespace", "default")
        else:
            config.load_incluster_config(client_configuration=configuration)
            namespace = namespace or (ACCOUNT / "namespace").read_text().strip()
    except (config.ConfigException, OSError) as error:
        raise UserError(
            f"no cluster is known: {plain(error)}; run in a pod with a service account, or let KUBECONFIG"
            " name a file"
        ) from None
    return Cluster(namespace, configuration, say)


def in_pod() -> bool:
    """Whether this process is in a pod that may speak to its cluster, and is told of no other one."""
    return (ACCOUNT / "token").exists() and not environment.KUBECONFIG.get()


def lines(answer: Any) -> Iterator[bytes]:
    """The lines of an answer as they come; one that was cut off is none."""
    rest = b""
    for chunk in answer.stream(amt=None, decode_content=False):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole


def pause(tries: int) -> float:
    """Seconds until the next try: more each time, and not the same for everybody."""
    longest: float = min(LONGEST_PAUSE, 0.5 * 2 ** min(tries, 10))
    return longest * random.uniform(0.5, 1.0)


def retry_after(error: ApiException) -> float:
    """Seconds for which the server asks to be left alone."""
    headers: Mapping[str, str] = error.headers or {}
    with suppress(ValueError):
        return min(float(headers.get("Retry-After", 0)), LONGEST_ASKED)
    return 0.0


def told(error: ApiException) -> str:
    """What the server says of its refusal, in one line."""
    message = ""
    with suppress(ValueError, AttributeError, TypeError):
        message = json.loads(error.body).get("message", "")
    return " ".join((message or f"{error.status} {error.reason}").split())[:400]


def plain(error: Exception) -> str:
    """An error in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
