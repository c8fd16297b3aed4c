"""Runs on a cluster as people see them, with a KFP and a kubectl that a test plays."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from components.parameters import TEXT_TO_IMAGE, VQVAE
from model.config import PRESETS
from model.errors import UserError
from model.plumbing import attempts, storage, tracking
from model.plumbing.tracking import PipelineRun, StepRun
from pipelines.cluster import runs
from pipelines.cluster.kfp import Kfp
from tests.kfpserver import KfpServer
from tests.kubectl import OURS, FakeKubectl, Object, made

PARAMETERS = ["preset", "data", "workers", "gpus_per_worker", "overrides", "experiment_name", "config"]
TASKS = ("prepare", "images", "tokenizer", "text", "judge", "register")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    with KfpServer() as one:
        monkeypatch.setenv("KFP_ENDPOINT", one.url)
        monkeypatch.setattr(runs, "LOOK", 0.0)
        yield one


@pytest.fixture
def kfp(server: KfpServer, tmp_path: Path) -> Kfp:
    """With both pipelines, as an upload leaves them."""
    kfp = Kfp(server.url, "", "kubeflow")
    wanted = ", ".join(f"{name}: {{}}" for name in PARAMETERS)
    tasks = ", ".join(f"{name}: {{}}" for name in TASKS)
    package = tmp_path / "package.yaml"
    package.write_text(
        f"root: {{dag: {{tasks: {{{tasks}}}}}, inputDefinitions: {{parameters: {{{wanted}}}}}}}"
    )
    for name in (TEXT_TO_IMAGE, VQVAE):
        kfp.upload(name, package, "")
    return kfp


@pytest.fixture
def kubectl(monkeypatch: pytest.MonkeyPatch) -> FakeKubectl:
    one = FakeKubectl()
    monkeypatch.setattr(runs, "Kubectl", lambda namespace: one)
    return one


def given(server: KfpServer, run: str) -> Any:
    return server.runs[run]["runtime_config"]["parameters"]


# ── submit ──────────────────────────────────────────────────────────────────────────────────────────────


def test_what_differs_from_the_preset_is_sent(kfp: Kfp, server: KfpServer) -> None:
    run = runs.submit(
        "smoke", ("seed=1", "transformer.dropout=0.1"), workers=2, experiment_name="mine", name="r"
    )
    assert given(server, run) == {
        "preset": "smoke",
        "workers": 2,
        "overrides": "seed=1\ntransformer.dropout=0.1",
        "experiment_name": "mine",
    }
    assert kfp.run(run).pipeline == kfp.pipeline(TEXT_TO_IMAGE)
    assert kfp.run(run).name == "r"


@pytest.mark.parametrize("data", ["openmoji", "s3://here/{000..009}.tar", "s3://here/folder"])
def test_pictures_that_pods_see_are_sent(kfp: Kfp, server: KfpServer, data: str) -> None:
    assert given(server, runs.submit("openmoji-tiny", data=data)) == {"preset": "openmoji-tiny", "data": data}


def test_a_file_travels_as_its_content(kfp: Kfp, server: KfpServer, tmp_path: Path) -> None:
    text = (PRESETS / "smoke.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text)
    assert given(server, runs.submit(str(tmp_path / "mine.yaml"))) == {"config": text}


def test_a_config_without_a_transformer_goes_to_its_own_pipeline(kfp: Kfp) -> None:
    run = runs.submit("smoke", ("transformer=null",))
    assert kfp.run(run).pipeline == kfp.pipeline(VQVAE)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"overrides": ("seed=x",)}, "seed: Input should be a valid integer"),
        ({"preset": "smoka"}, "preset 'smoka' does not exist; choose one of"),
        ({"workers": -3}, "jobs.workers"),
        ({"data": "/no/pictures"}, r"data: /no/pictures is a path of this machine.*\(s3://bucket/"),
        ({"data": "tests"}, "data: tests is a path of this machine"),
        ({"data": "pictures.tar"}, "data: pictures.tar is a path of this machine"),
        ({"overrides": ("data.source={kind: folder, path: /x}",)}, "data: /x is a path of this machine"),
        ({"overrides": ("data.source={kind: webdataset, urls: x.tar}",)}, "data: x.tar is a path of this"),
    ],
)
def test_a_wrong_config_is_refused_before_anybody_is_asked(server: KfpServer, how: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        runs.submit(**{"preset": "smoke", **how})
    assert server.requests == []


def test_without_an_upload_there_is_nothing_to_submit_to(server: KfpServer) -> None:
    with pytest.raises(UserError, match="has no pipeline latent-gpt-text-to-image; `make upload` first"):
        runs.submit("smoke")


# ── which run ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_is_found_by_whatever_names_it(kfp: Kfp, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = (runs.submit("smoke", name="same") for _ in range(2))
    third = runs.submit("smoke", name="other")
    for which, run in ((old, old), (old[:8], old), (f"smoke-{old}", old), ("same", new), ("", third)):
        assert runs._found(kfp, which).id == run
    with pytest.raises(UserError, match=r"no run of ours is called 'nobody'; .*, the last other"):
        runs._found(kfp, "nobody")
    capsys.readouterr()
    runs.runs()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [third, new, old]


def test_only_what_goes_is_cancelled_and_only_what_stopped_is_retried(kfp: Kfp, server: KfpServer) -> None:
    run = runs.submit("smoke", name="r")
    with pytest.raises(UserError, match="is pending; only what failed or was cancelled is retried"):
        runs.retry("r")
    runs.cancel("r")
    server.state(run, "FAILED")
    with pytest.raises(UserError, match=r"^r \(.*\) is over: it is cancelled"):
        runs.cancel("r")
    runs.retry("r")
    assert kfp.run(run).state == "running"


def test_who_takes_all_away_ends_runs_first(
    kfp: Kfp,
    server: KfpServer,
    kubectl: FakeKubectl,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    over, going = runs.submit("smoke", name="over"), runs.submit("smoke", name="going")
    server.state(over, "RUNNING", "SUCCEEDED")
    lost = runs.submit("smoke", name="lost")
    server.lost = {lost}
    handed = runs.submit("smoke", name="handed over as a package")
    server.runs[handed]["pipeline_version_reference"] = {}
    pod = step(handed, "a", 1)
    pod["metadata"]["labels"] |= OURS
    kubectl.add(pod)
    ends = lambda seconds: [server.state(run, "FAILED") for run in (going, handed)]  # noqa: E731
    monkeypatch.setattr("time.sleep", ends)
    capsys.readouterr()
    runs.remove(kfp, kubectl)
    said = capsys.readouterr().out.splitlines()
    (gone,) = [line for line in said if "lost" in line]
    assert gone.startswith(f"lost ({lost}) cannot be cancelled: KFP at ")
    assert gone.endswith(f'answers 500: workflows.argoproj.io "{lost}" not found')
    assert [line for line in said if line != gone] == [
        f"cancelled going ({going})",
        f"cancelled handed over as a package ({handed})",
        f"removed pipeline {TEXT_TO_IMAGE} from KFP",
        f"removed pipeline {VQVAE} from KFP",
    ]
    assert server.pipelines == {}
    assert server.runs[over]["state"] == "SUCCEEDED"


# ── how it goes ─────────────────────────────────────────────────────────────────────────────────────────


def step(run: str, name: str, at: int, role: str = "launcher", **status: Any) -> Object:
    spec = {"containers": [{"name": "main", "image": "x"}, {"name": "wait", "image": "y"}]}
    labels = {"pipeline/runid": run}
    pod = made("Pod", name, labels, spec=spec, status={"phase": "Running", **status})
    pod["metadata"]["creationTimestamp"] = f"2026-11-26T12:00:{at:02}Z"
    pod["metadata"]["annotations"] = {"pipelines.kubeflow.org/runtime-role": role}
    return pod


def main(state: str, **how: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "main", "state": {state: how}}]}


DONE = main("terminated", exitCode=0, finishedAt="2026-11-26T12:01:00Z")
BAD = main("terminated", exitCode=1, finishedAt="2026-11-26T12:02:00Z")
GOES = main("running", startedAt="2026-11-26T12:00:00Z")


def log(*lines: str) -> str:
    return "".join(f"2026-11-26T12:00:{at:02}.5Z {line}\n" for at, line in enumerate(lines))


def shown(run: str, follow: bool = False) -> list[str]:
    out = io.StringIO()
    runs.status(run, follow, out)
    return out.getvalue().splitlines()


def test_a_run_reads_as_one_on_this_machine(kfp: Kfp, server: KfpServer, kubectl: FakeKubectl) -> None:
    run = runs.submit("smoke", name="r")
    server.state(run, "RUNNING")
    kubectl.add(step(run, "a", 1, **DONE), step(run, "b", 2, **GOES), step(run, "d", 0, "driver", **BAD))
    kubectl.logs["a", "main"] = log("I1126 launcher", "prepare | started", "prepare | done in 1.0 s")
    kubectl.logs["b", "main"] = log(
        *4 * ["chatter"], "tokenizer | started", "tokenizer | step 1/9  11%", "tokenizer | step 2/9  22%"
    )
    kubectl.logs["d", "main"] = log("error: none of ours")
    first, *rest = shown("r")
    assert first.startswith(f"r ({run}) is running, ")
    assert rest == ["[1/6] prepare", "      done in 1.0 s", "[2/6] tokenizer", "      step 2/9  22%"]


def test_the_page_is_named_where_it_is(kfp: Kfp, server: KfpServer, kubectl: FakeKubectl) -> None:
    run = runs.submit("smoke", name="r")
    assert not any("#" in line for line in shown("r"))
    server.html = "<html>"
    assert shown("r")[1] == f"{server.url}/#/runs/details/{run}"


def test_who_follows_sees_each_line_once_to_the_end(
    kfp: Kfp, server: KfpServer, kubectl: FakeKubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.submit("smoke", name="r")
    server.state(run, "RUNNING")
    waits = main("waiting", reason="CreateContainerConfigError", message='no "x"')
    kubectl.add(step(run, "a", 1, **waits | {"phase": "Pending"}))
    lines = ["prepare | started", "prepare | reused s3://x", "prepare | done in 1.0 s"]

    def starts() -> None:
        kubectl.add(step(run, "a", 1, **GOES))
        kubectl.logs["a", "main"] = log(*lines[:2])

    def away() -> None:
        server.faults += [(503, "")] * 2

    def ends() -> None:
        kubectl.add(step(run, "a", 1, **DONE))
        kubectl.logs["a", "main"] = log(*lines)
        server.state(run, "SUCCEEDED")

    turns = iter([lambda: None, starts, away, lambda: None, lambda: None, ends])
    monkeypatch.setattr("time.sleep", lambda seconds: next(turns)())
    _, *rest, last = shown("r", follow=True)
    assert rest == [
        '      pod a cannot be started: CreateContainerConfigError: no "x"',
        "[1/6] prepare",
        "      reused s3://x",
        "      done in 1.0 s",
    ]
    assert last.startswith("succeeded after ")


def test_a_failed_run_says_why(kfp: Kfp, server: KfpServer, kubectl: FakeKubectl) -> None:
    run = runs.submit("smoke", name="r")
    server.state(run, "RUNNING", "FAILED")
    kubectl.add(step(run, "a", 1, **BAD))
    kubectl.logs["a", "main"] = log("prepare | started", "error: data: there is none", "F1126 launcher")
    assert shown("r")[-1].endswith(": data: there is none")
    oom = main("terminated", exitCode=137, reason="OOMKilled", finishedAt="2026-11-26T12:02:00Z")
    kubectl.add(step(run, "a", 1, **oom))
    assert "ran out of memory" in shown("r")[-1]


def test_a_cancelled_run_is_no_failure(kfp: Kfp, server: KfpServer, kubectl: FakeKubectl) -> None:
    run = runs.submit("smoke", name="r")
    server.state(run, "RUNNING", "CANCELING", "FAILED")
    kubectl.add(step(run, "a", 1, **BAD))
    kubectl.logs["a", "main"] = log("error: told to end")
    assert shown("r")[-1].startswith("cancelled after ")
    assert "told to end" not in shown("r")[-1]


def test_who_follows_does_so_to_the_end_whatever_kubectl_says(
    kfp: Kfp, server: KfpServer, kubectl: FakeKubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.submit("smoke", name="r")
    server.state(run, "RUNNING")
    whole, away = FakeKubectl.objects, {"so": False}

    def objects(self: FakeKubectl, *arguments: str, stdin: str = "") -> list[Object]:
        if away["so"]:
            raise UserError("kubectl get: it was refused")
        return whole(self, *arguments, stdin=stdin)

    monkeypatch.setattr(FakeKubectl, "objects", objects)
    kubectl.add(step(run, "a", 1, **GOES))
    kubectl.logs["a", "main"] = log("prepare | started")

    def back_at_its_end() -> None:
        away["so"] = False
        kubectl.there["Pod", "a"]["status"] |= BAD
        kubectl.logs["a", "main"] = log("prepare | started", "error: data: there is none")
        server.state(run, "FAILED")

    gone = lambda: away.update(so=True)  # noqa: E731
    turns = iter([gone, lambda: None, back_at_its_end])
    monkeypatch.setattr("time.sleep", lambda seconds: next(turns)())
    _, *rest, last = shown("r", follow=True)
    assert rest == ["[1/6] prepare", "      its pods cannot be asked: kubectl get: it was refused"]
    assert last.endswith(": data: there is none")


def test_who_may_not_look_follows_what_kfp_says(
    kfp: Kfp, server: KfpServer, kubectl: FakeKubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.submit("smoke", name="r")
    server.state(run, "RUNNING")

    def forbidden(*_: Any, **__: Any) -> Any:
        raise UserError("kubectl get: pods is forbidden")

    monkeypatch.setattr(FakeKubectl, "objects", forbidden)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    turns = iter([lambda: None, lambda: None, lambda: server.state(run, "FAILED")])
    monkeypatch.setattr("time.sleep", lambda seconds: next(turns)())
    out = io.StringIO()
    assert not runs.status("r", True, out), "and it is not well"
    assert out.getvalue().count("its pods cannot be asked: kubectl get: pods is forbidden") == 1
    assert out.getvalue().splitlines()[-1].startswith("failed after ")


def test_a_log_that_cannot_be_read_when_its_pod_has_ended_is_read_later(
    kfp: Kfp, server: KfpServer, kubectl: FakeKubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.submit("smoke", name="r")
    server.state(run, "RUNNING")
    kubectl.add(step(run, "a", 1, **DONE))
    kubectl.logs["a", "main"] = log("prepare | started", "prepare | done in 1.0 s")
    whole, faults = FakeKubectl.__call__, [UserError("kubectl logs: i/o timeout")]

    def called(self: FakeKubectl, *arguments: str, stdin: str = "") -> str:
        if arguments[0] == "logs" and faults:
            raise faults.pop()
        return whole(self, *arguments, stdin=stdin)

    monkeypatch.setattr(FakeKubectl, "__call__", called)
    monkeypatch.setattr("time.sleep", lambda seconds: server.state(run, "SUCCEEDED"))
    _, *rest, _ = shown("r", follow=True)
    assert rest == ["[1/6] prepare", "      done in 1.0 s"]
    reads = [one for one in kubectl.calls if one[0] == "logs"]
    assert len(reads) == 1, "and what was read is not read again"


def test_when_pods_are_gone_mlflow_and_the_store_remember(
    kfp: Kfp, server: KfpServer, kubectl: FakeKubectl, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    run = runs.submit("smoke", name="r")
    server.state(run, "RUNNING", "FAILED")
    assets = {"tokenizer": f"{store}/tokenizer/1", "text": f"{store}/text/1"}
    begun = attempts.begin(assets["text"], 0, "a-pod", "uid", 0)
    storage.write_bytes(begun.log(0), b"loads\ntext | step 1/9  11%\ntext | step 2/9  22%\n")
    known = PipelineRun([StepRun("tokenizer", 3.25), StepRun("text", 0.0)], assets, "text: out of memory")
    monkeypatch.setattr(tracking, "pipeline_run", lambda job: known if job == run else None)
    monkeypatch.setattr(runs, "services", lambda kubectl: nullcontext())
    _, *rest, last = shown("r")
    assert rest == ["[1/6] tokenizer", "      done in 3.2 s", "[2/6] text", "      step 2/9  22%"]
    assert last.endswith(": text: out of memory")


def test_who_may_not_look_is_told_so_and_how_it_ended(
    kfp: Kfp, server: KfpServer, kubectl: FakeKubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.submit("smoke", name="r")
    server.state(run, "RUNNING", "SUCCEEDED")

    def forbidden(*_: Any, **__: Any) -> Any:
        raise UserError("kubectl get: pods is forbidden")

    monkeypatch.setattr(FakeKubectl, "objects", forbidden)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    _, pods, memory, last = shown("r")
    assert pods.strip() == "its pods cannot be asked: kubectl get: pods is forbidden"
    assert memory.strip() == "kubectl get: pods is forbidden"
    assert last.startswith("succeeded after ")
