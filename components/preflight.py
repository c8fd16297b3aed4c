"""What can be known to be wrong before anything expensive starts: each thing that a run will need is tried.

`PROBES` is the list; whoever brings a new need adds a line.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from model.config import RunConfig
from model.errors import UserError
from model.plumbing import environment, storage

FREE_BYTES = 2 * 2**30  # a run of a small preset with its services, checkpoints and logs fits
FREE_SHARE = 0.01  # of a disk: with less left, SeaweedFS takes no more writes (its -minFreeSpace)
PATIENCE, ATTEMPTS = 4.0, 2  # seconds, tries: a service that is down is found out within ten seconds


class Probe(NamedTuple):
    """One thing that is tried. `check` returns what to tell people, or raises UserError: what is lacking."""

    section: str
    name: str
    check: Callable[[RunConfig], str | None]


def preflight(config: RunConfig) -> list[str]:
    """Try everything that a run of `config` will need; return what was found, a line for each section.

    Raises:
        UserError: the first thing that is wrong, and what would be right.
    """
    return [f"{probe.section:10}{said}" for probe in PROBES if (said := probe.check(config))]


def check_disk(folder: Path, needed: int = FREE_BYTES, share: float = 0.0) -> None:
    """Check that `folder`, or the nearest parent that exists, has room.

    Args:
        folder: where something will be written.
        needed: bytes.
        share: of the whole disk, which has to stay free beside them.

    Raises:
        UserError: less is free.
    """
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    needed += int(share * disk.total)
    if disk.free < needed:
        raise UserError(
            f"disk: {folder} has {disk.free / 2**30:.1f} GiB free and a run needs {needed / 2**30:.0f} GiB;"
            " free some, or set LATENT_GPT_STATE to a folder on a larger disk"
        )


def check_writable(folder: Path) -> None:
    """Check that this user may write into the state folder, or make it.

    Raises:
        UserError: not so.
    """
    there = folder
    while not os.path.exists(there):  # as far as this user may look
        there = there.parent
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK, effective_ids=True)):
        raise UserError(
            f"{folder} cannot be written: permission denied at {there}; set LATENT_GPT_STATE to a folder of"
            " this user's"
        )


def check_state(folder: Path) -> None:
    """Check that the state folder may be written, and has room for a run, with S3 if that is started there.

    Raises:
        UserError: it may not, or has not.
    """
    check_writable(folder)
    check_disk(folder, share=0.0 if environment.S3_ENDPOINT_URL.get() else FREE_SHARE)


# ── probes ──────────────────────────────────────────────────────────────────────────────────────────────


def _temporary(config: RunConfig) -> None:
    check_disk(Path(tempfile.gettempdir()))


def _source(config: RunConfig) -> str:
    from model.steps import STEPS

    return str(STEPS["images"].settings(config)["fingerprint"])


def _weights(config: RunConfig) -> None:
    from model.steps import STEPS

    for step in STEPS.values():
        if step.taken(config):
            step.settings(config)  # looks at the weights that the config names by path or URI


def _store(config: RunConfig) -> str:
    root = storage.store_root()
    storage.check_store(root)
    return root


def _list(config: RunConfig) -> None:
    with _scratch("a", "b/c") as folder:
        storage.write_bytes(storage.join(folder, "a"), b"1")
        storage.write_bytes(storage.join(folder, "b/c"), b"22")
        found = storage.list_sizes(folder)
    if found != {"a": 1, "b/c": 2}:
        raise UserError(f"{storage.store_root()}: what was just written is not all listed: {found}")


def _write_once(config: RunConfig) -> None:
    with _scratch("once") as folder:
        uri = storage.join(folder, "once")
        try:
            storage.write_bytes(uri, b"first", if_absent=True)
            storage.write_bytes(uri, b"second", if_absent=True)
            why = "a second write went through"
        except FileExistsError:
            if storage.read_bytes(uri) == b"first":
                return
            why = "it refused, and wrote"
        except UserError as error:
            why = str(error)
    raise UserError(
        f"{storage.store_root()} has no conditional writes (If-None-Match: *), without which two runs could"
        f" both finish the same asset: {why}; use a store that has them, as AWS, MinIO and SeaweedFS do"
    )


def _delete_many(config: RunConfig) -> None:
    with _scratch("a", "b/c") as folder:
        for name in ("a", "b/c"):
            storage.write_bytes(storage.join(folder, name), b"1")
        storage.delete_prefix(folder)
        if left := storage.list_uris(folder):
            raise UserError(f"{storage.store_root()}: {left[0]} is still there after it was deleted")


def _parts(config: RunConfig) -> None:
    if not storage.is_s3(storage.store_root()):
        return
    with _scratch("parts") as folder:
        uri = storage.join(folder, "parts")
        bucket, key = storage.split(uri)
        with storage.explained(uri):
            s3 = storage.client()
            upload = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
            part = s3.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"part")
            s3.complete_multipart_upload(
                Bucket=bucket,
                Key=key,
                UploadId=upload,
                MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
            )
        if storage.read_bytes(uri) != b"part":
            raise UserError(f"{uri}: what was uploaded in parts came back different")


def _read_on(config: RunConfig) -> None:
    with _scratch("whole") as folder:
        uri, data = storage.join(folder, "whole"), os.urandom(64)
        storage.write_bytes(uri, data)
        with storage.open_read(uri) as stream:
            stream.seek(16)
            if stream.read() != data[16:]:
                raise UserError(f"{uri}: reading from the middle on gives other bytes than were written")


def _server(config: RunConfig) -> str:
    from model.plumbing import tracking

    tracking.check_server(PATIENCE)
    return environment.MLFLOW_TRACKING_URI.get()


def _cluster(config: RunConfig) -> str | None:
    if environment.LAUNCHER.get() != "pytorchjob":
        return None
    from kubernetes.client.exceptions import ApiException  # type: ignore[import-untyped]

    from components.launch import cluster, pytorchjob

    there = cluster.here()
    kind, where = pytorchjob.RESOURCE, f"namespace {there.namespace}"
    try:
        if lacks := there.lacks(kind):
            raise UserError(f"cluster: {where} does not allow {', '.join(lacks)}; apply k8s/base/rbac.yaml")
        if not there.installed(kind):
            raise UserError(f"cluster: it has no {kind.plural}.{kind.group}; install the training operator")
        for plural, what in (("configmaps", "ConfigMap"), ("secrets", "Secret")):
            if there.has(plural, pytorchjob.ACCESS) is False:
                raise UserError(
                    f"cluster: {where} has no {what} '{pytorchjob.ACCESS}', from which workers learn where"
                    " their services are; see k8s/README.md"
                )
    except ApiException as error:
        raise UserError(f"cluster: {cluster.told(error)}") from None
    except cluster.NETWORK as error:
        raise UserError(
            f"cluster: {there.configuration.host} does not answer: {cluster.plain(error)}"
        ) from None
    return f"{where}, image {there.image()}"


def _models(config: RunConfig) -> None:
    from model.plumbing import tracking

    tracking.check_models(config.experiment)


def _artifacts(config: RunConfig) -> None:
    from model.plumbing import tracking

    tracking.check_artifacts(config.experiment)


@contextlib.contextmanager
def _scratch(*names: str) -> Iterator[str]:
    """A folder of the store for a probe, which tries in haste; `names` in it are gone afterwards."""
    folder = storage.join(storage.store_root(), f".preflight-{os.getpid()}-{os.urandom(4).hex()}")
    with storage.hasty(PATIENCE, ATTEMPTS):
        try:
            yield folder
        finally:
            with contextlib.suppress(UserError):  # one by one: that much is known to work
                for name in names:
                    storage.delete(storage.join(folder, name))
                if not storage.is_s3(folder):
                    storage.delete_prefix(folder)


PROBES = [
    Probe("disk", "has room", _temporary),
    Probe("source", "can be read", _source),
    Probe("storage", "is written to and read from", _store),
    Probe("storage", "lists", _list),
    Probe("storage", "writes only what is absent", _write_once),
    Probe("storage", "deletes many at once", _delete_many),
    Probe("storage", "takes uploads in parts", _parts),
    Probe("storage", "is read from the middle on", _read_on),
    Probe("weights", "are where the config says", _weights),
    Probe("cluster", "takes training jobs", _cluster),
    Probe("tracking", "answers", _server),
    Probe("tracking", "keeps models", _models),
    Probe("tracking", "keeps artifacts", _artifacts),
]
