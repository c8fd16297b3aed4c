"""Ends before the end: where they are raised, where they wait for a step, and that all processes agree."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from model.errors import Orphaned, Stopped, UserError
from model.plumbing import leases, stopping
from model.plumbing.distributed import Distributed, setup
from model.plumbing.stopping import Stopping
from tests.ranks import two_ranks

ALONE = Distributed(rank=0, world=1, local_rank=0, device=torch.device("cpu"))


class Kept:
    """Notes what it is asked to keep."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.waited = False

    def save(self, done: int) -> None:
        self.steps.append(done)

    def wait(self) -> None:
        self.waited = True


@pytest.fixture(autouse=True)
def usual_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_before_a_loop_it_is_raised_where_the_process_is_and_only_once() -> None:
    told = Stopping().listen()
    with pytest.raises(Stopped, match=r"told to end \(SIGTERM\), before its work was done"):
        sigterm()
    sigterm()  # while the first one unwinds
    assert told.why == stopping.TOLD


def test_what_is_told_to_end_while_it_compiles_is_stopped_and_not_failed() -> None:
    """torch raises an error of its own from whatever happens in a backend."""
    Stopping().listen()

    def backend(*_: object) -> Callable[..., object]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    with pytest.raises(Stopped, match="told to end"), stopping.unwrapped():
        compiled(torch.ones(2))


def test_what_goes_wrong_at_the_end_is_not_hidden() -> None:
    def unwound() -> None:
        try:
            raise Stopped("told to end")
        finally:
            raise UserError("what it had cannot be stored")

    with pytest.raises(UserError, match="cannot be stored"), stopping.unwrapped():
        unwound()


def test_within_a_loop_the_step_is_kept_first() -> None:
    kept = Kept()
    with Stopping().listen().of(ALONE, orphan_minutes=10) as told:
        told.heed(1, 9, kept)
        sigterm()  # nothing is raised here
        assert kept.steps == []
        with pytest.raises(Stopped, match="before step 3; a checkpoint of step 2 is kept"):
            told.heed(2, 9, kept)
    assert (kept.steps, kept.waited) == ([2], True)


def test_after_the_last_step_the_rest_is_done() -> None:
    kept = Kept()
    told = Stopping().listen().of(ALONE, orphan_minutes=10)
    told.heed(8, 9, kept)
    sigterm()
    told.heed(9, 9, kept)
    assert kept.steps == []


# ── ranks ───────────────────────────────────────────────────────────────────────────────────────────────


def _steps_in_ranks(folder: str) -> None:
    kept = Kept()

    def loop(told: Stopping, rank: int) -> None:
        for done in range(1, 10):
            if (rank, done) == (1, 4):
                sigterm()
            told.heed(done, 9, kept)

    with (
        setup() as processes,
        Stopping().listen().of(processes, orphan_minutes=10) as told,
        pytest.raises(Stopped, match="before step 6; a checkpoint of step 5 is kept"),
    ):
        loop(told, processes.rank)
    Path(folder, str(processes.rank)).write_text(str(kept.steps))


@pytest.mark.slow
def test_all_processes_end_at_the_step_after_the_one_at_which_one_was_told(
    store: str, tmp_path: Path
) -> None:
    two_ranks(_steps_in_ranks, store, str(tmp_path))
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["[5]", "[5]"]


# ── whether anybody wants it ────────────────────────────────────────────────────────────────────────────


def goes_on(told: Stopping, seconds: float = 2.0) -> Kept:
    """A loop that lasts until it is stopped, or for that time."""
    kept, done, until = Kept(), 0, time.monotonic() + seconds
    while time.monotonic() < until:
        done += 1
        told.heed(done, 10**9, kept)
        time.sleep(0.01)
    return kept


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leases of these ages, one after the other, the last one for ever."""
    monkeypatch.setattr(stopping, "EVERY", 0.05)
    monkeypatch.setattr(leases, "LIVE", 0.1)
    monkeypatch.setenv("LATENT_GPT_LEASES", "s3://bucket/tokens/key/leases")

    def answer(*ages: float | UserError | None) -> None:
        left = list(ages)

        def age(uri: str) -> float | None:
            assert uri == "s3://bucket/tokens/key/leases"
            found = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(found, UserError):
                raise found
            return found

        monkeypatch.setattr(leases, "age", age)

    return answer


def test_whom_nobody_wants_keeps_the_step_and_is_orphaned(answered: Callable[..., None]) -> None:
    answered(5.0, 200.0, 601.0)
    with Stopping().of(ALONE, orphan_minutes=10) as told, pytest.raises(Orphaned, match="for 10 minutes"):
        goes_on(told)


def test_without_any_lease_the_time_counts_from_the_first_look(answered: Callable[..., None]) -> None:
    answered(None)
    with Stopping().of(ALONE, orphan_minutes=0.5 / 60) as told:
        began = time.monotonic()
        with pytest.raises(Orphaned):
            goes_on(told)
    assert time.monotonic() - began > 0.5


def test_a_store_that_does_not_answer_is_no_expired_lease(answered: Callable[..., None]) -> None:
    answered(0.0, UserError("s3://bucket cannot be reached"))
    with Stopping().of(ALONE, orphan_minutes=0.1 / 60) as told:
        assert goes_on(told, seconds=1.0).steps == []


def test_a_lease_that_is_renewed_soon_after_a_store_was_away_has_not_run_out(
    answered: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LIVE", 60.0)
    answered(5.0, UserError("s3://bucket cannot be reached"), 700.0, 700.1, 5.0)
    with Stopping().of(ALONE, orphan_minutes=10) as told:
        assert goes_on(told, seconds=1.0).steps == []


def test_a_job_without_a_loop_is_unwound_when_it_is_orphaned(answered: Callable[..., None]) -> None:
    answered(700.0)
    with pytest.raises(Orphaned), Stopping().listen().of(ALONE, orphan_minutes=10):
        time.sleep(5)


def test_only_the_main_process_looks_and_only_where_there_are_leases(
    answered: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered(700.0)
    other = Distributed(rank=1, world=1, local_rank=1, device=torch.device("cpu"))
    with Stopping().of(other, orphan_minutes=10) as told:
        goes_on(told, seconds=0.3)
    monkeypatch.delenv("LATENT_GPT_LEASES")
    with Stopping().of(ALONE, orphan_minutes=10) as told:
        goes_on(told, seconds=0.3)
