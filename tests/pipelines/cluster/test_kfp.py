"""The client of KFP's API: uploads that repeat themselves, states in our words, refusals in one line."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.parameters import RETRAINING
from model import steps
from model.config import load_config
from model.errors import Unavailable, UserError
from pipelines.cluster.kfp import Kfp, connected
from pipelines.compile import compile
from tests.kfpserver import KfpServer

PACKAGE = (
    "# a comment of the compiler's\n"
    "root: {inputDefinitions: {parameters: {preset: {literals: [smoke, openmoji-tiny]}, seed: {}}}}\n"
)


@pytest.fixture
def server() -> Iterator[KfpServer]:
    with KfpServer() as one:
        yield one


@pytest.fixture
def kfp(server: KfpServer) -> Kfp:
    return Kfp(server.url, "", "kubeflow")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "pipeline.yaml"
    path.write_text(PACKAGE)
    return path


def test_an_upload_without_a_change_does_nothing(kfp: Kfp, server: KfpServer, package: Path) -> None:
    first = kfp.upload("ours", package, "draws")
    again = kfp.upload("ours", package, "draws")
    assert (first.new, again.new) == (True, False)
    assert (first.pipeline, first.version) == (again.pipeline, again.version)
    assert [one["name"] for one in kfp.versions(first.pipeline)] == [first.version]


def test_the_newest_version_is_what_was_uploaded_last(kfp: Kfp, package: Path) -> None:
    first = kfp.upload("ours", package, "")
    package.write_text(PACKAGE + "\n# more\n")
    second = kfp.upload("ours", package, "")
    package.write_text(PACKAGE)
    third = kfp.upload("ours", package, "")
    names = [first.version, second.version, third.version]
    assert names[2] == f"{names[0]}-2"
    assert [one["name"] for one in kfp.versions(first.pipeline)] == names[::-1], "over two pages"
    assert not kfp.upload("ours", package, "").new


def test_a_removed_pipeline_takes_its_versions_along_and_no_other(
    kfp: Kfp, server: KfpServer, package: Path
) -> None:
    kfp.upload("ours", package, "")
    other = kfp.upload("theirs", package, "")
    assert kfp.remove("ours")
    assert not kfp.remove("ours")
    assert list(server.pipelines) == [other.pipeline]
    assert len(server.uploads[other.pipeline]) == 1


def test_steps_within_a_part_of_a_pipeline_are_steps_of_a_run(
    kfp: Kfp, server: KfpServer, tmp_path: Path
) -> None:
    path = tmp_path / "retraining.yaml"
    compile(RETRAINING, path)
    uploaded = kfp.upload(RETRAINING, path, "")
    run = kfp.run(
        kfp.submit(uploaded.pipeline, "r", {"preset": "smoke", "model": "mine", "start": "scratch"})
    )
    assert set(kfp.tasks(run)) == {"news", *steps.names(load_config("smoke"))}


def test_a_run_is_of_the_newest_version(kfp: Kfp, server: KfpServer, package: Path) -> None:
    uploaded = kfp.upload("ours", package, "")
    run = kfp.run(kfp.submit(uploaded.pipeline, "smoke-1", {"preset": "smoke"}))
    assert (run.name, run.state, run.over) == ("smoke-1", "pending", False)
    assert run.parameters == {"preset": "smoke"}
    reference = server.runs[run.id]["pipeline_version_reference"]
    newest = server.uploads[uploaded.pipeline][-1]["pipeline_version_id"]
    assert reference["pipeline_version_id"] == newest


def test_what_kfp_says_against_a_preset_is_passed_on(kfp: Kfp, package: Path) -> None:
    uploaded = kfp.upload("ours", package, "")
    with pytest.raises(UserError) as refused:
        kfp.submit(uploaded.pipeline, "x", {"preset": "smoka"})
    said = str(refused.value)
    assert said == (
        'KFP refuses: input parameter "preset" value "smoka" does not match any of the allowed literal'
        ' values: ["smoke" "openmoji-tiny"]'
    )


def test_the_steps_of_a_run_are_those_of_its_version(kfp: Kfp, server: KfpServer, package: Path) -> None:
    package.write_text(PACKAGE.replace("root: {", "root: {dag: {tasks: {prepare: {}, images: {}}}, "))
    run = kfp.run(kfp.submit(kfp.upload("ours", package, "").pipeline, "x", {}))
    assert kfp.tasks(run) == ["prepare", "images"]
    kfp.remove("ours")
    assert kfp.tasks(run) == []
    handed = server.runs[run.id]  # over as a package, without a version
    handed |= {
        "pipeline_version_reference": {},
        "pipeline_spec": {"root": {"dag": {"tasks": {"images": {}}}}},
    }
    assert kfp.tasks(kfp.run(run.id)) == ["images"]


def test_runs_are_ours_the_newest_first_and_so_many_at_most(kfp: Kfp, package: Path) -> None:
    ours, theirs = kfp.upload("ours", package, ""), kfp.upload("theirs", package, "")
    made = [kfp.submit(one.pipeline, str(n), {}) for n, one in enumerate([ours, theirs, ours, ours])]
    assert [run.id for run in kfp.runs({ours.pipeline}, 2)] == [made[3], made[2]]
    assert [run.id for run in kfp.runs({ours.pipeline}, 9)] == [made[3], made[2], made[0]]


@pytest.mark.parametrize(
    ("states", "word", "over"),
    [
        (["RUNNING"], "running", False),
        (["RUNNING", "SUCCEEDED"], "succeeded", True),
        (["RUNNING", "FAILED"], "failed", True),
        (["RUNNING", "CANCELING"], "being cancelled", False),
        (["RUNNING", "CANCELING", "FAILED"], "cancelled", True),
        (["RUNNING", "CANCELING", "FAILED", "RUNNING"], "running", False),
        (["RUNNING", "CANCELING", "FAILED", "RUNNING", "FAILED"], "failed", True),
        (["CANCELED"], "cancelled", True),
    ],
)
def test_a_cancelled_run_is_called_so(
    kfp: Kfp, server: KfpServer, package: Path, states: list[str], word: str, over: bool
) -> None:
    run = kfp.submit(kfp.upload("ours", package, "").pipeline, "x", {})
    server.state(run, *states)
    found = kfp.run(run)
    assert (found.state, found.over) == (word, over)
    if states[-1] == "RUNNING":
        assert found.ended == 0


def test_a_run_is_terminated_and_retried(kfp: Kfp, server: KfpServer, package: Path) -> None:
    run = kfp.submit(kfp.upload("ours", package, "").pipeline, "x", {})
    with pytest.raises(UserError, match="must be Failed/Error to retry"):
        kfp.retry(run)
    kfp.terminate(run)
    assert kfp.run(run).state == "being cancelled"
    server.state(run, "FAILED")
    kfp.retry(run)
    assert kfp.run(run).state == "running"


def test_a_kfp_with_several_users_is_told_the_namespace(server: KfpServer, package: Path) -> None:
    server.several_users = True
    kfp = Kfp(server.url, "", "alice")
    pipeline = kfp.upload("ours", package, "").pipeline
    runs = [kfp.submit(pipeline, "x", {}) for _ in range(2)]
    assert [run.id for run in kfp.runs({pipeline}, 9)] == runs[::-1]
    assert server.pipelines[pipeline]["namespace"] == "alice"
    (experiment,) = server.experiments.values()
    assert experiment["namespace"] == "alice"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ((401, {"message": "no\nidentity"}), r"does not let you in \(401: no identity\); it wants a login"),
        ((302, ""), "does not let you in .*: let KFP_TOKEN hold"),
        ((404, {"message": "Run x not found"}), r"does not know it \(Run x not found\)"),
        ((400, {"error": "preset"}), "^KFP refuses: preset$"),
        ((503, "upstream connect error"), "answers 503: Service Unavailable"),
        ((200, "<html>log in"), "does not answer as KFP does; check KFP_ENDPOINT"),
    ],
)
def test_a_refusal_is_one_line(kfp: Kfp, server: KfpServer, fault: tuple[int, Any], said: str) -> None:
    server.faults.append(fault)
    with pytest.raises(UserError, match=said) as refused:
        kfp.run("x")
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, Unavailable) == (fault[0] == 503)


def test_the_token_is_shown(server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "secret"
    monkeypatch.setenv("KFP_ENDPOINT", server.url + "/")
    for token, said in (("", "it wants a login"), ("stale", "that has not expired")):
        monkeypatch.setenv("KFP_TOKEN", token)
        with pytest.raises(UserError, match=said) as refused:
            connected()
        assert "stale" not in str(refused.value)
    monkeypatch.setenv("KFP_TOKEN", "secret\n")
    connected()


def test_an_address_where_nobody_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    monkeypatch.delenv("KFP_ENDPOINT", raising=False)
    with pytest.raises(UserError, match="KFP_ENDPOINT is not set"):
        connected()
    with pytest.raises(Unavailable, match=r"cannot be reached \(.*refused.*\); check KFP_ENDPOINT"):
        Kfp(f"http://127.0.0.1:{port}", "", "")
    with pytest.raises(UserError, match="must be an address"):
        Kfp("localhost:8888", "", "")
