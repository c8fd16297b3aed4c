"""Jobs on real processes: success, every way to fail, and stopping."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.launch import launch
from model.config import JobConfig, load_config
from model.errors import UserError
from model.plumbing.jobs import JobSpec, TrackingIds
from model.plumbing.outcome import JobFailed
from tests import ROOT
from tests.sockets import LOOPBACK, listening

pytestmark = pytest.mark.slow

JOB = """
import os, sys, time
from model.errors import Stopped, UserError
from model.plumbing import tracking, worker

def main(job: worker.Job) -> None:
    toy = job.spec.settings
    rank, end = job.processes.rank, toy["end"]
    print(f"toy | rank {rank} of {os.environ['WORLD_SIZE']} on {os.environ['OMP_NUM_THREADS']} threads")
    open(f"{toy['folder']}/pid-{rank}", "w").write(str(os.getpid()))
    if end == "sleep":
        time.sleep(60)
    if rank == 1 and end == "user error":
        raise UserError("batch_size 7 is odd; make it even")
    if end == "stopped":
        raise Stopped("its time is up, at step 3")
    if rank == 1 and end == "exit":
        print("the last words")
        sys.exit(3)
    if rank == 1 and end == "defect":
        raise ZeroDivisionError("by zero")
    if rank == 1 and end == "kill":
        print("error: could not open /dev/foo, falling back", flush=True)  # what a library might print
        os.kill(os.getpid(), 9)
    if rank == 0 and end.startswith("well"):
        job.output.add_bytes("a.txt", b"a")
        job.output.finish({})
    job.processes.barrier()  # who waits here for one that has ended loses it
    if end == "well, then killed":
        os.kill(os.getpid(), 9)

if __name__ == "__main__":
    worker.Tracker = lambda ids, params, enabled: tracking.Tracker(ids, params, False)
    worker.run_worker(main)
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy_job.py").write_text(JOB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("LATENT_GPT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("LATENT_GPT_LOGS", str(tmp_path / "logs"))
    return tmp_path


def spec(folder: Path, end: str) -> JobSpec:
    return JobSpec(
        kind="tokenizer",
        module="toy_job",
        config=load_config("smoke"),
        settings={"end": end, "folder": str(folder)},
        inputs={},
        jobs=JobConfig(processes_per_worker=2),
        tracking=TrackingIds(experiment="e", run="r", step="toy"),
    )


def test_a_job_runs_on_its_processes_and_returns_its_asset(
    store: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = launch(spec(store, "well"))
    assert [file.name for file in made.files] == ["a.txt"]
    shown = capfd.readouterr().out
    assert "toy | rank 0 of 2" in shown
    assert "rank 1 of 2" not in shown, "only rank 0 speaks"
    logs = [path.read_text() for path in (store / "logs").rglob("stdout.log")]
    assert sorted(line.split(" on ")[0] for log in logs for line in log.splitlines()) == [
        "rank 1 of 2,",  # says the worker, of those that nobody hears
        "toy | rank 0 of 2",
        "toy | rank 1 of 2",
    ]
    (store / "pid-0").unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert launch(spec(store, "well")) == made
    shown = capfd.readouterr().out
    assert "toy | reused" in shown
    assert "toy | warning: MLflow at http://127.0.0.1:1 cannot be reached" in shown, "and that is all"
    assert not (store / "pid-0").exists(), "an asset that is there is not made again"


def test_a_workers_user_error_arrives_as_it_was_said(store: Path) -> None:
    with pytest.raises(UserError, match=r"^batch_size 7 is odd; make it even$"):
        launch(spec(store, "user error"))


def test_an_exit_code_comes_with_rank_and_last_lines(store: Path) -> None:
    with pytest.raises(JobFailed, match=r"process 1 failed: it left with exit code 3(.|\n)*the last words"):
        launch(spec(store, "exit"))


def test_a_defect_is_named_and_its_trace_is_at_hand(store: Path) -> None:
    with pytest.raises(JobFailed) as caught:
        launch(spec(store, "defect"))
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("process 1 failed: ZeroDivisionError: by zero; its log is under ")
    assert rest[-1] == "ZeroDivisionError: by zero"


def test_a_process_that_was_killed_was_killed_whatever_its_log_says(store: Path) -> None:
    with pytest.raises(JobFailed, match=r"^process 1 was killed \(SIGKILL; most often the machine ran out"):
        launch(spec(store, "kill"))


def test_an_asset_that_is_complete_is_made_however_the_job_ended(
    store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = launch(spec(store, "well, then killed"))
    assert [file.name for file in made.files] == ["a.txt"]
    assert "toy | warning: process 0 was killed" in capfd.readouterr().out


def test_an_older_outcome_is_not_taken_for_this_one(store: Path) -> None:
    with pytest.raises(UserError):
        launch(spec(store, "user error"))
    (old,) = (store / "logs").glob("toy-*/outcomes/1.json")
    with pytest.raises(JobFailed, match=r"^process 1 was killed"):
        launch(spec(store, "kill"))
    assert old.exists()


def test_a_job_that_ends_well_without_its_asset_has_failed(store: Path) -> None:
    with pytest.raises(JobFailed, match="has no manifest"):
        launch(spec(store, "nothing made"))


def test_what_else_is_in_the_environment_chooses_no_launcher(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # a notebook in a pod
    launch(spec(store, "well"))


def test_whoever_listens_for_signals_listens_after_a_job_as_before(store: Path) -> None:
    """Torch has its own handlers, whose exception botocore would take for an answer that did not come."""
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    launch(spec(store, "well"))
    assert {one: signal.getsignal(one) for one in before} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_workers_who_listened_on_loopback_alone(
    store: Path, number: signal.Signals
) -> None:
    code = (
        "import sys; from model.plumbing.jobs import JobSpec;"
        "from components.launch import launch;"
        "launch(JobSpec.model_validate_json(sys.argv[1]))"
    )
    text = spec(store, "sleep").model_dump_json()
    with subprocess.Popen([sys.executable, "-c", code, text], cwd=ROOT) as launcher:
        marks = [store / "pid-0", store / "pid-1"]
        until = time.monotonic() + 60
        while not all(mark.exists() and mark.read_text() for mark in marks) and time.monotonic() < until:
            time.sleep(0.1)
        workers = [int(mark.read_text()) for mark in marks]
        assert listening([launcher.pid]) == ({}, []), "torchrun unpickles what anybody puts into its store"
        assert set(listening(workers)[0].values()) == {LOOPBACK}
        launcher.send_signal(number)
        status = launcher.wait(60)
        assert status == (143 if number == signal.SIGTERM else -signal.SIGINT)
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


def test_two_launches_of_the_same_work_side_by_side_do_it_once(store: Path) -> None:
    code = (
        "import sys; from model.plumbing.jobs import JobSpec;"
        "from components.launch import launch;"
        "launch(JobSpec.model_validate_json(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, spec(store, "well").model_dump_json()]
    environment = {**os.environ, "LATENT_GPT_CACHE": str(store / "cache")}
    both = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = sorted(process.communicate(timeout=120)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert [text.count("toy | rank 0 of 2") for text in said] in ([0, 1], [1, 0])
    assert sum(text.count("toy | reused") for text in said) == 1


def test_a_launcher_that_is_not_there_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_LAUNCHER", "flux")
    with pytest.raises(
        UserError, match=r"^LATENT_GPT_LAUNCHER is 'flux'; there is torchrun, pytorchjob, slurm$"
    ):
        launch(spec(store, "well"))
