"""What make hands over is what was typed, and what it installs goes where it should."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import ROOT

FAKE = '#!/bin/sh\nprintf "%s\\n" "$@"\n'


@pytest.fixture(autouse=True)
def no_make_above(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test` tells a make that it starts about itself, and that one then talks of folders."""
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "PROMPT"):
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


def test_a_users_own_pip_settings_do_not_lead_an_installation_elsewhere(clone: Path) -> None:
    with (clone / "Makefile").open("a") as makefile:
        makefile.write("\nshown:\n\t@env | grep ^PIP_ | sort\n")
    theirs = {"PIP_USER": "1", "PIP_TARGET": "/x", "PIP_PREFIX": "/y", "PIP_ROOT": "/z", "PIP_CERT": "/cert"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")} | theirs
    command = ["make", "shown"]
    said = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["PIP_CERT=/cert", "PIP_USER=0"], "and what leads to packages stays"
