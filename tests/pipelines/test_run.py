"""The local runner's parts: folders, and why a run stopped."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from model.errors import UserError
from model.plumbing import outcome
from model.plumbing.outcome import JobFailed, Outcome
from pipelines.run import _new_folder, _why, state_folder
from pipelines.terminal import Follower
from tests import ROOT


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    assert len({_new_folder(tmp_path) for _ in range(3)}) == 3


def test_the_state_folder_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_STATE", str(tmp_path / "elsewhere"))
    assert state_folder() == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (UserError("no captions in /x"), "no captions in /x"),
        (KeyError("psnr"), "tokenizer failed: KeyError: 'psnr'; see {folder}/log.txt"),
        (
            JobFailed(Outcome(kind="killed", reason="process 1 was killed", last_lines=("error: not this",))),
            "tokenizer failed: process 1 was killed; see {folder}/log.txt",
        ),
    ],
)
def test_a_run_stops_for_the_reason_that_its_step_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, why: str
) -> None:
    monkeypatch.setenv("LATENT_GPT_OUTCOMES", str(tmp_path / "outcomes"))
    with outcome.recorded("prepare"):
        pass
    with pytest.raises(type(error)), outcome.recorded("tokenizer"):
        raise error
    follower = Follower([], under_way=["tokenizer"], last="error: what a library said")
    assert _why(follower, tmp_path, 1) == why.format(folder=tmp_path)


@pytest.mark.parametrize(
    ("running", "last", "why"),
    [
        ("tokenizer", "Killed", "tokenizer stopped (status 1): Killed; see {folder}/log.txt"),
        ("", "sh: /a: not found", "the pipeline stopped (status 1): sh: /a: not found; see {folder}/log.txt"),
        ("", "", "the pipeline stopped (status 1); see {folder}/log.txt"),
    ],
)
def test_where_no_step_says_why_the_last_line_of_the_log_does(
    tmp_path: Path, running: str, last: str, why: str
) -> None:
    assert _why(Follower([], under_way=[running] if running else [], last=last), tmp_path, 1) == why.format(
        folder=tmp_path
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "why"),
    [
        (
            "model.training.vqvae",
            r"tokenizer failed: process \d was killed \(SIGKILL; most often the machine",
        ),
        ("kfp.dsl.executor_main", r"tokenizer stopped \(status 1\): "),
    ],
    ids=["a process of its job", "the step itself"],
)
def test_a_run_whose_step_is_killed_says_so(
    tmp_path: Path, services: dict[str, str], victim: str, why: str
) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "run", "--preset", "smoke", "--set", "transformer=null"]
    command += ["--set", "tokenizer.training.steps=100000"]
    environment = {**os.environ, **services, "LATENT_GPT_STATE": str(tmp_path / "state")}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout
        assert run.stderr
        for line in run.stdout:
            if re.search(r"step \d+/100000", line):
                break
        os.kill(process(victim, of=tmp_path), signal.SIGKILL)
        (said,) = run.stderr.read().splitlines()
        assert run.wait(60) == 2
    assert re.match(f"error: {why}", said)
    assert f"; see {tmp_path}/state/runs/" in said


def process(module: str, of: Path) -> int:
    """The process that runs a module for a state folder; the last that was started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            told = (folder / "environ").read_bytes()
            if module.encode() in (folder / "cmdline").read_bytes().split(b"\0") and str(of).encode() in told:
                found.append(int(folder.name))
    return max(found)
