"""What make hands over is what was typed, and what it installs goes where it should."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import ROOT

TYPED = ("PROMPT", "PRESET", "DATA", "MINUTES", "EFFORT")  # that nobody but a test may have set
FAKE = '#!/bin/sh\nprintf "%s\\n" "$@"\n'


@pytest.fixture(autouse=True)
def no_make_above(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test` tells a make that it starts about itself, and that one then talks of folders."""
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", *TYPED):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with our Makefile whose `latent-gpt` repeats what it is told."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "latent-gpt").write_text(FAKE)
    (programs / "latent-gpt").chmod(0o755)
    for name in (
        "requirements-uv.lock",
        "requirements.lock",
        "pyproject.toml",
        ".venv/bin/uv",
        ".venv/run.stamp",
    ):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("prompt", ["a $5 note", "costs $(5) $$ and `date`", 'it\'s "red"', "50 % of #1"])
def test_a_prompt_arrives_as_it_was_typed(clone: Path, prompt: str) -> None:
    for how in (["make", "generate", f"PROMPT={prompt}"], ["make", "generate"]):
        environment = os.environ | ({} if len(how) == 3 else {"PROMPT": prompt})
        said = subprocess.run(how, cwd=clone, env=environment, capture_output=True, text=True, check=True)
        assert said.stdout.splitlines() == ["generate", prompt, "--out", "out.png"]


@pytest.mark.parametrize(
    "data", ["my $5 pictures", 'it\'s "mine"/#1', "s3://b/{00..09}.tar", "$(shell date)"]
)
def test_what_is_said_of_ones_own_pictures_arrives_as_it_was_typed(clone: Path, data: str) -> None:
    command = ["make", "run", f"DATA={data}", "MINUTES=2.5", "EFFORT=0.5", "ARGS=--set a=1"]
    said = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True)
    told = ["--data", data, "--minutes", "2.5", "--effort", "0.5"]
    assert said.stdout.splitlines() == ["run", *told, "--set", "a=1"]
    command = ["make", "plan", f"DATA={data}", "PRESET=a b.yaml"]
    said = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == ["plan", "a b.yaml", "--data", data]


@pytest.mark.parametrize("target", ["run", "plan", "retrain", "submit", "schedule", "preflight"])
def test_what_is_not_said_is_left_to_the_command(clone: Path, target: str) -> None:
    others = os.environ | {"DATA": "/of/another/program", "MINUTES": "7", "EFFORT": "9"}
    said = subprocess.run(["make", target], cwd=clone, env=others, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == [target, *(["--cron", ""] if target == "schedule" else [])]
    if target == "plan":
        return
    command = ["make", target, "PRESET=a b.yaml", "DATA=$5"]
    said = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-4:] == ["--preset", "a b.yaml", "--data", "$5"]
    command.append("MINUTES=5")
    said = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-2:] == ["--minutes", "5"]


def test_a_users_own_pip_settings_do_not_lead_an_installation_elsewhere(clone: Path) -> None:
    with (clone / "Makefile").open("a") as makefile:
        makefile.write("\nshown:\n\t@env | grep ^PIP_ | sort\n")
    theirs = {"PIP_USER": "1", "PIP_TARGET": "/x", "PIP_PREFIX": "/y", "PIP_ROOT": "/z", "PIP_CERT": "/cert"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")} | theirs
    command = ["make", "shown"]
    said = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["PIP_CERT=/cert", "PIP_USER=0"], "and what leads to packages stays"


def shown(clone: Path, *arguments: str, **environment: str) -> dict[str, str]:
    """What a recipe finds in its environment."""
    with (clone / "Makefile").open("a") as makefile:
        makefile.write("\nshown:\n\t@env\n")
    names = ("REGISTRY", "NAMESPACE", "LATENT_GPT_NAMESPACE", "BUILD_FLAGS", "KFP_TOKEN")
    outside = {name: value for name, value in os.environ.items() if name not in names} | environment
    command = ["make", "shown", *arguments]
    said = subprocess.run(command, cwd=clone, env=outside, capture_output=True, text=True, check=True)
    return dict(line.partition("=")[::2] for line in said.stdout.splitlines())


def test_what_cluster_env_says_reaches_who_builds_unless_somebody_says_otherwise(clone: Path) -> None:
    text = "# ours\nREGISTRY=ghcr.io/us\nBUILD_FLAGS=--a b --c=#d $x\nNAMESPACE=team\nKFP_TOKEN=secret\n"
    (clone / "cluster.env").write_text(text)
    found = shown(clone)
    assert found["REGISTRY"] == "ghcr.io/us"
    assert found["BUILD_FLAGS"] == "--a b --c=#d $x"
    assert found["LATENT_GPT_NAMESPACE"] == "team"
    assert "KFP_TOKEN" not in found, "`latent-gpt` reads it for itself"
    assert shown(clone, "REGISTRY=x", NAMESPACE="mine")["REGISTRY"] == "x"
    assert shown(clone, "REGISTRY=x", NAMESPACE="mine")["LATENT_GPT_NAMESPACE"] == "mine"
    assert shown(clone, REGISTRY="y")["REGISTRY"] == "y"
    (clone / "cluster.env").unlink()
    assert shown(clone)["REGISTRY"] == "", "and what was said once is forgotten"


def test_no_secret_of_cluster_env_is_copied_and_nobody_else_reads_the_copy(clone: Path) -> None:
    copy = clone / "build" / "cluster.mk"
    copy.parent.mkdir()
    copy.write_text("KFP_TOKEN ?= of an earlier release\n")
    copy.chmod(0o644)
    text = "REGISTRY=ghcr.io/us\nKFP_TOKEN=secret\nAWS_SECRET_ACCESS_KEY=secret\nMY_REGISTRY=secret\n"
    (clone / "cluster.env").write_text(text)
    os.utime(clone / "cluster.env", (0, 0))
    assert shown(clone)["REGISTRY"] == "ghcr.io/us"
    assert "ghcr.io/us" in copy.read_text()
    assert not {"secret", "KFP_TOKEN"} & set(copy.read_text().split())
    assert copy.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("cluster", {"KUBECONFIG"}),
        ("cluster-addons", {"KUBECONFIG"}),
        ("test-cluster", {"KUBECONFIG", "KFP_ENDPOINT", "NAMESPACE"}),
    ],
)
def test_programs_that_are_none_of_ours_go_to_the_cluster_of_cluster_env(
    clone: Path, target: str, names: set[str]
) -> None:
    said = {"KUBECONFIG": "/its/config", "KFP_ENDPOINT": "http://its:8888", "NAMESPACE": "its"}
    programs = clone / ".venv" / "bin"
    (clone / ".venv" / "dev.stamp").touch()
    (clone / "requirements-dev.lock").touch()
    os.utime(clone / "requirements-dev.lock", (0, 0))
    for program in ("kubectl", "kind", "pytest"):
        (programs / program).write_text("#!/bin/sh\nenv\n")
        (programs / program).chmod(0o755)
    outside = {name: value for name, value in os.environ.items() if name not in said}
    outside |= {"PATH": f"{programs}:{os.environ['PATH']}"}

    def found(**environment: str) -> dict[str, str]:
        told = subprocess.run(
            ["make", target], cwd=clone, env=outside | environment, capture_output=True, text=True, check=True
        )
        lines = dict(line.partition("=")[::2] for line in told.stdout.splitlines())
        return {name: lines[name] for name in names if name in lines}

    assert found() == {}, "and nothing is said to be empty"
    (clone / "cluster.env").write_text("".join(f"{name}={value} \n" for name, value in said.items()))
    assert found() == {name: said[name] for name in names}
    assert found(KUBECONFIG="/mine")["KUBECONFIG"] == "/mine"
    assert found(KUBECONFIG="")["KUBECONFIG"] == "/its/config", "set to nothing is as good as unset"


def test_build_and_deploy_is_its_parts_in_order_and_ends_where_one_fails(clone: Path) -> None:
    (clone / "docker").mkdir()
    image = clone / "docker" / "image.sh"
    image.write_text(FAKE)
    image.chmod(0o755)
    command = ["make", "-j4", "build-and-deploy"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["build", "push", "secrets", "deploy", "upload"]
    image.write_text("#!/bin/sh\nexit 3\n")
    failed = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert failed.returncode
    assert "deploy" not in failed.stdout
