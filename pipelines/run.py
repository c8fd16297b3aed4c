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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.parameters import RETRAINING, pipeline_of
from components.retraining import NOTHING
from model import steps
from model.config import load_config
from model.data.sources import recognise
from model.errors import UserError
from model.plumbing import environment, outcome
from model.plumbing.processes import session, stopping_on_sigterm, tie_to_parent
from pipelines.logs import ENDED
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
    data = absolute(data)
    config = load_config(preset, overrides, recognise(data, look=False))  # its S3 may not have started yet
    parameters = {"preset": _absolute(preset), "data": data, "overrides": "\n".join(overrides)}
    _run(pipeline_of(config), parameters, steps.names(config))


def retrain(preset: str, model: str, data: str, start: str, overrides: tuple[str, ...]) -> None:
    """Train anew on this machine where there is anything new to learn, and say what came of it.

    Args:
        preset: of the first model; what comes after it starts from the champion's settings.
        model: name of the registered model; "": that of the preset.
        data: other pictures than the champion's, as in `run`.
        start: weights that the transformer begins from, as `retrain.start`; "": as the config says.
        overrides: settings that win over all others.

    Raises:
        UserError: what is wrong with the input, from here or from any step.
    """
    data = absolute(data)
    parameters = {"preset": _absolute(preset), "model": model, "data": data, "start": start}
    parameters["overrides"] = "\n".join(overrides)
    config = load_config(preset, overrides, recognise(data, look=False))
    _run(RETRAINING, parameters, ["news", *steps.names(config)])


def absolute(data: str) -> str:
    """Data of this machine by its whole path: a model is known by where its pictures are."""
    path = os.path.expanduser(data.strip())
    return os.path.abspath(path) if path and os.path.exists(path) else data


def _absolute(preset: str) -> str:
    return str(Path(preset).resolve()) if preset.endswith((".yaml", ".yml")) else preset


def _run(pipeline: str, parameters: dict[str, str], names: list[str]) -> None:
    """Run a pipeline, whose steps have these names where all of them are run."""
    from components.preflight import check_state
    from pipelines.embedded.services import services

    state = state_folder()
    check_state(state)
    folder = _new_folder(state / "runs")
    began = time.monotonic()
    with _ending(folder), stopping_on_sigterm(), services(state) as found:
        follower = Follower(names)
        told = {
            environment.LOGS.name: str(folder / "jobs"),
            environment.OUTCOMES.name: str(folder / "outcomes"),
            **environment.imports_as_we_do(),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(_made(folder / "tmp")),  # kfp leaves a folder behind for every step
        }
        command = [sys.executable, "-m", "pipelines.run", str(folder), pipeline, json.dumps(parameters)]
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
        if _output(folder, "news") == NOTHING:
            follower.steps = ["news"]
        if missing := [name for name in follower.steps if name not in follower.seconds]:
            raise RuntimeError(f"the pipeline ended without {', '.join(missing)}; see {folder}/log.txt")
    print(summary(follower, folder, time.monotonic() - began, _registered(folder)))


@contextlib.contextmanager
def _ending(folder: Path) -> Iterator[None]:
    """Leave a mark when a run is over, whichever step was its last: who reads its logs waits no longer."""
    try:
        yield
    finally:
        (folder / ENDED).touch()


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
    returned = _output(folder, "register")
    for report in folder.glob("kfp/*/register/report*") if returned else ():
        shutil.copyfile(report, folder / "report.html")
    value: dict[str, Any] | None = json.loads(returned) if returned else None
    return value


def _output(folder: Path, step: str) -> str:
    """What a step returned; "": it was not run."""
    for output in folder.glob(f"kfp/*/{step}/executor_output.json"):
        return str(json.loads(output.read_text())["parameterValues"]["Output"])
    return ""


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
