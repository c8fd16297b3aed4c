"""The manifests on a real cluster: what its API server says to them, and who gets in.

`make test-cluster PART=manifests` runs this file against the cluster of KUBECONFIG, in a namespace of its
own, with the images that `make push` left, within ten minutes.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from model.plumbing import storage
from tests.cluster.cluster import MLFLOW, S3, Cluster, until
from tests.k8s.rendering import OVERLAYS, Object, build, everything, overlay

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

FOREIGN = (Path(__file__).parent / "foreign.py").read_text()
RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def pod(cluster: Cluster, name: str, *command: str, **labels: str) -> Object:
    """A pod that is nothing of ours, unless its labels say so."""
    container = {
        "name": "main",
        "image": cluster.mlflow,
        "command": list(command),
        "securityContext": RESTRICTED,
    }
    user = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"containers": [container], "securityContext": user, "automountServiceAccountToken": False}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


def address(cluster: Cluster, name: str) -> str:
    """A running pod's, by its name, or by the server that it is of."""
    selector = ("-l", f"app.kubernetes.io/name={name}") if name in (S3, MLFLOW) else ()
    found = [
        one["status"]["podIP"]
        for one in cluster.get("pods", *selector)
        if (selector or one["metadata"]["name"] == name) and "deletionTimestamp" not in one["metadata"]
    ]
    (ip,) = found
    return str(ip)


@pytest.fixture(scope="module")
def foreign(cluster: Cluster) -> Iterator[str]:
    """The name of a foreign pod in our namespace, which waits to be told what to do."""
    cluster.apply(pod(cluster, "foreign", "sleep", "3600"))
    cluster.kubectl("wait", "--for=condition=ready", "pod/foreign", "--timeout=120s")
    yield "foreign"
    cluster.kubectl("delete", "pod", "foreign", "--grace-period=1")


@pytest.fixture(scope="module")
def found(cluster: Cluster, foreign: str) -> dict[str, Any]:
    """What it finds."""
    servers = [address(cluster, name) for name in (S3, MLFLOW)]
    said = cluster.kubectl("exec", foreign, "--", "python", "-W", "ignore", "-c", FOREIGN, *servers)
    result: dict[str, Any] = json.loads(said.splitlines()[-1])
    return result


# ── what the API server says ────────────────────────────────────────────────────────────────────────────


def warnings(cluster: Cluster, objects: list[Object]) -> list[str]:
    """What it warns of; a failure where it refuses. Kinds that it does not know are left out."""
    known = {line.split()[-1] for line in cluster.kubectl("api-resources", "--no-headers").splitlines()}
    whole = {"apiVersion": "v1", "kind": "List", "items": [one for one in objects if one["kind"] in known]}
    command = ["kubectl", "apply", "--server-side", "--force-conflicts", "--dry-run=server", "-f", "-"]
    done = subprocess.run(command, input=json.dumps(whole), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.fixture(scope="module")
def empty(cluster: Cluster) -> Iterator[str]:
    """A namespace that holds nothing, and warns of what is not `restricted`."""
    name = f"{cluster.namespace}-empty"
    labels = {"pod-security.kubernetes.io/warn": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.mark.parametrize("name", [*OVERLAYS, "everything"])
def test_it_is_taken_without_a_warning(cluster: Cluster, empty: str, name: str, tmp_path: Path) -> None:
    if name == "everything":
        folder = everything(tmp_path, empty)
    else:
        folder = overlay(tmp_path, empty, resources=[f"../{name}"])
    found = [one for one in build(folder) if one["kind"] != "Namespace"]  # is there, and somebody else's
    assert warnings(cluster, found) == []
    servers = [one for one in found if one["kind"] == "Deployment"]
    servers[0]["spec"]["template"]["spec"]["containers"][0].pop("securityContext")
    assert "would violate PodSecurity" in "".join(warnings(cluster, servers)), "it would have warned"


# ── who gets in ─────────────────────────────────────────────────────────────────────────────────────────


def test_s3_refuses_who_has_no_key(found: dict[str, Any]) -> None:
    assert {what: found[what] for what in ("list", "read", "write")} == {
        "list": 403,
        "read": 403,
        "write": 403,
    }


def test_no_other_port_of_s3_lets_anybody_in(found: dict[str, Any]) -> None:
    assert set(found["open at S3"]) <= {8333, 18333}
    assert found["control"] in ("", "ConnectionResetError", "TimeoutError"), "it speaks TLS alone"
    assert found["control by TLS"] == "SSLError"
    assert found["control with a certificate"] == "SSLError", "only the one of this start is known"


def test_mlflow_refuses_who_has_no_password(found: dict[str, Any]) -> None:
    assert found["open at MLflow"] == [5000]
    assert found["MLflow"] == 401
    assert found["MLflow with a password"] == 401
    assert found["MLflow by another name"] == 403
    assert len(found["MLflow's routes"]) > 100
    let_in = {path for _, path, status in found["MLflow's routes"] if status not in (401, 403, 405)}
    public = {"/health", "/static-files/1"}  # and how it was set up, without secrets, for clients
    assert let_in == public | {f"/{api}/3.0/mlflow/server-info" for api in ("api", "ajax-api")}


def test_policies_keep_a_foreign_pod_off(cluster: Cluster, foreign: str) -> None:
    def reaches(who: str, host: str, port: int) -> bool:
        code = f"import socket; socket.create_connection(({host!r}, {port}), 3)"
        command = ["kubectl", "-n", cluster.namespace, "exec", who, "--", "python", "-c", code]
        return subprocess.run(command, capture_output=True).returncode == 0

    shut = {"podSelector": {"matchLabels": {"test": "shut"}}, "policyTypes": ["Ingress"]}
    meta = {"name": "shut", "labels": {"test": "shut"}}
    policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta, "spec": shut}
    ours = {"app.kubernetes.io/part-of": "latent-gpt"}
    cluster.apply(
        policy,
        pod(cluster, "shut", "python", "-m", "http.server", "8000", test="shut"),
        pod(cluster, "ours", "sleep", "3600", **ours),
    )
    try:
        cluster.kubectl("wait", "--for=condition=ready", "pod/shut", "pod/ours", "--timeout=120s")
        s3, mlflow = (address(cluster, name) for name in (S3, MLFLOW))
        assert reaches("ours", s3, 8333)
        assert reaches("ours", mlflow, 5000)
        until(lambda: reaches("shut", "127.0.0.1", 8000), 30, "a server to try policies on")
        if reaches(foreign, address(cluster, "shut"), 8000):
            pytest.skip("this cluster enforces no policy: a pod that one shuts off was reached")
        assert not reaches(foreign, s3, 8333)
        assert not reaches(foreign, s3, 18333)
        assert not reaches("ours", s3, 18333), "not even ours"
        assert not reaches(foreign, mlflow, 5000)
    finally:
        cluster.kubectl("delete", "networkpolicy/shut", "pod/shut", "pod/ours", "--grace-period=1")


# ── what lasts ──────────────────────────────────────────────────────────────────────────────────────────


def test_servers_that_are_killed_come_back_with_their_data(cluster: Cluster) -> None:
    client = mlflow.MlflowClient()
    kept = client.create_experiment("kept")
    storage.write_bytes("s3://latent-gpt/kept", b"kept")

    def restarts(server: str) -> int:
        (one,) = cluster.get("pods", "-l", f"app.kubernetes.io/name={server}")
        (container,) = one["status"]["containerStatuses"]
        return int(container["restartCount"]) if container["ready"] else -1

    for server in (S3, MLFLOW):
        before = restarts(server)
        cluster.kubectl("exec", f"deployment/{server}", "--", "sh", "-c", "kill -TERM 1")
        until(lambda: restarts(server) > before, 180, f"{server} again", every=1)  # noqa: B023
    with cluster.reached() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        assert storage.read_bytes("s3://latent-gpt/kept") == b"kept"
        assert mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"]).get_experiment(kept).name == "kept"
