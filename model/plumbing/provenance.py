"""What a run in MLflow came from, as MLflow knows it: code, image, data, and the run of KFP around it."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from model.plumbing import environment, storage

if TYPE_CHECKING:
    from model.plumbing.assets import Manifest

COMMIT_TAG = "mlflow.source.git.commit"  # MLflow's own: it links to the commit
IMAGE_TAG = "latent_gpt.image"  # that the process runs in, by its digest
KFP_TAG = "latent_gpt.kfp_run"  # id of the run in KFP
NOTE_TAG = "mlflow.note.content"  # MLflow's own: the description, as Markdown
DATA = ("images", "tokens")  # kinds that MLflow calls datasets
DIGEST = 36  # characters of one that MLflow's databases keep
CONTEXT = "mlflow.data.context"  # MLflow's own: of a dataset as an input


class Named(NamedTuple):
    """Runs in MLflow that KFP has made; empty where it has not."""

    pipeline: str  # around all steps
    step: str  # of this one


def tags() -> dict[str, str]:
    """Of every run: the commit and the image, as far as they are known."""
    image = environment.IMAGE.given()
    found = {COMMIT_TAG: _commit(), IMAGE_TAG: image}
    return {name: value for name, value in found.items() if value}


def kfp_tags(job: str) -> dict[str, str]:
    """Of a pipeline's run, by its id in KFP."""
    ui = environment.KFP_UI.get().rstrip("/")
    note = {NOTE_TAG: f"[This run in KFP]({ui}/#/runs/details/{job})"} if ui else {}
    return {KFP_TAG: job, **note}


def named_by_kfp() -> Named:
    """What KFP's MLflow plugin says: `KFP_MLFLOW_CONFIG`, and the variables of MLflow that it may set."""
    pipeline = ""
    with suppress(ValueError, TypeError, AttributeError):
        pipeline = str(json.loads(environment.KFP_MLFLOW_CONFIG.get() or "{}").get("parentRunId") or "")
    return Named(pipeline, environment.MLFLOW_RUN_ID.get() if pipeline else "")


def dataset(manifest: Manifest, context: str) -> dict[str, Any]:
    """An asset as an input of a run, in the form of MLflow's API: its place, its hash, how much there is."""
    counts = {name: one for name, one in manifest.info.items() if isinstance(one, int | float | str)}
    kind = "s3" if storage.is_s3(manifest.uri) else "local"
    described = {
        "name": manifest.kind,
        "digest": manifest.sha256[:DIGEST],
        "source_type": kind,
        "source": json.dumps({"uri": manifest.uri}),
        "profile": json.dumps(counts),
    }
    return {"tags": [{"key": CONTEXT, "value": context}], "dataset": described}


@cache
def _commit() -> str:
    """That of the image, or of the clone; -dirty where there is more than was committed."""
    if revision := environment.REVISION.get():
        return "" if revision == "unknown" else revision
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():  # installed
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""
