"""What is found out before anything starts: each of the checks is really made."""

import datetime
import http.server
import json
import os
import re
import shutil
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from components.launch.cluster import Cluster
from components.preflight import (
    FROM_OUTSIDE,
    PROBES,
    Finding,
    __main__,
    check_compiler,
    check_disk,
    check_state,
    findings,
    preflight,
)
from components.preflight.kfp import NON_ROOT
from model.config import WebDatasetSource, load_config
from model.data import sources
from model.errors import UserError
from model.plumbing import environment, storage
from model.plumbing.tracking import TRIAL, mlflow_client
from tests.apiserver import USER, ApiServer
from tests.data.test_archives import tar
from tests.data.test_ingest import picture
from tests.k8s.rendering import K8S, OVERLAYS, build, can_build
from tests.proxies import Answer, Hook, Request, proxy

NOBODY = "http://127.0.0.1:1"  # where nothing listens


def test_enough_room_is_fine_even_where_the_folder_is_not_there_yet(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "yet", needed=1)


def test_a_full_disk_is_named_with_what_it_has_and_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GiB free and a run needs 1048576 GiB"):
        check_disk(tmp_path, needed=2**50)


def test_a_disk_without_room_for_a_run_is_refused(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**30, 2**30))
    with pytest.raises(UserError, match=r"^disk: .* has 1\.0 GiB free and a run needs 2 GiB; free some"):
        preflight(load_config("smoke"))


def test_a_source_that_is_not_there_is_refused(store: str, tmp_path: Path) -> None:
    config = load_config("smoke", [f"data.source={{kind: folder, path: {tmp_path / 'none'}}}"])
    with pytest.raises(UserError, match=r"none"):
        preflight(config)


def test_a_pod_finds_out_of_what_kind_the_data_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From outside a folder in S3 is not looked at: any kind might lie there."""
    monkeypatch.setattr(__main__, "PROBES", [one for one in PROBES if one.section in ("source", "disk")])
    told = load_config("smoke", data={"kind": "folder", "path": str(tmp_path / "shards")}).model_dump_json()

    def said(data: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["preflight", told, str(data)])
        with pytest.raises(SystemExit) as ended:
            __main__.main()
        return int(ended.value.code or 0), capsys.readouterr().out

    (tmp_path / "shards").mkdir()
    tar(tmp_path / "shards" / "0.tar", {"1.png": picture(1), "1.txt": b"one"})
    assert said(tmp_path / "shards") == (0, f"source    {fingerprint(tmp_path / 'shards')}\n")
    status, why = said(tmp_path / "none")
    assert status == 2
    assert why.startswith("source    STOPS A RUN: data: there is no folder")


def fingerprint(shards: Path) -> str:
    return sources.fingerprint(WebDatasetSource(urls=str(shards)))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("tokenizer={{kind: pretrained, ref: {}}}", "tokenizer.ref"),
        ("tokenizer.loss.perceptual_weights={}", "tokenizer.loss.perceptual_weights"),
        ("clip={{kind: pretrained, weights: {}}}", "clip.weights"),
    ],
)
def test_weights_that_are_not_where_the_config_says(
    override: str, field: str, store: str, tmp_path: Path
) -> None:
    config = load_config("smoke", [override.format(tmp_path / "none.safetensors")])
    with pytest.raises(UserError, match=rf"^{field}: .*none\.safetensors does not exist"):
        preflight(config)


def test_what_torch_lacks_to_compile_is_named_where_a_training_compiles(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = load_config("smoke", [f"{net}.training.compile=true" for net in ("clip", "transformer")])
    check_compiler(compiled)
    settings = "set clip.training.compile=false and transformer.training.compile=false"
    for name, value, lacking in (
        ("CXX", "none-such -O2", "the C\\+\\+ compiler none-such"),
        ("PATH", str(tmp_path), r"the C\+\+ compiler g\+\+"),
    ):
        monkeypatch.setenv(name, value)
        with pytest.raises(
            UserError, match=rf"^clip\.training\.compile: .* without {lacking}; .* {settings}$"
        ):
            check_compiler(compiled)
        check_compiler(load_config("smoke"))
        monkeypatch.undo()
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match=r"without the headers of Python; .*python3-dev"):
        check_compiler(compiled)


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LATENT_GPT_STORE", str(tmp_path / "file" / "store"))
    with pytest.raises(UserError, match=r"file/store.*: Not a directory"):
        preflight(load_config("smoke"))


def test_mlflow_that_does_not_answer_is_refused(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    with pytest.raises(UserError, match=rf"^MLflow at {NOBODY} cannot be reached"):
        preflight(load_config("smoke"))


def test_a_store_on_a_disk_nearly_full_by_seaweedfs_own_rule_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 * 2**40, 0, 99 * 2**30))  # 0.97 %
    monkeypatch.setenv("S3_ENDPOINT_URL", NOBODY)
    check_state(tmp_path)
    monkeypatch.delenv("S3_ENDPOINT_URL")
    with pytest.raises(UserError, match=r"^disk: .* has 99\.0 GiB free and a run needs 104 GiB"):
        check_state(tmp_path)


def test_a_state_folder_of_somebody_else_is_refused_by_the_name_of_its_setting(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    if as_root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"cannot be written: .* set LATENT_GPT_STATE to a folder"):
            check_state(tmp_path / "clone" / ".latent-gpt")
    finally:
        if as_root:
            os.seteuid(0)
        tmp_path.chmod(0o755)


@pytest.mark.slow
def test_where_all_is_well_each_check_says_what_it_found_and_nothing_is_left(
    services: dict[str, str],
) -> None:
    config = load_config("smoke")
    preflight(config)  # imports, and the experiment
    began = time.monotonic()
    found = preflight(config)
    assert time.monotonic() - began < 10
    assert [line.split()[0] for line in found] == ["source", "storage", "tracking"]
    assert found[1].endswith(services["LATENT_GPT_STORE"])
    assert found[2].endswith(os.environ["MLFLOW_TRACKING_URI"])
    assert storage.list_sizes(services["LATENT_GPT_STORE"]) == {}
    client = mlflow_client()
    experiment = client.get_experiment_by_name(config.experiment)
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    assert TRIAL not in {run.info.run_name for run in runs}
    assert TRIAL not in {one.name for one in client.search_logged_models([experiment.experiment_id])}


def ask_probe(section: str, name: str) -> None:
    """Make one of the checks."""
    [probe] = [one for one in PROBES if (one.section, one.name) == (section, name)]
    probe.check(load_config("smoke"))


def lacks(condition: Callable[[Request], bool], answer: Answer) -> Hook:
    """A server that is the real one but for some requests."""
    return lambda request, ask: answer if condition(request) else ask()


def without_conditions(request: Request, ask: Callable[[], Answer]) -> Answer:
    """A server that knows no If-None-Match, and writes."""
    if request.headers.get("If-None-Match") and request.key.endswith("once"):
        return Answer(200, {"ETag": '"x"'})
    return ask()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hook", "says"),
    [
        pytest.param(
            "lists",
            lacks(lambda one: "list-type" in one.path, Answer.error(403, "AccessDenied")),
            r"denies ListObjectsV2 \(AccessDenied\); .* may list, read, write and delete in this bucket",
            id="no right to list",
        ),
        pytest.param(
            "writes only what is absent",
            lacks(lambda one: "If-None-Match" in one.headers, Answer.error(501, "NotImplemented")),
            r"has no conditional writes \(If-None-Match: \*\).* PutObject with 501 NotImplemented",
            id="501",
        ),
        pytest.param(
            "writes only what is absent",
            without_conditions,
            r"has no conditional writes .*: a second write went through; use a store that has them",
            id="conditions ignored",
        ),
        pytest.param(
            "deletes many at once",
            lacks(lambda one: one.path.endswith("?delete"), Answer.error(400, "MissingContentMD5")),
            r"answers DeleteObjects with 400 MissingContentMD5",
            id="no batches",
        ),
        pytest.param(
            "takes uploads in parts",
            lacks(lambda one: one.path.endswith("?uploads"), Answer.error(501, "NotImplemented")),
            r"answers CreateMultipartUpload with 501 NotImplemented",
            id="no parts",
        ),
        pytest.param(
            "is read from the middle on",
            lacks(lambda one: "Range" in one.headers, Answer(200, {"ETag": '"x"'}, bytes(64))),
            r"S3 answers another question",
            id="no ranges",
        ),
        pytest.param(
            "is written to and read from",
            lacks(lambda one: True, Answer.error(403, "SecondLevelDomainForbidden", "Use virtual hosts")),
            r"wants the bucket in the host's name .*; set addressing_style = virtual below s3 = in ~/\.aws",
            id="virtual hosts alone",
        ),
    ],
)
def test_a_store_that_lacks_something_is_refused_by_name(
    services: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str, hook: Hook, says: str
) -> None:
    with proxy(services["S3_ENDPOINT_URL"], hook) as url:
        monkeypatch.setenv("S3_ENDPOINT_URL", url)
        with pytest.raises(UserError, match=says):
            ask_probe("storage", name)
    monkeypatch.setenv("S3_ENDPOINT_URL", services["S3_ENDPOINT_URL"])
    assert storage.list_sizes(services["LATENT_GPT_STORE"]) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hook", "says"),
    [
        pytest.param(
            "keeps models",
            lacks(lambda one: "/logged-models" in one.path, Answer(404, {}, b"{}")),
            r"refuses: .*; models need MLflow 3 or newer",
            id="models",
        ),
        pytest.param(
            "keeps artifacts",
            lacks(lambda one: "/mlflow-artifacts/" in one.path, Answer(500, {}, b"{}")),
            r"wants artifacts at mlflow-artifacts:/.*; start the server with --serve-artifacts",
            id="artifacts",
        ),
    ],
)
def test_an_mlflow_that_lacks_something_is_refused_by_name(
    services: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str, hook: Hook, says: str
) -> None:
    with proxy(services["MLFLOW_TRACKING_URI"], hook) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        with pytest.raises(UserError, match=says):
            ask_probe("tracking", name)


@pytest.mark.slow
def test_another_registry_that_does_not_answer_is_named(
    services: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", NOBODY)
    with pytest.raises(UserError, match=rf"MLFLOW_REGISTRY_URI or .* names the registry {NOBODY}"):
        ask_probe("tracking", "keeps models")


# ── the cluster ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def whole(api_server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> ApiServer:
    """A cluster that has all that jobs need."""
    for one in {*environment.IN_CONFIG_MAP, *environment.IN_SECRET} - {
        environment.LAUNCHER,
        environment.STORE,
    }:
        monkeypatch.delenv(one.name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://latent-gpt-mlflow:5000")
    api_server.add("configmaps", "latent-gpt", data={"MLFLOW_TRACKING_URI": "http://latent-gpt-mlflow:5000"})
    api_server.add("secrets", "latent-gpt", data={"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"})
    node(api_server, "cpu-1")
    return api_server


def node(
    server: ApiServer, name: str, taints: Sequence[str] = (), labels: dict[str, str] | None = None, **has: str
) -> None:
    """A node; a taint is `key=value:effect`."""
    told = []
    for taint in taints:
        what, effect = taint.split(":")
        key, _, value = what.partition("=")
        told.append({"key": key, "effect": effect} | ({"value": value} if value else {}))
    allocatable = {"cpu": "8", "memory": "32Gi"} | {
        one.replace("gpu", "nvidia.com/gpu"): has[one] for one in has
    }
    server.add("nodes", name, spec={"taints": told}, status={"allocatable": allocatable})
    server._change("nodes", name, lambda one: one["metadata"].update(labels=labels or {}))


def on_cluster(*overrides: str, section: str = "cluster") -> list[Finding]:
    """What is found there."""
    config = load_config("smoke", ["jobs.cpu=1", "jobs.memory=2Gi", *overrides])
    return findings(config, [probe for probe in PROBES if probe.section == section])


def stopping(*overrides: str) -> str:
    """The one thing found there that stops a run."""
    (error,) = (one.error for one in on_cluster(*overrides) if one.error)
    return str(error)


def test_a_cluster_that_has_all_a_job_needs_is_named_with_the_image(whole: ApiServer) -> None:
    assert [str(one) for one in on_cluster()] == [
        f"cluster   Kubernetes v1.34.4 at {whole.url}, namespace kubeflow",
        "cluster   image registry/latent-gpt@sha256:1",
        "cluster   the clocks here and of the API server are less than a minute apart",
    ]


def test_who_runs_jobs_here_needs_no_cluster(api_server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_LAUNCHER", "torchrun")
    assert on_cluster() == on_cluster(section="KFP") == []
    assert api_server.requests == []


@pytest.mark.parametrize(
    ("verb", "resource", "group"),
    [
        *((verb, "pytorchjobs", "kubeflow.org") for verb in ("get", "list", "watch", "create", "delete")),
        *(("list", "pods", ""), ("watch", "pods", ""), ("get", "pods/log", ""), ("list", "events", "")),
    ],
)
def test_what_a_step_may_not_do_is_named_with_the_rule_that_is_missing(
    whole: ApiServer, verb: str, resource: str, group: str
) -> None:
    whole.denied.add((verb, resource))
    said = stopping()
    assert said.startswith(f"cluster: {USER} may not {verb} {resource}")
    rule = yaml.safe_load(said.partition("rules of its Role: ")[2])
    assert rule == [{"apiGroups": [group], "resources": [resource], "verbs": [verb]}]


@pytest.mark.parametrize(("lacking", "kind"), [("configmaps", "ConfigMap"), ("secrets", "Secret")])
def test_what_workers_would_lack_is_named(whole: ApiServer, lacking: str, kind: str) -> None:
    whole.remove(lacking, "latent-gpt")
    assert stopping().startswith(f"cluster: namespace kubeflow has no {kind} 'latent-gpt', from which")


def test_a_key_that_this_step_has_and_workers_would_not_is_named(
    whole: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://latent-gpt-s3:8333")
    assert "ConfigMap 'latent-gpt' in namespace kubeflow has no S3_ENDPOINT_URL, which this" in stopping()


@pytest.mark.skipif(not can_build(), reason="neither kustomize nor kubectl is here")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_step_of_every_overlay_is_told_nothing_that_workers_would_lack(
    whole: ApiServer, monkeypatch: pytest.MonkeyPatch, overlay: str
) -> None:
    (told,) = [one["data"] for one in build(K8S / "overlays" / overlay) if one["kind"] == "ConfigMap"]
    whole.remove("configmaps", "latent-gpt")
    whole.add("configmaps", "latent-gpt", data=told)
    for name, value in (told | environment.OF_A_STEP).items():
        monkeypatch.setenv(name, value)
    (probe,) = (one for one in PROBES if one.name == "tells workers their services")
    assert probe.check(load_config("smoke")) is None


def test_half_a_pair_of_keys_is_named(whole: ApiServer) -> None:
    whole.remove("secrets", "latent-gpt")
    whole.add("secrets", "latent-gpt", data={"AWS_ACCESS_KEY_ID": "a"})
    assert "Secret 'latent-gpt' in namespace kubeflow has no AWS_SECRET_ACCESS_KEY, and S3" in stopping()


def test_without_mlflow_s_address_workers_have_none(
    whole: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    whole.remove("configmaps", "latent-gpt")
    whole.add("configmaps", "latent-gpt")
    assert "has no MLFLOW_TRACKING_URI, the address of MLflow; `make deploy`" in stopping()


@pytest.mark.parametrize(
    ("verb", "resource", "what"),
    [
        ("get", "secrets", "what workers are told"),
        ("list", "nodes", "whether a node has room for a worker"),
        ("list", "resourcequotas", "what is left of quota"),
        ("create", "pods", "whether a worker's pod is let in"),
    ],
)
def test_what_an_account_may_not_look_at_is_unknown_and_stops_nothing(
    whole: ApiServer, verb: str, resource: str, what: str
) -> None:
    whole.denied.add((verb, resource))
    found = on_cluster()
    assert not any(one.error for one in found)
    assert f"{what} is unknown: this account may not {verb} {resource}" in [one.said for one in found]


def test_a_cluster_without_the_operator_is_refused(whole: ApiServer) -> None:
    del whole.kinds["pytorchjobs"]
    assert stopping().startswith(
        "cluster: it has no pytorchjobs.kubeflow.org of v1; install Kubeflow's training"
    )


def test_a_cluster_without_argo_is_said_to_be(whole: ApiServer) -> None:
    del whole.kinds["workflows"]
    assert any("worth knowing: it has no workflows.argoproj.io" in one.said for one in on_cluster())


def test_a_cluster_that_does_not_answer_is_refused_once(
    api_server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text((tmp_path / "kubeconfig").read_text().replace(api_server.url, NOBODY))
    monkeypatch.setenv("KUBECONFIG", str(elsewhere))
    assert stopping().startswith(f"cluster: {NOBODY} does not answer: ")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert stopping().startswith("no cluster is known: ")


def test_a_cluster_that_falls_silent_is_asked_no_further(whole: ApiServer) -> None:
    whole.fail(0, times=99, where="selfsubjectaccessreviews")
    assert "does not answer" in stopping()
    assert not any("/nodes" in one.path for one in whole.requests)


def test_a_tag_is_no_digest(whole: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_IMAGE", "registry/latent-gpt:1")
    assert any("worth knowing: image registry/latent-gpt:1 has a tag" in one.said for one in on_cluster())


def test_a_pull_secret_that_is_not_there_is_named(whole: ApiServer) -> None:
    assert "no Secret 'pull', which jobs.image_pull_secrets names" in stopping(
        "jobs.image_pull_secrets=[pull]"
    )


GPUS = ("jobs.gpus_per_worker=8", "jobs.node_selector={gpu: h100}")
TOLERATED = "jobs.tolerations=[{key: gpu, operator: Exists}]"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["jobs.gpus_per_worker=8"],
            r"no node has 8 nvidia.com/gpu for a worker, at most 0 .* device plugin",
        ),
        (["jobs.node_selector={gpu: h100}"], r"of the 1 nodes is labelled gpu=h100; mend jobs.node_selector"),
        (
            ["jobs.cpu=9", "jobs.cpu_limit=9"],
            r"no node has 9 cpu for a worker, at most 8 cpu; lower jobs.cpu",
        ),
        (["jobs.memory=64Gi"], r"no node has 64 GiB of memory for a worker, at most 32 GiB"),
    ],
)
def test_a_worker_for_which_no_node_is_large_enough_is_refused(
    whole: ApiServer, overrides: list[str], says: str
) -> None:
    assert re.search(says, stopping(*overrides))
    (found,) = (one for one in on_cluster(*overrides, "jobs.pending_hours=2") if "node" in one.said)
    assert re.search(rf"^worth knowing: .*{says}", found.said)
    assert "waits for 2 hours" in found.said
    (found,) = (one for one in on_cluster(*overrides, "jobs.queue=q") if "node" in one.said)
    assert re.search(rf"^worth knowing: .*{says}.*, unless the queue's flavour gives it", found.said)


def test_a_node_of_gpus_is_taken_if_its_taint_is_tolerated(whole: ApiServer) -> None:
    node(whole, "gpu-1", ["gpu=yes:NoSchedule"], {"gpu": "h100"}, gpu="8")
    assert "keeps workers off by gpu=yes:NoSchedule; kubectl uncordon one, or name" in stopping(*GPUS)
    assert not any(one.error for one in on_cluster(*GPUS, TOLERATED))


def test_two_nodes_are_no_one(whole: ApiServer) -> None:
    node(whole, "small", memory="4Gi", cpu="32")
    assert "no single node has 16 cpu, 16 GiB of memory" in stopping(
        "jobs.cpu=16", "jobs.cpu_limit=16", "jobs.memory=16Gi"
    )


def quota(server: ApiServer, used: str, **spec: Any) -> None:
    """A quota of 4 cores, of which so many are used."""
    hard = {"requests.cpu": "4"}
    server.add(
        "resourcequotas", "small", spec={"hard": hard, **spec}, status={"used": {"requests.cpu": used}}
    )


def test_a_job_beyond_a_quota_is_refused_and_one_beyond_what_is_left_waits(whole: ApiServer) -> None:
    quota(whole, "1500m")
    assert not any("quota" in one.said for one in on_cluster("jobs.workers=2"))
    (found,) = (one.said for one in on_cluster("jobs.workers=4") if "quota" in one.said)
    assert found == (
        "worth knowing: jobs wait for 4 requests.cpu of quota small, whose 2.5 requests.cpu are left"
    )
    says = "cluster: quota small allows 4 requests.cpu, and a job asks for 8 requests.cpu; raise it"
    assert stopping("jobs.workers=8", "jobs.processes_per_worker=1").startswith(says)


@pytest.mark.parametrize(
    ("spec", "counted"),
    [
        ({"scopes": ["BestEffort"]}, False),
        ({"scopes": ["NotTerminating"]}, True),
        (
            {"scopeSelector": {"matchExpressions": [{"scopeName": "PriorityClass", "operator": "Exists"}]}},
            False,
        ),
        (
            {
                "scopeSelector": {
                    "matchExpressions": [
                        {"scopeName": "PriorityClass", "operator": "NotIn", "values": ["latent-gpt"]}
                    ]
                }
            },
            True,
        ),
    ],
)
def test_a_quota_of_other_pods_is_none_of_ours(whole: ApiServer, spec: dict[str, Any], counted: bool) -> None:
    quota(whole, "4", **spec)
    assert any("quota" in one.said for one in on_cluster("jobs.workers=2")) == counted


@pytest.mark.parametrize(
    ("refuses", "says"),
    [
        ('violates PodSecurity "restricted:latest": x', "our jobs meet `restricted`; what changes pods"),
        ("no PriorityClass with name high was found", "create it, or set jobs.priority_class"),
    ],
)
def test_what_refuses_a_workers_pod_is_said(whole: ApiServer, refuses: str, says: str) -> None:
    whole.refuses = refuses
    said = stopping()
    assert said.startswith("cluster: a worker's pod is refused: ")
    assert refuses in said
    assert says in said


def test_a_used_up_quota_stops_no_run_and_a_warning_is_passed_on(whole: ApiServer) -> None:
    whole.refuses = "exceeded quota: small, requested: cpu=1, used: cpu=4, limited: cpu=4"
    assert any("worth knowing: jobs wait, as quota is used up: " in one.said for one in on_cluster())
    whole.refuses, whole.warns = "", "would violate PodSecurity"
    assert any(one.said.endswith("with a warning: would violate PodSecurity") for one in on_cluster())


def test_a_clock_that_is_wrong_is_said_to_be(whole: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Later":
            return cls.fromtimestamp(time.time() + 300, tz)

    monkeypatch.setattr("components.preflight.cluster.datetime", Later)
    (found,) = (one.said for one in on_cluster() if "clock" in one.said)
    assert re.match(r"worth knowing: the clock here is (299|300|301) s ahead of the API server's; S3", found)


# ── KFP ─────────────────────────────────────────────────────────────────────────────────────────────────


class Health(http.server.BaseHTTPRequestHandler):
    """A KFP of the version that its server has as `version`."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/apis/v2beta1/healthz" else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"tag_name": self.server.version, "multi_user": False}).encode())  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("2.17.0", r"^KFP 2\.17\.0 at http.* knows drop-downs$"),
        ("2.5.0", r"^worth knowing: KFP 2\.5\.0 .* knows no drop-downs, which come with 2\.17"),
        ("unknown", r"^KFP at http.* does not tell its version"),
    ],
)
def test_what_kfp_can_do_is_told(
    whole: ApiServer, monkeypatch: pytest.MonkeyPatch, version: str, says: str
) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), Health)
    server.version = version  # type: ignore[attr-defined]
    threading.Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.setenv("KFP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    found = on_cluster(section="KFP")[0].said
    server.server_close()
    assert re.search(says, found)


def test_a_kfp_that_is_not_there_stops_nothing(whole: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_ENDPOINT", NOBODY)
    found = on_cluster(section="KFP")
    assert found[0].said.startswith(f"worth knowing: no KFP at {NOBODY}")
    assert not any(one.error for one in found)


def test_kfp_is_looked_at_where_it_is_named_or_around_a_step(
    whole: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (probe,) = (one for one in FROM_OUTSIDE if one.name == "has drop-downs")
    monkeypatch.setenv("KFP_ENDPOINT", "")
    assert probe.check(load_config("smoke")) is None, "from outside nothing is known of it"
    there = Cluster("kubeflow", client.Configuration(host=whole.url))
    monkeypatch.setattr("components.launch.cluster.in_pod", lambda: True)
    monkeypatch.setattr("components.launch.cluster.here", lambda: there)
    said = probe.check(load_config("smoke"))
    assert said == "KFP's version is unknown here: none is at http://ml-pipeline.kubeflow:8888"


def deployment(server: ApiServer, name: str, **variables: Any) -> None:
    told = [
        {"name": key, **({"value": value} if isinstance(value, str) else value)}
        for key, value in variables.items()
    ]
    server.add("deployments", name, spec={"template": {"spec": {"containers": [{"name": "a", "env": told}]}}})


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"DEFAULT_REQUEUE_TIME": "2s"}, "Argo looks again after 2s"),
        ({}, "worth knowing: Argo looks again after 10s"),
    ],
)
def test_argos_requeue_time_is_told(
    whole: ApiServer, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    monkeypatch.setenv("KFP_ENDPOINT", NOBODY)
    assert "is unknown: no workflow-controller" in on_cluster(section="KFP")[-1].said
    deployment(whole, "workflow-controller", **variables)
    assert on_cluster(section="KFP")[-1].said.startswith(says)


FROM_MAP = {"valueFrom": {"configMapKeyRef": {"name": "pipeline-install-config", "key": "nonRoot"}}}


@pytest.mark.parametrize(
    ("variables", "said"),
    [({}, False), ({NON_ROOT: "false"}, False), ({NON_ROOT: "true"}, True), ({NON_ROOT: FROM_MAP}, True)],
)
def test_a_kfp_that_does_not_restrict_its_containers_is_told_how(
    whole: ApiServer, monkeypatch: pytest.MonkeyPatch, variables: dict[str, Any], said: bool
) -> None:
    monkeypatch.setenv("KFP_ENDPOINT", NOBODY)
    whole.add("configmaps", "pipeline-install-config", data={"nonRoot": "true"})
    deployment(whole, "ml-pipeline", **variables)
    found = [
        one.said for one in on_cluster(section="KFP") if f"set {NON_ROOT}=true for ml-pipeline" in one.said
    ]
    assert bool(found) == (not said)


@pytest.mark.parametrize("restricted", [False, True])
def test_a_step_of_kfp_looks_at_its_own_pod(
    whole: ApiServer, monkeypatch: pytest.MonkeyPatch, restricted: bool
) -> None:
    context = {"securityContext": {"runAsNonRoot": True}}
    whole.add(
        "pods",
        "step",
        spec={
            "initContainers": [
                {
                    "name": "kfp-launcher",
                    "image": "ghcr.io/kubeflow/kfp-launcher:2.17.0",
                    **(context if restricted else {}),
                }
            ],
            "containers": [{"name": "main", "image": "x", **context}],
        },
    )
    whole._change(
        "pods", "step", lambda one: one["metadata"].update(labels={"workflows.argoproj.io/workflow": "w"})
    )
    monkeypatch.setenv("LATENT_GPT_POD", "step")
    monkeypatch.setattr("components.launch.cluster.in_pod", lambda: True)
    there = Cluster("kubeflow", client.Configuration(host=whole.url))
    monkeypatch.setattr("components.launch.cluster.here", lambda: there)
    server = http.server.HTTPServer(("127.0.0.1", 0), Health)
    server.version = "unknown"  # type: ignore[attr-defined]
    threading.Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.setenv("KFP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    version, *rest = on_cluster(section="KFP")
    server.server_close()
    assert version.said.startswith("KFP 2.17.0 at ")
    assert any("KFP's containers (kfp-launcher) do not say" in one.said for one in rest) == (not restricted)


# ── all of it ───────────────────────────────────────────────────────────────────────────────────────────


def test_all_that_stops_a_run_is_said_at_once(
    whole: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    whole.remove("secrets", "latent-gpt")
    source = f"data.source={{kind: folder, path: {tmp_path / 'none'}}}"
    config = load_config("smoke", [source, "jobs.memory=64Gi"])
    with pytest.raises(UserError) as raised:
        preflight(config)
    for one in (
        str(tmp_path / "none"),
        "no Secret 'latent-gpt'",
        "no node has 64 GiB",
        f"MLflow at {NOBODY}",
    ):
        assert str(raised.value).count(one) == 1


def test_a_service_named_mlflow_is_warned_of(whole: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_PORT", "tcp://10.96.0.1:5000")
    (probe,) = (one for one in PROBES if one.name == "is no Service named mlflow")
    said = probe.check(load_config("smoke"))
    assert said
    assert "a Service named 'mlflow' puts MLFLOW_PORT" in said
    monkeypatch.setenv("MLFLOW_PORT", "5000")
    assert probe.check(load_config("smoke")) is None
