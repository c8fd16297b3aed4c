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
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from model.errors import UserError
from model.plumbing import environment, storage
from model.plumbing.tracking import MLFLOW_SETTINGS, check_server
from pipelines.embedded import keeper
from pipelines.embedded.servers import BUCKET, HOST, MLflowServer, S3Server, Server, write_secret
from pipelines.embedded.tracking_server import DATABASE

MLFLOW_TO_S3 = ("MLFLOW_S3_", "MLFLOW_BOTO_")  # variables that say how MLflow reaches S3
START_PATIENCE = 180.0  # seconds until a server must answer; a machine under load takes its time
STOP_PATIENCE = 15.0  # seconds until a stopped server must be gone
ABOVE = 10_000  # SeaweedFS's maintenance worker expects the admin server's gRPC port this far above its other
STARTS = 3  # tries, each with fresh ports, where somebody else took one meanwhile


@contextmanager
def services(state_dir: str | Path) -> Iterator[dict[str, str]]:
    """Within the block S3 and MLflow answer, and the environment says where; yields those variables.

    `S3_ENDPOINT_URL` and `MLFLOW_TRACKING_URI` that are set already are checked and used as they are.

    Raises:
        UserError: a configured service does not work, or ours does not start; says what to do.
    """
    state = Path(state_dir).expanduser().absolute()
    needs_s3 = not environment.S3_ENDPOINT_URL.get()
    needs_mlflow = not environment.MLFLOW_TRACKING_URI.get()
    with ExitStack() as stack:
        s3 = mlflow = None
        names = ["S3_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "LATENT_GPT_STORE"]

        def say(values: Mapping[str, str | None]) -> None:
            stack.enter_context(environment.within(values))
            names.extend(values)

        if needs_s3 or needs_mlflow:
            say(_past_proxies())
        if needs_mlflow:
            # What ~/.netrc says of any host, or of this one, goes before the password that is given.
            say({**_forgotten("MLFLOW_", but=MLFLOW_TO_S3), "NETRC": os.devnull})
        say({**MLFLOW_SETTINGS, "LATENT_GPT_CACHE": environment.CACHE.get() or str(state / "cache")})
        if needs_s3:
            say(_forgotten("AWS_", *MLFLOW_TO_S3))
            s3 = stack.enter_context(_use(state / "s3", S3Server()))
            say(s3.environment)
        if not environment.STORE.get():
            say({"LATENT_GPT_STORE": BUCKET})
        if not s3:
            storage.check_store(storage.store_root())
        if needs_mlflow:  # its records point at artifacts in this very S3: another S3, another MLflow
            place = environment.S3_ENDPOINT_URL.get() + storage.store_root()
            name = "mlflow" if s3 else f"mlflow-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
            mlflow = stack.enter_context(_use(state / name, MLflowServer()))
            say(mlflow.environment)
        else:
            check_server()
        for server in (s3, mlflow):  # they start side by side
            if server:
                server.wait_until_ready()
        if s3 and not storage.is_s3(storage.store_root()):
            storage.check_store(storage.store_root())
        yield {name: os.environ[name] for name in names if name in os.environ}


def database(state_dir: str | Path, uri: str) -> Path | None:
    """The database of the embedded MLflow at an address, if it is one of this state folder's."""
    for described in Path(state_dir).expanduser().absolute().glob("mlflow*/server.json"):
        if uri == f"http://{HOST}:{json.loads(described.read_text())['ports'][0]}":
            return described.with_name(DATABASE)
    return None


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
        command, changes = self.server.command(self.folder, ports)
        described = {"name": self.server.name, "ports": ports, "command": command}
        write_secret(self.folder / "server.json", json.dumps(described, indent=2))
        surroundings = {**os.environ, **environment.imports_as_we_do(), "PWD": str(self.folder), **changes}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb" if self._starts == 1 else "ab") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-P", keeper.__file__, str(self.folder)],
                cwd=self.folder,
                env={name: value for name, value in surroundings.items() if value is not None},
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
        environment.put(self.environment)  # the ports may be new


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


def _wait(condition: Callable[[], bool], patience: float) -> bool:
    """Wait until a condition holds; whether it does in time."""
    until = time.monotonic() + patience
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _forgotten(*prefixes: str, but: tuple[str, ...] = ()) -> dict[str, str | None]:
    """Variables of the user's to unset: what we start is not what they were said of."""
    return {name: None for name in os.environ if name.startswith(prefixes) and not name.startswith(but)}


def _past_proxies() -> dict[str, str | None]:
    """What is on loopback is not asked for through the user's proxy."""
    exempt = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if exempt.strip() != "*":
        exempt = ",".join(filter(None, [exempt, HOST]))
    return {"no_proxy": exempt, "NO_PROXY": exempt}


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
