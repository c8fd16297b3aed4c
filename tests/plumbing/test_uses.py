"""Steps that look for assets while a sweep is under way, stopped at every request to the store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from model.plumbing import assets, leases, storage, uses
from model.plumbing.assets import AssetWriter
from model.plumbing.sweeping import look, sweep

REQUESTS = ("read_bytes", "write_bytes", "listing", "list_sizes", "delete", "delete_all")


class Stopped:
    """A piece of work in a thread of its own that stands still before one of its requests."""

    def __init__(self, work: Callable[[], object], before: int) -> None:
        self.requests = 0
        self.stands = False
        self.still = threading.Event()  # it stands still, waits for the other one, or has ended
        self.failed: BaseException | None = None
        self._before = before
        self.go_on = threading.Event()
        self._work = work
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.failed = error
        self.still.set()

    def request(self) -> None:
        if self.requests == self._before:
            self.stands = True
            self.still.set()
            assert self.go_on.wait(20)
        self.requests += 1

    def end(self) -> None:
        self.go_on.set()
        self.thread.join(20)
        assert not self.thread.is_alive()
        assert self.failed is None, self.failed


@contextmanager
def watched(patch: pytest.MonkeyPatch, *works: Stopped) -> Iterator[None]:
    """Within the block they hear of their requests, and of having to wait."""

    def mine() -> Stopped | None:
        return next((one for one in works if one.thread is threading.current_thread()), None)

    def requested(real: Callable[..., Any]) -> Callable[..., Any]:
        def request(*arguments: Any, **options: Any) -> Any:
            if one := mine():
                one.request()
            return real(*arguments, **options)

        return request

    wait = leases._Lock.wait

    def waits(lock: leases._Lock, seconds: float) -> None:
        if one := mine():
            one.still.set()
        wait(lock, seconds)

    with patch.context() as now:
        for name in REQUESTS:
            now.setattr(storage, name, requested(getattr(storage, name)))
        now.setattr(leases._Lock, "wait", waits)
        yield


def write() -> AssetWriter:
    """What the step makes where it does not find it: the same bytes each time."""
    writer = AssetWriter("images", {"a": 1}, {})
    for name in ("0.tar", "1.tar"):
        writer.add_bytes(name, name.encode())
    return writer


def step() -> None:
    with leases.carried("images", "run"):
        uses.use("images", "run", write_at())
        found = assets.find(write_at())
        if not found:
            found = write().finish({})
        used.append(found)
        assert assets.find(write_at()) == found


def gc() -> None:
    with uses.sweep() as still_ours:
        sweep(look(list, spared=0.0), still_ours)


def write_at() -> str:
    return AssetWriter("images", {"a": 1}, {}).uri


used: list[assets.Manifest] = []


@pytest.mark.slow
def test_a_run_that_starts_during_a_sweep_loses_nothing(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step stands still at each of its requests, the sweep goes as far as each of its own, the step goes
    on to its end or until it has to wait, the sweep ends."""
    monkeypatch.setattr(leases, "LOOKS", (0.001, 0.002))
    waited = kept = made = 0
    far = 0  # requests of the sweep
    for at in range(50):
        for until in range(50):
            storage.delete_prefix(store)
            write().finish({})
            one, other = Stopped(step, at), Stopped(gc, until)
            used.clear()
            with watched(monkeypatch, one, other):
                one.thread.start()
                assert one.still.wait(20)
                other.thread.start()
                assert other.still.wait(20)
                deleted = assets.find(write_at()) is None
                if one.stands:
                    one.still.clear()
                    one.go_on.set()
                    assert one.still.wait(20)
                waited += one.thread.is_alive()
                other.end()
                one.end()
            assert len(used) == 1
            assert assets.find(write_at()) == used[0], f"lost: the step at {at}, the sweep at {until}"
            kept, made = kept + (not deleted), made + deleted
            far = max(far, other.requests)
            if other.requests <= until:
                break
        if one.requests <= at:
            break
    assert at > 6, "there is something to stop at"
    assert far > 10, "likewise"
    assert waited > 10, "a step waits for a sweep"
    assert made > 5, "one that comes late makes it anew"
    assert kept > 5, "one that comes early keeps it"


def test_what_is_used_is_told_by_run(store: str) -> None:
    uses.use("tokens", "smoke-1", f"{store}/images/{'0' * 16}", f"{store}/tokens/{'1' * 16}")
    uses.use("images", "", f"{store}/images/{'0' * 16}")
    assert set(uses.said()) == {
        f"smoke-1/images-{'0' * 16}",
        f"smoke-1/tokens-{'1' * 16}",
        f"no-run/images-{'0' * 16}",
    }
    uses.forget([f"smoke-1/images-{'0' * 16}"])
    assert len(uses.said()) == 2


def test_a_sweep_waits_for_another_one_and_a_step_for_both(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(leases, "LOOKS", (0.01, 0.02))
    order: list[str] = []

    def another() -> None:
        with uses.sweep():
            order.append("another")

    def late() -> None:
        uses.use("images", "run", f"{store}/images/{'0' * 16}")
        order.append("step")

    threads = [threading.Thread(target=another), threading.Thread(target=late)]
    with uses.sweep() as still_ours:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(0.3)
        still_ours()
        order.append("first")
    for thread in threads:
        thread.join(20)
    assert order[0] == "first"
    assert set(order[1:]) == {"another", "step"}
    said = capsys.readouterr().out
    assert "gc | waits for another run that does the same" in said
    assert "images | waits for `latent-gpt gc`, which is at work" in said
