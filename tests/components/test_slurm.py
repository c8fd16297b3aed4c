"""Jobs by srun: its place is taken by one that starts tasks here, as real processes of the real entry."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.launch import launch
from components.launch.slurm import judged, srun
from model.config import JobConfig, load_config
from model.errors import UserError
from model.plumbing import attempts
from model.plumbing.attempts import Attempt
from model.plumbing.jobs import JobSpec, TrackingIds
from model.plumbing.outcome import JobFailed, Kind, Outcome
from tests import ROOT
from tests.components.test_launch import JOB

SRUN = """#!/bin/sh
# Starts as many tasks as --ntasks says, and ends with the highest of their exit codes, as srun does.
echo "$@" >>"$CALLS"
while [ "${1#--}" != "$1" ]; do case $1 in --ntasks=*) tasks=${1#--ntasks=} ;; esac; shift; done
n=0; pids=
while [ $n -lt "$tasks" ]; do SLURM_PROCID=$n SLURMD_NODENAME=node1 "$@" & pids="$pids $!"; n=$((n + 1)); done
echo $pids >"$CALLS.pids"
trap 'echo srun was told to end >>"$CALLS"; kill -KILL $pids' TERM
worst=0
for pid in $pids; do wait $pid; code=$?; [ $code -le $worst ] || worst=$code; done
exit $worst
"""
SCANCEL = """#!/bin/sh
echo scancel "$@" >>"$CALLS"
kill -TERM $(cat "$CALLS.pids")
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An allocation; yields the file that lists what was called in it."""
    (tmp_path / "toy_job.py").write_text(JOB)
    for name, text in (("srun", SRUN), ("scancel", SCANCEL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    told = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "CALLS": str(tmp_path / "calls"),
        "LATENT_GPT_STORE": str(tmp_path / "store"),
        "LATENT_GPT_LAUNCHER": "slurm",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    return tmp_path / "calls"


def spec(folder: Path, end: str) -> JobSpec:
    return JobSpec(
        kind="tokenizer",
        module="toy_job",
        config=load_config("smoke"),
        settings={"end": end, "folder": str(folder)},
        inputs={},
        jobs=JobConfig(workers=2),
        tracking=TrackingIds(experiment="e", run="r", step="toy"),
    )


@pytest.mark.slow
def test_workers_meet_and_make_the_asset(calls: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = launch(spec(calls.parent, "well"))
    assert [file.name for file in made.files] == ["a.txt"]
    shown = capfd.readouterr().out
    assert "toy | rank 0 of 2" in shown
    assert "toy | rank 1 of 2" not in shown, "only rank 0 speaks"
    assert "--nodes=1 --ntasks=2 --ntasks-per-node=2 --relative=0" in calls.read_text()
    assert sorted((one.worker, one.pod) for one in attempts.attempts(made.uri)) == [
        (0, "node1"),
        (1, "node1"),
    ]
    assert launch(spec(calls.parent, "well")) == made
    assert len(calls.read_text().splitlines()) == 1, "what is there is not made again"


@pytest.mark.slow
def test_the_worker_that_is_to_blame_is_named(calls: Path) -> None:
    with pytest.raises(UserError, match=r"^batch_size 7 is odd; make it even$"):
        launch(spec(calls.parent, "user error"))
    with pytest.raises(JobFailed, match=r"process 1 .*exit code 3(.|\n)*the last words"):
        launch(spec(calls.parent, "exit"))


@pytest.mark.slow
def test_workers_whose_time_is_up_have_not_failed(calls: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        launch(spec(calls.parent, "stopped"))
    assert ended.value.code == 143


@pytest.mark.slow
def test_a_group_that_is_told_to_end_leaves_srun_its_time(calls: Path) -> None:
    """As `latent-gpt run` ends a step: SIGTERM to the whole group, at which the real srun kills its tasks."""
    code = f"""
import components.launch, components.step
from tests.components.test_slurm import spec
from pathlib import Path
with components.step.told_to_end():
    components.launch.launch(spec(Path({str(calls.parent)!r}), "sleep"))
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True) as child:
        until = time.monotonic() + 60
        pids = calls.parent / "pid-0"
        while not (pids.exists() and pids.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        pid = int(pids.read_text())
        os.killpg(child.pid, signal.SIGTERM)
        assert child.wait(60) == 143
    told = calls.read_text().splitlines()
    assert told[1:] == ["scancel --signal=TERM 7"], "srun itself was told by nobody"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_outside_of_an_allocation_it_says_where_the_script_comes_from(
    calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(UserError, match=r"this is no job of Slurm's; `latent-gpt slurm` makes the script"):
        launch(spec(calls.parent, "well"))


def test_workers_are_spread_over_nodes_evenly(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "48")
    command = srun(4, 2, "s3://a/job.json")
    assert {"--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=48"} <= set(command)
    assert "--nodes=1" in srun(1, 8, "s3://a/job.json"), "a job may be smaller than the allocation"
    with pytest.raises(UserError, match=r"^jobs.workers \(3\) cannot be spread evenly over 2 nodes"):
        srun(3, 2, "s3://a/job.json")


@pytest.mark.parametrize(
    ("kinds", "code", "judgement"),
    [
        ([], 0, "finished"),
        ([], 137, "failed"),  # nobody left a word
        (["lost", "killed"], 202, "killed"),
        (["lost", "killed", "refused"], 202, "refused"),
        (["stopped", "lost"], 200, "stopped"),
        (["finished", "failed"], 1, "failed"),
    ],
)
def test_the_first_cause_is_the_jobs_end(kinds: list[Kind], code: int, judgement: Kind) -> None:
    ended = [
        Attempt(worker=number, pod="node1", outcome=Outcome(kind=kind, when=number))
        for number, kind in enumerate(kinds)
    ]
    assert judged(ended, code).kind == judgement
