"""Services of a cluster are led to from here; what only looks like one of them is not."""

from __future__ import annotations

import base64
import os
import time
from pathlib import Path

import pytest

from model.plumbing import environment
from pipelines.cluster.reach import _led_to, services
from tests.kubectl import FakeKubectl, made

# It forwards, and then says more than a pipe holds.
FORWARDS = """#!/bin/sh
printf '%s\\n' "$*" >"$SAID"
echo "Forwarding from 127.0.0.1:41234 -> 8333"
i=0
while [ $i -lt 4000 ]; do
    echo "Handling connection for 41234, and for another one after that"
    i=$((i + 1))
done
echo done >>"$SAID"
exec sleep 60
"""


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a kubectl that forwards leaves what it was told, and at its end a second line."""
    (tmp_path / "kubectl").write_text(FORWARDS)
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    return tmp_path / "said"


@pytest.fixture
def kubectl() -> FakeKubectl:
    """A namespace `ours` with a service `s3`."""
    one = FakeKubectl()
    one.add(made("Service", "s3"))
    return one


@pytest.mark.parametrize("behind", ["", ".ours", ".ours.svc", ".ours.svc.cluster.local"])
def test_a_service_of_the_namespace_is_led_to(said: Path, kubectl: FakeKubectl, behind: str) -> None:
    with _led_to(kubectl, f"http://s3{behind}:8333") as address:
        assert address == "http://127.0.0.1:41234"
    assert said.read_text().splitlines()[0] == "-n ours port-forward service/s3 :8333"


@pytest.mark.parametrize(
    "address",
    [
        "http://s3.storage:8333",
        "http://s3.storage.svc:8333",
        "http://s3.example.com:8333",
        "http://s3.ours.example.com:8333",
        "https://s3:8333",
        "http://other:8333",
    ],
)
def test_an_address_elsewhere_stays_as_it_is(said: Path, kubectl: FakeKubectl, address: str) -> None:
    with _led_to(kubectl, address) as found:
        assert found == address
    assert not said.exists(), "and gets none of our keys by another way"


def test_what_kubectl_says_of_connections_does_not_stop_it(said: Path, kubectl: FakeKubectl) -> None:
    with _led_to(kubectl, "http://s3:8333"):
        end = time.monotonic() + 20
        while "done" not in said.read_text().split():
            assert time.monotonic() < end, "nobody reads it"
            time.sleep(0.02)


def test_what_opens_services_is_had_from_the_cluster_and_nothing_else_of_its_secret(
    kubectl: FakeKubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in (*environment.IN_CONFIG_MAP, *environment.IN_SECRET):
        monkeypatch.delenv(one.name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "mine")
    told = {"MLFLOW_TRACKING_URI": "http://mlflow.example.com", "HF_ENDPOINT": "http://its-mirror"}
    kubectl.add({**made("ConfigMap", environment.ON_CLUSTER), "data": told})
    secret = {"MLFLOW_TRACKING_TOKEN": base64.b64encode(b"its").decode(), "HF_TOKEN": "aXRz"}
    kubectl.add({**made("Secret", environment.ON_CLUSTER), "data": secret})
    with services(kubectl):
        assert environment.MLFLOW_TRACKING_URI.get() == "http://mlflow.example.com"
        assert environment.MLFLOW_TRACKING_TOKEN.get() == "its"
        assert environment.HF_TOKEN.get() == "mine"
        assert not environment.HF_ENDPOINT.get()
