"""What a job's processes are told: one JSON file beside the set they are to make.

A worker is `python -m model.<module> <spec uri>`; it needs nothing else but the environment.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, ValidationError

from model.config import RunConfig
from model.errors import UserError
from model.plumbing import storage

SPEC = "job.json"


class TrackingIds(BaseModel):
    """Where a job's curves belong in MLflow."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: str
    run: str  # the pipeline run, found by tag
    step: str  # the child run below it, found by tag


class JobSpec(BaseModel):
    """One job: what to run, on what, and where its set goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str  # e.g. "model.training.transformer"
    config: RunConfig
    inputs: dict[str, str]  # name: URI of a complete set
    output: str  # URI of the set to be made
    tracking: TrackingIds
    options: dict[str, str] = {}  # what is particular to the module, e.g. role: text

    @property
    def name(self) -> str:
        """Of the step, for logs."""
        return self.tracking.step

    @property
    def checkpoints(self) -> str:
        """URI below which the job's checkpoints live until its set is complete."""
        return storage.join(self.output, "checkpoints")


def write_spec(spec: JobSpec) -> str:
    """Store a spec beside its output; returns the spec's URI."""
    uri = storage.join(spec.output, SPEC)
    storage.write_bytes(uri, spec.model_dump_json(indent=2).encode())
    return uri


def read_spec(uri: str) -> JobSpec:
    """The spec stored at `uri`."""
    try:
        return JobSpec.model_validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        what = " ".join(str(error).split())[:300]
        raise UserError(f"{uri} is not a job spec of this version: {what}") from None


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel for a signal when the parent dies, however it dies."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), number)


def run_worker(main: Callable[[JobSpec], object]) -> None:
    """Entry point of a worker: read the spec named on the command line, set up logging, call `main`.

    A `UserError` ends in one line, `error: …`, and status 2; anything else in a trace and status 1.
    """
    rank = int(os.environ.get("RANK", "0"))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun puts its workers into sessions of their own
        die_with_parent()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stdout,
    )
    for chatty in ("botocore", "boto3", "s3transfer", "urllib3", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        if len(sys.argv) != 2:
            raise UserError(f"usage: python -m {main.__module__} SPEC_URI")
        main(read_spec(sys.argv[1]))
    except UserError as error:
        if os.environ.get("LATENT_GPT_DEBUG"):
            traceback.print_exc()
        print(f"error: {error}", flush=True)
        sys.exit(2)
