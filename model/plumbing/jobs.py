"""What a job's processes are told: one JSON file beside the asset they are to make.

A worker is `python -m <module> <spec uri>` (see `worker.py`); it needs nothing else but the environment.
"""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from model.config import JobConfig, RunConfig
from model.errors import UserError
from model.plumbing import storage
from model.plumbing.assets import Input, Kind, asset_key, place


class TrackingIds(BaseModel):
    """Where a job's curves belong in MLflow."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: str
    run: str  # the pipeline run, found by tag; "": there is none, and nothing is tracked
    step: str  # the child run below it, found by tag


class JobSpec(BaseModel):
    """One job: what to make from what, and on how many processes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind  # of the asset to be made
    version: int = 1  # of the step
    module: str  # e.g. "model.training.transformer"
    config: RunConfig
    settings: dict[str, Any]  # those that decide the asset's content
    inputs: dict[str, Input]
    jobs: JobConfig = JobConfig()
    tracking: TrackingIds

    @property
    def name(self) -> str:
        """Of the step, for logs."""
        return self.tracking.step

    @property
    def output(self) -> str:
        """URI of the asset: it follows from what goes in, here and in the worker."""
        return place(self.kind, asset_key(self.kind, self.settings, self.inputs, self.version))

    @property
    def checkpoints(self) -> str:
        """URI below which the job's checkpoints live until its asset is complete."""
        return storage.join(self.output, "checkpoints")

    @property
    def leases(self) -> str:
        """URI below which those who want the job's asset say so: see `leases.py`."""
        return storage.join(self.output, "leases")


def write_spec(spec: JobSpec) -> str:
    """Store a spec beside its output; returns the spec's URI.

    Another spec has another URI: of two launches that make the same asset at once, each on its own
    resources, the one whose job is made wrote what that job reads.
    """
    text = spec.model_dump_json(indent=2).encode()
    uri = storage.join(spec.output, f"job-{hashlib.sha256(text).hexdigest()[:8]}.json")
    storage.write_bytes(uri, text)
    return uri


def read_spec(uri: str) -> JobSpec:
    """The spec stored at `uri`."""
    try:
        return JobSpec.model_validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        what = " ".join(str(error).split())[:300]
        raise UserError(f"{uri} is not a job spec of this version: {what}") from None
