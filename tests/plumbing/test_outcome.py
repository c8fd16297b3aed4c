"""Outcomes: a process says how it ended, and what it does not say its exit status does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from model.errors import Diverged, UserError
from model.plumbing import outcome
from model.plumbing.outcome import JobFailed, Outcome


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A container's termination log, empty as Kubernetes makes it."""
    path = tmp_path / "termination-log"
    path.touch()
    monkeypatch.setattr(outcome, "TERMINATION_LOG", path)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The place that a launcher named for this attempt."""
    monkeypatch.setenv("LATENT_GPT_OUTCOMES", str(tmp_path / "attempt-1"))
    return str(tmp_path / "attempt-1")


def end(error: Exception | None, who: str = "0") -> None:
    """End a process named `who` like this."""
    if error is None:
        with outcome.recorded(who):
            pass
        return
    with pytest.raises(type(error)), outcome.recorded(who):
        raise error


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (None, "finished", ""),
        (UserError("batch_size 7 is odd; make it even"), "refused", "batch_size 7 is odd; make it even"),
        (Diverged("step 12: loss is nan"), "diverged", "step 12: loss is nan"),
        (ValueError("a bug\nof ours"), "failed", "ValueError: a bug"),
        (AssertionError(), "failed", "AssertionError"),
        (JobFailed(Outcome(kind="killed", reason="process 1 was killed")), "failed", "process 1 was killed"),
    ],
)
def test_a_process_leaves_how_it_ended(folder: str, error: Exception | None, kind: str, reason: str) -> None:
    end(error)
    (left,) = outcome.left_in(folder).values()
    assert (left.kind, left.reason) == (kind, reason)


def test_a_defect_comes_with_the_last_lines_of_its_trace(folder: str) -> None:
    end(ZeroDivisionError("division by zero"))
    lines = outcome.left_in(folder)["0"].last_lines
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert any("raise error" in line for line in lines)


def test_who_only_lost_another_process_says_so(folder: str) -> None:
    from torch import distributed

    end(distributed.DistBackendError("NCCL error: remote process exited"), "0")
    end(RuntimeError("[/x/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer"), "1")
    end(RuntimeError("shapes do not match"), "2")
    assert [left.kind for left in outcome.left_in(folder).values()] == ["lost", "lost", "failed"]


def test_each_process_of_an_attempt_has_its_own_and_an_older_attempt_is_not_seen(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(None, "0")
    end(UserError("no"), "1")
    assert {who: left.kind for who, left in outcome.left_in(folder).items()} == {
        "0": "finished",
        "1": "refused",
    }
    monkeypatch.setenv("LATENT_GPT_OUTCOMES", folder.replace("1", "2"))
    assert outcome.left_in(folder.replace("1", "2")) == {}


def test_what_a_block_starts_elsewhere_does_not_move_its_own_outcome(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with outcome.recorded("tokenizer"):
        monkeypatch.setenv("LATENT_GPT_OUTCOMES", "/nowhere")
    assert outcome.left_in(folder)["tokenizer"].well


def test_what_is_no_outcome_is_passed_over(folder: str) -> None:
    end(None)
    Path(folder, "1.json").write_text("{}")
    assert outcome.left_in(folder).keys() == {"0"}


def test_where_nobody_asks_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATENT_GPT_OUTCOMES", raising=False)
    monkeypatch.chdir(tmp_path)
    end(UserError("no"))
    assert list(tmp_path.iterdir()) == []


def test_an_outcome_that_cannot_be_stored_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LATENT_GPT_OUTCOMES", str(tmp_path / "file"))
    end(UserError("the data is bad"))
    assert "warning: its outcome cannot be stored" in capsys.readouterr().err


def test_a_container_says_why_it_ended(folder: str, container: Path) -> None:
    end(Diverged("step 12: loss is nan"))
    said = json.loads(container.read_text())
    assert (said["kind"], said["reason"]) == ("diverged", "step 12: loss is nan")


def test_of_several_processes_in_a_container_the_first_to_fail_is_heard(folder: str, container: Path) -> None:
    end(UserError("the data is bad"), "1")
    end(ConnectionError("lost rank 1"), "0")
    assert "the data is bad" in container.read_text()


def test_a_step_has_the_last_word_in_its_container(folder: str, container: Path) -> None:
    end(ValueError("a bug"))
    outcome.tell_container("tokenizer failed: ValueError: a bug")
    assert container.read_text() == "tokenizer failed: ValueError: a bug"


def test_a_termination_message_fits(folder: str, container: Path) -> None:
    end(UserError("ä" * 10_000))
    assert len(container.read_bytes()) <= 4096
    assert json.loads(container.read_text())["kind"] == "refused"


def test_a_process_that_ends_well_leaves_no_termination_message(folder: str, container: Path) -> None:
    end(None)
    assert container.read_bytes() == b""


def test_a_termination_log_that_cannot_be_written_is_passed_over(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "TERMINATION_LOG", tmp_path)  # a folder
    end(UserError("no"))
    assert outcome.left_in(folder)["0"].reason == "no"


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (
            -9,
            "killed",
            "process 1 was killed (SIGKILL; most often the machine ran out of memory) (the last words)",
        ),
        (-11, "killed", "process 1 was ended by signal 11 (SIGSEGV) (the last words)"),
        (-99, "killed", "process 1 was ended by signal 99 (the last words)"),
        (3, "failed", "process 1 ended with exit code 3 (the last words)"),
    ],
)
def test_who_says_nothing_is_judged_by_its_exit_status(status: int, kind: str, reason: str) -> None:
    found = outcome.of_status("process 1", status, ["first", "  the last words "])
    assert (found.kind, found.reason) == (kind, reason)
    assert found.last_lines == ("first", "  the last words ")
    assert "()" not in outcome.of_status("process 1", status).reason


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("refused", "why"),
        ("diverged", "why"),
        ("failed", "tokenizer failed: why"),
        ("killed", "tokenizer failed: why"),
    ],
)
def test_it_is_said_who_failed_unless_the_reason_says_it_all(kind: outcome.Kind, told: str) -> None:
    assert Outcome(kind=kind, reason="why").told_of("tokenizer") == told


@pytest.mark.parametrize("error", [UserError("no"), Diverged("step 12: loss is nan")])
def test_an_error_for_people_crosses_processes_as_itself(error: UserError) -> None:
    again = outcome.of(error).error()
    assert (type(again), str(again)) == (type(error), str(error))


def test_any_other_end_is_a_failed_job_with_its_last_lines() -> None:
    error = outcome.of_status("process 1", -9, ["a", "b"]).error()
    assert isinstance(error, JobFailed)
    first, *rest = str(error).splitlines()
    assert first.startswith("process 1 was killed")
    assert rest == ["a", "b"]


@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        (3, "failed", "it left with exit code 3"),
        ("no such thing", "failed", "it left with exit code 1: no such thing"),
        (0, None, ""),
    ],
)
def test_who_leaves_in_the_middle_says_so_before_it_is_gone(
    folder: str, code: int | str, kind: str | None, reason: str
) -> None:
    with pytest.raises(SystemExit), outcome.recorded("1"):
        sys.exit(code)
    left = outcome.left_in(folder)
    assert [(end.kind, end.reason) for end in left.values()] == ([(kind, reason)] if kind else [])
