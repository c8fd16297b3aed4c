"""Secrets are made once, kept, and shown to nobody."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator

import pytest
from kubernetes import client  # type: ignore[import-untyped]
from kubernetes.client.exceptions import ApiException  # type: ignore[import-untyped]

from components.launch.cluster import Cluster
from model.errors import Unavailable, UserError
from model.plumbing import environment
from pipelines import commands
from pipelines.cluster.secrets import keep
from tests.apiserver import ApiServer
from tests.components.conftest import api_server  # noqa: F401 (a fixture)

AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
MLFLOW = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
LOCAL = [{"kind": "Deployment", "metadata": {"name": "latent-gpt-s3"}, "spec": {"template": {"spec": {}}}}]
DATABASE = {"secretKeyRef": {"name": "latent-gpt-mlflow", "key": "MLFLOW_BACKEND_STORE_URI"}}
CONTAINER = {"env": [{"name": "MLFLOW_BACKEND_STORE_URI", "valueFrom": DATABASE}]}
PRODUCTION = [
    {
        "kind": "Deployment",
        "metadata": {"name": "latent-gpt-mlflow"},
        "spec": {"template": {"spec": {"initContainers": [CONTAINER]}}},
    }
]


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    own = (environment.MLFLOW_BACKEND_STORE_URI, environment.MLFLOW_FLASK_SERVER_SECRET_KEY)
    for one in (*environment.IN_SECRET, *own):
        monkeypatch.delenv(one.name, raising=False)


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as one:
        yield one


@pytest.fixture
def cluster(server: ApiServer) -> Cluster:
    configuration = client.Configuration()
    configuration.host = server.url
    return Cluster(server.namespace, configuration, print)


def values(server: ApiServer, name: str = "latent-gpt") -> dict[str, str]:
    data = server.get("secrets", name)["data"]
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


def test_what_nobody_gives_is_drawn_and_kept_from_then_on(server: ApiServer, cluster: Cluster) -> None:
    said = keep(cluster, LOCAL)
    first, own = values(server), values(server, "latent-gpt-mlflow")
    assert set(first) == {*AWS, *MLFLOW}
    assert set(own) == {"MLFLOW_FLASK_SERVER_SECRET_KEY"}
    assert first["MLFLOW_TRACKING_USERNAME"] == "latent-gpt"
    drawn = [value for key, value in (first | own).items() if key != "MLFLOW_TRACKING_USERNAME"]
    assert len(set(drawn)) == 4
    assert min(map(len, drawn)) >= 40
    assert not [value for value in drawn if value in "\n".join(said)]
    assert server.get("secrets", "latent-gpt")["metadata"]["labels"] == {
        "app.kubernetes.io/part-of": "latent-gpt"
    }
    changes = [one for one in server.requests if one.method != "GET"]
    again = keep(cluster, LOCAL)
    assert values(server) == first
    assert [one for one in server.requests if one.method != "GET"] == changes, "it asked, and changed nothing"
    assert "kept" in again[0]
    assert "drawn" not in again[0]


def test_what_the_environment_gives_is_taken(
    server: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        AWS[0]: "mine",
        AWS[1]: "my own secret",
        "HF_TOKEN": "hf_my-token",
        "MLFLOW_BACKEND_STORE_URI": "postgresql://me:pw@db/mlflow",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    said = "\n".join(keep(cluster, PRODUCTION))
    for name in (*AWS, "HF_TOKEN"):
        assert values(server)[name] == given[name]
    assert values(server, "latent-gpt-mlflow")["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:pw@db/mlflow"
    assert "from the environment" in said
    assert not [value for value in given.values() if value in said.replace("mine", "")]


def test_what_is_there_goes_before_the_environment_unless_told(
    server: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(cluster, LOCAL)
    before = values(server)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another password")
    assert "--replace" in keep(cluster, LOCAL)[0]
    assert values(server) == before
    keep(cluster, LOCAL, replace=True)
    assert values(server) == before | {"MLFLOW_TRACKING_PASSWORD": "another password"}


def test_an_older_secret_gets_what_it_has_not_got(server: ApiServer, cluster: Cluster) -> None:
    server.add("secrets", "latent-gpt", data={AWS[0]: base64.b64encode(b"old").decode()})
    keep(cluster, [])
    assert set(values(server)) == {AWS[0], *MLFLOW}, "a key of S3 may be missing on purpose"
    keep(cluster, LOCAL)
    assert set(values(server)) == {*AWS, *MLFLOW}, "but not of our own"
    assert values(server)[AWS[0]] == "old"


def test_keys_of_the_environment_are_no_business_of_an_s3_of_our_own(
    server: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*AWS, "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "of my account")
    keep(cluster, LOCAL)
    assert set(values(server)) == {*AWS, *MLFLOW}
    assert "of my account" not in values(server).values()


def test_for_another_s3_no_keys_are_drawn(server: ApiServer, cluster: Cluster) -> None:
    keep(cluster, [])
    assert set(values(server)) == {*MLFLOW}


def test_a_database_that_nobody_named_is_missed_before_anything_is_made(
    server: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^MLFLOW_BACKEND_STORE_URI is not set"):
        keep(cluster, PRODUCTION)
    assert not server.names("secrets")
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql://db/mlflow")
    keep(cluster, PRODUCTION)
    monkeypatch.delenv("MLFLOW_BACKEND_STORE_URI")
    assert "kept" in keep(cluster, PRODUCTION)[1]


def test_a_namespace_that_is_not_there_is_said_to_be_made_first(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object, **__: object) -> None:
        refused = ApiException(404)
        refused.body = '{"message": "namespaces \\"kubeflow\\" not found"}'
        raise refused

    monkeypatch.setattr(cluster.core, "create_namespaced_secret", absent)
    with pytest.raises(UserError, match=r"not found; make it first: kubectl create namespace kubeflow$"):
        keep(cluster, LOCAL)


def test_one_that_somebody_made_by_hand_becomes_ours(server: ApiServer, cluster: Cluster) -> None:
    keep(cluster, LOCAL)
    kept = server.get("secrets", "latent-gpt-mlflow")["data"]
    server.remove("secrets", "latent-gpt-mlflow")
    server.add("secrets", "latent-gpt-mlflow", data=kept)
    keep(cluster, LOCAL)
    found = server.get("secrets", "latent-gpt-mlflow")
    assert found["data"] == kept
    assert found["metadata"]["labels"] == {"app.kubernetes.io/part-of": "latent-gpt"}, "undeploy finds it"


def test_half_a_pair_of_keys_is_refused(
    server: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(AWS[0], "mine")
    with pytest.raises(UserError, match="S3 wants both, or neither"):
        keep(cluster, [])
    assert not server.names("secrets")


def test_who_has_a_token_needs_no_password(
    server: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a token")
    keep(cluster, LOCAL)
    assert set(values(server)) == {*AWS, "MLFLOW_TRACKING_TOKEN"}


def test_what_cannot_be_is_said_without_the_value(
    server: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "tooshort")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD has fewer than 12 letters") as refused:
        keep(cluster, LOCAL)
    assert "tooshort" not in str(refused.value)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    server.denied.add(("create", "secrets"))
    with pytest.raises(
        UserError, match=r"does not take Secret latent-gpt in namespace kubeflow: .*forbidden"
    ):
        keep(cluster, LOCAL)


def test_a_cluster_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = client.Configuration()
    configuration.host = "http://127.0.0.1:9"
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:9 does not answer"):
        keep(Cluster("kubeflow", configuration, print), LOCAL)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl, whose kustomize needs no cluster")
def test_the_command_looks_at_the_overlay_that_is_named(
    api_server: ApiServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LATENT_GPT_NAMESPACE", api_server.namespace)
    monkeypatch.setenv("KFP_ENDPOINT", "http://nobody")
    monkeypatch.setenv("OVERLAY", "production")
    with pytest.raises(UserError, match=r"^MLFLOW_BACKEND_STORE_URI is not set"):
        commands.secrets()
    monkeypatch.setenv("OVERLAY", "local")
    monkeypatch.setenv(AWS[0], "of my account")
    commands.secrets()
    assert set(values(api_server)) == {*AWS, *MLFLOW}
    assert "AWS_ACCESS_KEY_ID" in capsys.readouterr().out
