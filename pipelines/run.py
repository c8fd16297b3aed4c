"""The DAG on this machine: services, `kfp.local` in a process of its own, and lines a person can follow.

`run` starts what is not configured, then `python -m pipelines.run` as a session of its own. That child runs
the very object that compiles for a cluster; everything it prints goes to the run's log, and the lines that
steps speak (`model.plumbing.speech`) go to the terminal too. Stopping ends the whole session. Why a step
failed it says in an outcome, in the run's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from components.parameters import pipeline_of
from model import steps
from model.config import load_config
from model.data.sources import recognise
from model.errors import UserError
from model.plumbing import environment, outcome
from model.plumbing.processes import session, stopping_on_sigterm, tie_to_parent
from pipelines.terminal import Follower, summary

ROOT = Path(__file__).resolve().parent.parent


def state_folder() -> Path:
    """Where services keep their data and runs their logs: in the clone, or where LATENT_GPT_STATE says."""
    if configured := environment.STATE.get():
        return Path(configured).expanduser().resolve()
    base = ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()
    return base / ".latent-gpt"


def run(preset: str, overrides: tuple[str, ...], data: str = "") -> None:
    """Run the pipeline of a config to its end on this machine, and say what came of it.

    Args:
        preset: name of a shipped one, or a YAML file.
        overrides: settings that win over it.
        data: other pictures, as `model.data.sources.recognise` takes them.

    Raises:
        UserError: what is wrong with the input, from here or from any step.
    """
    config = load_config(preset, overrides, recognise(data))
    if preset.endswith((".yaml", ".yml")):
        preset = str(Path(preset).resolve())
    from components.preflight import check_state
    from pipelines.embedded.services import services

    state = state_folder()
    check_state(state)
    folder = _new_folder(state / "runs")
    began = time.monotonic()
    with stopping_on_sigterm(), services(state) as found:
        follower = Follower(steps.names(config))
        told = {
            environment.LOGS.name: str(folder / "jobs"),
            environment.OUTCOMES.name: str(folder / "outcomes"),
            **environment.imports_as_we_do(),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(_made(folder / "tmp")),  # kfp leaves a folder behind for every step
        }
        parameters = {"preset": preset, "data": data, "overrides": "\n".join(overrides)}
        command = [sys.executable, "-m", "pipelines.run", str(folder), pipeline_of(config)]
        command.append(json.dumps(parameters))
        with (
            (folder / "log.txt").open("w") as log,
            session(command, environment.of_a_child(found, told)) as child,
        ):
            assert child.stdout
            for line in child.stdout:
                log.write(line)
                follower.line(line)
            status = child.wait()
        follower.end_line()
        if status:
            raise UserError(_why(follower, folder, status))
        if missing := [name for name in follower.steps if name not in follower.seconds]:
            raise RuntimeError(f"the pipeline ended without {', '.join(missing)}; see {folder}/log.txt")
    print(summary(follower, folder, time.monotonic() - began, _registered(folder)))


def _why(follower: Follower, folder: Path, status: int) -> str:
    """Why a run stopped: as its step says, or else in the last words that anybody left."""
    for name, end in outcome.left_in(str(folder / "outcomes")).items():
        if not end.well:
            return end.told_of(name) + ("" if end.expected else f"; see {folder}/log.txt")
    who = follower.running or "the pipeline"
    last = f": {follower.last}" if follower.last else ""
    return f"{who} stopped (status {status}){last}; see {folder}/log.txt"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _new_folder(runs: Path) -> Path:
    """A fresh folder for this run's log and KFP's files; runs beside each other get different ones."""
    name = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        with contextlib.suppress(FileExistsError):
            (runs / (name + suffix)).mkdir(parents=True)
            return runs / (name + suffix)
    raise RuntimeError(f"{runs} has too many runs of this second")


def _registered(folder: Path) -> dict[str, Any] | None:
    """What the register step returned; the report is copied out of KFP's folder on the way."""
    for output in folder.glob("kfp/*/register/executor_output.json"):
        for report in folder.glob("kfp/*/evaluation/report*"):
            shutil.copyfile(report, folder / "report.html")
        value: dict[str, Any] = json.loads(json.loads(output.read_text())["parameterValues"]["Output"])
        return value
    return None


def _run_dag(folder: Path, pipeline: str, parameters: dict[str, str]) -> None:
    """The child: run a pipeline with kfp.local."""
    signal.signal(signal.SIGUSR1, lambda *_: os.killpg(0, signal.SIGTERM))
    tie_to_parent(signal.SIGUSR1)  # and take along the step that runs
    from kfp import local

    from pipelines.dag import PIPELINES

    sys.executable = shlex.quote(sys.executable)  # kfp.local puts it into shell scripts as it is
    # kfp.local deletes the workspace after the run: it gets a folder of its own.
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(folder / "kfp"),
        workspace_root=str(folder / "workspace"),
    )
    try:
        PIPELINES[pipeline](**parameters)
    except RuntimeError as error:  # a failed step, which has said why
        print(error)
        sys.exit(1)


if __name__ == "__main__":
    _run_dag(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
