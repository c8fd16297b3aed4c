"""Run a job and return its asset: by processes of this machine, or by whatever this machine is set to use.

A backend knows processes, logs and exit codes, and nothing of nets. Whether an asset is made, its manifest
alone says; how a job ended that made none, an `Outcome`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

from model.errors import UserError
from model.plumbing import assets, environment, speech, tracking
from model.plumbing.assets import Manifest
from model.plumbing.jobs import JobSpec
from model.plumbing.outcome import Outcome

MODULES = {
    "torchrun": "components.launch.torchrun",
    "pytorchjob": "components.launch.pytorchjob",
    "slurm": "components.launch.slurm",
}


class Backend(Protocol):
    """A module that runs jobs."""

    run: Callable[[JobSpec], Outcome]
    """Run `python -m <spec.module> <URI of the spec>` on every process of the job; return how it ended.

    Rank 0 speaks on our stdout. Work that another launch does already is waited for. A job is repeatable: the
    next one resumes from the checkpoints of what was left unfinished. What ends this process ends the job.
    """


def launch(spec: JobSpec) -> Manifest:
    """Make the asset of a spec, or find it made.

    Raises:
        UserError: what a worker found wrong with its input, in the worker's own line.
        JobFailed: any other end without a complete asset.
    """
    _note(spec)
    if made := assets.find(spec.output):
        speech.reused(spec.name, made.uri)
        return made
    end = backend().run(spec)
    if made := assets.find(spec.output):
        if not end.well:  # complete all the same: it was the last thing to be written
            speech.warn(spec.name, end.reason)
        return made
    if end.well:
        end = Outcome(kind="failed", reason=f"all processes ended well, but {spec.output} has no manifest")
    raise end.error()


def _note(spec: JobSpec) -> None:
    """Leave in MLflow where the logs are found when the pods are gone; see `pipelines/logs.py`."""
    if spec.tracking.run and environment.MLFLOW_TRACKING_URI.get():
        try:
            tracking.note_asset(spec.tracking.run, spec.name, spec.output)
        except UserError as error:
            speech.warn(spec.name, str(error))


def backend() -> Backend:
    """The backend that this machine is set to use."""
    name = environment.LAUNCHER.get()
    if name not in MODULES:
        raise UserError(f"{environment.LAUNCHER.name} is '{name}'; there is {', '.join(MODULES)}")
    module: Backend = import_module(MODULES[name])
    return module
