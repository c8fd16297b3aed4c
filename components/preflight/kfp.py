"""What surrounds the steps on a cluster: Kubeflow Pipelines, and Argo below it. Nothing here stops a run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from components.preflight.cluster import NOTE, PATIENCE, asked, found
from model.config import RunConfig
from model.plumbing import environment

if TYPE_CHECKING:
    from components.launch.cluster import Cluster, Object

DROP_DOWNS = (2, 17)  # version of KFP from which its page knows them, and its server refuses other values
REQUEUE = "10s"  # after which Argo looks again, unless it is told otherwise
NON_ROOT = "DEFAULT_SECURITY_CONTEXT_RUN_AS_NON_ROOT"


@asked("KFP's version")
def knows_drop_downs(there: Cluster, config: RunConfig) -> str | None:
    """KFP, its version, and whether its page offers presets in a drop-down.

    A step is told no address of KFP's, and looks where a KFP with one user is; outside we look at the one
    that is named.
    """
    import urllib3

    from components.launch import cluster
    from model.plumbing.tracking import reason

    named = environment.KFP_ENDPOINT.get()
    if not named and not cluster.in_pod():
        return None
    url = named or f"http://ml-pipeline.{there.namespace}:8888"
    token = environment.KFP_TOKEN.get()
    try:
        answer = urllib3.request(
            "GET",
            f"{url}/apis/v2beta1/healthz",
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=PATIENCE,
            retries=False,
        )
        version = str(answer.json().get("tag_name", "unknown"))
    except (OSError, urllib3.exceptions.HTTPError, ValueError) as error:
        if not named:
            return f"KFP's version is unknown here: none is at {url}"
        return f"{NOTE}no KFP at {url} ({reason(error)}); where it is elsewhere, KFP_ENDPOINT says so"
    if version == "unknown":
        version = _of_launcher(there) or version
    parts = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not parts:
        return f"KFP at {url} does not tell its version; its page has drop-downs from 2.17 on"
    if parts < DROP_DOWNS:
        return (
            f"{NOTE}KFP {version} at {url} knows no drop-downs, which come with 2.17: a preset is typed"
            " there, and a wrong one is refused by the run's first step"
        )
    return f"KFP {version} at {url} knows drop-downs"


def _of_launcher(there: Cluster) -> str:
    """KFP's version by the image of its launcher in this pod; "" if this is no step of it."""
    for one in (_own_pod(there) or {"spec": {}})["spec"].get("initContainers") or []:
        if found := re.search(r"kfp-launcher:v?(\d[\w.]*)", one["image"]):
            return found[1]
    return ""


def _own_pod(there: Cluster) -> Object | None:
    from components.launch import cluster

    return (
        found(there, f"/api/v1/namespaces/{there.namespace}/pods/{environment.pod()}")
        if cluster.in_pod()
        else None
    )


@asked("whether KFP's containers say runAsNonRoot")
def is_restricted(there: Cluster, config: RunConfig) -> str | None:
    """KFP's own containers say what a namespace that enforces Pod Security `restricted` asks for."""
    pod = _own_pod(there)
    unsaid: list[str] = []
    if pod and any(name.startswith("workflows.argoproj.io") for name in pod["metadata"].get("labels") or {}):
        if (pod["spec"].get("securityContext") or {}).get("runAsNonRoot"):
            return None
        unsaid = [
            one["name"]
            for one in (pod["spec"].get("initContainers") or []) + pod["spec"]["containers"]
            if not (one.get("securityContext") or {}).get("runAsNonRoot")
        ]
    else:
        server = _deployment(there, "ml-pipeline")
        if server is None or _says_non_root(there, server):
            return None
        unsaid = ["those of steps"]
    if not unsaid:
        return None
    return (
        f"{NOTE}KFP's containers ({', '.join(unsaid)}) do not say runAsNonRoot, and a namespace that enforces"
        f" Pod Security `restricted` refuses them; set {NON_ROOT}=true for ml-pipeline (KFP 2.16 and newer),"
        " by defaultSecurityContextRunAsNonRoot in its pipeline-install-config"
    )


def _says_non_root(there: Cluster, server: Object) -> bool:
    for one in _variables(server):
        if one["name"] == NON_ROOT:
            reference = (one.get("valueFrom") or {}).get("configMapKeyRef")
            if not reference:
                return str(one.get("value", "")).lower() == "true"
            path = f"/api/v1/namespaces/{there.namespace}/configmaps/{reference['name']}"
            data = (found(there, path) or {}).get("data") or {}
            return str(data.get(reference["key"], "")).lower() == "true"
    return False


@asked("after how long Argo looks again")
def looks_again(there: Cluster, config: RunConfig) -> str:
    """Argo's requeue time, which is most of what KFP adds to a step."""
    controller = _deployment(there, "workflow-controller")
    if controller is None:
        return f"after how long Argo looks again is unknown: no workflow-controller in {there.namespace}"
    said = [one.get("value") for one in _variables(controller) if one["name"] == "DEFAULT_REQUEUE_TIME"]
    if said and said[0]:
        return f"Argo looks again after {said[0]}"
    return (
        f"{NOTE}Argo looks again after {REQUEUE}, its default: a step takes some 5 s more than with"
        " DEFAULT_REQUEUE_TIME=2s in the workflow-controller's environment"
    )


def _deployment(there: Cluster, name: str) -> Object | None:
    return found(there, f"/apis/apps/v1/namespaces/{there.namespace}/deployments/{name}")


def _variables(deployment: Object) -> list[Object]:
    containers = deployment["spec"]["template"]["spec"]["containers"]
    return [one for container in containers for one in container.get("env") or []]
