"""A worker: one process of a job, with all that the job names opened for it.

    python -m model.training.transformer SPEC_URI        (by torchrun, one process per device)

What a job may read and where it writes is what its spec names, and nothing else.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from model.config import RunConfig
from model.errors import Stopped, UserError
from model.plumbing import environment, outcome
from model.plumbing.assets import AssetWriter, Manifest, find
from model.plumbing.checkpoints import Checkpointer
from model.plumbing.distributed import Distributed, setup
from model.plumbing.jobs import JobSpec, read_spec
from model.plumbing.processes import tie_to_parent
from model.plumbing.speech import Progress
from model.plumbing.stopping import Stopping, unwrapped
from model.plumbing.tracking import Tracker


@dataclass(frozen=True)
class Job:
    """What a job's `main` gets."""

    spec: JobSpec
    inputs: dict[str, Manifest]
    output: AssetWriter  # at `spec.output`
    processes: Distributed
    tracker: Tracker  # off on every rank but one
    checkpoints: Checkpointer
    stopping: Stopping  # heeded at the end of each step of a loop

    @property
    def config(self) -> RunConfig:
        """Of the whole run."""
        return self.spec.config

    def progress(
        self, total: int, unit: str, per_count: float = 1.0, counted: str = "step", done: int = 0
    ) -> Progress:
        """Lines of how far the job is, from one rank; see `Progress`."""
        return Progress(self.spec.name, total, unit, per_count, counted, done, enabled=self.processes.is_main)


Main = Callable[[Job], Manifest | None]  # of a job's module: the manifest, or None on all ranks but one


@contextmanager
def open_job(spec: JobSpec, track: bool = True, stopping: Stopping | None = None) -> Iterator[Job]:
    """Open what a spec names, in this process.

    Args:
        spec: of the job.
        track: whether its curves go to MLflow.
        stopping: what may end it before its end; by default its leases alone, and no signal.

    Raises:
        UserError: an input is missing or is another one than was meant, or MLflow cannot be reached.
    """
    inputs = {name: one.load() for name, one in spec.inputs.items()}
    output = AssetWriter(spec.kind, spec.settings, inputs, spec.version)
    with (
        setup() as processes,
        Tracker(
            spec.tracking, spec.settings, bool(track and spec.tracking.run and processes.is_main)
        ) as tracker,
        (stopping or Stopping()).of(processes, spec.jobs.orphan_minutes) as heard,
        Checkpointer(spec.checkpoints) as checkpoints,
    ):
        tracker.reads(inputs.values(), spec.name)
        if not processes.is_main:  # whose log says all that follows
            print(f"rank {processes.rank} of {processes.world}, on {processes.device}", flush=True)
        with unwrapped():  # before the tracker learns how it ended
            yield Job(spec, inputs, output, processes, tracker, checkpoints, heard)


def run(spec: JobSpec, main: Main, track: bool = True, stopping: Stopping | None = None) -> Manifest | None:
    """Do the work of a spec, unless its asset is there; returns its manifest, or None on all ranks but one.

    Raises as `open_job`, and what `main` raises.
    """
    if found := find(spec.output):
        return found
    with open_job(spec, track, stopping) as job:
        return main(job)


def run_worker(main: Main) -> None:
    """Entry point of a worker: read the spec named on the command line, set up logging, open the job, run it.

    A `UserError` ends in one line, `error: …`, and status 2; being told to end in a line and the status of
    SIGTERM, or 0 if nobody wants the work; anything else in a trace and status 1. The launcher finds an
    outcome.
    """
    rank = environment.rank()
    if environment.under_torchrun():  # it puts its workers into sessions of their own
        tie_to_parent()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stdout,
    )
    for chatty in ("botocore", "boto3", "s3transfer", "urllib3", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        with outcome.recorded(str(rank)):
            stopping = Stopping().listen()
            if len(sys.argv) != 2:
                raise UserError(f"usage: python -m {main.__module__} SPEC_URI")
            run(read_spec(sys.argv[1]), main, stopping=stopping)
    except UserError as error:
        if environment.DEBUG.get():
            traceback.print_exc()
        print(f"error: {error}", flush=True)
        sys.exit(2)
    except Stopped as error:
        print(error, flush=True)
        sys.exit(outcome.EXIT_CODES[outcome.of(error).kind])
