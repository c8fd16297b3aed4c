"""What every step does around its one call: say when it starts and ends, and why it failed."""

from __future__ import annotations

import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from model.errors import UserError
from model.plumbing import environment, leases, outcome, speech
from model.plumbing.outcome import EXIT_CODES

IMAGE = environment.IMAGE.default  # of every step, until `pipelines.compile` puts in the real one
MESSAGE = 1000  # characters of a reason that MLflow keeps as a tag


@contextmanager
def step(name: str, run: str = "") -> Iterator[None]:
    """Report a step's start, end and failure; a failure leaves with a non-zero status.

    A `UserError` comes out as its one line. Anything else is a defect: its trace goes to the step's log,
    and the line says so. The reason is left as an outcome too, and as the container's termination message;
    MLflow's run of the pipeline, if it is named, has failed with it.
    """
    began = time.monotonic()
    speech.started(name)
    try:
        with told_to_end(), leases.carried(name, run) as anew, outcome.recorded(name):
            if anew:
                _reopen(name, run)
            if run and environment.MLFLOW_RUN_ID.get():
                _attach(name, run)
            yield
    except SystemExit as told:
        if run and told.code == EXIT_CODES["stopped"]:
            record(name, run, "KILLED", "told to end")
        raise
    except Exception as error:
        end = outcome.of(error)
        if not end.expected or environment.DEBUG.get():
            traceback.print_exc()
        reason = end.told_of(name)
        print(f"error: {reason}", flush=True)
        outcome.tell_container(reason)
        if run:
            record(name, run, "FAILED", end.reason)
        sys.exit(2 if end.expected else 1)
    speech.done(name, time.monotonic() - began)


def end_given_up_runs(name: str) -> None:
    """End in MLflow, as KILLED, the runs of this store that no step carries any more.

    Others' runs are nothing to fail for: what does not go is said by the step `name`.
    """
    from model.plumbing.tracking import kill_pipeline_run

    try:
        for run in leases.given_up():
            if kill_pipeline_run(run):
                speech.say(name, f"run {run} had been given up and is KILLED now in MLflow")
            leases.forget(run)
    except UserError as error:
        speech.warn(name, f"runs that were given up are not ended in MLflow: {error}")


def _reopen(name: str, run: str) -> None:
    from model.plumbing.tracking import reopen_pipeline_run

    try:
        reopen_pipeline_run(run)
    except UserError as error:  # what matters is said by whoever needs MLflow
        speech.warn(name, str(error))


def _attach(name: str, run: str) -> None:
    from model.plumbing.tracking import attach

    try:
        attach(run, name)
    except UserError as error:
        speech.warn(name, str(error))


def record(name: str, run: str, status: str, reason: str) -> None:
    """Say in MLflow how the run of a pipeline ended at a step, and why; MLflow that is away is warned of."""
    from model.plumbing.tracking import FAILURE_TAG, finish_pipeline_run

    try:
        finish_pipeline_run(run, status, {FAILURE_TAG: f"{name}: {reason}"[:MESSAGE]}, step=name)
    except UserError as error:  # the reason of the failure itself is said already, and matters more
        speech.warn(name, str(error))


@contextmanager
def told_to_end(first: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Within the block SIGTERM does `first` before all else, and then ends the process as an exception would.

    KFP's Terminate leaves a step some tenths of a second.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def told(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with suppress(Exception):
            first()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(EXIT_CODES["stopped"])

    before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
