"""The embedded services: started, shared, survived and stopped, with the real SeaweedFS and MLflow."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from model.errors import UserError
from model.plumbing import storage
from model.plumbing.tracking import check_server, mlflow_client
from pipelines.embedded import services as module
from pipelines.embedded.servers import S3Server, _weed
from pipelines.embedded.services import services as start
from pipelines.embedded.tracking_server import DATABASE, PARTIAL
from tests import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests start their own."""
    for name in ("S3_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "LATENT_GPT_STORE", "LATENT_GPT_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def s3_alone(servers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MLflow is configured, only S3 is started: quicker, where that is enough to see."""
    for name in ("URI", "USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", servers[f"MLFLOW_TRACKING_{name}"])


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder that the tests start from one after the other, as runs do."""
    return tmp_path_factory.mktemp("state")


def processes(state: Path) -> dict[int, str]:
    """Ids and command lines of everything that runs from a state folder."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                surroundings = (folder / "environ").read_bytes().decode(errors="replace")
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue
            ours = any(one in command for one in ("weed", "tracking_server", "keeper.py"))
            if ours and (str(state) in command or str(state) in surroundings):
                found[int(folder.name)] = command
    return found


def eventually(condition: Callable[[], bool], patience: float = 30.0) -> bool:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def client(state: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts other processes that use the services until they are ended; returns when each is ready."""
    started: list[subprocess.Popen[str]] = []
    code = (
        "import json, sys, time\n"
        "from pipelines.embedded.services import services\n"
        "with services(sys.argv[1]) as environment:\n"
        "    print(json.dumps(environment), flush=True)\n"
        "    time.sleep(600)\n"
    )

    def run() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(state)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def ready(process: subprocess.Popen[str]) -> dict[str, str]:
    assert process.stdout
    values: dict[str, str] = json.loads(process.stdout.readline())
    return values


def test_they_work_on_loopback_and_go(state: Path) -> None:
    with start(state) as environment:
        assert os.environ["S3_ENDPOINT_URL"] == environment["S3_ENDPOINT_URL"]
        storage.write_bytes("s3://latent-gpt/kept", b"across runs")
        check_server()
        listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
        addresses = [
            line.split()[3]
            for line in listening.splitlines()
            if (match := re.search(r"pid=(\d+)", line)) and int(match[1]) in processes(state)
        ]
        assert len(addresses) == 11
        assert all(address.startswith("127.0.0.1:") for address in addresses)
        for secret in ("s3/credentials.json", "s3/s3.json", "s3/tls.pem", "mlflow/credentials.json"):
            assert stat.S_IMODE((state / secret).stat().st_mode) == 0o600
        assert stat.S_IMODE((state / "s3").stat().st_mode) == 0o700
    assert eventually(lambda: processes(state) == {})
    assert "S3_ENDPOINT_URL" not in os.environ


def test_the_data_is_there_again_even_on_other_ports(state: Path, s3_alone: None) -> None:
    described = json.loads((state / "s3/server.json").read_text())
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind((module.HOST, described["ports"][0]))
        squatter.listen()
        with start(state) as environment:
            assert not environment["S3_ENDPOINT_URL"].endswith(f":{described['ports'][0]}")
            assert storage.read_bytes("s3://latent-gpt/kept") == b"across runs"


def test_a_port_taken_in_between_is_no_end(
    state: Path, s3_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as squatter:
        squatter.bind((module.HOST, 0))
        squatter.listen()
        taken = squatter.getsockname()[1]
        free = module._free_ports
        drawn: list[int] = []

        def unlucky(count: int) -> list[int]:
            ports = free(count)
            if not drawn:
                ports[0] = taken
            drawn.append(ports[0])
            return ports

        monkeypatch.setattr(module, "_free_ports", unlucky)
        (state / "s3/server.json").unlink()
        with start(state):
            assert storage.read_bytes("s3://latent-gpt/kept") == b"across runs"
        assert drawn[0] == taken
        assert len(drawn) == 2


def test_runs_beside_each_other_share_them(state: Path, client: Callable[[], subprocess.Popen[str]]) -> None:
    first, second = client(), client()  # at the same moment
    environment = ready(first)
    assert ready(second) == environment
    assert len(processes(state)) == 4  # two servers, two keepers
    first.send_signal(signal.SIGINT)
    first.wait()
    with start(state) as third:
        assert third == environment
        storage.check_store("s3://latent-gpt")
        check_server()
    assert len(processes(state)) == 4  # the second one still needs them
    second.kill()
    assert eventually(lambda: processes(state) == {})


def test_a_killed_run_leaves_nothing(state: Path, client: Callable[[], subprocess.Popen[str]]) -> None:
    process = client()
    ready(process)
    process.kill()
    assert eventually(lambda: processes(state) == {})
    with start(state):  # and does not block the next one
        assert storage.read_bytes("s3://latent-gpt/kept") == b"across runs"


def test_a_very_first_start_that_is_killed_is_no_end(tmp_path: Path) -> None:
    code = "import sys; from pipelines.embedded.services import services\nwith services(sys.argv[1]): pass"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) as first:
        assert eventually((tmp_path / "mlflow" / PARTIAL).exists, 120), "MLflow's database is half made"
        for pid in (first.pid, *processes(tmp_path)):
            with suppress(ProcessLookupError):  # it went with one of the others
                os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: processes(tmp_path) == {})
    assert not (tmp_path / "mlflow" / DATABASE).exists()
    with start(tmp_path):
        storage.write_bytes("s3://latent-gpt/kept", b"here")
        check_server()


def test_a_killed_keeper_takes_its_server_along(
    state: Path, client: Callable[[], subprocess.Popen[str]]
) -> None:
    process = client()
    ready(process)
    for pid, command in processes(state).items():
        if "keeper.py" in command:
            os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: processes(state) == {})
    with start(state):
        assert storage.read_bytes("s3://latent-gpt/kept") == b"across runs"


def test_a_crashed_server_is_started_again(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with start(state):
        assert eventually(lambda: time.monotonic() - started > module.keeper.YOUNG + 5)
        for pid in servers(state):
            os.kill(pid, signal.SIGKILL)
        storage.write_bytes("s3://latent-gpt/after", b"the crash")  # the client's retries outlive it
        assert storage.read_bytes("s3://latent-gpt/kept") == b"across runs"
        assert eventually(lambda: works(check_server))
    assert eventually(lambda: processes(state) == {})


def servers(state: Path) -> list[int]:
    return [pid for pid, command in processes(state).items() if "keeper.py" not in command]


def works(check: Callable[[], None]) -> bool:
    try:
        check()
    except UserError:
        return False
    return True


def test_a_server_that_cannot_start_says_why(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: S3Server, folder: Path, ports: list[int]) -> tuple[list[str], dict[str, str | None]]:
        return [_weed(), "mini", "-no.such.option"], {}

    monkeypatch.setattr(S3Server, "command", broken)
    with (
        pytest.raises(UserError, match=r"SeaweedFS does not start: .* \(its log: .*/logs/s3.log\)"),
        start(state),
    ):
        pass
    assert eventually(lambda: processes(state) == {})


def test_what_is_started_is_reached_whatever_the_environment_says_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = "http://127.0.0.1:9"
    config = tmp_path / "aws-config"
    config.write_text(
        f"[profile work]\nendpoint_url = {nobody}\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = work\n"
        "s3 =\n  use_accelerate_endpoint = true\n  addressing_style = virtual\n"
    )
    elsewhere = tmp_path / ".seaweedfs" / "security.toml"
    elsewhere.parent.mkdir()
    elsewhere.write_text('[jwt.signing]\nkey = "of another cluster"\n')
    (tmp_path / "model.py").write_text("raise SystemExit('the module of somebody else')\n")
    (tmp_path / ".netrc").write_text("default login me password of-another-server\n")
    said = {
        "AWS_PROFILE": "work",
        "AWS_CONFIG_FILE": str(config),
        "AWS_SESSION_TOKEN": "of another account",
        "AWS_ENDPOINT_URL": nobody,
        "HOME": str(tmp_path),
        "HTTP_PROXY": nobody,
        "http_proxy": nobody,
        "no_proxy": "intranet.example",
        "MLFLOW_REGISTRY_URI": nobody,
        "MLFLOW_S3_ENDPOINT_URL": nobody,
        "MLFLOW_TRACKING_TOKEN": "of another server",
        "NETRC": str(tmp_path / ".netrc"),
        "PYTHONPATH": str(tmp_path),
        "WEED_JWT_SIGNING_KEY": "of another cluster",
    }
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with start(tmp_path / "state") as environment:
        storage.write_bytes("s3://latent-gpt/kept", b"here")
        assert storage.read_bytes("s3://latent-gpt/kept") == b"here"
        client = mlflow_client()
        run = client.create_run(client.create_experiment("e")).info.run_id
        client.log_text(run, "hello", "hello.txt")
        names = storage.list_sizes("s3://latent-gpt/mlflow")
        assert [name.rpartition("/")[2] for name in names] == ["hello.txt"]
        assert environment["NO_PROXY"] == "intranet.example,127.0.0.1"
        assert environment["NETRC"] == os.devnull
    assert {name: os.environ[name] for name in said} == said


def test_any_folder_will_do_for_the_state(tmp_path: Path, s3_alone: None) -> None:
    place = tmp_path / "a long path, for a job of 'CI': é 日本 #1 %2F what?" / ("deep" * 30)
    with start(place):
        storage.write_bytes("s3://latent-gpt/kept", b"here")
        assert storage.read_bytes("s3://latent-gpt/kept") == b"here"
    assert any((place / "s3/data").glob("*.dat"))


def test_configured_services_are_used_and_checked(
    servers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in servers.items():
        monkeypatch.setenv(name, value)
    with start(tmp_path) as environment:
        assert environment["S3_ENDPOINT_URL"] == servers["S3_ENDPOINT_URL"]
        assert environment["MLFLOW_TRACKING_URI"] == servers["MLFLOW_TRACKING_URI"]
        assert eventually(lambda: processes(tmp_path) == {})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="refuses the credentials"), start(tmp_path):
        pass
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", servers["AWS_SECRET_ACCESS_KEY"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", servers["S3_ENDPOINT_URL"])
    with (
        pytest.raises(UserError, match="check that MLFLOW_TRACKING_URI names an MLflow server"),
        start(tmp_path),
    ):
        pass
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{module._free_ports(1)[0]}")
    with pytest.raises(UserError, match="cannot be reached"), start(tmp_path):
        pass
    assert eventually(lambda: processes(tmp_path) == {})


def test_mlflow_alone_keeps_its_artifacts_in_the_configured_s3(
    servers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in servers.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("LATENT_GPT_STORE", "s3://latent-gpt/elsewhere")
    with start(tmp_path):
        client = mlflow_client()
        run = client.create_run(client.create_experiment("e")).info.run_id
        client.log_text(run, "hello", "hello.txt")
        names = storage.list_sizes("s3://latent-gpt/elsewhere/mlflow")
        assert [name.rpartition("/")[2] for name in names] == ["hello.txt"]
    assert eventually(lambda: processes(tmp_path) == {})
