"""Leases: who holds one, who else does, and what is left of those that ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from model.errors import UserError
from model.plumbing import leases, storage
from model.plumbing.leases import Lease


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def work(request: pytest.FixtureRequest) -> str:
    """Folder of the leases of a piece of work that nobody wants yet, in a store of each kind."""
    if request.param == "local":
        root = request.getfixturevalue("store")
    else:
        root = request.getfixturevalue("services")["LATENT_GPT_STORE"]
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
