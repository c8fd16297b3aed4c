"""Nobody gets into what a run starts without a secret of this state folder, over any port of loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.plumbing import storage
from model.plumbing.tracking import mlflow_client
from pipelines.embedded import mutual_tls, servers
from pipelines.embedded.services import services as start
from tests.pipelines import stranger
from tests.pipelines.test_services import eventually, nothing_configured, processes  # noqa: F401
from tests.sockets import LOOPBACK, listening

pytestmark = pytest.mark.slow

SECRET = b"nobody's business " * 10_000
PARTS = ("master", "volume", "filer")
EXPERIMENT = "nobodys-experiment"
QUESTIONS = [  # each to every port
    ("GET", "/", ""),
    ("GET", "/latent-gpt?list-type=2", ""),
    ("GET", "/latent-gpt/kept", ""),
    ("GET", "/latent-gpt/kept?X-Amz-Algorithm=AWS4-HMAC-SHA256", ""),
    ("PUT", "/latent-gpt/planted", "x"),
    ("PUT", "/planted-bucket", ""),
    ("DELETE", "/latent-gpt/kept", ""),
    ("DELETE", "/latent-gpt", ""),
    ("POST", "/latent-gpt?delete", "<Delete><Object><Key>kept</Key></Object></Delete>"),
    ("POST", "/latent-gpt/planted?uploads", ""),
    ("POST", "/", "Action=CreateAccessKey&UserName=latent-gpt&Version=2010-05-08"),
    ("POST", "/", "Action=ListUsers&Version=2010-05-08"),
    ("GET", "/dir/assign", ""),
    ("GET", "/dir/lookup?volumeId=1", ""),
    ("GET", "/dir/status", ""),
    ("GET", "/vol/grow?count=1", ""),
    ("GET", "/vol/status", ""),
    ("GET", "/vol/vacuum?garbageThreshold=0", ""),
    ("GET", "/col/delete?collection=latent-gpt", ""),
    ("POST", "/submit", "x"),
    ("GET", "/metrics", ""),
    ("GET", "/debug/pprof/cmdline", ""),
    ("GET", "/buckets/latent-gpt/kept", ""),
    ("GET", "/buckets/latent-gpt/?limit=9", ""),
    ("PUT", "/buckets/latent-gpt/planted", "x"),
    ("DELETE", "/buckets/latent-gpt/kept", ""),
    ("DELETE", "/buckets/latent-gpt?recursive=true", ""),
    ("GET", "/ajax-api/2.0/mlflow/experiments/search?max_results=9", ""),
    ("POST", "/api/2.0/mlflow/experiments/search", '{"max_results": 9}'),
    ("POST", "/api/2.0/mlflow/experiments/create", '{"name": "planted"}'),
    ("POST", "/api/2.0/mlflow/experiments/delete", '{"experiment_id": "1"}'),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts", ""),
    ("PUT", "/api/2.0/mlflow-artifacts/artifacts/planted", "x"),
    ("DELETE", "/api/2.0/mlflow-artifacts/artifacts/1", ""),
    ("POST", "/graphql", '{"query": "{ mlflowSearchRuns { runs { info { runId } } } }"}'),
    ("GET", "/health", ""),
    ("GET", "/login", ""),
]
REFUSED = {400, 401, 403, 404, 405}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that every user of this machine can use."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o777)
        yield Path(name)


def answers(ports: list[int], questions: list[tuple[str, str, str]], certificate: Path) -> list[list[str]]:
    task = {"ports": ports, "requests": questions, "certificate": str(certificate)}
    command = [sys.executable, "-I", stranger.__file__]
    done = subprocess.run(
        command, input=json.dumps(task), capture_output=True, text=True, env={}, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout)
    return found


def places(state: Path) -> dict[str, str]:
    """Where SeaweedFS's parts are, as it writes it itself."""
    ports = json.loads((state / "s3/server.json").read_text())["ports"]
    both = zip(ports[2::2], ports[3::2], strict=False)  # the first two are S3's
    return {part: f"127.0.0.1:{http}.{grpc}" for part, (http, grpc) in zip(PARTS, both, strict=False)}


def owner(state: Path, part: str, path: str) -> dict[str, Any]:
    """What a part of SeaweedFS answers to the owner of the certificate."""
    pem = state / "s3/tls.pem"
    context = ssl.create_default_context(cafile=pem)
    context.load_cert_chain(pem)
    place = places(state)[part].rpartition(".")[0]
    with urllib.request.urlopen(f"https://{place}{path}", context=context, timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def shell(state: Path, place: Path, stranger_: bool) -> str:
    """What SeaweedFS's own shell gets out of it, over gRPC, for the owner or for a stranger."""
    weed = shutil.copy(servers._weed(), place / "weed")
    command = [weed, *([] if stranger_ else ["-config_dir=."]), "shell"]
    command += [f"-{part}={places(state)[part]}" for part in ("master", "filer")]
    said = "collection.list\nvolume.list\nfs.ls /buckets/latent-gpt\n"
    said += (
        "lock\nfs.rm -r /buckets/latent-gpt\ncollection.delete -collection latent-gpt -apply\n"
        if stranger_
        else ""
    )
    child = subprocess.Popen(
        command,
        cwd=place if stranger_ else state / "s3",
        env={"HOME": str(place)},
        user=stranger.NOBODY if stranger_ and os.geteuid() == 0 else None,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        return child.communicate(said, timeout=15)[0]
    except subprocess.TimeoutExpired:  # it asks again and again
        child.kill()
        return child.communicate()[0]


def test_no_port_answers_a_stranger(state: Path, open_to_all: Path) -> None:
    with start(state):
        storage.write_bytes("s3://latent-gpt/kept", SECRET)
        client = mlflow_client()
        client.create_experiment(EXPERIMENT)
        assert eventually(lambda: len(listening(processes(state))[0]) == 11)  # one comes late
        ports, paths = listening(processes(state))
        assert set(ports.values()) == {LOOPBACK}
        assert len(paths) == 7
        for path in paths:
            assert not stat.S_IMODE((state / "s3" / path).stat().st_mode) & 0o077, path

        certificate = open_to_all / "certificate.pem"
        certificate.write_text(mutual_tls.certificate())  # as good as ours, but not ours
        certificate.chmod(0o644)
        entry = owner(state, "filer", "/buckets/latent-gpt/kept?metadata=true")
        piece = f"/{entry['chunks'][0]['file_id']}"  # as the volume server knows it
        questions = [*QUESTIONS, ("GET", piece, ""), ("POST", piece, "x"), ("DELETE", piece, "")]
        started = time.monotonic()
        heard = answers(list(ports), questions, certificate)
        seconds = time.monotonic() - started
        tries = len(ports) * (len(questions) + 1) * len(stranger.MANNERS)
        print(f"{tries} tries on {len(ports)} ports, {len(heard)} answers, all refusals, {seconds:.0f} s")
        for port, manner, question, answer in heard:
            refused = re.match(r"HTTP/1\.[01] (\d+) ", answer)
            assert int(refused[1] if refused else 0) in REFUSED, f"{port}, {manner}: {question}: {answer}"
            assert "nobody" not in answer
        assert "nobody" not in shell(state, open_to_all, stranger_=True)

        storage.check_store("s3://latent-gpt")
        assert storage.read_bytes("s3://latent-gpt/kept") == SECRET
        assert not [name for name in storage.list_sizes("s3://latent-gpt") if "planted" in name]
        assert {one.name for one in client.search_experiments()} == {"Default", EXPERIMENT}
        assert "kept" in shell(state, open_to_all, stranger_=False)  # and so it would be seen
