"""What nobody needs any more, listed and deleted: in the store, and in MLflow what is marked as deleted.

Registered versions are never deleted, nor what MLflow shows. MLflow deletes for good by a command of its own
alone, which needs its database: here that is the embedded one's, on a cluster the one of our deployment.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from components.step import end_given_up_runs
from model.errors import UserError
from model.plumbing import environment, leases, registry, storage, sweeping, uses
from model.plumbing.tracking import deleted_runs
from pipelines.embedded.servers import BUCKET
from pipelines.embedded.services import database

if TYPE_CHECKING:
    from pipelines.cluster.kubectl import Kubectl

DEPLOYMENT = "latent-gpt-mlflow"
# In the pod of our MLflow, whose own environment has no password: it comes on standard input.
IN_POD = (
    "IFS= read -r MLFLOW_TRACKING_USERNAME; IFS= read -r MLFLOW_TRACKING_PASSWORD;"
    " export MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD;"
    ' exec mlflow gc --backend-store-uri "$MLFLOW_BACKEND_STORE_URI" --tracking-uri "$0" --older-than "$1"'
)


def gc(delete: bool, hours: float, versions: int, state: Path, kubectl: Kubectl | None = None) -> None:
    """List what nobody needs, or delete it, and say how many bytes that frees.

    Args:
        delete: it; else it is only listed.
        hours: for which anything stays that was written.
        versions: newest ones of each registered model whose assets stay; whatever has an alias stays, too.
        state: folder of the embedded services.
        kubectl: of the cluster whose services the environment leads to, if it does.

    Raises:
        UserError: the store or MLflow cannot be reached, they do not belong together, or the
            hours are no number.
    """
    if not math.isfinite(hours):  # nothing is newer than NaN
        raise UserError(f"--hours is {hours:g}; a number says for how many what was written stays")
    if delete:
        end_given_up_runs("gc")
    wanted: Mapping[str, sweeping.Needed] = {}
    others: list[str] = []

    def needed() -> Collection[sweeping.Needed]:
        nonlocal wanted, others
        wanted, others = registry.needed(versions)
        return wanted.values()

    with uses.sweep() if delete else nullcontext(lambda: None) as still_ours:
        found = sweeping.look(needed, 3600 * hours)
        print("\n".join(_what_stays(found, wanted, others)))
        print("this goes:" if delete else "this would go; --delete does it:")
        if delete:
            _check_that_it_is_theirs(found, wanted)
            sweeping.sweep(found, still_ours)
    freed = _said_of_store(found)
    freed += _mlflow(delete, hours, state, kubectl)
    print(f"  {'in all':12} {'':6} {_readable(freed)}{'' if delete else ' would be free'}")


def _check_that_it_is_theirs(found: sweeping.Found, wanted: Mapping[str, sweeping.Needed]) -> None:
    """Raises UserError: MLflow knows nothing of what this store has, so it may be another one's."""
    complete = {one for one, asset in found.assets.items() if asset.complete}
    models = {one for one in complete if one.startswith("model/")}
    store, mlflow = storage.store_root(), environment.MLFLOW_TRACKING_URI.get()
    ask = "is it the one that belongs to this store?"
    if models and not models & found.needed:
        raise UserError(
            f"{store} holds {len(models)} models and MLflow at {mlflow} has registered none of them: {ask}"
            " If it is, and all are to go, delete the store's folder `model` first"
        )
    if complete and wanted and not found.needed:
        raise UserError(
            f"{store} has nothing of what is registered in MLflow at {mlflow}: {ask}"
            " If it is, delete the store's folders yourself"
        )


def _what_stays(found: sweeping.Found, wanted: Mapping[str, sweeping.Needed], others: list[str]) -> list[str]:
    lines = [f"stays: what was needed for {name}" for name in wanted]
    lines += [f"stays: what run {run} uses, which lives" for run in leases.living()]
    lines += [f"registered still, but what it was made from may go: {name}" for name in others]
    return lines


def _said_of_store(found: sweeping.Found) -> int:
    """Print what goes of the store, by kind; returns bytes."""
    whole = 0
    for kind, (count, size) in sorted(found.sizes().items()):
        print(f"  {kind:12} {count:6} {_readable(size)}")
        whole += size
    if found.uses or found.locks:
        print(f"  {'notes':12} {len(found.uses) + len(found.locks):6}")
    return whole


def _mlflow(delete: bool, hours: float, state: Path, kubectl: Kubectl | None) -> int:
    """Delete for good what is marked as deleted in MLflow, and say so; returns bytes."""
    before = deleted_runs()
    if not before:
        return 0
    sizes = {run: _size(uri) for run, uri in before.items()}
    old = f"those older than {hours:g} hours go"
    if not delete:
        print(f"  {'MLflow':12} {len(sizes):6} {_readable(sum(sizes.values()))}  runs deleted there; {old}")
        return 0
    if held := registry.in_deleted_experiments():
        why = f"experiments that are deleted hold {', '.join(held)}: restore them first"
    elif embedded := database(state, environment.MLFLOW_TRACKING_URI.get()):
        why = _gc_here(embedded, hours)
    elif kubectl and kubectl.objects("get", "deployment", DEPLOYMENT, "--ignore-not-found"):
        why = _gc_there(kubectl, hours)
    else:
        why = f"where that MLflow runs: mlflow gc --backend-store-uri … --older-than {hours:g}h"
    gone = sizes.keys() - deleted_runs().keys()
    freed = sum(sizes[run] for run in gone)
    print(
        f"  {'MLflow':12} {len(gone):6} {_readable(freed)}  of {len(sizes)} runs deleted there; {why or old}"
    )
    return freed


def _gc_here(embedded: Path, hours: float) -> str:
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", f"sqlite:///{embedded}"]
    command += ["--tracking-uri", environment.MLFLOW_TRACKING_URI.get(), "--older-than", f"{hours:g}h"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"mlflow gc says: {_last_line(done.stderr or done.stdout)}"


def _gc_there(kubectl: Kubectl, hours: float) -> str:
    account = (environment.MLFLOW_TRACKING_USERNAME, environment.MLFLOW_TRACKING_PASSWORD)
    try:
        kubectl(
            *("exec", "-i", f"deployment/{DEPLOYMENT}", "--container", "mlflow", "--"),
            *("sh", "-c", IN_POD, "http://127.0.0.1:5000", f"{hours:g}h"),
            stdin="".join(f"{one.get()}\n" for one in account),
        )
    except UserError as error:
        return f"mlflow gc says: {error}"
    return ""


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing")[:300]


def _size(artifacts: str) -> int:
    """Bytes of a run's artifacts, as far as they lie where our MLflow servers put them."""
    match = re.fullmatch("mlflow-artifacts:/+(.+)", artifacts)
    if not match:
        return 0
    root = storage.store_root()
    return sum(
        storage.list_sizes(storage.join(root if storage.is_s3(root) else BUCKET, "mlflow", match[1])).values()
    )


def _readable(size: int) -> str:
    for unit, bytes_of in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= bytes_of:
            return f"{size / bytes_of:8.1f} {unit}"
    return f"{size:8} B "
