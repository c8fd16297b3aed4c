"""`docker/image.sh` builds and pushes both images, and tags them with the commit that changed them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import ROOT

# As buildah does it, as far as the script looks: it says what it was told, and leaves a digest.
BUILDER = """#!/bin/sh
echo "$@" >>"$SAID"
[ "$1" != inspect ] || exit "${FORGOT:-0}"
while [ $# -gt 0 ]; do
    [ "$1" = --digestfile ] && echo "sha256:$(basename "$3" | tr -d :)" >"$2"
    [ "$1" = --file ] && grep '^FROM .* AS train$' "$2" >>"$SAID"
    shift
done
exit 0
"""

# As docker does it: digests of all registries that an image was ever pushed to, the oldest first.
DOCKER = """#!/bin/sh
echo "$@" >>"$SAID"
case $1 in
inspect) printf '%s\\n' $DIGESTS ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with all that images are made from, and a builder."""
    where = tmp_path / "clone"
    (where / "docker").mkdir(parents=True)
    (where / "pipelines/images").mkdir(parents=True)
    for name in (
        "docker/image.sh",
        "docker/Dockerfile",
        "pipelines/images/sbom.py",
        "pyproject.toml",
        "requirements.lock",
    ):
        shutil.copy(ROOT / name, where / name)
    for name in ("model", "components", "pipelines"):
        (where / name).mkdir(exist_ok=True)
        (where / name / "one.py").touch()
    for name in ("LICENSE", "README.md", "latent_gpt.py"):
        (where / name).touch()
    (where / ".gitignore").write_text("/build/\n")
    builder = tmp_path / "buildah"
    builder.write_text(BUILDER)
    builder.chmod(0o755)
    git(where, "init", "--quiet")
    commit(where)
    return where


def git(where: Path, *arguments: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *arguments], cwd=where, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(where: Path) -> str:
    git(where, "add", "--all")
    git(where, "commit", "--quiet", "--message", "one")
    return git(where, "rev-parse", "--short", "HEAD")


def told(where: Path, what: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """How the script ends; what the builder is told is in a file."""
    said = where.parent / "said"
    said.write_text("")
    mine = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    for name in ("BASE", "CA", "TORCH_INDEX", "BUILD_FLAGS", "PUSH_FLAGS"):
        mine.pop(name, None)
    mine |= {"REGISTRY": "here", "BUILDER": str(where.parent / "buildah"), "SAID": str(said), **environment}
    return subprocess.run(["docker/image.sh", what], cwd=where, env=mine, capture_output=True, text=True)


def image(where: Path, what: str, **environment: str) -> list[str]:
    """What the builder is told."""
    done = told(where, what, **environment)
    assert done.returncode == 0, done.stderr
    return (where.parent / "said").read_text().splitlines()


def test_both_are_built_and_listed_and_pushed_by_digest(clone: Path) -> None:
    revision = git(clone, "rev-parse", "--short", "HEAD")
    said = image(clone, "build", BASE="python@sha256:1", BUILD_FLAGS="--layers", CA="/etc/ca.pem")
    builds = [line for line in said if line.startswith("build ")]
    assert [line.split("--target ")[1].split()[0] for line in builds] == ["train", "mlflow", "sbom"]
    for line in builds:
        assert "--layers" in line
        assert "BASE=python@sha256:1" in line
        assert "--secret id=ca,src=/etc/ca.pem" in line
        assert f"REVISION={revision}" in line
    assert (clone / "build/tag").read_text() == f"here/latent-gpt:{revision}\n"
    pushes = image(clone, "push", PUSH_FLAGS="--tls-verify=false")
    assert [line.split()[-1] for line in pushes] == [
        f"here/latent-gpt:{revision}",
        f"here/latent-gpt-mlflow:{revision}",
    ]
    assert (clone / "build/image").read_text() == f"here/latent-gpt@sha256:latent-gpt{revision}\n"
    assert (clone / "build/image-mlflow").read_text() == (
        f"here/latent-gpt-mlflow@sha256:latent-gpt-mlflow{revision}\n"
    )


@pytest.mark.parametrize("registry", ["here:5000", "docker.io/me"])
def test_docker_names_the_digest_of_the_registry_that_was_pushed_to(clone: Path, registry: str) -> None:
    docker = clone.parent / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    known = registry.removeprefix("docker.io/")
    own = [f"{known}/latent-gpt@sha256:{1:064}", f"{known}/latent-gpt-mlflow@sha256:{2:064}"]
    others = [f"older/latent-gpt@sha256:{3:064}", f"x{known}/latent-gpt@sha256:{4:064}"]
    how = {"BUILDER": str(docker), "REGISTRY": registry}
    image(clone, "build", **how)
    said = image(clone, "push", **how, DIGESTS=" ".join(others + own))
    assert [line.split()[0] for line in said] == ["push", "inspect"] * 2
    first = (clone / "build/image").read_text()
    assert first == f"{registry}/latent-gpt@sha256:{1:064}\n"
    assert (clone / "build/image-mlflow").read_text() == f"{registry}/latent-gpt-mlflow@sha256:{2:064}\n"
    none = told(clone, "push", **how, DIGESTS=" ".join(others))
    assert none.returncode == 2
    (line,) = none.stderr.splitlines()
    assert "does not say by which digest" in line
    assert (clone / "build/image").read_text() == first, "what was pushed before stays"
    assert not list((clone / "build").glob("*.new"))


def test_a_push_that_leaves_no_digest_leaves_what_was_pushed_before(clone: Path) -> None:
    image(clone, "build")
    image(clone, "push")
    before = (clone / "build/image").read_text()
    silent = clone.parent / "podman"
    silent.write_text("#!/bin/sh\n: >build/digest\n")
    silent.chmod(0o755)
    assert told(clone, "push", BUILDER=str(silent)).returncode == 2
    assert (clone / "build/image").read_text() == before


def test_what_is_built_is_not_built_again(clone: Path) -> None:
    def builds(**environment: str) -> int:
        return sum(line.startswith("build ") for line in image(clone, "build", **environment))

    assert builds() == 3
    assert builds() == 0
    assert builds(BASE="another") == 3
    assert builds(BASE="another", FORGOT="1") == 3, "its images are gone"
    (clone / "model/one.py").write_text("1")
    assert builds(BASE="another") == 3
    (clone / "model/one.py").write_text("2")
    assert builds(BASE="another") == 3, "the same tag, -dirty, and another program"
    (clone / "README.md").write_text("more words")
    assert builds(BASE="another") == 0
    assert builds(BASE="another", BUILD_FLAGS="--no-cache") == 3


def test_what_was_built_for_another_registry_is_not_pushed(clone: Path) -> None:
    image(clone, "build")
    done = told(clone, "push", REGISTRY="elsewhere")
    assert done.returncode == 2
    assert "was built, for another registry than elsewhere" in done.stderr


def test_the_tag_is_the_commit_that_changed_a_program(clone: Path) -> None:
    first = git(clone, "rev-parse", "--short", "HEAD")
    (clone / "README.md").write_text("more words")
    assert commit(clone) != first
    image(clone, "build")
    assert (clone / "build/tag").read_text() == f"here/latent-gpt:{first}\n"
    (clone / "model/one.py").write_text("1")
    image(clone, "build")
    assert (clone / "build/tag").read_text() == f"here/latent-gpt:{first}-dirty\n"
    second = commit(clone)
    image(clone, "build")
    assert (clone / "build/tag").read_text() == f"here/latent-gpt:{second}\n"


def test_an_index_with_wheels_for_cpus_takes_the_place_of_cuda(clone: Path) -> None:
    assert "FROM dependencies AS train" in image(clone, "build")
    said = image(clone, "build", TORCH_INDEX="https://where.example/cpu")
    assert "FROM dependencies-cpu AS train" in said
    assert "FROM dependencies AS train" not in said
    assert [line for line in said if "TORCH_INDEX=https://where.example/cpu" in line]


def test_what_goes_without_cuda_is_told_from_the_rest(tmp_path: Path) -> None:
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    program = dockerfile.split("awk '")[1].split("'")[0]
    lock = ROOT / "requirements.lock"
    kept = subprocess.run(["awk", program, str(lock)], capture_output=True, text=True, check=True).stdout
    names = {line.split("==")[0] for line in lock.read_text().splitlines() if "==" in line}
    rest = {line.split("==")[0] for line in kept.splitlines() if "==" in line}
    gone = names - rest
    assert {"torch", "torchvision", "triton", "nvidia-cublas", "cuda-toolkit"} <= gone
    assert {one.partition("-")[0] for one in gone} == {"torch", "torchvision", "triton", "nvidia", "cuda"}
    assert {"nvidia-ml-py", "numpy", "mlflow"} <= rest
    assert kept.count("--hash=") < lock.read_text().count("--hash="), "their hashes go with them"
