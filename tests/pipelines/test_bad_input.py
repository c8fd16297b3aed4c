"""Bad input through the real command line: one clear line, status 2, before training, nothing left behind."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command_line import latent_gpt, refused

pytestmark = pytest.mark.slow


@pytest.fixture
def nobody() -> Iterator[str]:
    """Address of a port that is taken and never answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def folder_config(tmp_path: Path, pictures: int, bad: int = 0, captions: bool = True) -> list[str]:
    """Arguments that run `smoke` on a folder with so many good and so many broken pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(pictures):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
            folder / f"{number:03}.png"
        )
    for number in range(bad):
        (folder / f"bad{number:03}.png").write_bytes((folder / "000.png").read_bytes()[:200])
    if captions:
        for path in folder.glob("*.png"):
            path.with_suffix(".txt").write_text(f"noise {path.stem}\n")
    return ["run", "--preset", "smoke", "--data", str(folder), "--set", "transformer=null"]


def test_data_that_is_not_there(tmp_path: Path) -> None:
    line = refused(latent_gpt("run", "--preset", "smoke", "--data", f"{tmp_path}/nowhere", state=tmp_path))
    assert line.startswith(f"error: data: there is no folder {tmp_path}/nowhere here")


def test_an_unreachable_s3(tmp_path: Path, nobody: str) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    assert nobody in refused(
        latent_gpt("run", "--preset", "smoke", S3_ENDPOINT_URL=nobody, state=tmp_path, **keys)
    )


def test_an_unreachable_mlflow(tmp_path: Path, services: dict[str, str], nobody: str) -> None:
    done = latent_gpt(
        "run", "--preset", "smoke", state=tmp_path, **{**services, "MLFLOW_TRACKING_URI": nobody}
    )
    line = refused(done)
    assert nobody in line
    assert "MLFLOW_TRACKING_URI" in line


def test_wrong_credentials(tmp_path: Path, services: dict[str, str]) -> None:
    wrong = {**services, "AWS_SECRET_ACCESS_KEY": "wrong"}
    assert "AWS_SECRET_ACCESS_KEY" in refused(latent_gpt("run", "--preset", "smoke", state=tmp_path, **wrong))


def test_an_endpoint_without_scheme(tmp_path: Path) -> None:
    done = latent_gpt("run", "--preset", "smoke", S3_ENDPOINT_URL="localhost:9000", state=tmp_path)
    assert "must start with http" in refused(done)


def test_no_captions(tmp_path: Path, services: dict[str, str]) -> None:
    arguments = folder_config(tmp_path, 12, captions=False)
    line = refused(latent_gpt(*arguments, state=tmp_path / "state", **services))
    assert "caption" in line


def test_a_source_that_is_not_there(tmp_path: Path, services: dict[str, str]) -> None:
    missing = f"data.source={{kind: folder, path: {tmp_path}/nowhere}}"
    line = refused(latent_gpt("run", "--preset", "smoke", "--set", missing, state=tmp_path, **services))
    assert f"{tmp_path}/nowhere" in line


def test_one_corrupt_picture_is_put_aside_and_counted(tmp_path: Path, services: dict[str, str]) -> None:
    arguments = folder_config(tmp_path, 40, bad=1)
    done = latent_gpt(*arguments, state=tmp_path / "state", **services)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 quarantined" in done.stdout


def test_too_many_corrupt_pictures_fail_the_run(tmp_path: Path, services: dict[str, str]) -> None:
    arguments = folder_config(tmp_path, 10, bad=10)
    line = refused(latent_gpt(*arguments, state=tmp_path / "state", **services))
    assert "max_bad_share" in line


def test_a_disk_that_is_nearly_full(tmp_path: Path) -> None:
    """On a real file system of 64 MiB, in a mount namespace of its own."""
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
    ):
        pytest.skip("mounting needs user namespaces")
    mount = f'mount -t tmpfs -o size=64m none {tmp_path} && exec "$@"'
    done = latent_gpt(
        "run", "--preset", "smoke", state=tmp_path, before=("unshare", "-rm", "sh", "-c", mount, "-")
    )
    line = refused(done)
    assert str(tmp_path) in line
    assert "GiB free" in line
