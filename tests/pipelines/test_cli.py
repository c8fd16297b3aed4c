"""The command line as a person meets it: help, and one clear line for bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT


def latent_gpt(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal: status 2, nothing else on stderr, no stack trace."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_help_lists_the_commands() -> None:
    done = latent_gpt("--help")
    assert done.returncode == 0
    for command in ("run", "compile", "generate", "presets", "mlflow-ui"):
        assert f"  {command}" in done.stdout


def test_presets_come_with_their_promise() -> None:
    done = latent_gpt("presets")
    assert done.returncode == 0
    assert "openmoji-tiny" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--preset", "openmoji-tony"], "preset 'openmoji-tony' does not exist; choose one of"),
        (["--preset", "smoke", "--set", "data.imagesize=64"], "data.imagesize: unknown key"),
        (["--preset", "smoke", "--set", "data.image_size=-3"], "data.image_size"),
        (["--preset", "smoke", "--set", "data.image_size=30"], "must be a multiple of tokenizer.factor"),
        (["--preset", "smoke", "--set", "seed"], "must read section.field=value"),
        (["--preset", "missing.yaml"], "missing.yaml"),
    ],
)
def test_a_bad_config_is_refused_in_one_line(arguments: list[str], expected: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert expected in refused(latent_gpt("run", *arguments, LATENT_GPT_STATE=str(state)))
    assert not state.exists(), "nothing was started"


def test_debug_shows_the_stack_trace() -> None:
    done = latent_gpt("run", "--preset", "nowhere", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_compile_refuses_an_unknown_suffix(tmp_path: Path) -> None:
    assert "must end in .yaml" in refused(latent_gpt("compile", "--out", str(tmp_path / "p.txt")))
