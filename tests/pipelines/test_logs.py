"""What `latent-gpt logs` prints: attempts in the store, and processes of this machine."""

from __future__ import annotations

import io
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from model.plumbing import assets, attempts, storage, tracking
from model.plumbing.attempts import Attempt
from model.plumbing.outcome import Outcome
from pipelines import logs
from pipelines.logs import ENDED, local_logs, print_logs, stored_logs

NOW = time.time()


@pytest.fixture
def noted(store: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What MLflow says of a run: that it runs, and which assets its steps make."""
    says: dict[str, Any] = {
        "running": True,
        "assets": {"tokenizer": f"{store}/tokenizer/1", "text": f"{store}/clip/2"},
    }
    monkeypatch.setattr(tracking, "assets_noted", lambda run: (says["running"], says["assets"]))
    monkeypatch.setattr(logs, "LOOK", 0.05)
    return says


def begun(uri: str, worker: int, started: int, step: int = 0) -> Attempt:
    return attempts.begin(uri, worker, f"job-worker-{worker}", f"{started:08}", step)


def printed(what: logs.Logs, step: str = "", rank: int | None = None, follow: bool = False) -> str:
    out = io.StringIO()
    print_logs(what, step, rank, follow, out)
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", out.getvalue())


def test_every_attempt_is_there_with_its_end_when_the_pods_are_gone(noted: dict[str, Any]) -> None:
    uri = noted["assets"]["tokenizer"]
    first, second = begun(uri, 0, 1), begun(uri, 1, 2)
    storage.write_bytes(first.log(0), b"step 1\nstep 2\n")
    storage.write_bytes(second.log(1), b"Killed")
    attempts.finish(second, Outcome(kind="killed", reason="process 1 was killed"))
    third = begun(uri, 0, 3, step=2)
    storage.write_bytes(third.log(0), b"step 3\n")
    attempts.finish(third, Outcome(kind="finished"))
    other = begun(noted["assets"]["text"], 0, 4)
    storage.write_bytes(other.log(0), b"reads\n")
    first_title = "worker 0 (start 1, TIME, pod job-worker-0)"
    second_title = "worker 1 (start 2, TIME, pod job-worker-1)"
    third_title = "worker 0 (start 3, TIME, pod job-worker-0, from step 2)"
    tokenizer = (
        f"── tokenizer, {first_title}, rank 0\nstep 1\nstep 2\n"
        f"── tokenizer, {second_title}, rank 1\nKilled\n"
        f"── tokenizer, {second_title}, ended: killed: process 1 was killed\n"
        f"── tokenizer, {third_title}, rank 0\nstep 3\n"
        f"── tokenizer, {third_title}, ended: finished\n"
    )
    text = f"── text, {first_title}, rank 0\nreads\n"
    assert printed(stored_logs("r")) == tokenizer + text
    assert printed(stored_logs("r"), step="text") == text
    of_rank_1 = printed(stored_logs("r"), step="tokenizer", rank=1)
    assert "Killed\n" in of_rank_1
    assert "step 1" not in of_rank_1


def test_who_follows_sees_each_line_once_until_the_work_is_done(noted: dict[str, Any]) -> None:
    uri = noted["assets"]["tokenizer"]
    one = begun(uri, 0, 1)

    def work() -> None:
        said = b""
        for step in range(5):
            said += b"step %d\n" % step
            storage.write_bytes(one.log(0), said)
            time.sleep(0.1)
        attempts.finish(one, Outcome(kind="stopped", reason="told to end"))  # and is started again
        time.sleep(0.2)
        again = begun(uri, 0, 2, step=4)
        storage.write_bytes(again.log(0), b"goes on\n")
        assets_made.set()
        attempts.finish(again, Outcome(kind="finished"))

    assets_made = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "find", lambda uri: "made" if assets_made.is_set() else None)
        thread = threading.Thread(target=work)
        thread.start()
        text = printed(stored_logs("r"), step="tokenizer", follow=True)
        thread.join()
    lines = [line for line in text.splitlines() if not line.startswith("──")]
    assert lines == [*(f"step {step}" for step in range(5)), "goes on"]


@pytest.mark.parametrize(
    ("kind", "seconds_ago", "over"),
    [("refused", 0, True), ("lost", 0, False), ("lost", 3600, True), ("orphaned", 0, True), (None, 0, False)],
)
def test_an_end_that_another_start_may_follow_is_none_for_a_while(
    noted: dict[str, Any], kind: Any, seconds_ago: float, over: bool
) -> None:
    one = begun(noted["assets"]["tokenizer"], 0, 1)
    if kind:
        attempts.finish(one, Outcome(kind=kind, when=time.time() - seconds_ago))
    assert stored_logs("r").over("tokenizer") == over


def test_all_steps_are_over_with_their_run(noted: dict[str, Any]) -> None:
    assert not stored_logs("r").over("")
    noted["running"] = False
    assert stored_logs("r").over("")


def test_a_run_without_logs_says_so(noted: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"^run 'r' has no logs in the store: its jobs were no pods.* \(step text\)"
    ):
        print_logs(stored_logs("r"), "text", None, False)
    noted["assets"] = {}
    with pytest.raises(UserError, match=r"^run 'r' has come to no training job so far$"):
        print_logs(stored_logs("r"), "", None, False)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Folders of runs on this machine: one with two jobs, as torchrun leaves them, and one without."""
    for age, (job, rank, out, err) in enumerate(
        [
            ("text-b", 0, "sees\n", ""),
            ("tokenizer-a", 0, "step 1\n", "a warning\n"),
            ("tokenizer-a", 1, "one\n", ""),
        ]
    ):
        folder = tmp_path / "20261126-070928" / "jobs" / job / f"{job[:-2]}_x" / "attempt_0" / str(rank)
        folder.mkdir(parents=True)
        (folder / "stdout.log").write_text(out)
        (folder / "stderr.log").write_text(err)
        os.utime(folder.parents[1], (NOW + age,) * 2)
    storage.write_bytes(
        str(tmp_path / "20261126-070928" / "jobs" / "text-b" / "outcomes" / "0.json"),
        Outcome(kind="failed", reason="KeyError").model_dump_json().encode(),
    )
    for name in ("20261126-070928", "20261126-080000"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "log.txt").touch()
    return tmp_path


def test_processes_of_this_machine_left_theirs_in_the_runs_folder(runs: Path) -> None:
    folder = runs / "20261126-070928"
    text, tokenizer = f"under {folder}/jobs/text-b", f"under {folder}/jobs/tokenizer-a"
    expected = (
        f"── text, {text}, rank 0\nsees\n"
        f"── text, {text}, ended: failed: KeyError\n"
        f"── tokenizer, {tokenizer}, rank 0\nstep 1\na warning\n"
        f"── tokenizer, {tokenizer}, rank 1\none\n"
    )
    for name in (folder.name, str(folder)):
        found = local_logs(runs, name)
        assert found
        assert printed(found) == expected
    assert local_logs(runs, "a name in MLflow") is None
    assert local_logs(runs, "") is None


def test_a_run_here_is_over_with_its_last_step_or_a_failure(runs: Path) -> None:
    folder = runs / "20261126-080000"
    found = local_logs(runs, folder.name)
    assert found
    assert not found.over("")
    storage.write_bytes(
        f"{folder}/outcomes/tokenizer.json", Outcome(kind="finished").model_dump_json().encode()
    )
    assert (found.over("tokenizer"), found.over("text"), found.over("")) == (True, False, False)
    storage.write_bytes(
        f"{folder}/outcomes/register.json", Outcome(kind="finished").model_dump_json().encode()
    )
    assert found.over("text")
    storage.delete(f"{folder}/outcomes/register.json")
    assert not found.over("")
    (folder / ENDED).touch()
    assert found.over(""), "of a run that has no register"
    with pytest.raises(UserError, match="has no logs of training jobs: it reused what they make"):
        print_logs(found, "", None, True)
