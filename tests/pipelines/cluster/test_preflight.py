"""Preflight from outside: a pod as a step's is made, what it says is passed on, and nothing is left of it."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from model.config import load_config
from model.errors import UserError
from model.plumbing import environment
from pipelines.cluster import preflight
from pipelines.pod import FIXED
from tests.apiserver import PODS, ApiServer
from tests.components.conftest import api_server  # noqa: F401 (a fixture)

CONFIG = load_config("smoke", ["jobs.cpu=1", "jobs.memory=2Gi"])


@pytest.fixture
def cluster(api_server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> ApiServer:  # noqa: F811
    """A cluster with a node."""
    monkeypatch.setenv("LATENT_GPT_NAMESPACE", api_server.namespace)
    has = {"cpu": "8", "memory": "32Gi"}
    api_server.add("nodes", "one", spec={}, status={"allocatable": has})
    api_server.lingers = 0
    return api_server


def kubelet(server: ApiServer, *lines: str, **state: Any) -> None:
    """The first pod that is made prints these lines, and comes into this state."""

    def play() -> None:
        while not (names := server.names(PODS)):
            time.sleep(0.01)
        running = {"containerStatuses": [{"name": "main", "state": {"running": {}}}]}
        server._change(PODS, names[0], lambda one: one.update(status=running))
        server.log(names[0], *lines)
        phase = "Failed" if state.get("terminated", {}).get("exitCode") else "Pending"
        status = {"phase": phase, "containerStatuses": [{"name": "main", "state": state}]}
        server._change(PODS, names[0], lambda one: one.update(status=status))

    threading.Thread(target=play, daemon=True).start()


def test_what_the_pod_finds_is_passed_on_and_the_pod_is_gone(
    cluster: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kubelet(cluster, "storage   s3://latent-gpt", terminated={"exitCode": 0})
    preflight.look(CONFIG)
    printed = capsys.readouterr().out
    assert "cluster   Kubernetes v1.34.4" in printed
    assert "storage   s3://latent-gpt" in printed
    assert cluster.names(PODS) == []


def test_what_stops_a_run_there_stops_it_here(cluster: ApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    kubelet(cluster, "storage   STOPS A RUN: x", terminated={"exitCode": 2})
    with pytest.raises(UserError, match="STOPS A RUN"):
        preflight.look(CONFIG)
    assert "storage   STOPS A RUN: x" in capsys.readouterr().out


def test_what_only_an_operator_sees_stops_it_too(
    cluster: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kubelet(cluster, "storage   s3://latent-gpt", terminated={"exitCode": 0})
    with pytest.raises(UserError, match="STOPS A RUN"):
        preflight.look(load_config("smoke", ["jobs.gpus_per_worker=8"]))
    assert "STOPS A RUN: no node has 8 nvidia.com/gpu" in capsys.readouterr().out


def test_an_image_that_knows_no_preflight_is_not_taken_for_all_well(cluster: ApiServer) -> None:
    kubelet(cluster, terminated={"exitCode": 0})
    with pytest.raises(UserError, match=r"said nothing; registry/latent-gpt@sha256:1 is no image of this"):
        preflight.look(CONFIG)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (
            {"waiting": {"reason": "ErrImagePull", "message": "not found"}},
            r"cannot pull its image registry/latent-gpt@sha256:1: ErrImagePull: not found; check its name",
        ),
        ({"waiting": {"reason": "InvalidImageName"}}, r"give the image a valid name"),
        (
            {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
            r"the check has failed: .* ran out of memory",
        ),
    ],
)
def test_a_pod_that_cannot_look_says_why(
    cluster: ApiServer, monkeypatch: pytest.MonkeyPatch, state: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(preflight, "HOPELESS", 0.5)
    kubelet(cluster, **state)
    with pytest.raises(UserError, match=rf"^cluster: .*{says}"):
        preflight.look(CONFIG)
    assert cluster.names(PODS) == []


def test_an_account_that_is_not_there_is_named(cluster: ApiServer) -> None:
    cluster.refuses = 'error looking up service account kubeflow/x: serviceaccount "x" not found'
    with pytest.raises(UserError, match=r"a step's pod is refused: .*LATENT_GPT_ACCOUNT names the account"):
        preflight.look(CONFIG)


def test_a_cluster_that_does_not_answer_is_said_to_be(
    cluster: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.fail(0, times=99)
    with pytest.raises(UserError, match=r"does not answer"):
        preflight.look(CONFIG)


def test_the_pod_is_told_what_steps_are_told_and_restricted_as_they_are() -> None:
    pod = preflight.body(CONFIG, "s3://bucket/mine", "image", "account")
    (container,) = pod["spec"]["containers"]
    assert container["command"][-1] == "s3://bucket/mine"
    assert container["env"][0] == {"name": "LATENT_GPT_LAUNCHER", "value": "pytorchjob"}
    sources = {one["name"]: one["valueFrom"] for one in container["env"] if "valueFrom" in one}
    said = {one["name"]: one["value"] for one in container["env"][1:] if "value" in one}
    assert said == FIXED, "as the pipeline has it"
    mounts = {one["mountPath"] for one in container["volumeMounts"]}
    assert {said["HOME"], said["LATENT_GPT_CACHE"]} <= mounts, "nothing else may be written to"
    assert (
        sources.keys()
        == {one.name for one in environment.IN_CONFIG_MAP + environment.IN_SECRET} - FIXED.keys()
    )
    for source in sources.values():
        (reference,) = source.values()
        assert reference["name"] == "latent-gpt"
        assert reference["optional"]
    assert sources["AWS_SECRET_ACCESS_KEY"].keys() == {"secretKeyRef"}
    assert pod["spec"]["serviceAccountName"] == "account"
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
