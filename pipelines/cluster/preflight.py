"""Preflight on a cluster: a pod looks as a step would, and we with a kubeconfig."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kubernetes.client.exceptions import ApiException  # type: ignore[import-untyped]

from components.launch import cluster, pods
from components.launch.cluster import NETWORK, Cluster, Object
from components.launch.pytorchjob import AUTHORITIES, AUTHORITIES_AT, PART_OF
from components.preflight import FROM_OUTSIDE, Finding, findings
from model.config import RunConfig
from model.errors import UserError
from model.plumbing import environment
from pipelines.cluster.settings import built, read

LONGEST = 900  # seconds for the pod: its image may have GBs to be pulled
HOPELESS = 20.0  # seconds for which it may say that it cannot be started
UNSCHEDULED = 40.0  # seconds for a node
LOOKS = 0.5  # seconds between two looks


def look(config: RunConfig, data: str = "") -> None:
    """Print what is found, from here and from the pod.

    Args:
        config: of a run.
        data: its pictures, where only a look from the pod tells of what kind they are.

    Raises:
        UserError: something would stop a run, or the pod says nothing.
    """
    read()
    told = {
        environment.LAUNCHER.name: "pytorchjob",
        environment.IMAGE.name: built("latent-gpt"),
        environment.STORE.name: environment.STORE.get() or "s3://latent-gpt",
    }
    with environment.within(told):
        found = findings(config, FROM_OUTSIDE)
        _print(found)
        if found[0].error:
            raise found[0].error
        code = _in_pod(config, data, cluster.here())
    if code or any(one.error for one in found):
        raise UserError("what STOPS A RUN has to be mended first")


def _print(found: list[Finding]) -> None:
    if found:
        print(*found, sep="\n", flush=True)


def _in_pod(config: RunConfig, data: str, there: Cluster) -> int:
    """Print what a pod of the steps' account finds; returns its exit code."""
    try:
        with _pod(there, body(config, data, environment.IMAGE.get(), environment.ACCOUNT.get())) as name:
            pod = _ended(there, name)
            lines = [line for _, line in there.log(name, cluster.STEP_CONTAINER)]
    except ApiException as error:
        said = cluster.told(error)
        right = ""
        if "serviceaccount" in said and "not found" in said:
            right = "; LATENT_GPT_ACCOUNT names the account of steps"
        raise UserError(f"cluster: a step's pod is refused: {said}{right}") from None
    except NETWORK as error:
        where = there.configuration.host
        raise UserError(f"cluster: {where} does not answer: {cluster.plain(error)}") from None
    for line in lines:
        print(line, flush=True)
    ended = pod.ended
    assert ended
    if ended.code not in (0, 2):
        raise UserError(f"cluster: the check has failed: {pods.end_of(pod).reason}")
    if not lines:
        raise UserError(f"cluster: the check said nothing; {pod.image} is no image of this version")
    return ended.code


@contextmanager
def _pod(there: Cluster, made: Object) -> Iterator[str]:
    """A pod, until the block ends; yields its name."""
    name = there.ask(f"/api/v1/namespaces/{there.namespace}/pods", made).found["metadata"]["name"]
    try:
        yield name
    finally:
        with suppress(ApiException, *NETWORK):
            there.core.delete_namespaced_pod(
                name, there.namespace, grace_period_seconds=1, _preload_content=False
            )


def _ended(there: Cluster, name: str) -> pods.Pod:
    """The pod, as soon as it has ended.

    Raises:
        UserError: it does not start, and why.
    """
    began = time.monotonic()
    stands: dict[str, float] = {}  # since when it has waited for this
    path = f"/api/v1/namespaces/{there.namespace}/pods/{name}"
    while True:
        pod = pods.read(there.patiently(lambda: there.ask(path).found, limit=60), cluster.STEP_CONTAINER, 0)
        if pod.ended:
            return pod
        now = time.monotonic()
        kind = pod.waits.partition(":")[0]
        since = now - stands.setdefault(kind, now)
        limit = HOPELESS if kind.startswith("cannot") else UNSCHEDULED if "schedul" in kind else LONGEST
        if since > limit or now - began > LONGEST or pod.hopeless:
            raise UserError(f"cluster: a step's pod {pod.waits or 'does not end'}")
        time.sleep(LOOKS)


def body(config: RunConfig, data: str, image: str, account: str) -> Object:
    """The pod that looks: a step's in all that matters."""
    values: list[dict[str, Any]] = [
        {"name": one.name, "valueFrom": {reference: _key(one.name)}}
        for reference, keys in (
            ("configMapKeyRef", environment.IN_CONFIG_MAP),
            ("secretKeyRef", environment.IN_SECRET),
        )
        for one in keys
        if one.name not in environment.OF_A_STEP
    ]
    said = [{"name": name, "value": value} for name, value in environment.OF_A_STEP.items()]
    container = {
        "name": cluster.STEP_CONTAINER,
        "image": image,
        "command": ["python", "-m", "components.preflight", config.model_dump_json(), data],
        # The first where the second is optional and not there: the cluster is looked at all the same.
        "env": [{"name": environment.LAUNCHER.name, "value": "pytorchjob"}, *values, *said],
        "resources": {
            "requests": {"cpu": "100m", "memory": "512Mi"},
            "limits": {"cpu": "1", "memory": "2Gi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "cache", "mountPath": environment.OF_A_STEP[environment.CACHE.name]},
            {"name": "ca", "mountPath": AUTHORITIES_AT, "readOnly": True},
        ],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": "latent-gpt-preflight-", "labels": PART_OF},
        "spec": {
            "serviceAccountName": account,
            "restartPolicy": "Never",
            "activeDeadlineSeconds": LONGEST,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "imagePullSecrets": [{"name": one} for one in config.jobs.image_pull_secrets],
            "containers": [container],
            "volumes": [
                {"name": "tmp", "emptyDir": {}},
                {"name": "cache", "emptyDir": {}},
                {"name": "ca", "secret": {"secretName": AUTHORITIES, "optional": True}},
            ],
        },
    }


def _key(name: str) -> Object:
    return {"name": environment.ON_CLUSTER, "key": name, "optional": True}
