"""The job object: every setting is in it, nothing that the API does not know, no right beyond its need."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from kubeflow.training import models
from kubernetes import client

from components.launch import pytorchjob
from model.config import JobConfig, load_config
from model.plumbing.jobs import JobSpec, TrackingIds

Built = dict[str, Any]


def spec(run: str = "smoke-1", **jobs: Any) -> JobSpec:
    return JobSpec(
        kind="transformer",
        module="toy",
        config=load_config("smoke"),
        settings={},
        inputs={},
        jobs=JobConfig(**jobs),
        tracking=TrackingIds(experiment="e", run=run, step="transformer"),
    )


def built(one: JobSpec) -> Built:
    """The object as it goes to the API server."""
    found = pytorchjob.job(one, "s3://b/job.json", "registry/image@sha256:1", "ns", pytorchjob.labels(one))
    plain: Built = client.ApiClient().sanitize_for_serialization(found)
    return plain


def template(made: Built) -> Built:
    return made["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]


def pod(made: Built) -> Built:
    return template(made)["spec"]


def container(made: Built) -> Built:
    (one,) = pod(made)["containers"]
    return one


@pytest.fixture(autouse=True)
def _store(store: str) -> None:
    """Names depend on where assets go."""


SHOWN: dict[str, tuple[Any, Callable[[Built], Any], Any]] = {  # value, where it stands, what stands there
    "workers": (3, lambda made: made["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"], 3),
    "min_workers": (1, lambda made: made["spec"]["elasticPolicy"]["minReplicas"], 1),
    "processes_per_worker": (2, lambda made: made["spec"]["nprocPerNode"], "2"),
    "gpus_per_worker": (8, lambda made: container(made)["resources"]["limits"]["nvidia.com/gpu"], "8"),
    "cpu": ("300m", lambda made: container(made)["resources"]["requests"]["cpu"], "300m"),
    "cpu_limit": ("7", lambda made: container(made)["resources"]["limits"]["cpu"], "7"),
    "memory": (
        "3Gi",
        lambda made: [container(made)["resources"][one]["memory"] for one in ("requests", "limits")],
        ["3Gi", "3Gi"],
    ),
    "shared_memory": (
        "2Gi",
        lambda made: [one["emptyDir"] for one in pod(made)["volumes"] if one["name"] == "shm"],
        [{"medium": "Memory", "sizeLimit": "2Gi"}],
    ),
    "node_selector": ({"gpu": "h100"}, lambda made: pod(made)["nodeSelector"], {"gpu": "h100"}),
    "tolerations": (
        [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}, {"key": "a", "value": "b"}],
        lambda made: pod(made)["tolerations"],
        [
            {"key": "spot", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "a", "operator": "Equal", "value": "b"},
        ],
    ),
    "priority_class": ("low", lambda made: pod(made)["priorityClassName"], "low"),
    "queue": ("gpus", lambda made: made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], "gpus"),
    "image_pull_secrets": (
        ["a", "b"], lambda made: pod(made)["imagePullSecrets"], [{"name": "a"}, {"name": "b"}],
    ),
    "grace_seconds": (90, lambda made: pod(made)["terminationGracePeriodSeconds"], 150),
}  # fmt: skip
# Kept by the loop or the worker; `gpu` is only what others are foreseen by.
OURS = {"max_restarts", "pending_hours", "deadline_hours", "orphan_minutes", "gpu"}


@pytest.mark.parametrize("field", sorted(JobConfig.model_fields.keys() - OURS))
def test_every_setting_of_a_job_is_in_its_object(field: str) -> None:
    value, where, expected = SHOWN[field]
    more = {"workers": 2} if field == "min_workers" else {}
    assert where(built(spec(**{field: value}, **more))) == expected


@pytest.mark.parametrize("field", sorted(OURS))
def test_what_the_loop_keeps_changes_no_object(field: str) -> None:
    value = "l4" if field == "gpu" else JobConfig.model_fields[field].default + 1
    assert built(spec(**{field: value})) == built(spec())


def test_what_is_not_asked_for_is_not_there() -> None:
    made = built(spec())
    assert not {"nodeSelector", "tolerations", "priorityClassName", "imagePullSecrets"} & pod(made).keys()
    assert container(made)["resources"]["limits"] == {"cpu": "4", "memory": "16Gi"}
    assert pytorchjob.QUEUE not in made["metadata"]["labels"]
    assert made["spec"]["elasticPolicy"] == {
        "minReplicas": 1, "maxReplicas": 1, "rdzvBackend": "c10d", "maxRestarts": 0,
    }  # fmt: skip


def test_the_operator_is_told_to_start_workers_again_and_to_keep_those_that_ended() -> None:
    made = built(spec())
    assert (made["apiVersion"], made["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert made["spec"]["pytorchReplicaSpecs"].keys() == {"Worker"}, "a master brings an init container"
    assert made["spec"]["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] == "ExitCode"
    assert made["spec"]["runPolicy"] == {"cleanPodPolicy": "Running", "ttlSecondsAfterFinished": 600}


def test_a_worker_is_as_restricted_as_pods_can_be() -> None:
    made = built(spec())
    assert pod(made)["securityContext"] == {
        "runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    assert container(made)["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert pod(made)["automountServiceAccountToken"] is False
    assert pod(made)["enableServiceLinks"] is False
    assert "initContainers" not in pod(made)


def test_a_worker_can_write_where_it_has_to_and_learns_who_it_is(store: str) -> None:
    made = built(spec())
    one = container(made)
    assert (one["name"], one["image"]) == ("pytorch", "registry/image@sha256:1")
    assert one["command"] == ["python", "-m", "components.launch.entry", "s3://b/job.json"]
    assert one["envFrom"] == [{"configMapRef": {"name": "latent-gpt"}}, {"secretRef": {"name": "latent-gpt"}}]
    said = {
        each["name"]: each.get("value") or each["valueFrom"]["fieldRef"]["fieldPath"] for each in one["env"]
    }
    assert said == {
        "LATENT_GPT_STORE": store,
        "LATENT_GPT_IMAGE": "registry/image@sha256:1",
        "LATENT_GPT_CACHE": "/cache",
        "HOME": "/tmp",
        "PYTHONUNBUFFERED": "1",
        "LATENT_GPT_POD": "metadata.name",
        "LATENT_GPT_POD_UID": "metadata.uid",
        "LATENT_GPT_WORKER": "metadata.labels['training.kubeflow.org/replica-index']",
    }
    places = {each["name"]: each["mountPath"] for each in one["volumeMounts"]}
    assert places == {"tmp": "/tmp", "cache": "/cache", "shm": "/dev/shm", "ca": "/etc/latent-gpt/ca"}
    volumes = {each.pop("name"): each for each in pod(made)["volumes"]}
    assert volumes.keys() == places.keys()
    assert volumes["ca"] == {"secret": {"secretName": "latent-gpt-ca", "optional": True}}


def test_labels_of_job_and_pods_are_values_that_labels_may_have() -> None:
    made = built(spec(run="my run: ÄÖ/2026, " + "x" * 80))
    for labels in (made["metadata"]["labels"], template(made)["metadata"]["labels"]):
        assert labels["app.kubernetes.io/part-of"] == "latent-gpt"
        assert labels["latent-gpt/step"] == "transformer"
        assert labels["latent-gpt/run"].startswith("my-run-2026-xxx")
        for value in labels.values():
            assert re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?", value), value
    assert made["metadata"]["annotations"]["latent-gpt/run"].startswith("my run: ÄÖ")


def test_the_same_work_has_the_same_job_and_the_name_leaves_room_for_the_operators_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = pytorchjob.name(spec())
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name), "DNS-1035"
    assert len(f"{name}-worker-1023") <= 63
    assert name == pytorchjob.name(spec(run="another", workers=2)), "neither decides the asset"
    assert built(spec())["metadata"]["name"] == name
    monkeypatch.setenv("LATENT_GPT_STORE", "/elsewhere")
    assert pytorchjob.name(spec()) != name, "another store in the same namespace"


def test_a_field_that_the_api_does_not_know_is_refused() -> None:
    with pytest.raises(TypeError, match="restart_polocy"):
        models.KubeflowOrgV1ReplicaSpec(restart_polocy="ExitCode")
    with pytest.raises(TypeError, match="enviroment"):
        client.V1Container(name="pytorch", enviroment=[])


@pytest.mark.parametrize(
    ("status", "phase"),
    [
        ({}, ""),
        ({"conditions": [{"type": "Created", "status": "True"}]}, ""),
        ({"conditions": [{"type": "Running", "status": "True"}]}, ""),
        ({"conditions": [{"type": "Failed", "status": "False"}]}, ""),
        ({"conditions": [{"type": "Failed", "status": "True"}]}, "failed"),
        (
            {"conditions": [{"type": "Running", "status": "False"}, {"type": "Succeeded", "status": "True"}]},
            "succeeded",
        ),
    ],
)
def test_the_phase_of_a_job_is_in_its_conditions(status: Built, phase: str) -> None:
    found = built(spec(workers=2, queue="gpus"))
    found["metadata"] |= {"uid": "1", "creationTimestamp": "2026-11-26T09:00:00Z"}
    job = pytorchjob.read({**found, "status": status})
    assert (job.failed, job.succeeded) == (phase == "failed", phase == "succeeded")
    assert (job.uid, job.workers, job.queue, job.created) == ("1", 2, "gpus", 1795683600)
    assert not job.suspended
    assert not job.terminating
    found["spec"]["runPolicy"]["suspend"] = True
    found["metadata"]["deletionTimestamp"] = "2026-11-26T09:00:00Z"
    job = pytorchjob.read(found)
    assert job.suspended
    assert job.terminating
