"""The manifests of k8s/, one by one and rendered: known fields, our names, nothing secret, `restricted`."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any

import pytest

from components.launch import pytorchjob
from model.plumbing import environment
from tests.k8s.rendering import FILES, K8S, OVERLAYS, Object, build, can_build, everything, objects, overlay
from tests.k8s.typed import wrong

UNTYPED = ("kustomize.config.k8s.io", "builtin", "kueue.x-k8s.io", "monitoring.coreos.com")
OURS = {"app.kubernetes.io/part-of": "latent-gpt"}


@pytest.fixture(scope="module", params=[*OVERLAYS, "everything"])
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """An overlay; or all there is, in a namespace of our own."""
    if not can_build():
        pytest.skip("neither kustomize nor kubectl is here")
    if request.param != "everything":
        return build(K8S / "overlays" / request.param)
    return build(everything(tmp_path_factory.mktemp("k8s")))


def of(found: list[Object], *kinds: str) -> list[Object]:
    return [one for one in found if one["kind"] in kinds]


def pods(found: list[Object]) -> dict[str, Object]:
    """Pod templates, by the name of what makes them."""
    return {
        one["metadata"]["name"]: one["spec"]["template"] for one in of(found, "Deployment", "StatefulSet")
    }


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


# ── each file ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(K8S)))
def test_every_field_is_known(path: Path) -> None:
    patch = path.parent.parent.name == "overlays"  # says a part of an object
    for one in objects(path):
        if one.get("apiVersion", "kustomize.config.k8s.io/").partition("/")[0] in UNTYPED:
            continue
        found = wrong({key: value for key, value in one.items() if key != "$patch"})
        assert [line for line in found if not (patch and "must not be `None`" in line)] == []


def test_what_chance_has_drawn_is_told_from_words() -> None:
    assert RANDOM.search(secrets.token_hex(20))
    assert RANDOM.search("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    assert not RANDOM.search(
        "preferredDuringSchedulingIgnoredDuringExecution AWS_REQUEST_CHECKSUM_CALCULATION"
    )


def test_a_mistake_is_found() -> None:
    whole = objects(K8S / "components" / "seaweedfs" / "seaweedfs.yaml")[2]
    assert wrong(whole) == []
    whole["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    whole["spec"]["replicas"] = "1"
    del whole["spec"]["selector"]
    found = "\n".join(wrong(whole))
    assert "Deployment.spec.template.spec.containers[0].imagePullPolice is unknown" in found
    assert "Deployment.spec.replicas is '1', and no int" in found
    assert "`selector`, must not be `None`" in found


SECRET = re.compile(r"KEY|SECRET|PASSWORD|TOKEN|_URI$")
PUBLIC = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
RANDOM = re.compile(r"[0-9a-f]{20,}|(?=[A-Za-z+/]*[0-9])[A-Za-z0-9+/]{32,}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(K8S)))
def test_nothing_is_secret(path: Path) -> None:
    for one in objects(path):
        assert one.get("kind") != "Secret"
    assert not RANDOM.findall(path.read_text())
    assert "://" not in re.sub(r"(https?|s3|sqlite)://[^@\s]*(?=\s|$)", "", path.read_text()), (
        "a login in a URI"
    )


# ── rendered ────────────────────────────────────────────────────────────────────────────────────────────


def test_all_of_it_is_ours_by_name_and_label(rendered: list[Object]) -> None:
    for one in rendered:
        meta = one["metadata"]
        if one["kind"] != "Namespace":
            assert re.fullmatch(r"latent-gpt(-[a-z0-9]+)?", meta["name"]), one
        assert OURS.items() <= meta.get("labels", {}).items(), one
    for pod in pods(rendered).values():
        assert OURS.items() <= pod["metadata"]["labels"].items()


def test_all_of_it_lies_in_one_namespace(rendered: list[Object]) -> None:
    places = {one["metadata"]["namespace"] for one in rendered if "namespace" in one["metadata"]}
    assert len(places) == 1
    (binding,) = of(rendered, "RoleBinding")
    assert {one["namespace"] for one in binding["subjects"]} == places
    assert {one["name"] for one in binding["subjects"]} >= {"latent-gpt", "pipeline-runner"}
    assert {one["metadata"]["name"] for one in of(rendered, "Namespace")} <= places


def test_a_step_may_what_it_does_and_no_more(rendered: list[Object]) -> None:
    (role,) = of(rendered, "Role")
    may = {
        (verb, resource) for rule in role["rules"] for verb in rule["verbs"] for resource in rule["resources"]
    }
    changes = {one for one in may if one[0] not in ("get", "list", "watch")}
    assert changes == {("create", "pytorchjobs"), ("delete", "pytorchjobs")}
    for rule in role["rules"]:
        if "secrets" in rule["resources"]:
            assert rule["resourceNames"] == ["latent-gpt"]
    assert not of(rendered, "ClusterRole", "ClusterRoleBinding")


def test_steps_are_told_what_they_know(rendered: list[Object]) -> None:
    known = {one.name for one in environment.IN_CONFIG_MAP}
    (told,) = [one["data"] for one in of(rendered, "ConfigMap") if one["metadata"]["name"] == "latent-gpt"]
    assert set(told) <= known
    assert told["LATENT_GPT_LAUNCHER"] == "pytorchjob"


def test_secrets_are_asked_for_by_key(rendered: list[Object]) -> None:
    known = {
        "latent-gpt": {one.name for one in environment.IN_SECRET},
        "latent-gpt-mlflow": {"MLFLOW_BACKEND_STORE_URI", "MLFLOW_FLASK_SERVER_SECRET_KEY"},
    }
    for pod in pods(rendered).values():
        for container in containers(pod):
            for variable in container.get("env", []):
                if found := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert found["key"] in known[found["name"]]
                elif SECRET.search(variable["name"]) and variable["name"] not in PUBLIC:
                    assert variable["value"].startswith("sqlite:")


def test_every_pod_is_restricted(rendered: list[Object]) -> None:
    for pod in pods(rendered).values():
        spec, context = pod["spec"], pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == 10001, "a number, as an image may name its user"
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["image"].split(":")[0] in ("latent-gpt", "latent-gpt-mlflow"), "deploy pins it"
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
        for server in spec["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= server.keys()


def selects(selector: Object, labels: dict[str, str]) -> bool:
    for one in selector.get("matchExpressions", []):
        assert one["operator"] in ("NotIn", "Exists")
        if one["operator"] == "Exists" and one["key"] not in labels:
            return False
        if one["operator"] == "NotIn" and labels.get(one["key"]) in one["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def test_services_and_policies_meet_the_pods_that_they_mean(rendered: list[Object]) -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(rendered).items()}
    ports = {
        name: {port["name"] for one in pod["spec"]["containers"] for port in one.get("ports", [])}
        for name, pod in pods(rendered).items()
    }
    for one in of(rendered, "Service"):
        name = one["metadata"]["name"]
        assert selects({"matchLabels": one["spec"]["selector"]}, labels[name])
        assert {port["targetPort"] for port in one["spec"]["ports"]} <= ports[name]
    for one in of(rendered, "PodDisruptionBudget"):
        assert selects(one["spec"]["selector"], labels[one["metadata"]["name"]])
    policies = {one["metadata"]["name"]: one["spec"] for one in of(rendered, "NetworkPolicy")}
    for name, pod in labels.items():
        (own,) = [
            policy
            for policy, spec in policies.items()
            if spec["podSelector"] and selects(spec["podSelector"], pod)
        ]
        assert own == name
        (entry,) = policies[name]["ingress"]
        assert [one["podSelector"]["matchLabels"] for one in entry["from"]] == [OURS]
        assert {one["port"] for one in entry["ports"]} <= ports[name]
    worker = {**OURS, pytorchjob.STEP: "transformer"}
    step = {**OURS, "app.kubernetes.io/name": "transformer"}  # as pipelines/pod.py has it
    driver = {"pipeline/runid": "of KFP"}  # as KFP labels all pods of a run, with ours or without
    stranger = {"app": "ml-pipeline"}
    if "latent-gpt-deny" in policies:
        for labelled in (worker, step, driver):
            calls = [
                spec["egress"]
                for name, spec in policies.items()
                if name != "latent-gpt-deny" and "egress" in spec and selects(spec["podSelector"], labelled)
            ]
            assert [{}] in calls, "it may call KFP and the API server"
    for one in (worker, step):
        assert selects(policies["latent-gpt"]["podSelector"], one)
    for name, spec in policies.items():
        ours_alone = "latent-gpt-deny" in policies  # only in a namespace that is ours
        assert name == "latent-gpt-deny" or not selects(spec["podSelector"], stranger)
        assert ours_alone == bool(of(rendered, "Namespace"))


@pytest.mark.skipif(not can_build(), reason="neither kustomize nor kubectl is here")
def test_mlflow_may_call_its_services_wherever_an_overlay_has_them(tmp_path: Path) -> None:
    def calls(found: list[Object]) -> Any:
        (policy,) = [
            one for one in of(found, "NetworkPolicy") if one["metadata"]["name"] == "latent-gpt-mlflow"
        ]
        return policy["spec"]["egress"]

    alone = overlay(tmp_path, "team", resources=["../../base"], components=["../../components/mlflow"])
    assert calls(build(alone)) == [{}], "as README puts one together"
    s3, names = calls(build(K8S / "overlays" / "local"))
    assert s3["to"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "latent-gpt-s3"}}}]
    assert {one["port"] for one in names["ports"]} == {53}
    (outside,) = calls(build(K8S / "overlays" / "production"))
    assert {one["port"] for one in outside["ports"]} == {53, 443, 5432}


def test_nothing_of_everybodys_is_limited(rendered: list[Object]) -> None:
    for one in of(rendered, "ResourceQuota"):
        (scope,) = one["spec"]["scopeSelector"]["matchExpressions"]
        assert scope["scopeName"] == "PriorityClass"
        assert scope["values"] == [each["metadata"]["name"] for each in of(rendered, "PriorityClass")]
    assert not of(rendered, "LimitRange")


@pytest.mark.skipif(not can_build(), reason="neither kustomize nor kubectl is here")
def test_local_needs_nothing_else_and_production_no_volume() -> None:
    local, production = (build(K8S / "overlays" / name) for name in ("local", "production"))
    assert set(pods(local)) == {"latent-gpt-s3", "latent-gpt-mlflow"}
    assert len(of(local, "PersistentVolumeClaim")) == 2
    assert set(pods(production)) == {"latent-gpt-mlflow"}
    assert not of(production, "PersistentVolumeClaim")
    for container in containers(pods(production)["latent-gpt-mlflow"]):
        (one,) = [each for each in container["env"] if each["name"] == "MLFLOW_BACKEND_STORE_URI"]
        assert one["valueFrom"]["secretKeyRef"]["key"] == "MLFLOW_BACKEND_STORE_URI"
        assert "value" not in one
    (told,) = [one["data"] for one in of(local, "ConfigMap")]
    services = {
        f"{one['metadata']['name']}:{one['spec']['ports'][0]['port']}" for one in of(local, "Service")
    }
    named = ("S3_ENDPOINT_URL", "MLFLOW_TRACKING_URI")
    assert {told[name].removeprefix("http://") for name in named} == services
