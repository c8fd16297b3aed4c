"""Preflight on a real cluster: what is broken on purpose is named with its remedy; what is mended is well.

`make test-cluster PART=preflight`, in a namespace of its own, in five minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests.cluster.cluster import ROOT, Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SMALL = ("jobs.cpu=200m", "jobs.cpu_limit=1", "jobs.memory=2Gi")
Broken = Callable[[Cluster], AbstractContextManager[None]]


def look(cluster: Cluster, *overrides: str, image: str = "") -> tuple[int, str]:
    """Status and output of `latent-gpt preflight --cluster`."""
    settings = [word for one in (*SMALL, *overrides) for word in ("--set", one)]
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "preflight",
        "--cluster",
        "--preset",
        "smoke",
        *settings,
    ]
    told = {
        "LATENT_GPT_NAMESPACE": cluster.namespace,
        "LATENT_GPT_ACCOUNT": "latent-gpt",
        "LATENT_GPT_IMAGE": image or cluster.image,
    }
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **told}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@contextmanager
def patched(cluster: Cluster, kind: str, change: dict[str, object]) -> Iterator[None]:
    """An object `latent-gpt` with a change, and as it was afterwards."""
    before = json.loads(cluster.kubectl("get", kind, "latent-gpt", "-o", "json"))
    cluster.kubectl("patch", kind, "latent-gpt", "--type=merge", "-p", json.dumps(change))
    try:
        yield
    finally:
        meta = {"name": "latent-gpt", "labels": before["metadata"].get("labels", {})}
        rest = {name: value for name, value in before.items() if name != "metadata"}
        cluster.kubectl("replace", "-f", "-", stdin=json.dumps({**rest, "metadata": meta}))


@contextmanager
def whole(cluster: Cluster) -> Iterator[None]:
    """Nothing is broken."""
    yield


def a_secret_without_a_key(cluster: Cluster) -> AbstractContextManager[None]:
    return patched(cluster, "secret", {"data": {"AWS_SECRET_ACCESS_KEY": None}})


def a_wrong_key(cluster: Cluster) -> AbstractContextManager[None]:
    return patched(cluster, "secret", {"stringData": {"AWS_SECRET_ACCESS_KEY": "wrong"}})


@contextmanager
def a_name_that_mlflow_does_not_allow(cluster: Cluster) -> Iterator[None]:
    services = {one["metadata"]["name"]: one for one in cluster.get("services")}
    (server,) = (one for name, one in services.items() if "mlflow" in name)
    spec = {"selector": server["spec"]["selector"], "ports": [{"port": 5000}]}
    cluster.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "elsewhere"}, "spec": spec})
    with patched(cluster, "configmap", {"data": {"MLFLOW_TRACKING_URI": "http://elsewhere:5000"}}):
        yield
    cluster.kubectl("delete", "service", "elsewhere")


@contextmanager
def a_role_without_delete(cluster: Cluster) -> Iterator[None]:
    role = json.loads(cluster.kubectl("get", "role", "latent-gpt", "-o", "json"))
    for rule in role["rules"]:
        if "pytorchjobs" in rule["resources"]:
            rule["verbs"].remove("delete")
    with patched(cluster, "role", {"rules": role["rules"]}):
        yield


@contextmanager
def a_small_quota(cluster: Cluster) -> Iterator[None]:
    hard = {"requests.nvidia.com/gpu": "0", "count/pytorchjobs.kubeflow.org": "0"}
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "small"},
        "spec": {"hard": hard},
    }
    cluster.apply(quota)
    yield
    cluster.kubectl("delete", "resourcequota", "small")


@pytest.mark.parametrize(
    ("broken", "overrides", "says"),
    [
        pytest.param(
            a_secret_without_a_key,
            (),
            (
                "Secret 'latent-gpt'",
                "has no AWS_SECRET_ACCESS_KEY",
                "`make secrets`",
                "credentials are incomplete",
            ),
            id="a key is missing",
        ),
        pytest.param(
            a_wrong_key,
            (),
            ("refuses the credentials (SignatureDoesNotMatch); check AWS_ACCESS_KEY_ID",),
            id="a key is wrong",
        ),
        pytest.param(
            a_name_that_mlflow_does_not_allow,
            (),
            ("MLflow at http://elsewhere:5000 answers 403", "--allowed-hosts for this name"),
            id="MLflow refuses its name",
        ),
        pytest.param(
            a_role_without_delete,
            (),
            (
                "latent-gpt may not delete pytorchjobs.kubeflow.org",
                "resources: [pytorchjobs], verbs: [delete]",
            ),
            id="a right is missing",
        ),
        pytest.param(
            a_small_quota,
            (),
            ("quota small allows 0 count/pytorchjobs.kubeflow.org, and a job asks for 1", "raise it"),
            id="no quota",
        ),
        pytest.param(
            whole,
            ("jobs.gpus_per_worker=8",),
            ("no node has 8 nvidia.com/gpu for a worker", "lower jobs.gpus_per_worker, or add such a node"),
            id="no GPUs",
        ),
        pytest.param(
            whole,
            ("jobs.priority_class=none",),
            ("no PriorityClass with name none", "create it, or set jobs.priority_class"),
            id="no priority class",
        ),
    ],
)
def test_what_is_broken_on_purpose_is_named_with_its_remedy(
    cluster: Cluster, broken: Broken, overrides: tuple[str, ...], says: tuple[str, ...]
) -> None:
    with broken(cluster):
        status, said = look(cluster, *overrides)
    print(said)
    assert status == 2
    assert "STOPS A RUN" in said
    for one in says:
        assert one in said


def test_an_image_that_is_not_there_is_named(cluster: Cluster) -> None:
    image = f"{cluster.image.partition('@')[0]}:none"
    status, said = look(cluster, image=image)
    print(said)
    assert status == 2
    assert f"a step's pod cannot pull its image {image}" in said
    assert "check its name, the registry and jobs.image_pull_secrets" in said


def test_what_is_mended_is_well_and_nothing_is_left(cluster: Cluster) -> None:
    status, said = look(cluster)
    print(said)
    assert status == 0
    assert "STOPS A RUN" not in said
    for section in ("cluster", "KFP", "source", "storage", "tracking"):
        assert f"\n{section:10}" in f"\n{said}"
    names = (
        one["metadata"]["name"] for one in cluster.get("pods") if "deletionTimestamp" not in one["metadata"]
    )
    assert [name for name in names if "preflight" in name] == []
