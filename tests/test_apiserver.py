"""The API server of the launcher's tests, asked by the client that the launcher uses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kubernetes import client, watch
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError, MaxRetryError

from tests.apiserver import ApiServer

GROUP = ("kubeflow.org", "v1", "kubeflow", "pytorchjobs")
CONTAINER = {"name": "pytorch", "image": "latent-gpt:dev"}


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


@pytest.fixture
def api(server: ApiServer) -> client.ApiClient:
    configuration = client.Configuration(host=server.url)
    configuration.retries = False
    return client.ApiClient(configuration)


@pytest.fixture
def jobs(api: client.ApiClient) -> client.CustomObjectsApi:
    return client.CustomObjectsApi(api)


@pytest.fixture
def core(api: client.ApiClient) -> client.CoreV1Api:
    return client.CoreV1Api(api)


def job(name: str, **labels: str) -> dict[str, Any]:
    template = {"metadata": {"labels": labels}, "spec": {"containers": [CONTAINER]}}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name, "labels": labels},
        "spec": {"pytorchReplicaSpecs": {"Worker": {"replicas": 2, "template": template}}},
    }


def refused(call: Callable[[], object]) -> int:
    with pytest.raises(ApiException) as error:
        call()
    return int(error.value.status)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_jobs_are_made_once_found_selected_and_deleted_by_uid(
    server: ApiServer, jobs: client.CustomObjectsApi
) -> None:
    made = jobs.create_namespaced_custom_object(*GROUP, job("a", step="clip"))
    assert refused(lambda: jobs.create_namespaced_custom_object(*GROUP, job("a"))) == 409
    jobs.create_namespaced_custom_object(*GROUP, job("b", step="tokens"))
    for selector, names in {
        "step=clip": ["a"],
        "step!=clip": ["b"],
        "step in (clip, tokens)": ["a", "b"],
        "step,step notin (tokens)": ["a"],
        "": ["a", "b"],
    }.items():
        found = jobs.list_namespaced_custom_object(*GROUP, label_selector=selector)["items"]
        assert [one["metadata"]["name"] for one in found] == names, selector

    def delete(uid: str) -> object:
        options = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=uid))
        return jobs.delete_namespaced_custom_object(*GROUP, "a", body=options)

    assert refused(lambda: delete("another")) == 409
    delete(made["metadata"]["uid"])
    assert "deletionTimestamp" in jobs.get_namespaced_custom_object(*GROUP, "a")["metadata"]
    assert refused(lambda: jobs.create_namespaced_custom_object(*GROUP, job("a"))) == 409
    until(lambda: server.names("pytorchjobs") == ["b"])
    assert refused(lambda: jobs.get_namespaced_custom_object(*GROUP, "a")) == 404
    patch = {"spec": {"runPolicy": {"suspend": True}}}
    assert jobs.patch_namespaced_custom_object(*GROUP, "b", patch)["spec"]["runPolicy"] == {"suspend": True}


def test_the_operator_is_played(
    server: ApiServer, jobs: client.CustomObjectsApi, core: client.CoreV1Api
) -> None:
    server.on_create = lambda made: server.pod(made["metadata"]["name"], 0, unschedulable="no cpu")
    jobs.create_namespaced_custom_object(*GROUP, job("a", step="clip"))
    until(lambda: server.names("pods") == ["a-worker-0"])
    (pod,) = core.list_namespaced_pod(
        "kubeflow", label_selector="training.kubeflow.org/job-name=a,step=clip"
    ).items
    assert (pod.status.conditions[0].reason, pod.status.conditions[0].message) == ("Unschedulable", "no cpu")
    server.event("pods", pod.metadata.name, "FailedScheduling", "0/1 nodes are available")
    (event,) = core.list_namespaced_event(
        "kubeflow", field_selector=f"involvedObject.name={pod.metadata.name}"
    ).items
    assert (event.reason, event.involved_object.uid) == ("FailedScheduling", pod.metadata.uid)
    server.condition("a", "Running")
    server.condition("a", "Succeeded", "well")
    status = jobs.get_namespaced_custom_object(*GROUP, "a")["status"]
    assert [one["type"] for one in status["conditions"]] == ["Running", "Succeeded"]
    server.pod("a", 0, "Failed", terminated={"exitCode": 137, "reason": "OOMKilled"})
    pod = core.read_namespaced_pod("a-worker-0", "kubeflow")
    assert pod.status.container_statuses[0].state.terminated.reason == "OOMKilled"
    before = pod.metadata.uid
    server.restart("a", 0)
    assert core.read_namespaced_pod("a-worker-0", "kubeflow").metadata.uid != before
    jobs.delete_namespaced_custom_object(*GROUP, "a")
    until(lambda: not server.names("pods") + server.names("pytorchjobs"))


def test_watches_go_on_from_a_version_and_forget(
    server: ApiServer, jobs: client.CustomObjectsApi, core: client.CoreV1Api
) -> None:
    version = jobs.list_namespaced_custom_object(*GROUP)["metadata"]["resourceVersion"]
    jobs.create_namespaced_custom_object(*GROUP, job("a"))
    timer = threading.Timer(0.3, lambda: server.pod("a", 0))
    timer.start()
    stream = watch.Watch().stream(core.list_namespaced_pod, "kubeflow", timeout_seconds=2)
    seen = [(one["type"], one["object"].status.phase) for one in stream]
    assert seen == [("ADDED", "Pending"), ("MODIFIED", "Running")]
    arguments = {"resource_version": version, "timeout_seconds": 1}
    events = list(watch.Watch().stream(jobs.list_namespaced_custom_object, *GROUP, **arguments))
    assert [(one["type"], one["object"]["metadata"]["name"]) for one in events] == [("ADDED", "a")]
    server.forget()
    stream = watch.Watch().stream(jobs.list_namespaced_custom_object, *GROUP, **arguments)
    assert refused(lambda: list(stream)) == 410


def test_logs_are_followed_to_the_end_of_the_container(
    server: ApiServer, jobs: client.CustomObjectsApi, core: client.CoreV1Api
) -> None:
    jobs.create_namespaced_custom_object(*GROUP, job("a"))
    pod = server.pod("a", 0, "Pending", waiting={"reason": "ImagePullBackOff"})
    assert refused(lambda: core.read_namespaced_pod_log(pod, "kubeflow")) == 400
    server.pod("a", 0)
    server.log(pod, "one", "two")

    def goes_on() -> None:
        server.log(pod, "three")
        server.pod("a", 0, "Succeeded")

    threading.Timer(0.3, goes_on).start()
    lines = list(watch.Watch().stream(core.read_namespaced_pod_log, pod, "kubeflow"))
    assert lines == ["one", "two", "three"]
    tail = core.read_namespaced_pod_log(pod, "kubeflow", tail_lines=1, timestamps=True)
    stamp, line = tail.split()
    assert line == "three"
    time.sleep(1.1)
    server.log(pod, "four")
    since = f"sinceTime={time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}"
    path = f"/api/v1/namespaces/kubeflow/pods/{pod}/log?{since}"
    said = core.api_client.call_api(path, "GET", response_type="str", _return_http_data_only=True)
    assert said == "four\n"
    assert stamp.endswith("Z")


def test_it_misbehaves_as_it_is_told(
    server: ApiServer, jobs: client.CustomObjectsApi, core: client.CoreV1Api
) -> None:
    def make(name: str) -> object:
        return jobs.create_namespaced_custom_object(*GROUP, job(name))

    server.fail(500, times=2, method="POST")
    assert [refused(lambda: make("a")) for _ in range(2)] == [500, 500]
    make("a")
    server.fail(429, retry_after=3)
    with pytest.raises(ApiException) as error:
        core.list_namespaced_pod("kubeflow")
    assert error.value.headers["Retry-After"] == "3"
    server.fail(504, method="POST", done=True)
    assert refused(lambda: make("b")) == 504
    assert refused(lambda: make("b")) == 409, "it was done all the same"
    server.fail(0, where="/pods")
    with pytest.raises(HTTPError):
        core.list_namespaced_pod("kubeflow")
    server.denied.add(("list", "pods"))
    assert refused(lambda: core.list_namespaced_pod("kubeflow")) == 403
    review = {"spec": {"resourceAttributes": {"verb": "list", "resource": "pods", "namespace": "kubeflow"}}}
    access = client.AuthorizationV1Api(core.api_client)
    assert not access.create_self_subject_access_review(review).status.allowed
    server.kinds.pop("pytorchjobs")
    assert refused(lambda: make("c")) == 404


def test_streams_break_silence_falls_and_it_goes_away(
    server: ApiServer, jobs: client.CustomObjectsApi, core: client.CoreV1Api
) -> None:
    jobs.create_namespaced_custom_object(*GROUP, job("a"))
    threading.Timer(0.3, server.drop).start()
    with pytest.raises(HTTPError):
        list(watch.Watch().stream(jobs.list_namespaced_custom_object, *GROUP, timeout_seconds=5))
    server.silent(1.0)
    began = time.monotonic()
    with pytest.raises(HTTPError):
        core.list_namespaced_pod("kubeflow", _request_timeout=(0.3, 0.3))  # a plain 0.3 it ignores
    core.list_namespaced_pod("kubeflow")
    assert 0.9 < time.monotonic() - began < 3
    gone = threading.Thread(target=server.away, args=(1.0,))
    gone.start()
    time.sleep(0.3)
    with pytest.raises((MaxRetryError, HTTPError)):
        core.list_namespaced_pod("kubeflow")
    gone.join()
    assert core.list_namespaced_pod("kubeflow").items == []
    assert server.requests[-1].path.startswith("/api/v1/namespaces/kubeflow/pods")


def test_configmaps_and_secrets_are_read(server: ApiServer, core: client.CoreV1Api) -> None:
    server.add("configmaps", "latent-gpt", data={"LATENT_GPT_STORE": "s3://a"})
    assert core.read_namespaced_config_map("latent-gpt", "kubeflow").data == {"LATENT_GPT_STORE": "s3://a"}
    assert refused(lambda: core.read_namespaced_secret("latent-gpt", "kubeflow")) == 404
    server.token = "known"
    assert refused(lambda: core.read_namespaced_config_map("latent-gpt", "kubeflow")) == 401
