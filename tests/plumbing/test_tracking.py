"""Tracking, against the real MLflow server."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Metric
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException

from model.errors import Stopped, Unavailable, UserError
from model.plumbing import tracking
from model.plumbing.jobs import TrackingIds
from model.plumbing.tracking import Tracker, check_server, flatten, mlflow_client
from tests.proxies import Answer, Request, certificate, proxy


@pytest.fixture
def ids(services: dict[str, str]) -> TrackingIds:
    """A step of a fresh pipeline run."""
    return TrackingIds(experiment="vqvae-training", run=f"run-{uuid.uuid4().hex[:8]}", step="tokenizer")


@pytest.mark.parametrize("uri", ["", "sqlite:///mlflow.db", "./mlruns"])
def test_only_a_server_will_do(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=rf"MLFLOW_TRACKING_URI is '{uri}'; it must name an MLflow server"):
        check_server()


def test_an_unreachable_server_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(
        Unavailable, match=r"MLflow at http://127.0.0.1:1 cannot be reached .*Connection refused"
    ):
        Tracker(TrackingIds(experiment="e", run="r", step="s"))


class Named(http.server.BaseHTTPRequestHandler):
    """An MLflow that takes questions by its name without a port alone."""

    def do_POST(self) -> None:
        known = ":" not in self.headers["Host"]
        body = (
            b'{"experiments": []}'
            if known
            else b"Invalid Host header - possible DNS rebinding attack detected"
        )
        self.send_response(200 if known else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_name_that_the_server_refuses_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), Named)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://localhost:{server.server_port}")
    refused = tracking.refused_hosts(2)
    server.shutdown()
    server.server_close()
    assert refused == [f"localhost:{server.server_port}"]


@pytest.mark.parametrize(
    ("status", "body", "right"),
    [
        (200, b"<html>", "does not answer as MLflow does"),
        (404, b"no", "names an MLflow server"),
        (401, b"no", "check MLFLOW_TRACKING_USERNAME"),
        (403, b"Invalid Host header", "--allowed-hosts"),
        (503, b"starting", "answers 503"),
    ],
)
def test_other_answers_say_what_would_be_right(
    monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, right: str
) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(UserError, match=right) as caught:
            check_server()
    assert isinstance(caught.value, Unavailable) == (status >= 500), "worth another try"


def test_a_dead_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(UserError, match=r"through the proxy that HTTP_PROXY .* \(.*Connection refused\)"):
        check_server()


@pytest.mark.slow
def test_a_run_on_a_cluster_is_found_by_its_id_there(services: dict[str, str]) -> None:
    job = str(uuid.uuid4())
    run = f"smoke-{job}"
    tracking.open_pipeline_run("vqvae-training", run)
    tracking.note_asset(run, "tokenizer", "s3://bucket/tokenizer/1")
    for step, status in (("tokenizer", "FINISHED"), ("text", "FAILED")):
        Tracker(TrackingIds(experiment="vqvae-training", run=run, step=step)).finish(status)
    tracking.finish_pipeline_run(run, "FAILED", {tracking.FAILURE_TAG: "text: too large"})
    found = tracking.pipeline_run(job)
    assert [one.step for one in found.steps] == ["tokenizer", "text"]
    assert found.steps[0].seconds > 0
    assert found.steps[1].seconds == 0
    assert found.assets == {"tokenizer": "s3://bucket/tokenizer/1"}
    assert found.failure == "text: too large"
    with pytest.raises(UserError, match="knows no run of nobody"):
        tracking.pipeline_run("nobody")


@pytest.mark.slow
def test_runs_are_found_however_many_experiments_there_are(
    services: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = str(uuid.uuid4())
    run = f"smoke-{job}"
    parent = tracking.open_pipeline_run(f"older-{job}", run)
    experiment = mlflow_client().get_run(parent).info.experiment_id
    gone = mlflow_client().create_run(experiment).info.run_id
    mlflow_client().delete_run(gone)
    mlflow_client().create_experiment(f"newer-{job}")
    known: list[Any] = []

    def one_a_page(request: Request, ask: Callable[[], Answer]) -> Answer:
        """As a server answers that has a page more of experiments than it tells at once."""
        asked = json.loads(request.body or b"{}")
        if not request.path.endswith("experiments/search") or asked["max_results"] == 1:
            return ask()
        start = int(asked.get("page_token") or 0)
        if not start:
            known[:] = json.loads(ask().body)["experiments"]
        page = {"experiments": known[start : start + 1]}
        more = {"next_page_token": str(start + 1)} if start + 1 < len(known) else {}
        return Answer(200, {"Content-Type": "application/json"}, json.dumps(page | more).encode())

    with proxy(services["MLFLOW_TRACKING_URI"], one_a_page) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        tracking.note_asset(run, "tokenizer", "s3://bucket/tokenizer/1")
        assert tracking.assets_noted(run) == (True, {"tokenizer": "s3://bucket/tokenizer/1"})
        assert tracking.pipeline_run(job).assets == {"tokenizer": "s3://bucket/tokenizer/1"}
        assert gone in tracking.deleted_runs()
        assert tracking.kill_pipeline_run(run)


@pytest.mark.slow
def test_a_certificate_of_an_own_authority_needs_its_file(
    services: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = certificate(tmp_path)
    with proxy(services["MLFLOW_TRACKING_URI"], lambda _, ask: ask(), tls=tmp_path) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        with pytest.raises(UserError, match=r"certificate verify failed.* MLFLOW_TRACKING_SERVER_CERT_PATH"):
            check_server()
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(authority))
        mlflow_client().search_experiments(max_results=1)


def test_settings_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": {}}) == {"a.b.c": 1, "a.d": [2], "e": {}}


def test_other_ranks_track_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with Tracker(TrackingIds(experiment="e", run="r", step="s"), enabled=False) as tracker:
        tracker.metrics(1, loss=2.0)
        tracker.text("a.txt", "a")


@pytest.mark.slow
class TestRealServer:
    """What only a server can show."""

    def test_a_step_is_a_child_and_continues_its_curve(self, ids: TrackingIds) -> None:
        parent = tracking.open_pipeline_run("latent-gpt-custom-vqvae", ids.run, {"seed": 0})
        with Tracker(ids, {"training": {"steps": 4}}) as tracker:
            for step in (1, 2):
                tracker.metrics(step, **{"train/loss": 1.0 / step})
        again = Tracker(ids, {"training": {"steps": 4}})
        assert again.run_id == tracker.run_id
        assert mlflow_client().get_run(again.run_id).info.status == "RUNNING"
        again.metrics(3, **{"train/loss": 0.1})
        again.finish()
        client = mlflow_client()
        history = client.get_metric_history(tracker.run_id, "train/loss")
        assert [(one.step, one.value) for one in history] == [(1, 1.0), (2, 0.5), (3, 0.1)]
        run = client.get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        assert run.data.params == {"training.steps": "4"}
        assert run.data.tags["mlflow.parentRunId"] == parent
        assert client.get_experiment(run.info.experiment_id).name == "vqvae-training"
        tracking.finish_pipeline_run(ids.run, tags={"outcome": "champion"})
        finished = client.get_run(parent)
        assert (finished.info.status, finished.data.tags["outcome"]) == ("FINISHED", "champion")
        assert finished.data.params == {"seed": "0"}
        assert client.get_experiment(finished.info.experiment_id).name == "latent-gpt-custom-vqvae"

    def test_steps_that_start_side_by_side_share_a_parent(self, ids: TrackingIds) -> None:
        steps = [ids.model_copy(update={"step": f"step-{number}"}) for number in range(4)]
        trackers: list[Tracker] = []
        threads = [threading.Thread(target=lambda one=one: trackers.append(Tracker(one))) for one in steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client = mlflow_client()
        parents = {client.get_run(one.run_id).data.tags["mlflow.parentRunId"] for one in trackers}
        assert parents == {tracking.open_pipeline_run(ids.experiment, ids.run)}
        assert len({one.run_id for one in trackers}) == 4

    def test_artifacts_go_through_the_server(self, ids: TrackingIds, monkeypatch: pytest.MonkeyPatch) -> None:
        from PIL import Image

        with Tracker(ids) as tracker:
            for name in ("S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                monkeypatch.delenv(name)
            tracker.image("samples/one.png", Image.new("RGB", (4, 4)))
            tracker.text("report.html", "<html>")
        assert tracker.lost == 0
        client = mlflow_client()
        names = {one.path for one in client.list_artifacts(tracker.run_id)}
        assert names == {"samples", "report.html"}

    @pytest.fixture
    def mlflow(self, services: dict[str, str]) -> Iterator[int]:
        """Process id of the MLflow server."""
        port = services["MLFLOW_TRACKING_URI"].rpartition(":")[2]
        listing = subprocess.run(["ss", "-ltnpH", f"sport = :{port}"], capture_output=True, text=True).stdout
        pid = int(listing.partition("pid=")[2].partition(",")[0])
        yield pid
        os.kill(pid, signal.SIGCONT)

    def test_a_server_that_is_away_costs_no_step(self, ids: TrackingIds, mlflow: int) -> None:
        with Tracker(ids) as tracker:
            os.kill(mlflow, signal.SIGSTOP)
            for step in range(100):
                tracker.metrics(step, loss=float(step))
            os.kill(mlflow, signal.SIGCONT)
        assert tracker.lost == 0  # a synchronous message would have waited for the server until it was lost
        assert len(mlflow_client().get_metric_history(tracker.run_id, "loss")) == 100

    def test_a_server_that_is_started_again_has_every_step(
        self, ids: TrackingIds, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        from PIL import Image

        gone = threading.Event()

        def hook(_: Request, ask: Callable[[], Answer]) -> Answer:
            return Answer(503, {}, b"starting") if gone.is_set() else ask()

        monkeypatch.setattr(tracking, "AGAIN", 0.1)
        with proxy(os.environ["MLFLOW_TRACKING_URI"], hook) as url:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
            with Tracker(ids) as tracker:
                monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # so that it is ours that are seen
                tracker.metrics(0, loss=0.0)
                gone.set()
                began = time.monotonic()
                for step in range(1, 100):
                    tracker.metrics(step, loss=float(step))
                tracker.image("samples/one.png", Image.new("RGB", (4, 4)))
                assert time.monotonic() - began < 0.5
                time.sleep(1.5)
                assert "MLflow does not answer for now" in caplog.text
                threading.Timer(1.0, gone.clear).start()  # after the last step
            assert tracker.lost == 0
            history = mlflow_client().get_metric_history(tracker.run_id, "loss")
            assert [(one.step, one.value) for one in history] == [(step, float(step)) for step in range(100)]
            assert mlflow_client().list_artifacts(tracker.run_id, "samples")
            assert mlflow_client().get_run(tracker.run_id).info.status == "FINISHED"

    def test_a_server_that_is_gone_is_reported(
        self, ids: TrackingIds, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setattr(tracking, "PATIENCE", 0.5)
        with Tracker(ids) as tracker:

            def gone(*_: object, **__: object) -> None:
                raise ConnectionError("connection refused")

            monkeypatch.setattr("mlflow.utils.rest_utils._get_http_response_with_retries", gone)
            tracker.metrics(1, loss=1.0)
            tracker.text("a.txt", "a")
        assert tracker.lost == 4  # the figures, the text, the end of what measures, and that of the run
        assert "MLflow does not answer for now, and is told later" in caplog.text
        assert "4 messages to MLflow were lost" in caplog.text

    def test_the_machine_is_measured(self, ids: TrackingIds, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("psutil")
        monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
        with Tracker(ids) as tracker:
            time.sleep(1)
        found = mlflow_client().get_run(tracker.run_id).data.metrics
        assert found["system/system_memory_usage_megabytes"] > 0
        assert "system/cpu_utilization_percentage" in found

    @pytest.mark.parametrize(("error", "status"), [(ZeroDivisionError, "FAILED"), (Stopped, "KILLED")])
    def test_an_exception_fails_the_run_and_being_told_to_end_does_not(
        self, ids: TrackingIds, error: type[Exception], status: str
    ) -> None:
        with pytest.raises(error), Tracker(ids) as tracker:
            raise error
        assert mlflow_client().get_run(tracker.run_id).info.status == status


# ── the order of messages ───────────────────────────────────────────────────────────────────────────────


def figures(*steps: int) -> list[Any]:
    return [Metric("loss", 0.5, 0, step) for step in steps]


def test_figures_that_wait_together_are_sent_together_and_nothing_overtakes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking, "AT_ONCE", 4)
    sent: list[object] = []
    begin = threading.Event()
    outbox = tracking._Outbox(lambda some: sent.append([one.step for one in some]))
    outbox.put(lambda: begin.wait(20))
    for step in range(6):
        outbox.put(figures(step))
    outbox.put(lambda: sent.append("picture"))
    outbox.put(figures(6))
    begin.set()
    outbox.close(20)
    assert sent == [[0, 1, 2, 3], [4, 5], "picture", [6]]
    assert outbox.lost == 0


@pytest.mark.parametrize(
    ("error", "sent", "lost"),
    [
        (MlflowException("no answer"), 2, 0),
        (ConnectionError("refused"), 2, 0),
        (MlflowException("such a name is not allowed", INVALID_PARAMETER_VALUE), 1, 1),
        (TypeError("a defect"), 1, 1),
    ],
    ids=["server", "network", "refused", "defect"],
)
def test_only_what_may_get_through_is_sent_again(
    error: Exception, sent: int, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "AGAIN", 0.01)
    errors, tries = iter([error]), []

    def log(some: list[Any]) -> None:
        tries.append(some)
        if one := next(errors, None):
            raise one

    outbox = tracking._Outbox(log)
    outbox.put(figures(1))
    outbox.close(20)
    assert (len(tries), outbox.lost) == (sent, lost)


@pytest.mark.slow
def test_what_a_run_makes_is_noted_on_it_and_found_by_name_or_id(ids: TrackingIds) -> None:
    parent = tracking.open_pipeline_run(ids.experiment, ids.run)
    tracking.note_asset(ids.run, "tokenizer", "s3://bucket/tokenizer/1")
    tracking.note_asset(ids.run, "text", "s3://bucket/clip/2")
    noted = {"tokenizer": "s3://bucket/tokenizer/1", "text": "s3://bucket/clip/2"}
    assert tracking.assets_noted(ids.run) == tracking.assets_noted(parent) == (True, noted)
    tracking.finish_pipeline_run(ids.run)
    assert tracking.assets_noted(ids.run) == (False, noted)
    tracking.note_asset("nobodys", "tokenizer", "s3://bucket/3")
    for name in ("nobodys", "0" * 32):
        with pytest.raises(UserError, match=f"knows no pipeline run '{name}'|refuses: .*{name}"):
            tracking.assets_noted(name)
