"""What tests share: a store of their own, and real servers, started once."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests measure nothing, and several processes of theirs share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked `compiles` in a process of its own, without the hook that checks shapes: its wrappers
    are nothing that torch.compile could trace."""
    config = pyfuncitem.config
    if not (pyfuncitem.get_closest_marker("compiles") and config.getoption("jaxtyping_packages")):
        return None
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-q", pyfuncitem.nodeid]
    done = subprocess.run(command, cwd=config.rootpath, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return True


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A local store that is empty; the environment names it."""
    root = tmp_path / "store"
    root.mkdir()
    monkeypatch.setenv("LATENT_GPT_STORE", str(root))
    return str(root)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The real SeaweedFS and MLflow, once for all tests; yields their environment, and does not set it."""
    from pipelines.embedded.services import services

    with pytest.MonkeyPatch.context() as patch:
        for name in ("S3_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "LATENT_GPT_STORE"):
            patch.delenv(name, raising=False)
        with services(tmp_path_factory.mktemp("servers")) as environment:
            for name in environment:
                os.environ.pop(name)
            yield environment


@pytest.fixture
def services(servers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The real servers, named by the environment, with an empty store on them."""
    environment = {**servers, "LATENT_GPT_STORE": f"{servers['LATENT_GPT_STORE']}/{uuid.uuid4().hex[:8]}"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment
