"""The whole system through the real command line: real services, real DAG, at a size of seconds."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from pipelines.embedded.services import services
from tests import ROOT
from tests.command_line import environment, latent_gpt, refused
from tests.nets.test_tokenizers import janus

pytestmark = pytest.mark.slow

STEPS = [
    "prepare",
    "images",
    "tokenizer",
    "text",
    "judge",
    "tokens",
    "transformer",
    "evaluation",
    "register",
]


def processes_of(state: Path) -> list[str]:
    """Command lines of all processes that belong to a state folder, by their environment or arguments."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            known = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
            if str(state).encode() in known and int(folder.name) != os.getpid():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return [line for line in found if line]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@dataclass
class First:
    """The first run in an empty state folder."""

    stdout: str
    stderr: str
    left: list[str]  # processes that belonged to the state folder after it


@pytest.fixture(scope="module")
def first(state: Path) -> Iterator[First]:
    """Run once; then keep the services of the state folder for the command lines that follow it."""
    done = latent_gpt("run", "--preset", "smoke", state=state)
    assert done.returncode == 0, done.stdout + done.stderr
    left = processes_of(state)
    with services(state) as settings, pytest.MonkeyPatch.context() as patch:
        for name in settings:  # a command line has to find them by its state folder
            patch.delenv(name)
        yield First(done.stdout, done.stderr, left)


def test_a_run_says_what_it_does_and_what_came_of_it(first: First) -> None:
    started = re.findall(r"^\[(\d+)/9\] (\w+)$", first.stdout, re.MULTILINE)
    assert [number for number, _ in started] == [str(number) for number in range(1, 10)]
    assert {name for _, name in started} == set(STEPS)
    assert re.search(r"step 3/3  100%  loss [\d.]+", first.stdout), "progress of a training"
    for said in (
        r"model +latent-gpt-smoke version 1, champion",
        r"report +\S+report\.html",
        r"make generate",
        r"make mlflow-ui",
    ):
        assert re.search(said, first.stdout), said
    assert "Traceback" not in first.stdout + first.stderr


def test_the_report_is_one_self_contained_page(first: First) -> None:
    match = re.search(r"report +(\S+report\.html)", first.stdout)
    assert match
    page = Path(match[1]).read_text()
    assert "<html" in page
    assert "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(https?:)?//', page), "nothing is loaded from elsewhere"


def test_nothing_runs_on_after_a_run(first: First) -> None:
    assert first.left == []


def test_a_second_run_reuses_everything_and_registers_nothing_new(first: First, state: Path) -> None:
    done = latent_gpt("run", "--preset", "smoke", state=state)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = re.findall(r"^reused +(.*)$", done.stdout, re.MULTILINE)
    assert set(line.split(", ")) == set(STEPS) - {"prepare"}
    assert "latent-gpt-smoke version 1, champion" in done.stdout


def test_neither_a_path_with_a_space_nor_a_module_of_the_same_name_is_in_the_way(
    first: First, state: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mé dir"
    folder.mkdir()
    (folder / "venv").symlink_to(sys.prefix)
    (folder / "model.py").write_text("raise SystemExit('the module of somebody else')\n")
    python = str(folder / "venv" / "bin" / "python")
    done = subprocess.run(
        [python, "-P", "-m", "pipelines.cli", "run", "--preset", "smoke"],
        cwd=folder,
        env=environment(state, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "latent-gpt-smoke version 1, champion" in done.stdout


def test_generate_draws_from_the_champion(first: First, state: Path, tmp_path: Path) -> None:
    prompt = "a red circle"
    done = latent_gpt("generate", prompt, "--out", str(tmp_path / "a.png"), "--seed", "7", state=state)
    assert done.returncode == 0, done.stderr
    assert "draws with latent-gpt-smoke, version 1" in done.stdout
    many = latent_gpt(
        "generate", prompt, "--out", str(tmp_path / "b.png"), "--seed", "6", "--num-images", "2", state=state
    )
    assert many.returncode == 0, many.stderr
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (16, 16)
    assert picture.info["Model"] == "latent-gpt-smoke version 1"
    assert picture.tobytes() == Image.open(tmp_path / "b-1.png").tobytes(), "a seed's picture is its own"


def test_generate_without_a_prompt(first: First, state: Path, tmp_path: Path) -> None:
    assert "the prompt is empty" in refused(latent_gpt("generate", " ", state=state))
    done = latent_gpt("generate", "--unconditional", "--out", str(tmp_path / "u.png"), state=state)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "u.png").size == (16, 16)


def test_a_long_prompt_is_cut_and_says_so_and_a_far_too_long_one_is_refused(
    first: First, state: Path, tmp_path: Path
) -> None:
    done = latent_gpt("generate", "red circle " * 80, "--out", str(tmp_path / "long.png"), state=state)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "long.png").exists()
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    line = refused(
        latent_gpt("generate", "red circle " * 2000, "--out", str(tmp_path / "no.png"), state=state)
    )
    assert "22000 characters" in line
    assert not (tmp_path / "no.png").exists()


def test_an_unknown_model_is_refused(first: First, state: Path) -> None:
    line = refused(latent_gpt("generate", "x", "--model", "models:/latent-gpt-smoke@winner", state=state))
    assert "no alias winner" in line


def mlflow_runs(state: Path) -> list[list[str]]:
    """Step, status, parent, id and experiment of every run, in the order of their starts.

    Asked by a process of its own: the services must be those of this state folder.
    """
    code = """
import json, sys
from pathlib import Path
from pipelines.embedded.services import services
from model.plumbing.tracking import mlflow_client, STEP_TAG
with services(Path(sys.argv[1])):
    client = mlflow_client()
    names = {e.experiment_id: e.name for e in client.search_experiments() if e.name != "Default"}
    runs = client.search_runs(list(names), order_by=["attributes.start_time ASC"])
    found = [(run.data.tags, run.info, names[run.info.experiment_id]) for run in runs]
    parent = "mlflow.parentRunId"
    print(json.dumps([[tags[STEP_TAG], i.status, tags.get(parent), i.run_id, n] for tags, i, n in found]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(state)],
        cwd=ROOT,
        env=environment(state),
        capture_output=True,
        text=True,
        check=True,
    )
    runs: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return runs


def test_mlflow_holds_one_parent_with_a_child_per_trained_step(first: First, state: Path) -> None:
    runs = mlflow_runs(state)
    parents = [run for run in runs if run[0] == "pipeline"]
    assert parents
    assert all(status == "FINISHED" for _, status, *_ in runs)
    children = {step: experiment for step, _, parent, _, experiment in runs if parent == parents[0][3]}
    assert children.pop("tokenizer") == "vqvae-training"
    assert set(children.values()) == {"latent-gpt-custom-vqvae"}
    assert {"text", "judge", "transformer", "register"} <= children.keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_leaves_nothing_running_and_is_taken_up_again(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "run", "--preset", "smoke"]
    command += ["--set", "tokenizer.training.steps=100000", "--set", "transformer=null"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        assert run.stdout
        for line in run.stdout:
            if re.search(r"step \d+/100000", line):
                break
        # A terminal sends Ctrl-C to the whole group; a supervisor sends SIGTERM to the process it knows.
        os.killpg(run.pid, number) if number == signal.SIGINT else run.send_signal(number)
        rest = run.stdout.read()
        assert run.wait(60) != 0
    assert "Traceback" not in rest
    until = time.monotonic() + 10
    while processes_of(tmp_path) and time.monotonic() < until:
        time.sleep(0.2)
    assert processes_of(tmp_path) == []


def test_a_killed_run_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "run", "--preset", "smoke"]
    command += ["--set", "tokenizer.training.steps=100000", "--set", "transformer=null"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout
        for line in run.stdout:
            if re.search(r"step \d+/100000", line):
                break
        run.kill()
    until = time.monotonic() + 60
    while processes_of(tmp_path) and time.monotonic() < until:
        time.sleep(0.2)
    assert processes_of(tmp_path) == []


def test_the_other_phases_take_the_same_steps_into_their_own_experiments(
    first: First, state: Path, tmp_path: Path
) -> None:
    """Phase 1, a pretrained tokenizer from a folder; phase 2, a tokenizer alone; 3 was the first run."""
    janus().save_pretrained(tmp_path / "janus", safe_serialization=True)
    pretrained = f"tokenizer={{kind: pretrained, family: janus, ref: {tmp_path / 'janus'}}}"
    done = latent_gpt("run", "--preset", "smoke", "--set", pretrained, state=state)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = re.findall(r"^reused +(.*)$", done.stdout, re.MULTILINE)
    assert set(line.split(", ")) == {"images", "text", "judge"}
    assert "latent-gpt-smoke version 2" in done.stdout
    drawn = latent_gpt(
        "generate",
        "a red circle",
        "--model",
        "models:/latent-gpt-smoke/2",
        "--out",
        str(tmp_path / "a.png"),
        state=state,
    )
    assert drawn.returncode == 0, drawn.stderr
    assert Image.open(tmp_path / "a.png").size == (16, 16)

    alone = latent_gpt("run", "--preset", "smoke", "--set", "transformer=null", state=state)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    (line,) = re.findall(r"^reused +(.*)$", alone.stdout, re.MULTILINE)
    assert set(line.split(", ")) == {"images", "tokenizer"}

    runs = mlflow_runs(state)
    assert all(status == "FINISHED" for _, status, *_ in runs)
    assert {experiment for step, *_, experiment in runs if step == "pipeline"} == {
        "latent-gpt-pretrained-vqvae", "vqvae-training", "latent-gpt-custom-vqvae",
    }  # fmt: skip


def test_a_retraining_ends_at_once_where_nothing_is_new_and_else_goes_on_from_the_champion(
    first: First, state: Path
) -> None:
    began = time.monotonic()
    done = latent_gpt("retrain", "--preset", "smoke", state=state)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 60
    assert re.search(r"nothing new since version 1 of latent-gpt-smoke \(champion\)", done.stdout)
    assert re.findall(r"^\[\d+/\d+\] (\w+)$", done.stdout, re.MULTILINE) == ["news"]

    done = latent_gpt("retrain", "--preset", "smoke", "--set", "transformer.dropout=0.1", state=state)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "setting transformer.dropout 0.0 -> 0.1" in done.stdout
    assert "whose weights the transformer begins from" in done.stdout
    (line,) = re.findall(r"^reused +(.*)$", done.stdout, re.MULTILINE)
    assert {"images", "tokenizer", "text", "judge", "tokens"} <= set(line.split(", "))
    assert re.search(r"\[10/10\] register", done.stdout)
    assert re.search(r"^model +latent-gpt-smoke version \d", done.stdout, re.MULTILINE)
