"""The real command line in a process of its own, and what a refusal has to look like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import ROOT

SERVICES = ("S3_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "LATENT_GPT_STORE", "AWS_ACCESS_KEY_ID")


def environment(state: Path | None = None, **changes: str) -> dict[str, str]:
    """Ours without any services, so that the state folder's are used; then the changes."""
    plain = {name: value for name, value in os.environ.items() if name not in SERVICES}
    return plain | ({"LATENT_GPT_STATE": str(state)} if state else {}) | changes


def latent_gpt(
    *arguments: str, state: Path | None = None, before: tuple[str, ...] = (), **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run `latent-gpt` with these arguments to its end; `before` is a command in front of it."""
    return subprocess.run(
        [*before, sys.executable, "-m", "pipelines.cli", *arguments],
        cwd=ROOT,
        env=environment(state, **changes),
        capture_output=True,
        text=True,
        timeout=400,
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal: status 2, nothing else on stderr, no stack trace, no training begun."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "tokenizer" not in done.stdout, "training was begun"
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line
