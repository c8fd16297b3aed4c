"""The model registry: versions of `latent-gpt` in MLflow and which of them is in use.

A version holds a bundle (see docs/ARCHITECTURE.md) and is known by what it plays: `challenger` (just made),
`champion` (in use), `previous-champion` (what a rollback returns to). A bundle carries `checksums.json`, so
whatever way it comes back, from MLflow, S3 or a folder, a flipped bit is noticed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import config_hash
from model.errors import UserError
from model.plumbing import assets, storage
from model.plumbing.jobs import TrackingIds
from model.plumbing.tracking import Tracker, explained, mlflow_client

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

MODEL = "latent-gpt"
CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous-champion"
CHECKSUMS = "checksums.json"
BUNDLE_TAG = "latent_gpt.bundle"  # hash of the bundle's checksums


def register(
    ids: TrackingIds,
    bundle: str | Path,
    log_model: Callable[[Path, str], Any],
    lineage: dict[str, str],
    model: str = MODEL,
) -> tuple[int, bool]:
    """Make a bundle a version of the registered model, with the alias `challenger`.

    Args:
        ids: the step's place in MLflow; the model is logged in its run.
        bundle: local folder; `checksums.json` is added to it.
        log_model: `log_model(bundle, name)` logs it as a pyfunc in the active run and returns MLflow's
            `ModelInfo`.
        lineage: tags of the version: what it was made from.
        model: name of the registered model.

    Returns:
        The version's number, and whether it is new: the same bundle is registered only once.

    Raises:
        UserError: MLflow cannot be reached or refuses.
    """
    import mlflow

    bundle = Path(bundle)
    sealed = seal(bundle)
    with Tracker(ids) as tracker, explained():
        client = mlflow_client()
        for version in client.search_model_versions(f"name='{model}'"):
            if version.tags.get(BUNDLE_TAG) == sealed:
                return int(version.version), False
        mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
        with mlflow.start_run(run_id=tracker.run_id):
            info = log_model(bundle, model)
        made = mlflow.register_model(info.model_uri, model, tags={**lineage, BUNDLE_TAG: sealed})
        client.set_registered_model_alias(model, CHALLENGER, made.version)
    return int(made.version), True


def find(lineage: dict[str, str], model: str = MODEL) -> int | None:
    """The newest version that was registered with these tags, or None."""
    with explained():
        versions = mlflow_client().search_model_versions(f"name='{model}'")
    found = [int(version.version) for version in versions if lineage.items() <= version.tags.items()]
    return max(found, default=None)


def version_of(alias: str, model: str = MODEL) -> int | None:
    """The version that has an alias, or None."""
    with explained():
        return _aliases(mlflow_client(), model).get(alias)


def promote(version: int, model: str = MODEL) -> None:
    """Make a version the champion; the one so far becomes `previous-champion`."""
    client = mlflow_client()
    with explained():
        aliases = _aliases(client, model)
        champion = aliases.get(CHAMPION)
        if champion != version:
            if champion is not None:  # first, so that a kill in between loses nobody
                client.set_registered_model_alias(model, PREVIOUS, str(champion))
            client.set_registered_model_alias(model, CHAMPION, str(version))
        if aliases.get(CHALLENGER) == version:
            client.delete_registered_model_alias(model, CHALLENGER)


def rollback(model: str = MODEL) -> int:
    """Put the previous champion back in use; the one so far takes its place. Returns the version in use.

    Raises:
        UserError: there is no previous champion.
    """
    client = mlflow_client()
    with explained():
        aliases = _aliases(client, model)
        previous = aliases.get(PREVIOUS)
        if previous is None:
            raise UserError(f"{model} has no {PREVIOUS} to roll back to; it has {_known(aliases)}")
        client.set_registered_model_alias(model, CHAMPION, str(previous))
        client.set_registered_model_alias(model, PREVIOUS, str(aliases[CHAMPION]))
    return previous


def resolve(ref: str, cache: str | Path | None = None) -> Path:
    """The local folder of a bundle, or of a set, whose files are what their checksums say.

    Args:
        ref: `models:/latent-gpt@champion`, `models:/latent-gpt/3`, an S3 URI, or a local folder.
        cache: where downloads are kept; default is the environment's `LATENT_GPT_CACHE`, or a folder of
            this user's among the temporary ones.

    Raises:
        UserError: there is no such model, or it is damaged.
    """
    folder = Path(cache or os.environ.get("LATENT_GPT_CACHE") or _default_cache())
    if ref.startswith("models:/"):
        return _resolve_version(ref, folder)
    if storage.is_s3(ref):
        return _resolve_s3(ref, folder)
    path = Path(ref).expanduser()
    if not path.is_dir():
        raise UserError(
            f"model {ref} does not exist; give models:/{MODEL}@{CHAMPION}, an s3:// URI or a folder"
        )
    if (path / CHECKSUMS).exists():
        verify(path)
    return path


def seal(bundle: Path) -> str:
    """Write `checksums.json`, the SHA-256 of every other file; returns the hash of it all."""
    sums = {
        path.relative_to(bundle).as_posix(): storage.file_sha256(path)
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and path.name != CHECKSUMS
    }
    storage.write_bytes(str(bundle / CHECKSUMS), json.dumps(sums, indent=2, sort_keys=True).encode())
    return config_hash(sums)


def verify(bundle: Path) -> str:
    """Check every file of a bundle against `checksums.json`; returns the hash of it all.

    Raises:
        Damaged: a file is missing or differs.
    """
    try:
        sums: dict[str, str] = json.loads((bundle / CHECKSUMS).read_text())
    except (FileNotFoundError, ValueError):
        raise storage.Damaged(f"{bundle} has no readable {CHECKSUMS}; it is not a complete bundle") from None
    for name, expected in sums.items():
        path = bundle / name
        if not path.is_file():
            raise storage.Damaged(f"{path} is missing; fetch or register the model again")
        if (found := storage.file_sha256(path)) != expected:
            raise storage.Damaged(
                f"{path} is damaged: its SHA-256 is {found[:16]}…, {CHECKSUMS} says {expected[:16]}…;"
                " fetch or register the model again"
            )
    return config_hash(sums)


def _resolve_version(ref: str, cache: Path) -> Path:
    import mlflow

    client = mlflow_client()
    with explained():
        name, number = _parse(client, ref)
        sealed = client.get_model_version(name, str(number)).tags.get(BUNDLE_TAG, "")
        if not sealed:
            raise UserError(f"{ref} was not registered by latent-gpt: it has no tag {BUNDLE_TAG}")
        target = cache / "models" / sealed
        if _is_whole(target, sealed):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=storage.TEMPORARY) as temporary:
            uri = f"models:/{name}/{number}"
            mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
            mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=temporary)
            bundles = [path.parent for path in Path(temporary).rglob(CHECKSUMS)]
            if len(bundles) != 1 or verify(bundles[0]) != sealed:
                raise storage.Damaged(
                    f"{uri} does not hold the bundle it was registered with; register it again"
                )
            return _keep(bundles[0], target)


def _resolve_s3(ref: str, cache: Path) -> Path:
    if manifest := assets.find(ref):
        return assets.fetch(manifest, cache / "sets" / manifest.kind / manifest.sha256[:16])
    try:
        sums: dict[str, str] = json.loads(storage.read_bytes(storage.join(ref, CHECKSUMS)))
    except storage.NotFound:
        raise storage.NotFound(f"{ref} is no model: it has neither {assets.NAME} nor {CHECKSUMS}") from None
    sealed = config_hash(sums)
    target = cache / "models" / sealed
    if _is_whole(target, sealed):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=storage.TEMPORARY) as temporary:
        bundle = Path(temporary) / "bundle"
        for name, sha256 in sums.items():
            assets.File(name=name, size=0, sha256=sha256)  # refuses names that lead elsewhere
            storage.download_file(storage.join(ref, name), bundle / name, sha256)
        storage.write_bytes(str(bundle / CHECKSUMS), json.dumps(sums, indent=2, sort_keys=True).encode())
        return _keep(bundle, target)


def _is_whole(target: Path, sealed: str) -> bool:
    """Whether the cache holds this bundle; what is damaged there is thrown away."""
    if not target.exists():
        return False
    try:
        if verify(target) == sealed:
            return True
    except storage.Damaged as error:
        logger.warning("the cached model is fetched again: %s", error)
    shutil.rmtree(target)
    return False


def _keep(bundle: Path, target: Path) -> Path:
    try:
        bundle.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        # Somebody else was quicker with the same bundle.
    return target


def _default_cache() -> Path:
    """A folder in the temporary one that is this user's alone."""
    folder = Path(tempfile.gettempdir()) / f"latent-gpt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user; set LATENT_GPT_CACHE to a folder of yours")
    return folder


def _parse(client: MlflowClient, ref: str) -> tuple[str, int]:
    """Name and version of `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
    rest = ref.removeprefix("models:/")
    if "@" in rest:
        name, _, alias = rest.partition("@")
        aliases = _aliases(client, name)
        if alias not in aliases:
            raise UserError(
                f"model {name} has no alias {alias}; it has {_known(aliases)}. Run the pipeline first"
            )
        return name, aliases[alias]
    name, _, number = rest.rpartition("/")
    if not name or not number.isdecimal():
        raise UserError(f"model {ref} must read models:/NAME@ALIAS or models:/NAME/VERSION")
    versions = sorted(int(version.version) for version in client.search_model_versions(f"name='{name}'"))
    if int(number) not in versions:
        known = ", ".join(map(str, versions)) or "none"
        raise UserError(f"model {name} has no version {number}; it has {known}")
    return name, int(number)


def _aliases(client: MlflowClient, model: str) -> dict[str, int]:
    """Aliases of a registered model; none if there is no such model."""
    found = client.search_registered_models(f"name='{model}'")
    return {alias: int(version) for alias, version in found[0].aliases.items()} if found else {}


def _known(aliases: dict[str, int]) -> str:
    return ", ".join(f"{alias} (version {version})" for alias, version in sorted(aliases.items())) or "none"
