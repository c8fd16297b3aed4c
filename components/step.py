"""What every step does around its one call: say when it starts and ends, and why it failed.

The lines are for people and for the local runner alike: `NAME  text`, two spaces after a step's name.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import UserError

if TYPE_CHECKING:
    from model.plumbing.manifests import Manifest

IMAGE = os.environ.get("LATENT_GPT_IMAGE", "latent-gpt:dev")  # of every step; by digest on a cluster


def say(name: str, text: str) -> None:
    """Print a line of a step's progress."""
    print(f"{name}  {text}", flush=True)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Report a step's start, end and failure; a failure leaves with a non-zero status.

    A `UserError` comes out as its one line. Anything else is a defect: its trace goes to the step's log,
    and the line says so.
    """
    started = time.monotonic()
    say(name, "started")
    try:
        yield
    except UserError as error:
        if os.environ.get("LATENT_GPT_DEBUG"):
            traceback.print_exc()
        print(f"error: {error}", flush=True)
        sys.exit(2)
    except Exception as error:
        traceback.print_exc()
        what = str(error).partition("\n")[0]
        print(f"error: {name} failed: {type(error).__name__}: {what}", flush=True)
        sys.exit(1)
    say(name, f"done in {time.monotonic() - started:.1f} s")


def write(manifest: Manifest, artifact: Any) -> None:
    """Make a KFP artifact stand for a set: its file is the manifest, its metadata what the UI shows."""
    Path(artifact.path).write_text(manifest.model_dump_json(indent=2))
    artifact.metadata["set"] = manifest.uri
    for name, value in manifest.info.items():
        if isinstance(value, int | float | str):
            artifact.metadata[name] = value


def read(artifact: Any) -> Manifest:
    """The set that a KFP artifact stands for."""
    from model.plumbing.manifests import Manifest

    return Manifest.model_validate_json(Path(artifact.path).read_text())
