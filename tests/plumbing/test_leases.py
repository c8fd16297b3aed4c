"""Leases: who holds one, who else does, and what is left of those that ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from model.errors import UserError
from model.plumbing import leases, storage
from model.plumbing.leases import Lease
from tests import ROOT
from tests.proxies import Answer, Request, proxy

Process = subprocess.Popen[str]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest) -> str:
    """An empty store of each kind."""
    if request.param == "local":
        return str(request.getfixturevalue("store"))
    return str(request.getfixturevalue("services")["LATENT_GPT_STORE"])


@pytest.fixture
def work(root: str) -> str:
    """Folder of the leases of a piece of work that nobody wants yet."""
    return storage.join(root, "tokens/0123456789abcdef/leases")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that run out within seconds; S3 tells whole ones."""
    monkeypatch.setattr(leases, "RENEWAL", 1.0)
    monkeypatch.setattr(leases, "LIVE", 3.0)
    monkeypatch.setattr(leases, "AGAIN", 0.2)


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.05)


def test_a_lease_says_who_holds_it_and_is_gone_afterwards(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_POD", "some-pod")
    assert leases.age(work) is None
    with Lease(work, "tokens", run="smoke-1") as lease:
        assert lease.last
        assert storage.list_uris(work) == [storage.join(work, lease.holder)]
        assert json.loads(storage.read_bytes(storage.join(work, lease.holder))) == {
            "run": "smoke-1",
            "pod": "some-pod",
        }
        time.sleep(2.5)
        assert (age := leases.age(work)) is not None
        assert age < 2.4, "it is renewed"
    assert leases.age(work) is None


def test_two_who_want_the_same_know_of_each_other(work: str) -> None:
    with Lease(work, "tokens") as first:
        with Lease(work, "tokens") as second:
            assert not second.last
            until(lambda: not first.last)
        until(lambda: first.last)


def test_a_step_that_comes_again_is_not_kept_from_ending_its_job_by_itself(work: str) -> None:
    died = Lease(work, "tokens", "smoke-1")
    died._write()
    with Lease(work, "tokens", "smoke-1") as lease:
        assert lease.last
        with Lease(work, "tokens", "smoke-2") as other:
            assert not other.last
            until(lambda: not lease.last)
    died._write()
    with Lease(work, "tokens") as lease:
        assert not lease.last


def test_one_that_does_not_end_well_leaves_a_sign_of_when(work: str) -> None:
    with pytest.raises(KeyboardInterrupt), Lease(work, "tokens"):
        raise KeyboardInterrupt
    assert list(storage.list_sizes(work)) == [leases.LEFT]
    with Lease(work, "tokens") as lease:
        assert lease.last, "nobody holds one any more"
        until(lambda: lease._ages.get(leases.LEFT, 0) > 3)
    assert leases.age(work) is None, "what has run out is removed by who ends well"


def test_a_store_that_does_not_answer_says_nothing_of_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "S3_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(leases, "QUICK", (0.2, 1))
    with pytest.raises(UserError, match="cannot be reached"):
        leases.age("s3://bucket/leases")


def test_a_store_that_is_away_for_a_while_is_outlived_and_said_once(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    work = Path(store, "leases")
    with Lease(str(work), "tokens") as lease:
        work.rename(work.with_name("elsewhere"))
        work.write_text("in the way")
        until(lambda: not lease.last)
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 1
        assert said[0].startswith("tokens | warning: the lease of its job is not renewed for now: ")
        work.unlink()
        until(lambda: lease.last)
    assert capsys.readouterr().out == ""


HOLDER = """
import sys, time
from model.plumbing import leases
leases.RENEWAL, leases.LIVE = 1.0, 4.0
with leases.Lease(sys.argv[1], "tokens"):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP], ids=lambda one: one.name)
def test_the_lease_of_one_that_dies_runs_out(work: str, number: signal.Signals) -> None:
    command = [sys.executable, "-c", HOLDER, work]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "holds\n"
        with Lease(work, "tokens") as lease:
            assert not lease.last
            time.sleep(5)
            assert not lease.last, "it is renewed"
            other.send_signal(number)
            until(lambda: lease.last)
            assert (age := leases.age(work)) is not None
            assert age < 2.4, "the work is wanted still"
        other.kill()
    assert leases.age(work) is None, "and who ends well tidies up"


@pytest.mark.slow
def test_the_age_of_what_nobody_holds_any_more_grows(work: str) -> None:
    command = [sys.executable, "-c", HOLDER, work]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "holds\n"
        other.kill()
    until(lambda: (leases.age(work) or 0) > 4)


@pytest.mark.slow
@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "says nothing"])
def test_a_lease_that_runs_out_while_s3_is_away_is_renewed_when_it_is_back(
    services: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    silent: bool,
) -> None:
    monkeypatch.setattr(leases, "QUICK", (0.5, 2))
    away = threading.Event()

    def hook(request: Request, ask: Callable[[], Answer]) -> Answer:
        if away.is_set() and silent:
            time.sleep(3)
        return Answer.error(503, "SlowDown") if away.is_set() else ask()

    work = storage.join(services["LATENT_GPT_STORE"], "tokens/0123456789abcdef/leases")
    with proxy(services["S3_ENDPOINT_URL"], hook) as url:
        monkeypatch.setenv("S3_ENDPOINT_URL", url)
        with Lease(work, "tokens") as lease:
            away.set()
            with pytest.raises(UserError):
                leases.age(work)
            said = ""

            def is_said() -> bool:
                nonlocal said
                said += capsys.readouterr().out
                return "tokens | warning: the lease of its job is not renewed for now: s3://" in said

            until(is_said)
            until(lambda: not lease.last)
            look = "import sys; from model.plumbing import leases; print(leases.age(sys.argv[1]))"
            command = [sys.executable, "-c", look, work]  # by another way
            found = subprocess.run(
                command, env={**os.environ, **services}, cwd=ROOT, capture_output=True, text=True
            )
            assert float(found.stdout) >= 2, f"it has run out: {found}"
            away.clear()
            until(lambda: lease.last)
            assert (age := leases.age(work)) is not None
            assert age < 2.4
        assert (said + capsys.readouterr().out).count("not renewed") == 1
        assert leases.age(work) is None


def test_nothing_ends_the_renewals(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError

    with Lease(work, "tokens") as lease:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "ages", lambda uri: {}[uri])
            patch.setattr("model.plumbing.speech.warn", broken)
            until(lambda: not lease.last)
        until(lambda: lease.last)


# ── alone ───────────────────────────────────────────────────────────────────────────────────────────────

RUN = """
import os, sys, time
from model.plumbing import leases
leases.RENEWAL, leases.LIVE, leases.AGAIN = 1.0, float(sys.argv[4]), 0.2
if sys.argv[5]:
    leases.socket.gethostname = lambda: sys.argv[5]
inside, rounds, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
for _ in range(rounds):
    with leases.alone("images", "images/0123456789abcdef"):
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails when there are two
        print("inside", flush=True)
        time.sleep(seconds)
        os.unlink(inside)
"""


def run(inside: Path, rounds: int = 1, seconds: float = 0.0, live: float = 60.0, host: str = "") -> Process:
    """A process that does something alone, and fails when another does it at the same time."""
    command = [sys.executable, "-c", RUN, str(inside), str(rounds), str(seconds), str(live), host]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def inside(process: Process) -> None:
    """Wait until a run is inside."""
    assert process.stdout
    for line in process.stdout:
        if line == "inside\n":
            return
    raise AssertionError(process.communicate()[1])


@pytest.mark.slow
def test_many_who_do_the_same_are_never_two_at_once_and_all_get_in(work: str, tmp_path: Path) -> None:
    runs = [run(tmp_path / "inside", rounds=6, seconds=0.02) for _ in range(6)]
    for process in runs:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.count("inside\n") == 6
        assert out.count("images | waits for another run that does the same") <= 6


@pytest.mark.slow
def test_one_that_dies_keeps_nobody_waiting_on_its_machine(work: str, tmp_path: Path) -> None:
    first = run(tmp_path / "inside", seconds=600)
    inside(first)
    others = [run(tmp_path / "inside", seconds=1.0) for _ in range(3)]
    for process in others:
        assert process.stdout
        assert process.stdout.readline() == "images | waits for another run that does the same\n"
    time.sleep(12)  # who waits for long looks seldom
    (tmp_path / "inside").unlink()
    first.kill()  # and not waited for: it stays, as a zombie
    began = time.monotonic()
    until((tmp_path / "inside").exists)
    assert time.monotonic() - began < 1.5
    for process in others:
        assert process.wait(60) == 0, process.communicate()[1]
    first.communicate()


@pytest.mark.slow
def test_one_that_dies_elsewhere_keeps_others_waiting_until_its_lock_runs_out(
    work: str, tmp_path: Path
) -> None:
    first = run(tmp_path / "inside", seconds=600, live=4.0, host="another-pod")
    inside(first)
    others = [run(tmp_path / "inside", live=4.0) for _ in range(3)]
    time.sleep(6)  # it is renewed
    assert [process.poll() for process in others] == [None] * 3
    first.kill()
    (tmp_path / "inside").unlink()
    began = time.monotonic()
    for process in others:
        assert process.wait(30) == 0, process.communicate()[1]
    assert 1 < time.monotonic() - began < 15
    first.communicate()


def test_who_comes_late_with_a_number_that_was_used_has_lost(
    work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        with leases.alone("images", "images/x"):
            pass
    late = leases._Lock("images/x")
    looks = [{}, late._ages()]
    assert [name for name in looks[1] if name.isdigit()] == ["00000003"]
    with monkeypatch.context() as patch:
        patch.setattr(late, "_ages", lambda: looks.pop(0))
        assert not late.take()
    assert list(late._ages()) == ["00000003", "00000003.released"], "and leaves nothing behind"
    later = leases._Lock("images/x")
    looks = [late._ages(), late._ages()]
    assert late.take()
    with monkeypatch.context() as patch:
        patch.setattr(later, "_ages", lambda: looks.pop(0))
        assert not later.take(), "and so has who comes second with the same"


@pytest.fixture
def renewed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Waits for a whole renewal of a lock, by a thread that renews often."""
    renew, done = leases._Lock.renew, 0

    def counted(lock: leases._Lock) -> None:
        nonlocal done
        renew(lock)
        done += 1

    def wait() -> None:
        enough = done + 2  # one may be under way
        until(lambda: done >= enough)

    monkeypatch.setattr(leases, "RENEWAL", 0.05)
    monkeypatch.setattr(leases._Lock, "renew", counted)
    return wait


def test_a_lock_that_another_took_meanwhile_is_lost_for_good(
    work: str, monkeypatch: pytest.MonkeyPatch, renewed: Callable[[], None]
) -> None:
    monkeypatch.setattr(leases, "_now", lambda: 0.0)  # nothing is late by our clock
    other = leases._Lock("gc")
    with leases.alone("gc", "gc") as still_ours:
        renewed()
        still_ours()
        with monkeypatch.context() as patch:
            patch.setattr(leases, "LIVE", 0.0)  # it has run out
            assert other.take()
        renewed()
        with pytest.raises(UserError, match="may be another's; run it again"):
            still_ours()
        storage.delete(other._at(2))  # as a sweep does long afterwards
        renewed()
        with pytest.raises(UserError, match="may be another's; run it again"):
            still_ours()


def test_a_lock_that_was_renewed_too_late_is_lost_for_good_and_keeps_others_waiting(
    work: str, monkeypatch: pytest.MonkeyPatch, renewed: Callable[[], None]
) -> None:
    now = 0.0
    monkeypatch.setattr(leases, "_now", lambda: now)
    with leases.alone("gc", "gc") as still_ours:
        renewed()
        still_ours()
        now = 1000.0  # a laptop slept; another may have come and gone
        renewed()
        with pytest.raises(UserError, match="may be another's; run it again"):
            still_ours()
        assert not leases._Lock("gc").take()


def test_an_answer_that_is_lost_locks_nobody_out(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = storage.write_bytes

    def repeated(uri: str, data: bytes, if_absent: bool = False) -> None:
        written(uri, data, if_absent)
        if if_absent:
            raise FileExistsError(uri)

    monkeypatch.setattr(storage, "write_bytes", repeated)
    assert leases._Lock("register").take()
    assert not leases._Lock("register").take(), "this one's is another's"


def test_a_process_is_dead_when_it_is_gone_or_another_has_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    me = leases._this_process()
    assert not leases._is_dead(me)
    assert leases._is_dead(me | {"started": "1"})
    with subprocess.Popen(["true"]) as child:
        pass
    assert leases._is_dead(me | {"process": child.pid})
    assert not leases._is_dead(me | {"process": child.pid, "place": "elsewhere"})
    assert not leases._is_dead({})
    assert not leases._is_dead(me | {"process": 1, "started": leases._state(1)[1]}), "another user's"


def test_what_fails_within_lets_the_next_one_in(work: str) -> None:
    with pytest.raises(ZeroDivisionError), leases.alone("images", "images/x"):
        raise ZeroDivisionError
    assert leases._Lock("images/x").take()


def test_locks_lie_beside_assets(store: str) -> None:
    output = storage.join(store, "images/0123456789abcdef")
    with leases.alone("images", output):
        storage.delete_prefix(output)  # as ingest does with what is no use to it
        assert not leases._Lock(output).take()
    assert list(storage.list_sizes(store)) == [
        f"locks/images/0123456789abcdef/00000001{end}" for end in ("", ".released")
    ]


# ── pipeline runs ───────────────────────────────────────────────────────────────────────────────────────


def test_a_run_is_given_up_when_its_step_dies_and_not_between_two_steps(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def carry(run: str, end: type[BaseException] | None = None) -> bool:
        with suppress(Exception, SystemExit), leases.carried("tokens", run) as anew:
            if end:
                raise end
        return anew

    assert carry("smoke-1")  # nothing is known of it
    assert not carry("smoke-1")
    carry("smoke-2", ZeroDivisionError)
    assert carry("smoke-3", SystemExit)
    with leases.carried("tokens", "smoke-4"):
        time.sleep(4.2)
        assert leases.given_up() == ["smoke-3"], "no step of the others has died, and one is at work"
        monkeypatch.setattr(leases, "NEXT_STEP", 3.0)
        assert leases.given_up() == ["smoke-1", "smoke-2", "smoke-3"], "no next step has come"
    leases.forget("smoke-1")
    assert carry("smoke-1"), "it may have been ended"
    assert not carry("smoke-2"), "it has not"
    assert carry("smoke-3"), "it may have been, as its step died"


def test_a_run_without_a_name_or_a_store_is_carried_in_silence(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with leases.carried("tokens", "") as anew:
        assert not anew
    assert storage.list_sizes(store) == {}
    monkeypatch.delenv("LATENT_GPT_STORE")
    with leases.carried("tokens", "smoke-1") as anew:
        assert not anew
    assert capsys.readouterr().out == ""


def test_a_run_costs_a_step_three_requests(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("read_bytes", "write_bytes", "ages", "delete"):
        before = getattr(storage, name)

        def counted(*given: object, name: str = name, before: Callable[..., object] = before) -> object:
            asked.append(name)
            return before(*given)

        monkeypatch.setattr(storage, name, counted)
    with leases.carried("tokens", "smoke-1"):
        pass
    assert asked == ["read_bytes", "write_bytes", "write_bytes"]
