"""What is applied, removed and waited for, against a kubectl that keeps objects in memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from model.errors import Unavailable, UserError
from pipelines.cluster import deploy as deploying
from pipelines.cluster import settings
from pipelines.cluster.deploy import Kubectl, apply, prune, undeploy, wait, why_not_ready
from pipelines.cluster.kubectl import Forbidden, NoKind
from tests import ROOT
from tests.kubectl import OURS, FakeKubectl, Object, made


@pytest.fixture
def kubectl() -> FakeKubectl:
    return FakeKubectl()


def test_what_is_as_it_should_be_is_no_change(kubectl: FakeKubectl) -> None:
    wanted = [made("ConfigMap", "latent-gpt", data={"a": "1"}), made("Service", "latent-gpt-s3")]
    assert apply(kubectl, wanted).made == ["ConfigMap latent-gpt", "Service latent-gpt-s3"]
    again = apply(kubectl, wanted)
    assert again.lines() == ["nothing changed: 2 objects are as they should be"]
    wanted[0]["data"] = {"a": "2"}
    changes = apply(kubectl, wanted)
    assert changes.lines() == ["changed ConfigMap latent-gpt"]


def test_what_a_new_set_has_no_more_is_removed_but_no_data_and_nothing_of_others(
    kubectl: FakeKubectl,
) -> None:
    owned = made("Service", "a-job")
    owned["metadata"]["ownerReferences"] = [{"kind": "PyTorchJob"}]
    kubectl.add(
        made("Service", "mlflow"),
        made("Service", "seaweedfs", labels={}),
        made("PersistentVolumeClaim", "mlflow"),
        made("Secret", "latent-gpt"),
        made("PyTorchJob", "transformer-1"),
        owned,
    )
    wanted = [made("Service", "latent-gpt-mlflow")]
    apply(kubectl, wanted)
    before = kubectl.names()
    kubectl.forbidden.add("poddisruptionbudgets.policy")
    assert prune(kubectl, wanted) == (["Service mlflow"], ["poddisruptionbudgets.policy"])
    assert before - kubectl.names() == {"Service mlflow"}


def test_kfps_own_namespace_gets_no_limits(kubectl: FakeKubectl) -> None:
    wanted = [made("Namespace", "ours"), made("Service", "latent-gpt-s3")]
    deploying._spare_kfps(kubectl, wanted)
    kubectl.add(made("Deployment", "ml-pipeline", labels={}))
    deploying._spare_kfps(kubectl, wanted[1:])
    with pytest.raises(
        UserError, match="namespace ours is KFP's, and the overlay has components/own-namespace"
    ):
        deploying._spare_kfps(kubectl, wanted)


def test_servers_start_anew_when_what_they_read_is_another_and_only_then(kubectl: FakeKubectl) -> None:
    def mark(data: str) -> str:
        template: Object = {"metadata": {"annotations": {"theirs": "x"}}, "spec": {}}
        wanted = [
            made("ConfigMap", "latent-gpt", data={"a": data}),
            made("Deployment", "latent-gpt-s3", spec={"template": template}),
        ]
        deploying._stamp(kubectl, wanted)
        notes = template["metadata"]["annotations"]
        assert notes["theirs"] == "x"
        return str(notes[deploying.CONFIG])

    secret = made("Secret", "latent-gpt", data={"KEY": "c2VjcmV0"})
    kubectl.add(secret)
    first = mark("1")
    assert mark("1") == first
    assert mark("2") != first
    kubectl.add(secret)  # of another version, as after a change
    assert mark("1") != first


def test_a_key_that_a_server_would_wait_for_is_missed_at_once(
    kubectl: FakeKubectl,
) -> None:
    def variable(key: str, **more: Any) -> Object:
        return {"name": key, "valueFrom": {"secretKeyRef": {"name": "latent-gpt-mlflow", "key": key, **more}}}

    container = {"env": [variable("MLFLOW_BACKEND_STORE_URI"), variable("ONE", optional=True)]}
    spec = {"template": {"spec": {"initContainers": [container]}}}
    wanted = [made("Deployment", "latent-gpt-mlflow", spec=spec)]
    with pytest.raises(UserError, match=r"^Secret latent-gpt-mlflow .* has no MLFLOW_BACKEND_STORE_URI"):
        deploying._check_secrets(kubectl, wanted)
    kubectl.add(made("Secret", "latent-gpt-mlflow", data={"MLFLOW_BACKEND_STORE_URI": "eA=="}))
    deploying._check_secrets(kubectl, wanted)


def test_the_data_of_an_earlier_version_is_not_forgotten(kubectl: FakeKubectl) -> None:
    spec = {"resources": {"requests": {"storage": "5Gi"}}}
    old, new = (made("PersistentVolumeClaim", name, spec=spec) for name in ("mlflow", "latent-gpt-mlflow"))
    kubectl.add(old, new)
    said = deploying._left_behind(kubectl, [new])
    assert said == ["claim mlflow (5Gi, no volume yet) is of an earlier version, and not used any more"]


def test_undeploy_leaves_the_data_and_what_is_not_ours(
    kubectl: FakeKubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = {"resources": {"requests": {"storage": "20Gi"}}, "volumeName": "pv-7"}
    told = {"LATENT_GPT_STORE": "s3://bucket", "S3_ENDPOINT_URL": "https://s3.company"}
    kubectl.add(
        made("Deployment", "latent-gpt-s3"),
        made("ConfigMap", "latent-gpt", data=told),
        made("Secret", "latent-gpt"),
        made("Pod", "a-step"),
        made("PyTorchJob", "transformer-1"),
        made("PersistentVolumeClaim", "latent-gpt-s3", spec=claim),
        made("Namespace", "ours"),
        made("Deployment", "ml-pipeline", labels={}),
    )
    monkeypatch.setattr(deploying, "Kubectl", lambda namespace: kubectl)
    said: list[str] = []
    undeploy("ours", said.append)
    assert kubectl.names() == {
        "PersistentVolumeClaim latent-gpt-s3",
        "Namespace ours",
        "Deployment ml-pipeline",
    }
    assert "data stays in claim latent-gpt-s3 (20Gi, pv-7)" in said
    assert "data stays in s3://bucket of https://s3.company" in said
    undeploy("ours", said.append)
    assert "nothing of ours was in namespace ours" in said


def test_who_may_look_at_one_namespace_alone_undeploys_it_and_learns_where_the_data_is(
    kubectl: FakeKubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = {"resources": {"requests": {"storage": "20Gi"}}, "volumeName": "pv-7"}
    kubectl.add(
        made("Deployment", "latent-gpt-s3"), made("PersistentVolumeClaim", "latent-gpt-s3", spec=claim)
    )
    kubectl.forbidden.update(deploying.EVERYWHERE)
    monkeypatch.setattr(deploying, "Kubectl", lambda namespace: kubectl)
    said: list[str] = []
    undeploy("ours", said.append)
    assert said[0] == "removed Deployment latent-gpt-s3"
    assert "data stays in claim latent-gpt-s3 (20Gi, pv-7)" in said
    assert said[-1] == f"not looked at: {', '.join(deploying.EVERYWHERE)}; you may not"


def test_what_belongs_to_no_namespace_stays_while_another_one_uses_it(
    kubectl: FakeKubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploying, "Kubectl", lambda namespace: kubectl)
    priority, other = made("PriorityClass", "latent-gpt"), made("ConfigMap", "theirs")
    other["metadata"]["namespace"] = "another"
    kubectl.add(priority)
    real = kubectl._asked
    elsewhere = [other]
    monkeypatch.setattr(
        FakeKubectl,
        "_asked",
        lambda self, arguments: elsewhere if "--all-namespaces" in arguments else real(arguments),
    )
    said: list[str] = []
    undeploy("ours", said.append)
    assert "PriorityClass latent-gpt stays, as another uses it, too" in said
    elsewhere.clear()
    undeploy("ours", said.append)
    assert kubectl.names() == set()


# ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────


def pod(name: str, phase: str = "Pending", **status: Any) -> Object:
    spec = {
        "initContainers": [{"name": "databases", "image": "mlflow"}],
        "containers": [{"name": "mlflow", "image": "mlflow"}],
    }
    one = made("Pod", name, labels={**OURS, "app": "mlflow"}, spec=spec, status={"phase": phase, **status})
    one["metadata"] |= {"creationTimestamp": "2026-11-26T12:00:00Z", "uid": name}
    return one


def of(container: str, state: str, **how: Any) -> list[Object]:
    last = how.pop("lastState", {})
    return [{"name": container, "state": {state: how}, "lastState": last}]


FULL = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "Insufficient cpu."}


@pytest.mark.parametrize(
    ("status", "why", "hopeless"),
    [
        ({"conditions": [FULL]}, "pod a is unschedulable: Insufficient cpu", False),
        ({}, "pod a is being started", False),
        ({"initContainerStatuses": of("databases", "running")}, "pod a starts databases", False),
        (
            {"initContainerStatuses": of("databases", "waiting", reason="ErrImagePull", message="no such")},
            "pod a cannot pull its image mlflow: ErrImagePull: no such; check its name, the registry",
            False,
        ),
        (
            {"initContainerStatuses": of("databases", "waiting", reason="InvalidImageName")},
            "pod a cannot pull its image mlflow: InvalidImageName; give the image a valid name",
            True,
        ),
        (
            {
                "containerStatuses": of(
                    "mlflow", "waiting", reason="CreateContainerConfigError", message='no "x"'
                )
            },
            'pod a cannot be started: CreateContainerConfigError: no "x"',
            False,
        ),
        (
            {
                "phase": "Running",
                "containerStatuses": of(
                    "mlflow", "waiting", reason="CrashLoopBackOff", lastState={"terminated": {"exitCode": 3}}
                ),
            },
            "mlflow of pod a ended with exit code 3 (no database)",
            False,
        ),
        (
            {
                "phase": "Running",
                "containerStatuses": of("mlflow", "terminated", exitCode=137, reason="OOMKilled"),
            },
            "mlflow of pod a ended with exit code 137, out of memory",
            False,
        ),
    ],
)
def test_it_is_said_why_a_server_is_not_ready(
    kubectl: FakeKubectl, status: Object, why: str, hopeless: bool
) -> None:
    kubectl.logs["a", "mlflow"] = "starts\nno database\n\n"
    said, never = why_not_ready(kubectl, pod("a", **status))
    assert (said.startswith(why), never) == (True, hopeless), said


def server(generation: int = 1, **status: int) -> Object:
    spec = {"replicas": 1, "selector": {"matchLabels": {"app": "mlflow"}}}
    one = made("Deployment", "mlflow", spec=spec, status=status)
    one["metadata"]["generation"] = generation
    return one


HEALTHY = {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}


def test_who_waits_says_each_reason_once_and_ends_when_all_is_well(
    kubectl: FakeKubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubectl.add(server(), pod("a", conditions=[FULL]))
    turns = iter([lambda: None, lambda: kubectl.add(server(**HEALTHY))])
    monkeypatch.setattr("time.sleep", lambda seconds: next(turns)())
    said: list[str] = []
    wait(kubectl, [server()], said.append)
    assert said == ["waits for Deployment mlflow: pod a is unschedulable: Insufficient cpu"]


def test_a_server_of_before_is_no_healthy_one(kubectl: FakeKubectl, monkeypatch: pytest.MonkeyPatch) -> None:
    kubectl.add(server(generation=2, **HEALTHY), pod("a"))
    monkeypatch.setattr("time.sleep", lambda seconds: kubectl.add(server(generation=1, **HEALTHY)))
    said: list[str] = []
    wait(kubectl, [server()], said.append)
    assert len(said) == 1


def test_nobody_waits_for_what_never_comes(kubectl: FakeKubectl, monkeypatch: pytest.MonkeyPatch) -> None:
    kubectl.add(server(), pod("a", containerStatuses=of("mlflow", "waiting", reason="InvalidImageName")))
    with pytest.raises(UserError, match=r"^Deployment mlflow is not healthy: pod a cannot pull"):
        wait(kubectl, [server()], lambda text: None)
    kubectl.add(pod("a", conditions=[FULL]))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match="not healthy after 0s: pod a is unschedulable"):
        wait(kubectl, [server()], lambda text: None, limit=0)
    kubectl.there.clear()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"Deployment mlflow cannot be seen after 0s: .* has no label"):
        wait(kubectl, [server()], lambda text: None, limit=0)


# ── kubectl ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("says", "kind", "line"),
    [
        (
            "The connection to the server 10.0.0.1:6443 was refused - did you specify the right host?",
            Unavailable,
            "check that KUBECONFIG names your cluster's file",
        ),
        ('Error from server (NotFound): namespaces "x" not found', UserError, "kubectl create namespace x"),
        (
            "Warning: old\nerror: deployments is forbidden: no",
            Forbidden,
            "kubectl get: deployments is forbidden",
        ),
        (
            'E1126 14:00:33.49 753 memcache.go:287] "Unhandled Error" err="service unavailable"\n' * 9
            + 'error: the server doesn\'t have a resource type "localqueues"',
            NoKind,
            "kubectl get: the server doesn't have a resource type",
        ),
        ('error: no matches for kind "LocalQueue" in version "x"', UserError, "`make cluster-addons`"),
    ],
)
def test_what_kubectl_says_against_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, kind: type[UserError], line: str
) -> None:
    program = tmp_path / "kubectl"
    program.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{says}\nEND\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError) as refused:
        Kubectl("ours")("get", "pods")
    assert type(refused.value) is kind
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_machine_without_kubectl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"^kubectl is not found; install it"):
        Kubectl("ours")("get", "pods")


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl, whose kustomize needs no cluster")
def test_an_overlay_comes_with_our_namespace_and_by_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = f"@sha256:{'a' * 64}"
    monkeypatch.setattr(deploying, "built", lambda name: f"registry:5000/{name}{digest}")
    objects = deploying.render(Kubectl("team"), "local")
    assert {one["metadata"].get("namespace") for one in objects} == {"team"}
    for one in objects:
        assert one["metadata"]["labels"].items() >= OURS.items()
        for subject in one.get("subjects", []):
            assert subject["namespace"] == "team"
        if one["kind"] == "Deployment":
            spec = one["spec"]["template"]["spec"]
            for container in (*spec["containers"], *spec.get("initContainers", [])):
                assert container["image"].startswith("registry:5000/latent-gpt")
                assert container["image"].endswith(digest)
    assert not list((ROOT / "k8s").glob(".deploy-*")), "nothing is left behind"

    def not_pushed(name: str) -> str:
        raise UserError(f"no image {name} was pushed")

    monkeypatch.setattr(deploying, "built", not_pushed)
    with pytest.raises(UserError, match="no image latent-gpt was pushed"):
        deploying.render(Kubectl("team"), "local")
    with pytest.raises(UserError, match=r"OVERLAY nowhere: .* choose .*local"):
        deploying.render(Kubectl("team"), "nowhere")


# ── cluster.env ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NAMESPACE", raising=False)
    monkeypatch.setenv("LATENT_GPT_NAMESPACE", "")  # and not deleted: what is set then would stay
    monkeypatch.setenv("KFP_ENDPOINT", "http://mine")
    monkeypatch.setenv("KFP_TOKEN", "")
    text = "# of the team\n\nNAMESPACE=team\nKFP_ENDPOINT=http://theirs\nKFP_TOKEN=a=b # c\n"
    (tmp_path / settings.FILE).write_text(text)
    settings.read(tmp_path)
    environment = settings.environment
    assert environment.NAMESPACE.get() == "team"
    assert environment.KFP_ENDPOINT.get() == "http://mine"
    assert environment.KFP_TOKEN.get() == "a=b # c"


@pytest.mark.parametrize(("whole", "found"), [("", "mine"), ("theirs", "theirs")])
def test_the_short_name_counts_in_the_environment_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: str, found: str
) -> None:
    monkeypatch.setenv("LATENT_GPT_NAMESPACE", whole)
    monkeypatch.setenv("NAMESPACE", "mine")
    (tmp_path / settings.FILE).write_text("NAMESPACE=team\n")
    settings.read(tmp_path)
    assert settings.environment.NAMESPACE.get() == found


def test_without_a_file_the_namespace_is_kfps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NAMESPACE", raising=False)
    monkeypatch.setenv("LATENT_GPT_NAMESPACE", "")
    settings.read(tmp_path)
    assert settings.environment.NAMESPACE.get() == "kubeflow"


@pytest.mark.parametrize("line", ["NAMESPACE = team", "export A=b", "KFP_TOKEN='secret'"])
def test_a_line_that_is_none_is_refused_without_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setenv("LATENT_GPT_NAMESPACE", "x")
    (tmp_path / settings.FILE).write_text(f"A=b\n{line}\n")
    monkeypatch.setenv("A", "")
    with pytest.raises(UserError, match=r"cluster\.env:2 must read NAME=value") as refused:
        settings.read(tmp_path)
    assert "secret" not in str(refused.value)
