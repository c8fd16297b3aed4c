"""The local runner's parts: what a person sees of a step's lines, and that a session ends as a whole."""

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model import steps
from model.config import load_config
from pipelines.local import Follower, _new_folder, _session, state_folder


def follow(lines: list[str], terminal: bool = False) -> tuple[Follower, str]:
    out = io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    follower = Follower(["prepare", "transformer"], out=out)
    for line in lines:
        follower.line(line)
    follower.end_line()
    return follower, out.getvalue()


SPOKEN = [
    "21:43:12 - INFO - Executing task 'train-gpt'\n",
    "    transformer  started\n",
    "    transformer  step 1/2  50%  loss 3.2  ETA 1s\n",
    "    transformer  step 2/2  100%  loss 3.1  ETA 0s\n",
    "    {'a': 1}\n",
    "    transformer  done in 2.5 s\n",
]


def test_only_what_steps_say_is_shown() -> None:
    follower, shown = follow(SPOKEN)
    assert shown.splitlines() == [
        "[1/2] transformer",
        "      step 1/2  50%  loss 3.2  ETA 1s",
        "      step 2/2  100%  loss 3.1  ETA 0s",
        "      done in 2.5 s",
    ]
    assert follower.seconds == {"transformer": 2.5}


def test_on_a_terminal_progress_replaces_progress_and_nothing_else() -> None:
    _, shown = follow(SPOKEN, terminal=True)
    assert shown == (
        "[1/2] transformer\n"
        "      step 1/2  50%  loss 3.2  ETA 1s\r\033[2K      step 2/2  100%  loss 3.1  ETA 0s\n"
        "      done in 2.5 s\n"
    )


def test_the_reason_of_a_failure_and_reuse_are_kept() -> None:
    follower, _ = follow(["prepare  started", "prepare  reused s3://x", "    error: no captions in /x"])
    assert follower.error == "no captions in /x"
    assert follower.reused == {"prepare"}


def test_the_steps_end_with_the_tokenizer_where_there_is_no_transformer() -> None:
    assert steps.names(load_config("smoke"))[-1] == "register"
    assert steps.names(load_config("smoke", ["transformer=null"]))[-1] == "tokenizer"


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    assert len({_new_folder(tmp_path) for _ in range(3)}) == 3


def test_the_state_folder_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_STATE", str(tmp_path / "elsewhere"))
    assert state_folder() == tmp_path / "elsewhere"


def test_leaving_a_session_ends_its_grandchildren(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    script = (
        "import subprocess\n"
        "sleeper = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(mark)!r}, 'w').write(str(sleeper.pid))\n"
        "sleeper.wait()\n"
    )
    with _session([sys.executable, "-c", script], {}) as child:
        until = time.monotonic() + 20
        while not (mark.exists() and mark.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
    assert child.returncode is not None
    found = subprocess.run(["ps", "-o", "stat=", "-p", mark.read_text()], capture_output=True, text=True)
    assert found.stdout.strip() in ("", "Z")
