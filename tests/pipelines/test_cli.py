"""The command line as a person meets it: help, and one clear line for bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from model.config import preset_names
from pipelines.cli import app
from tests import ROOT
from tests.command_line import environment, latent_gpt, refused


@pytest.mark.parametrize("theirs", ["model.py", "pipelines.py", "components/__init__.py"])
def test_a_module_of_somebody_else_is_not_run(tmp_path: Path, theirs: str) -> None:
    (tmp_path / theirs).parent.mkdir(exist_ok=True)
    (tmp_path / theirs).write_text("raise SystemExit('the module of somebody else')\n")
    done = subprocess.run(
        [sys.executable, "-P", ROOT / "latent_gpt.py", "presets"],
        env=environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_help_lists_the_commands() -> None:
    done = latent_gpt("--help")
    assert done.returncode == 0
    for command in (
        "run",
        "compile",
        "generate",
        "presets",
        "mlflow-ui",
        "logs",
        "models",
        "promote",
        "rollback",
        "evaluate",
    ):
        assert f"  {command}" in done.stdout


def test_presets_are_listed_each_with_what_it_is() -> None:
    done = latent_gpt("presets")
    assert done.returncode == 0
    listed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert list(listed) == preset_names()
    assert listed["openmoji"] == "All of OpenMoji at 64 px on one GPU."


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
    assert expected in refused(latent_gpt("run", *arguments, state=state))
    assert not state.exists(), "nothing was started"


@pytest.mark.parametrize(
    "ascii_",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "1"},
    ],
    ids=["by the locale", "by its own setting", "in UTF-8 mode, by its own setting"],
)
def test_what_a_person_reads_is_utf8_whatever_is_said(tmp_path: Path, ascii_: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "preflight", "--preset", "café.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path, **ascii_), capture_output=True)
    assert done.returncode == 2
    assert "café.yaml" in done.stderr.decode("utf-8")


def test_no_more_pictures_are_drawn_than_anybody_looks_at() -> None:
    done = CliRunner().invoke(app, ["generate", "x", "--num-images", "1000000000"])
    assert done.exit_code == 2
    assert "less than or equal to 10000" in done.output


def test_debug_shows_the_stack_trace() -> None:
    done = latent_gpt("run", "--preset", "nowhere", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_compile_refuses_an_unknown_suffix(tmp_path: Path) -> None:
    assert "must end in .yaml" in refused(latent_gpt("compile", "--out", str(tmp_path / "p.txt")))
