"""What can be known to be wrong before anything expensive starts."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from model.config import RunConfig
from model.errors import UserError
from model.plumbing import environment

FREE_BYTES = 2 * 2**30  # a run of a small preset with its services, checkpoints and logs fits


def preflight(config: RunConfig) -> list[str]:
    """Check source, storage, tracking and disk; return what was found, a line each.

    Raises:
        UserError: the first thing that is wrong, and what would be right.
    """
    from model.plumbing import storage, tracking
    from model.steps import STEPS

    check_disk(Path(tempfile.gettempdir()))
    found = [f"source    {STEPS['images'].settings(config)['fingerprint']}"]
    root = storage.store_root()
    storage.check_store(root)
    found.append(f"storage   {root}")
    for step in STEPS.values():
        if step.taken(config):
            step.settings(config)  # looks at the weights that the config names by path or URI
    tracking.check_server()
    found.append(f"tracking  {environment.MLFLOW_TRACKING_URI.get()}")
    return found


def check_disk(folder: Path, needed: int = FREE_BYTES) -> None:
    """Raise UserError unless `folder` (or the nearest parent that exists) has `needed` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"disk: {folder} has {free / 2**30:.1f} GiB free and a run needs {needed / 2**30:.0f} GiB;"
            " free some, or set LATENT_GPT_STATE to a folder on a larger disk"
        )
