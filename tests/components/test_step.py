"""What every step does around its one call."""

from __future__ import annotations

import os
import signal
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from components.step import end_given_up_runs, step, told_to_end
from model.errors import UserError
from model.plumbing import leases, outcome
from model.plumbing.outcome import JobFailed, Outcome

KILLED = Outcome(kind="killed", reason="process 1 was killed", last_lines=("its log",))


def ended(name: str, error: Exception | None = None, run: str = "") -> int:
    """The status that a process ends with in which a step raises this."""
    try:
        with step(name, run):
            if error:
                raise error
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_step_says_when_it_starts_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("tokens") == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == "tokens | started"
    assert last.startswith("tokens | done in 0.0 s")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("data.source.path: nowhere"), 2, "error: data.source.path: nowhere"),
        (JobFailed(KILLED), 1, "error: tokens failed: process 1 was killed"),
        (ZeroDivisionError("by zero"), 1, "error: tokens failed: ZeroDivisionError: by zero"),
    ],
)
def test_a_failed_step_ends_with_its_reason_and_its_status(
    error: Exception, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended("tokens", error) == status
    shown = capsys.readouterr()
    assert said in shown.out.splitlines()
    assert "done in" not in shown.out
    assert ("Traceback" in shown.err) is not isinstance(error, UserError), "a defect leaves its trace"


def test_a_failed_step_says_why_to_the_run_and_to_its_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = tmp_path / "termination-log"
    message.touch()
    monkeypatch.setattr(outcome, "TERMINATION_LOG", message)
    monkeypatch.setenv("LATENT_GPT_OUTCOMES", str(tmp_path / "outcomes"))
    ended("images")
    assert message.read_text() == ""
    ended("tokens", JobFailed(KILLED))
    left = outcome.left_in(str(tmp_path / "outcomes"))
    assert (left["images"].well, left["tokens"].reason) == (True, "process 1 was killed")
    assert message.read_text() == "tokens failed: process 1 was killed"


@pytest.mark.slow
@pytest.mark.parametrize("error", [UserError("bad input"), RuntimeError("oh")], ids=["input", "defect"])
def test_a_failed_step_fails_the_run_in_mlflow(services: dict[str, str], error: Exception) -> None:
    from model.plumbing.tracking import FAILURE_TAG, mlflow_client, open_pipeline_run

    run = f"run-{uuid.uuid4().hex[:8]}"
    parent = open_pipeline_run("latent-gpt-custom-vqvae", run)
    assert ended("tokens", run=run) == 0
    assert mlflow_client().get_run(parent).info.status == "RUNNING", "the steps after it are still to come"
    assert ended("tokens", error, run) != 0
    found = mlflow_client().get_run(parent)
    assert found.info.status == "FAILED"
    assert found.data.tags[FAILURE_TAG] == (
        "tokens: bad input" if isinstance(error, UserError) else "tokens: RuntimeError: oh"
    )
    assert open_pipeline_run("latent-gpt-custom-vqvae", run) == parent
    found = mlflow_client().get_run(parent)
    assert (found.info.status, found.data.tags.get(FAILURE_TAG)) == ("RUNNING", None), "it goes on"


def tell(number: int = signal.SIGTERM) -> None:
    """A signal to this process, which is then in the middle of something."""
    os.kill(os.getpid(), number)
    time.sleep(5)


@pytest.mark.slow
def test_a_step_that_is_told_to_end_leaves_no_run_running(services: dict[str, str]) -> None:
    from model.plumbing.jobs import TrackingIds
    from model.plumbing.tracking import Tracker, mlflow_client, open_pipeline_run

    run = f"run-{uuid.uuid4().hex[:8]}"
    parent = open_pipeline_run("latent-gpt-custom-vqvae", run)
    child = Tracker(TrackingIds(experiment="latent-gpt-custom-vqvae", run=run, step="tokens")).run_id
    other = Tracker(TrackingIds(experiment="latent-gpt-custom-vqvae", run=run, step="text")).run_id
    with pytest.raises(SystemExit) as end, step("tokens", run):
        tell()
    assert end.value.code == 143
    status = {one: mlflow_client().get_run(one).info.status for one in (parent, child, other)}
    assert status == {parent: "KILLED", child: "KILLED", other: "RUNNING"}, "another step's is its own"


def test_told_to_end_the_first_act_comes_first_and_the_block_is_left_as_by_an_exception(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, done = signal.getsignal(signal.SIGTERM), []

    def first() -> None:
        done.append("first")
        raise OSError("whatever happens in it")

    def work() -> None:
        try:
            tell()
        except Exception:  # what swallows exceptions, as botocore does, does not swallow this
            done.append("swallowed")
        finally:
            done.append("left")

    with pytest.raises(SystemExit) as end, told_to_end(first):
        work()
    assert end.value.code == 143
    assert done == ["first", "left"]
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyboardInterrupt), told_to_end(first):
        tell(signal.SIGINT)


@pytest.mark.slow
def test_a_run_that_was_given_up_is_killed_and_goes_on_with_its_next_step(
    services: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from model.plumbing import tracking
    from model.plumbing.jobs import TrackingIds

    monkeypatch.setattr(leases, "LIVE", 2.0)
    monkeypatch.setattr(leases, "RENEWAL", 0.5)
    client = tracking.mlflow_client()
    given_up, finished, at_work, elsewhere = (f"run-{uuid.uuid4().hex[:8]}" for _ in range(4))
    parents = {}
    for run in (given_up, finished, at_work, elsewhere):
        parents[run] = tracking.open_pipeline_run("latent-gpt-custom-vqvae", run)
        if run != elsewhere:  # a run of another store on the same MLflow
            with pytest.raises(SystemExit), step("tokens", run):
                raise SystemExit  # as on SIGTERM
    child = tracking.Tracker(TrackingIds(experiment="vqvae-training", run=given_up, step="tokenizer")).run_id
    tracking.finish_pipeline_run(finished)
    with step("tokens", at_work):
        time.sleep(3.5)
        capsys.readouterr()
        end_given_up_runs("prepare")
        said = f"prepare | run {given_up} had been given up and is KILLED now in MLflow\n"
        assert capsys.readouterr().out == said
    end_given_up_runs("prepare")
    assert said not in capsys.readouterr().out

    def status(run_id: str) -> str:
        return str(client.get_run(run_id).info.status)

    assert [status(parents[run]) for run in parents] == ["KILLED", "FINISHED", "RUNNING", "RUNNING"]
    assert status(child) == "KILLED"
    assert client.get_run(child).data.tags[tracking.FAILURE_TAG] == tracking.GIVEN_UP
    with step("tokens", given_up):
        assert status(parents[given_up]) == "RUNNING"
        assert tracking.FAILURE_TAG not in client.get_run(parents[given_up]).data.tags
        assert status(child) == "KILLED", "its own step opens it again"
    with step("tokens", finished):
        assert status(parents[finished]) == "FINISHED"


def test_runs_that_were_given_up_are_nothing_to_fail_for(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setattr(leases, "LIVE", 0.0)
    with suppress(SystemExit), step("tokens", "smoke-1"):
        raise SystemExit
    capsys.readouterr()
    end_given_up_runs("prepare")
    said = "prepare | warning: runs that were given up are not ended in MLflow: MLflow at http://127.0.0.1:1"
    assert capsys.readouterr().out.startswith(said)
    assert leases.given_up() == ["smoke-1"], "the next one tries again"


def test_mlflow_that_went_away_does_not_hide_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert ended("tokens", UserError("bad input"), "some-run") == 2
    said = capsys.readouterr().out.splitlines()
    assert "error: bad input" in said
    assert said[-1].startswith("tokens | warning: MLflow at http://127.0.0.1:1 cannot be reached")
