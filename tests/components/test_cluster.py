"""The API server, asked with patience."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.client.exceptions import ApiException

from components.launch import cluster
from components.launch.cluster import ALL, DELETED, Cluster, Farewell, Kind, Object
from model.errors import Unavailable, UserError
from tests.apiserver import JOBS, PODS, ApiServer

KIND = Kind("kubeflow.org", "v1", JOBS)


@pytest.fixture
def there(api_server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(cluster, "LONGEST_PAUSE", 0.1)
    one = cluster.here(said.append)
    yield one
    one.end.set()
    said.clear()


said: list[str] = []


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def job(name: str = "j") -> dict[str, Any]:
    template = {"metadata": {}, "spec": {"containers": [{"name": "pytorch", "image": "i"}]}}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {"pytorchReplicaSpecs": {"Worker": {"replicas": 1, "template": template}}},
    }


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503}, {"status": 429}, {"status": 0}])
def test_what_passes_is_waited_for(api_server: ApiServer, there: Cluster, fault: dict[str, Any]) -> None:
    api_server.fail(times=5, **fault)
    assert there.get(KIND, "j") is None
    assert len(api_server.requests) == 6


def test_a_server_that_says_when_is_left_alone_until_then(api_server: ApiServer, there: Cluster) -> None:
    api_server.fail(429, retry_after=2)
    there.get(KIND, "j")
    first, second = (one.when for one in api_server.requests)
    assert second - first >= 2


def test_a_server_that_is_away_is_said_to_be_and_found_again(
    api_server: ApiServer, there: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "COMPLAINT", 0.5)
    threading.Thread(target=api_server.away, args=(2,)).start()
    time.sleep(0.3)
    assert there.get(KIND, "j") is None
    assert len(said) in (2, 3, 4)
    assert all(line.startswith("the cluster has not answered for ") for line in said)


def test_patience_has_the_end_that_is_given(api_server: ApiServer, there: Cluster) -> None:
    api_server.fail(500, times=1000)
    with pytest.raises(Unavailable, match=r"^the cluster at http://127.* does not answer: provoked$"):
        there.patiently(lambda: there.objects.list_namespaced_custom_object(*KIND[:2], "kubeflow", JOBS), 0.5)


def test_a_refusal_is_no_matter_of_patience(api_server: ApiServer, there: Cluster) -> None:
    api_server.fail(422)
    with pytest.raises(UserError, match=r"^the cluster refuses the job: provoked$"):
        there.create(KIND, job())
    api_server.fail(400)
    with pytest.raises(ApiException):
        there.get(KIND, "j")


def test_one_that_is_there_is_none_that_we_made(there: Cluster) -> None:
    made = there.create(KIND, job())
    assert made
    assert made["metadata"]["uid"]
    assert there.create(KIND, job()) is None


def test_only_the_object_that_is_meant_is_deleted(api_server: ApiServer, there: Cluster) -> None:
    made = there.create(KIND, job())
    assert made
    for delete in (lambda uid: there.delete(KIND, "j", uid), Farewell(there, KIND, "j")):
        delete("another")
        assert "deletionTimestamp" not in api_server.job("j")["metadata"]
    there.delete(KIND, "j", made["metadata"]["uid"])
    until(lambda: not api_server.names(JOBS))
    there.delete(KIND, "j", made["metadata"]["uid"])  # as good as done


def test_a_farewell_takes_a_new_connection_where_the_open_one_is_gone(
    api_server: ApiServer, there: Cluster
) -> None:
    made = there.create(KIND, job())
    assert made
    farewell = Farewell(there, KIND, "j")
    until(lambda: len(api_server.requests) == 2)
    api_server.away(0)  # hangs up
    began = time.monotonic()
    assert farewell(made["metadata"]["uid"])
    assert time.monotonic() - began < 0.3
    assert "deletionTimestamp" in api_server.job("j")["metadata"]


FAULTS: dict[str, Callable[[ApiServer], None]] = {
    "nothing": lambda server: None,
    "dropped": lambda server: None,
    "forgotten": lambda server: server.forget(),
    "500": lambda server: server.fail(500, times=3),
    "410 at once": lambda server: server.fail(410),
    "away": lambda server: server.away(0.5),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_watch_misses_nothing(api_server: ApiServer, there: Cluster, fault: str) -> None:
    """What comes and goes while nobody watches is missed by a list, but not by a watch that goes on."""
    seen: list[tuple[str, str]] = []
    api_server.lingers = 0
    api_server.add(JOBS, "j", spec=job()["spec"])
    there.watch_pods(
        "training.kubeflow.org/job-name=j",
        lambda what, found: seen.extend((what, one["metadata"]["name"]) for one in found),
    ).start()
    until(lambda: any(one.path.find("watch=") > 0 for one in api_server.requests))
    api_server.pod("j", 0)
    until(lambda: ("ADDED", "j-worker-0") in seen)
    FAULTS[fault](api_server)
    if fault != "nothing":
        api_server.drop()
    if fault not in ("forgotten", "410 at once"):  # there it cannot know
        api_server.remove(PODS, "j-worker-0")
        until(lambda: (DELETED, "j-worker-0") in seen)
    api_server.pod("j", 1)
    until(lambda: ("ADDED", "j-worker-1") in seen or (ALL, "j-worker-1") in seen)


def test_a_watch_that_is_silent_is_begun_anew(
    api_server: ApiServer, there: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "SILENCE", (0.5, 0.5))
    seen: list[str] = []
    there.watch_kind(KIND, "j", lambda what, found: seen.extend([what] * len(found))).start()
    until(lambda: sum(one.path.find("watch=") > 0 for one in api_server.requests) >= 3)
    there.create(KIND, job("another"))
    there.create(KIND, job())
    until(lambda: seen)
    assert seen == ["ADDED"], "of this one alone"


def test_workers_run_the_image_of_the_step_unless_another_is_named(
    api_server: ApiServer, there: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert there.image() == "registry/latent-gpt@sha256:1"
    monkeypatch.delenv("LATENT_GPT_IMAGE")
    assert there.image() == "latent-gpt:dev", "outside of any pod"
    (tmp_path / "token").write_text("t")
    (tmp_path / "namespace").write_text("kubeflow\n")
    monkeypatch.setattr(cluster, "ACCOUNT", tmp_path)
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.delenv("LATENT_GPT_POD", raising=False)
    monkeypatch.setenv("KFP_POD_NAME", long := f"step-{'1' * 80}")
    containers = [{"name": "wait", "image": "argo"}, {"name": "main", "image": "registry/own@sha256:2"}]
    api_server.add(PODS, long, spec={"containers": containers})
    assert there.image() == "registry/own@sha256:2", "the host's name would have been cut off"
    api_server.denied.add(("get", PODS))
    monkeypatch.setattr(cluster, "TRIED_IN_VAIN", 0.2)
    with pytest.raises(UserError, match=r"cannot get resource .*apply k8s/base/rbac.yaml"):
        there.image()


def test_events_are_warnings_of_what_is_asked_for_the_newest_last(
    api_server: ApiServer, there: Cluster
) -> None:
    for name in ("j", "k"):
        api_server.add(JOBS, name, spec=job()["spec"])
    api_server.event(JOBS, "j", "FailedCreatePod", "exceeded\n quota")
    api_server.event(JOBS, "j", "Created", "well", kind="Normal")
    api_server.event(JOBS, "k", "FailedCreatePod", "of another")
    assert there.events("j") == ["FailedCreatePod: exceeded quota"]
    api_server.fail(500)
    assert there.events("j") == [], "not worth waiting for"


def test_a_watch_outlives_whoever_it_tells(api_server: ApiServer, there: Cluster) -> None:
    seen: list[str] = []

    def see(what: str, found: list[Object]) -> None:
        seen.extend(one["metadata"]["name"] for one in found)
        if len(seen) == 1:
            raise KeyError("containers")

    api_server.add(JOBS, "j", spec=job()["spec"])
    there.watch_pods("training.kubeflow.org/job-name=j", see).start()
    api_server.pod("j", 0)
    until(lambda: seen == ["j-worker-0", "j-worker-0"])
