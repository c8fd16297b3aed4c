"""What is found out before anything starts: each of the checks is really made."""

import os
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from components.preflight import PROBES, check_disk, check_state, preflight
from model.config import load_config
from model.errors import UserError
from model.plumbing import storage
from model.plumbing.tracking import TRIAL, mlflow_client
from tests.apiserver import ApiServer
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


def on_cluster() -> str | None:
    (check,) = (probe.check for probe in PROBES if probe.section == "cluster")
    return check(load_config("smoke"))


def whole(server: ApiServer) -> None:
    server.add("configmaps", "latent-gpt")
    server.add("secrets", "latent-gpt")


def test_a_cluster_that_has_all_a_job_needs_is_named_with_the_image(api_server: ApiServer) -> None:
    whole(api_server)
    assert on_cluster() == "namespace kubeflow, image registry/latent-gpt@sha256:1"


def test_who_runs_jobs_here_needs_no_cluster(api_server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_LAUNCHER", "torchrun")
    assert on_cluster() is None
    assert api_server.requests == []


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        *((verb, "pytorchjobs") for verb in ("get", "list", "watch", "create", "delete")),
        *(("list", "pods"), ("watch", "pods"), ("get", "pods/log"), ("list", "events")),
    ],
)
def test_what_a_step_may_not_do_is_named(api_server: ApiServer, verb: str, resource: str) -> None:
    whole(api_server)
    api_server.denied.add((verb, resource))
    with pytest.raises(
        UserError, match=rf"^cluster: namespace kubeflow does not allow {verb} {resource}; apply"
    ):
        on_cluster()


@pytest.mark.parametrize(("there", "lacking"), [("configmaps", "Secret"), ("secrets", "ConfigMap")])
def test_what_workers_would_lack_is_named(api_server: ApiServer, there: str, lacking: str) -> None:
    api_server.add(there, "latent-gpt")
    with pytest.raises(UserError, match=rf"^cluster: namespace kubeflow has no {lacking} 'latent-gpt'"):
        on_cluster()


def test_who_may_not_look_at_secrets_is_believed(api_server: ApiServer) -> None:
    api_server.add("configmaps", "latent-gpt")
    api_server.denied.add(("get", "secrets"))
    assert on_cluster()


def test_a_cluster_without_the_operator_is_refused(api_server: ApiServer) -> None:
    whole(api_server)
    del api_server.kinds["pytorchjobs"]
    with pytest.raises(
        UserError, match=r"^cluster: it has no pytorchjobs.kubeflow.org; install the training"
    ):
        on_cluster()


def test_a_cluster_that_does_not_answer_is_refused(
    api_server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text((tmp_path / "kubeconfig").read_text().replace(api_server.url, NOBODY))
    monkeypatch.setenv("KUBECONFIG", str(elsewhere))
    with pytest.raises(UserError, match=rf"^cluster: {NOBODY} does not answer: "):
        on_cluster()
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^no cluster is known: "):
        on_cluster()
