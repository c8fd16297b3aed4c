"""What every step does around its one call: say when it starts and ends, and why it failed."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from model.errors import UserError
from model.plumbing import environment, outcome, speech

IMAGE = environment.IMAGE.get()  # of every step; by digest on a cluster


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
        with outcome.recorded(name):
            yield
    except Exception as error:
        end = outcome.of(error)
        if not end.expected or environment.DEBUG.get():
            traceback.print_exc()
        reason = end.told_of(name)
        print(f"error: {reason}", flush=True)
        outcome.tell_container(reason)
        if run:
            _record_failure(name, run)
        sys.exit(2 if end.expected else 1)
    speech.done(name, time.monotonic() - began)


def _record_failure(name: str, run: str) -> None:
    from model.plumbing.tracking import finish_pipeline_run

    try:
        finish_pipeline_run(run, "FAILED")
    except UserError as error:  # the reason of the failure itself is said already, and matters more
        speech.warn(name, str(error))
