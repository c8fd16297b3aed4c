"""Whether the store and MLflow do what a run needs of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from components.preflight.cluster import NOTE, concerned
from model.config import RunConfig
from model.errors import UserError
from model.plumbing import environment, storage

PATIENCE, ATTEMPTS = 4.0, 2  # seconds, tries: a service that is down is found out within ten seconds


def writes(config: RunConfig) -> str:
    """Objects are written, read and deleted."""
    root = storage.store_root()
    storage.check_store(root)
    return root


def lists(config: RunConfig) -> None:
    """What was written is listed."""
    with _scratch("a", "b/c") as folder:
        storage.write_bytes(storage.join(folder, "a"), b"1")
        storage.write_bytes(storage.join(folder, "b/c"), b"22")
        found = storage.list_sizes(folder)
    if found != {"a": 1, "b/c": 2}:
        raise UserError(f"{storage.store_root()}: what was just written is not all listed: {found}")


def writes_once(config: RunConfig) -> None:
    """What is there already is not written over where that is asked for."""
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


def deletes_many(config: RunConfig) -> None:
    """A folder is deleted as a whole."""
    with _scratch("a", "b/c") as folder:
        for name in ("a", "b/c"):
            storage.write_bytes(storage.join(folder, name), b"1")
        storage.delete_prefix(folder)
        if left := storage.list_uris(folder):
            raise UserError(f"{storage.store_root()}: {left[0]} is still there after it was deleted")


def takes_parts(config: RunConfig) -> None:
    """Uploads in parts are taken."""
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


def reads_on(config: RunConfig) -> None:
    """An object is read from its middle on."""
    with _scratch("whole") as folder:
        uri, data = storage.join(folder, "whole"), os.urandom(64)
        storage.write_bytes(uri, data)
        with storage.open_read(uri) as stream:
            stream.seek(16)
            if stream.read() != data[16:]:
                raise UserError(f"{uri}: reading from the middle on gives other bytes than were written")


def tracks(config: RunConfig) -> str:
    """MLflow answers, and lets us in."""
    from model.plumbing import tracking

    tracking.check_server(PATIENCE)
    return environment.MLFLOW_TRACKING_URI.get()


def takes_any_name(config: RunConfig) -> str | None:
    """MLflow answers whoever calls it by its name, with the port or without."""
    if not concerned():
        return None
    from model.plumbing import tracking

    if refused := tracking.refused_hosts(PATIENCE):
        return (
            f"{NOTE}MLflow refuses whoever calls it {' or '.join(refused)}, as proxies may that add or drop a"
            " port; start it with --allowed-hosts NAME,NAME:*"
        )
    return None


def is_no_service(config: RunConfig) -> str | None:
    """No Service named `mlflow` sets a variable that `mlflow server` reads."""
    if any(value.startswith("tcp://") for _, value in environment.starting("MLFLOW_PORT")):
        return (
            f"{NOTE}a Service named 'mlflow' puts MLFLOW_PORT into the pods of this namespace, and `mlflow"
            " server` takes that for its --port; set enableServiceLinks: false in the server's pod"
        )
    return None


def keeps_models(config: RunConfig) -> None:
    """MLflow keeps models."""
    from model.plumbing import tracking

    tracking.check_models(config.experiment)


def keeps_artifacts(config: RunConfig) -> None:
    """MLflow keeps artifacts, and gives them back."""
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
