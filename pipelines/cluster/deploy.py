"""Our objects on a cluster: applied as one set, waited for, and taken away again.

All of ours carry one label, and nothing else is ever touched: no namespace, nothing of KFP's. What a set has
no more is removed when the next one is applied; volume claims are data, and stay.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from components.launch import pods
from model.errors import UserError
from model.plumbing import environment, speech
from pipelines.cluster.kubectl import Forbidden, Kubectl, NoKind, Object
from pipelines.cluster.settings import built
from pipelines.run import ROOT

LABEL = "app.kubernetes.io/part-of=latent-gpt"
MANAGER = "latent-gpt"  # who owns the fields that we apply
CONFIG = "latent-gpt/config"  # annotation of servers: which ConfigMap and Secret they were started with
IMAGES = ("latent-gpt", "latent-gpt-mlflow")  # their names in manifests
SERVERS = ("Deployment", "StatefulSet")
LONGEST = 1800.0  # seconds until servers are healthy: the first pull of some GB is among them
AGAIN = 60.0  # seconds until the same is said again

# What we may have made, in the order in which it is taken away; kinds that a cluster lacks are passed over.
WORK = ("pytorchjobs.kubeflow.org",)
APPLIED = (
    *("servicemonitors.monitoring.coreos.com", "podmonitors.monitoring.coreos.com"),
    *("prometheusrules.monitoring.coreos.com", "localqueues.kueue.x-k8s.io"),
    *("ingresses.networking.k8s.io", "cronjobs.batch", "jobs.batch"),
    *("deployments.apps", "statefulsets.apps", "services", "poddisruptionbudgets.policy"),
    *("networkpolicies.networking.k8s.io", "configmaps"),
    *("rolebindings.rbac.authorization.k8s.io", "roles.rbac.authorization.k8s.io", "serviceaccounts"),
    *("resourcequotas", "limitranges"),
)
MADE = ("pods", "secrets")  # by steps, and by `make secrets`
EVERYWHERE = (  # of no namespace
    *("clusterqueues.kueue.x-k8s.io", "resourceflavors.kueue.x-k8s.io"),
    "priorityclasses.scheduling.k8s.io",
)
FOREIGN = re.compile(r"\s|/|\d{4}[-/]|[A-Z]+:|$")  # of a library's line: a trace, a warning, a logger's time
DATA = "persistentvolumeclaims"

Say = Callable[[str], None]


@dataclass
class Changes:
    """What an application changed, each object as kind and name."""

    made: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    kept: int = 0

    def lines(self) -> list[str]:
        """For people."""
        told = [
            f"{what} {', '.join(names)}"
            for what, names in (("made", self.made), ("changed", self.changed), ("removed", self.removed))
            if names
        ]
        return told or [f"nothing changed: {self.kept} objects are as they should be"]


def deploy(overlay: str, namespace: str, say: Say = print) -> None:
    """Apply an overlay with the images that were pushed, wait until it is healthy, and say where what is.

    Args:
        overlay: name of one in `k8s/overlays`, or a folder.
        namespace: of all objects.
        say: is told each line.

    Raises:
        UserError: the cluster refuses, or a server does not become healthy.
    """
    kubectl = Kubectl(namespace)
    wanted = render(kubectl, overlay)
    _spare_kfps(kubectl, wanted)
    _check_secrets(kubectl, wanted)
    _stamp(kubectl, wanted)
    older = {one["metadata"]["uid"] for one in kubectl.objects("get", "pods", "-l", LABEL)}
    changes = apply(kubectl, wanted)
    changes.removed, unseen = prune(kubectl, wanted)
    for line in [*changes.lines(), *_not_looked_at(unseen), *_left_behind(kubectl, wanted)]:
        say(line)
    servers = [one for one in wanted if one["kind"] in SERVERS]
    wait(kubectl, servers, say)
    for line in _said_at_start(kubectl, older):
        say(line)
    for line in addresses(kubectl, wanted):
        say(line)


# ── what is to be there ─────────────────────────────────────────────────────────────────────────────────


def render(kubectl: Kubectl, overlay: str) -> list[Object]:
    """The objects of an overlay, in this namespace and with the images that were pushed.

    Raises:
        UserError: there is no such overlay, it cannot be rendered, or an image was not pushed.
    """
    images = []
    for name in IMAGES:
        with suppress(UserError):  # not every overlay needs both
            where, at, digest = built(name).partition("@")
            where, _, tag = (where, "", "") if at else where.rpartition(":")
            images.append({"name": name, "newName": where, **({"digest": digest} if at else {"newTag": tag})})
    found = manifests(kubectl, overlay, images)
    for name in sorted(_images(found) & set(IMAGES)):
        built(name)  # says what is missing
    return found


def manifests(kubectl: Kubectl, overlay: str, images: Iterable[dict[str, str]] = ()) -> list[Object]:
    """The objects of an overlay in this namespace, with these images or as they are called there.

    Raises:
        UserError: there is no such overlay, or it cannot be rendered.
    """
    folder = ROOT / "k8s" / "overlays" / overlay if "/" not in overlay else Path(overlay).resolve()
    if not (folder / "kustomization.yaml").is_file():
        known = sorted(path.parent.name for path in (ROOT / "k8s/overlays").glob("*/kustomization.yaml"))
        raise UserError(f"OVERLAY {overlay}: {folder} has no kustomization.yaml; choose {' or '.join(known)}")
    with tempfile.TemporaryDirectory(dir=ROOT / "k8s", prefix=".deploy-") as above:
        content = {
            "resources": [os.path.relpath(folder, above)],
            "namespace": kubectl.namespace,
            "images": list(images),
        }
        (Path(above) / "kustomization.yaml").write_text(json.dumps(content))
        found = [one for one in yaml.safe_load_all(kubectl("kustomize", above)) if one]
    for one in found:  # kustomize leaves these where an overlay put them
        for subject in one.get("subjects") or []:
            if subject["kind"] == "ServiceAccount":
                subject["namespace"] = kubectl.namespace
    return found


def _images(objects: Iterable[Object]) -> set[str]:
    """Names of images that these objects run."""
    templates = [one["spec"]["template"] for one in objects if one["kind"] in SERVERS]
    return {container["image"] for one in templates for container in _containers(one["spec"])}


def keys_needed(objects: Iterable[Object]) -> dict[str, set[str]]:
    """Keys without which servers do not start, by the name of their Secret."""
    needed: dict[str, set[str]] = {}
    for server in (one for one in objects if one["kind"] in SERVERS):
        for container in _containers(server["spec"]["template"]["spec"]):
            for variable in container.get("env") or []:
                key = (variable.get("valueFrom") or {}).get("secretKeyRef")
                if key and not key.get("optional"):
                    needed.setdefault(key["name"], set()).add(key["key"])
    return needed


def _check_secrets(kubectl: Kubectl, wanted: list[Object]) -> None:
    """Refuse what servers would wait for until we gave up: a key of theirs that no Secret has."""
    for name, keys in keys_needed(wanted).items():
        found = kubectl.objects("get", "secrets", name, "--ignore-not-found")
        if missing := sorted(keys - set((found[0].get("data") if found else None) or {})):
            raise UserError(
                f"Secret {name} in namespace {kubectl.namespace} has no {', '.join(missing)}, without which"
                " servers do not start; `make secrets` makes what is missing, of the environment or of chance"
            )


def _containers(spec: Object) -> list[Object]:
    return [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]


def _spare_kfps(kubectl: Kubectl, wanted: list[Object]) -> None:
    """Limits for a namespace of our own are no business of KFP's."""
    ours = any(one["kind"] == "Namespace" for one in wanted)
    if ours and kubectl.objects("get", "deployment", "ml-pipeline", "--ignore-not-found"):
        raise UserError(
            f"namespace {kubectl.namespace} is KFP's, and the overlay has components/own-namespace, which is"
            " for one that is ours alone; leave that out, or name another NAMESPACE"
        )


def _stamp(kubectl: Kubectl, wanted: list[Object]) -> None:
    """Have servers start anew when what they read at their start is another: ConfigMap or Secret."""
    told = json.dumps([one.get("data") for one in wanted if one["kind"] == "ConfigMap"], sort_keys=True)
    secrets = kubectl.objects("get", "secrets", "-l", LABEL)
    versions = sorted(f"{one['metadata']['uid']}/{one['metadata']['resourceVersion']}" for one in secrets)
    mark = hashlib.sha256("\n".join([told, *versions]).encode()).hexdigest()[:16]
    for one in wanted:
        if one["kind"] in SERVERS:
            meta = one["spec"]["template"].setdefault("metadata", {})
            meta["annotations"] = {**(meta.get("annotations") or {}), CONFIG: mark}


# ── applying ────────────────────────────────────────────────────────────────────────────────────────────


def apply(kubectl: Kubectl, wanted: list[Object]) -> Changes:
    """Make the cluster's objects what these say; what somebody else says of other fields stays."""
    whole = json.dumps({"apiVersion": "v1", "kind": "List", "items": wanted})
    before = {
        _title(one): _content(one)
        for one in kubectl.objects("get", "-f", "-", "--ignore-not-found", stdin=whole)
    }
    changes = Changes()
    how = ("apply", "--server-side", "--force-conflicts", f"--field-manager={MANAGER}", "-f", "-")
    for one in kubectl.objects(*how, stdin=whole):
        name = _title(one)
        if name not in before:
            changes.made.append(name)
        elif before[name] != _content(one):
            changes.changed.append(name)
        else:
            changes.kept += 1
    return changes


def prune(kubectl: Kubectl, wanted: list[Object]) -> tuple[list[str], list[str]]:
    """Remove objects of ours that an earlier set had; returns which, and the kinds that we may not look at.

    What is of no namespace stays: another one of ours may use it, and `undeploy` asks for that.
    """
    keep = {_title(one) for one in wanted}
    found, unseen = _ours(kubectl, APPLIED)
    rest = [one for one in found if _title(one) not in keep and not one["metadata"].get("ownerReferences")]
    for one in rest:
        kubectl("delete", _resource(one), one["metadata"]["name"], "--ignore-not-found")
    return [_title(one) for one in rest], unseen


def _left_behind(kubectl: Kubectl, wanted: list[Object]) -> list[str]:
    """Claims with the data of an earlier set that this one does not use."""
    used = {_title(one) for one in wanted}
    found = [one for one in kubectl.objects("get", DATA, "-l", LABEL) if _title(one) not in used]
    return [f"{_claim(one)} is of an earlier version, and not used any more" for one in found]


def _claim(one: Object) -> str:
    size = one["spec"]["resources"]["requests"]["storage"]
    volume = one["spec"].get("volumeName") or "no volume yet"
    return f"claim {one['metadata']['name']} ({size}, {volume})"


def _ours(kubectl: Kubectl, kinds: Iterable[str]) -> tuple[list[Object], list[str]]:
    """What is ours of these kinds, as far as the cluster has them, and those that we may not look at.

    Each is asked for by itself: one that is refused hides no other one.
    """
    found: list[Object] = []
    unseen = []
    for kind in kinds:
        try:
            found += kubectl.objects("get", kind, "-l", LABEL)
        except NoKind:
            continue
        except Forbidden:
            unseen.append(kind)
    return found, unseen


def _not_looked_at(kinds: list[str]) -> list[str]:
    return [f"not looked at: {', '.join(kinds)}; you may not"] if kinds else []


def _title(one: Object) -> str:
    return f"{one['kind']} {one['metadata']['name']}"


def _resource(one: Object) -> str:
    group, _, _ = one["apiVersion"].rpartition("/")
    return f"{one['kind'].lower()}.{group}" if group else one["kind"].lower()


def _content(one: Object) -> Object:
    """An object without what the server counts."""
    content = copy.deepcopy(one)
    content.pop("status", None)
    for name in ("managedFields", "resourceVersion", "generation"):
        content["metadata"].pop(name, None)
    return content


# ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────


def wait(kubectl: Kubectl, servers: list[Object], say: Say, limit: float = LONGEST) -> None:
    """Wait until all servers run as they were applied, and say for what, and why.

    Raises:
        UserError: one cannot become healthy, or has not within the limit.
    """
    names = [_title(one) for one in servers]
    if not names:
        return
    began = time.monotonic()
    said: dict[str, tuple[str, float]] = {}
    while True:
        kinds = ",".join(sorted({f"{one['kind'].lower()}s.apps" for one in servers} | {"pods"}))
        found = kubectl.objects("get", kinds, "-l", LABEL)
        waiting = {_title(one): one for one in found if _title(one) in names and not _healthy(one)}
        missing = [name for name in names if name not in {_title(one) for one in found}]
        if not waiting and not missing:
            return
        away = time.monotonic() - began
        if missing and away > limit:
            raise UserError(
                f"{', '.join(missing)} cannot be seen after {speech.duration(away)}: either somebody deleted"
                f" it, or it has no label {LABEL}"
            )
        for name, server in waiting.items():
            why, hopeless = _why(kubectl, server, [one for one in found if one["kind"] == "Pod"])
            if hopeless or away > limit:
                long = "" if hopeless else f" after {speech.duration(away)}"
                raise UserError(f"{name} is not healthy{long}: {why}")
            before, when = said.get(name, ("", 0.0))
            if why != before or time.monotonic() - when > AGAIN:
                say(f"waits for {name}: {why}")
                said[name] = (why, time.monotonic())
        time.sleep(1)


def _healthy(server: Object) -> bool:
    status, replicas = server.get("status") or {}, server["spec"].get("replicas", 1)
    if status.get("observedGeneration", 0) < server["metadata"]["generation"]:
        return False
    ready = status.get("readyReplicas" if server["kind"] == "StatefulSet" else "availableReplicas", 0)
    return status.get("updatedReplicas", 0) >= replicas and bool(
        ready >= replicas == status.get("replicas", 0)
    )


def _why(kubectl: Kubectl, server: Object, found: list[Object]) -> tuple[str, bool]:
    """Why a server is not healthy yet, and whether it would never be."""
    selector = server["spec"]["selector"]["matchLabels"].items()
    own = [one for one in found if selector <= (one["metadata"].get("labels") or {}).items()]
    if not own:
        for condition in (server.get("status") or {}).get("conditions") or []:
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                return " ".join(condition.get("message", "").split()), False
        return "it has no pod yet", False
    if all("deletionTimestamp" in one["metadata"] for one in own):
        return f"pod {own[0]['metadata']['name']} of before ends", False
    pod = max(own, key=lambda one: one["metadata"]["creationTimestamp"])
    return why_not_ready(kubectl, pod)


def why_not_ready(kubectl: Kubectl, pod: Object) -> tuple[str, bool]:
    """What a server's pod waits for, and whether it would do so for ever."""
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    states = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    plain = {**pod, "spec": {"containers": _containers(pod["spec"])}}
    plain["status"] = {**status, "containerStatuses": states}
    for one in states:
        state, before = one.get("state") or {}, one.get("lastState") or {}
        end = state.get("terminated") or ("running" not in state and before.get("terminated")) or {}
        if end.get("exitCode"):
            reason = {"OOMKilled": ", out of memory"}.get(end.get("reason", ""), "")
            last = _last_line(kubectl, name, one["name"], "terminated" not in state)
            return f"{one['name']} of pod {name} ended with exit code {end['exitCode']}{reason}{last}", False
    for container in _containers(pod["spec"]):
        read = pods.read(plain, container["name"], 0)
        if read.waits and read.waits != pods.STARTING:
            return f"pod {name} {read.waits}", read.hopeless
    running = [one["name"] for one in states if "running" in (one.get("state") or {})]
    return f"pod {name} {'starts ' + running[0] if running else pods.STARTING}", False


def _last_line(kubectl: Kubectl, pod: str, container: str, previous: bool) -> str:
    """What a container printed last, before its end."""
    with suppress(UserError):
        printed = kubectl("logs", pod, "-c", container, f"--previous={str(previous).lower()}", "--tail=5")
        if lines := [line.strip() for line in printed.splitlines() if line.strip()]:
            return f" ({lines[-1][:300]})"
    return ""


def _said_at_start(kubectl: Kubectl, older: set[str]) -> list[str]:
    """What the pods that were not there before did before their servers started, such as a migration."""
    said = []
    for pod in kubectl.objects("get", "pods", "-l", LABEL):
        if pod["metadata"]["uid"] in older or pod["metadata"].get("deletionTimestamp"):
            continue
        owner = pod["metadata"].get("labels", {}).get("app.kubernetes.io/name", pod["metadata"]["name"])
        for container in pod["spec"].get("initContainers") or []:
            with suppress(UserError):
                log = kubectl("logs", pod["metadata"]["name"], "-c", container["name"])
                said += [f"{owner}: {line}" for line in log.splitlines() if not FOREIGN.match(line)]
    return said


# ── where everything is ─────────────────────────────────────────────────────────────────────────────────


def addresses(kubectl: Kubectl, wanted: list[Object]) -> list[str]:
    """Where people find what was deployed, a line each."""
    told: dict[str, str] = {}
    for one in wanted:
        if _title(one) == f"ConfigMap {environment.ON_CLUSTER}":
            told = one.get("data") or {}
    lines = [f"{'namespace':10}{kubectl.namespace}"]
    services = {one["metadata"]["name"]: one for one in wanted if one["kind"] == "Service"}
    for what, names in (
        ("MLflow", (environment.MLFLOW_UI, environment.MLFLOW_TRACKING_URI)),
        ("S3", (environment.S3_ENDPOINT_URL,)),
    ):
        address = next((told[one.name] for one in names if told.get(one.name)), "")
        lines.append(f"{what:10}{address or 'of AWS'}")
        service = address.partition("://")[2].partition("/")[0].partition(":")[0].partition(".")[0]
        if service in services:
            port = services[service]["spec"]["ports"][0]["port"]
            way = f"kubectl -n {kubectl.namespace} port-forward service/{service} {port}"
            lines.append(f"{'':10}from here http://localhost:{port}, after {way}")
    secret = f"kubectl -n {kubectl.namespace} get secret {environment.ON_CLUSTER} -o yaml"
    lines.append(f"{'passwords':10}{secret} (base64)")
    lines.append(f"{'store':10}{told.get(environment.STORE.name, '')}")
    return lines


# ── taking it away ──────────────────────────────────────────────────────────────────────────────────────


def undeploy(namespace: str, say: Say = print) -> None:
    """Remove all of ours but the data from a namespace, and say where that is.

    Raises:
        UserError: the cluster refuses.
    """
    kubectl = Kubectl(namespace)
    told = _told(kubectl)
    removed, unseen = [], []
    for kinds in (WORK, APPLIED, MADE):
        found, hidden = _ours(kubectl, kinds)
        removed += _removed(kubectl, found)
        unseen += hidden
    say(f"removed {', '.join(removed)}" if removed else f"nothing of ours was in namespace {namespace}")
    claims = kubectl.objects("get", DATA, "-l", LABEL)
    for one in claims:
        say(f"data stays in {_claim(one)}")
    if claims:
        say(f"to delete it: kubectl -n {namespace} delete {DATA} -l {LABEL}")
    store, server = told.get(environment.STORE.name), told.get(environment.S3_ENDPOINT_URL.name, "")
    if store and f"://{environment.ON_CLUSTER}" not in server:
        say(f"data stays in {store}" + (f" of {server}" if server else ""))
    say(f"namespace {namespace} stays")
    found, hidden = _ours(kubectl, EVERYWHERE)
    if found:
        _leave_everywhere(kubectl, found, say)
    for line in _not_looked_at(unseen + hidden):
        say(line)


def _leave_everywhere(kubectl: Kubectl, found: list[Object], say: Say) -> None:
    """Remove what is ours and of no namespace, unless another namespace of ours is there."""
    names = ", ".join(map(_title, found))
    try:
        users = kubectl.objects("get", "configmaps", "-l", LABEL, "--all-namespaces")
        if others := sorted({one["metadata"]["namespace"] for one in users}):
            say(f"{names} stays, as {', '.join(others)} uses it, too")
        elif removed := _removed(kubectl, found):
            say(f"removed {', '.join(removed)}")
    except Forbidden:
        say(f"{names} stays: you may not see who else uses it, or not remove it")


def _told(kubectl: Kubectl) -> dict[str, str]:
    """What steps are told by the ConfigMap, if it is there."""
    found = kubectl.objects("get", "configmaps", environment.ON_CLUSTER, "--ignore-not-found")
    return (found[0].get("data") or {}) if found else {}


def _removed(kubectl: Kubectl, found: list[Object]) -> list[str]:
    """Remove what is ours of the kinds of these; returns what that was."""
    if found:
        kinds = ",".join(dict.fromkeys(map(_resource, found)))
        kubectl("delete", kinds, "-l", LABEL, "--ignore-not-found", "--timeout=180s")
    return [_title(one) for one in found if not one["metadata"].get("ownerReferences")]
