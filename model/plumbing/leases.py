"""Who wants a piece of work, and who is at it: said in the store, where runs on all machines see it.

- A `Lease` wants what a job makes, beside others: a job that nobody wants any more is to end.
- `alone` keeps others from the same work as long as it is done.
- A step that has `carried` a pipeline run to its own end, or to the next step's start, has not given it up.

A holder renews its object every half minute; one that dies stops, and what it held runs out. All ages are by
the store's clock, so that machines need not agree on the time.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from model.errors import UserError
from model.plumbing import environment, speech, storage

RENEWAL = 30.0  # seconds
LIVE = 3 * RENEWAL  # seconds since its last renewal for which a holder is taken to live
QUICK = (5.0, 3)  # seconds to wait for an answer of the store, and tries: the next renewal is a try, too
AGAIN = 5.0  # seconds until the next try of a renewal that failed
LEFT = "left"  # who leaves what is still under way writes it last: so that "nobody" has an age
RELEASED = ".released"  # ending of what says that a lock is nobody's any more
LOOKS = (0.1, 2.0)  # seconds from look to look of one who waits for a lock: at first, and later
GLANCE = 0.2  # seconds until it sees that a holder on its own machine has died
LOCKS = "locks"  # folder of the store
RUNS = "runs"  # folder of the store: what becomes of each run that may not be over
CARRIED, WAITS = b"carried", b"waits for its next step"
NEXT_STEP = 3600.0  # seconds that a step may take to start: its pod may wait for room


class _Renewal:
    """Renews from a thread of its own until it is stopped; a store that is away is outlived and said once."""

    def __init__(self, name: str, what: str, renew: Callable[[], None]) -> None:
        self._name, self._what, self._renew = name, what, renew
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, patience: float = QUICK[0]) -> None:
        """Return when no renewal is under way, or after so many seconds."""
        self._end.set()
        self._thread.join(patience)

    def _run(self) -> None:
        said = False
        wait = RENEWAL
        while not self._end.wait(wait):
            try:
                with storage.hasty(*QUICK):
                    self._renew()
                wait, said = RENEWAL, False
            except Exception as error:  # whatever it is: who does not renew is taken for dead
                wait = AGAIN
                if not said:
                    said = True
                    with suppress(OSError, ValueError):  # nobody reads our output any more
                        speech.warn(self._name, f"{self._what} is not renewed for now: {error}")


class Unwanted:
    """Whether nobody wants a job any more, by looks at the age of its newest lease.

    They have to say so for as long as a lease may be late: who was cut off from the store as well, or slept,
    is given the time to renew.
    """

    def __init__(self, minutes: float, more: float = 0.0) -> None:
        """
        Args:
            minutes: without a lease, after which nobody does.
            more: seconds for which looks have to say so beyond that time.
        """
        self._limit = 60 * minutes
        self._more = more
        self._since: float | None = None

    def by(self, age: float) -> bool:
        """Whether that is so after one more look, which found the newest lease of this age, in seconds."""
        now = time.monotonic()
        self._since = (self._since or now) if age > self._limit else None
        return self._since is not None and now - self._since >= LIVE + self._more


class Lease:
    """Wants what a job makes, while the block runs; learns thereby whether others want it, too.

    A block that ends well deletes its lease. One that ends otherwise leaves a sign of when: the job may run
    on, and its leases have run out some time after that, not never.
    """

    def __init__(self, uri: str, name: str, run: str = "") -> None:
        """
        Args:
            uri: folder of the leases of this piece of work, see `JobSpec.leases`.
            name: of the step, for what is said.
            run: of the pipeline. Of one run only one step at a time wants the same: a lease that is there
                already is that of the same step, which has died and comes again.
        """
        self.uri, self.name = uri, name
        self._kin = f"{hashlib.sha256(run.encode()).hexdigest()[:8]}-" if run else ""
        self.holder = f"{self._kin}{os.urandom(6).hex()}.json"
        self._content = json.dumps({"run": run, "pod": environment.pod()}).encode()
        self._ages: dict[str, float] = {}
        self._seen = -LIVE  # when `_ages` were those
        self._renewal = _Renewal(name, "the lease of its job", self._write)

    @property
    def last(self) -> bool:
        """Whether nobody else wanted the work when we renewed ours last; asks nobody.

        False where that is so long ago that it means nothing. The same step's before it died is nobody's.
        """
        others = [
            age
            for name, age in self._ages.items()
            if name not in (self.holder, LEFT) and not (self._kin and name.startswith(self._kin))
        ]
        return time.monotonic() - self._seen < LIVE and all(age >= LIVE for age in others)

    def _write(self) -> None:
        began = time.monotonic()
        storage.write_bytes(storage.join(self.uri, self.holder), self._content)
        self._ages = storage.ages(self.uri)
        self._seen = began

    def __enter__(self) -> Self:
        self._write()
        self._renewal.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._renewal.stop()  # one under way would bring back what is deleted here
        gone = [self.holder]
        if kind is None:
            gone += [name for name, age in self._ages.items() if age >= LIVE]
        with suppress(UserError, OSError), storage.hasty(*QUICK):  # where this fails, it runs out
            if kind is not None:
                storage.write_bytes(storage.join(self.uri, LEFT), self._content)
            for name in gone:
                storage.delete(storage.join(self.uri, name))


def age(uri: str) -> float | None:
    """Seconds since somebody wanted a piece of work last, by the store's clock; None if nobody ever did.

    Args:
        uri: folder of its leases.

    Raises:
        UserError: the store does not answer, which says nothing of the leases.
    """
    try:
        with storage.hasty(*QUICK):
            return min(storage.ages(uri).values(), default=None)
    except OSError as error:
        raise UserError(f"{uri}: {error}") from None


@contextmanager
def alone(
    name: str, work: str, saying: str = "waits for another run that does the same"
) -> Iterator[Callable[[], None]]:
    """Wait until no other run is at the same work, then do it; the next one finds it done.

    One that dies keeps nobody waiting on its own machine, and a minute and a half elsewhere.

    Args:
        name: of the step, for what is said.
        work: URI of what is made, or any name: the same for all who are not to do it at once.
        saying: what the step says where it waits.

    Yields:
        What raises a UserError once the lock may soon be another's, as it was not renewed, and from then on:
        before what must not be done by two.
    """
    lock = _Lock(work)
    _wait_while(lambda: not lock.take(), lock, name, saying)

    def still_ours() -> None:
        if lock.may_be_anothers():
            raise UserError(f"{name}: its lock was not renewed in time, and may be another's; run it again")

    renewal = _Renewal(name, "its lock", lock.renew)
    renewal.start()
    try:
        yield still_ours
    finally:
        renewal.stop()
        with suppress(UserError, OSError), storage.hasty(*QUICK):  # where this fails, it runs out
            lock.release()


def wait_for(name: str, work: str, saying: str) -> None:
    """Return when nobody is at some work that is done alone.

    Args:
        name: of the step.
        work: as of `alone`.
        saying: what the step says where it waits.
    """
    lock = _Lock(work)
    _wait_while(lock.is_held, lock, name, saying)


@dataclass(frozen=True)
class Lock:
    """What the store has of a lock."""

    held: bool  # by somebody who lives, as far as the store tells
    names: list[str]  # of its objects, below `<store>/locks`
    age: float  # seconds since the last one was written


def locks() -> dict[str, Lock]:
    """All locks of this store by their work; of assets `<kind>/<key>`.

    Raises:
        UserError: the store does not answer.
    """
    works: dict[str, dict[str, float]] = {}
    for path, age in storage.ages(storage.join(storage.store_root(), LOCKS)).items():
        work, _, name = path.rpartition("/")
        works.setdefault(work, {})[name] = age
    found = {}
    for work, ages in works.items():
        highest = _name(_highest(ages))
        held = f"{highest}{RELEASED}" not in ages and ages.get(highest, LIVE) < LIVE
        found[work] = Lock(held, [f"{work}/{name}" for name in ages], min(ages.values()))
    return found


def _wait_while(condition: Callable[[], bool], lock: _Lock, name: str, saying: str) -> None:
    wait, longest = LOOKS
    waits = False
    while condition():
        if not waits:
            waits = True
            speech.say(name, saying)
        lock.wait(wait)
        wait = min(1.2 * wait, longest)


def _now() -> float:
    """Seconds that pass while the machine sleeps, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class _Lock:
    """Objects with numbers, of which the highest is the lock; whoever writes the next one first has it.

    That one may be written when the highest is released, has run out or is a dead process's. The highest is
    never deleted, so a number counts once: who comes late with a lower one sees the higher, and has lost.
    """

    def __init__(self, work: str) -> None:
        root = storage.store_root()
        self.uri = storage.join(root, LOCKS, work.removeprefix(root))  # an asset may be deleted as a whole
        self._holder = {"holder": os.urandom(8).hex(), **_this_process()}
        self._content = json.dumps(self._holder).encode()
        self._number = self._seen = 0  # ours, and the highest at the last look
        self._holders: dict[int, dict[str, Any]] = {}  # as they were read
        self._renewed = 0.0  # when the writing of ours began that came through last
        self._lost = False

    def take(self) -> bool:
        """Whether it is ours from now on."""
        if self.is_held():
            return False
        self._number = self._seen + 1
        self._renewed = _now()
        try:
            storage.write_bytes(self._at(self._number), self._content, if_absent=True)
        except FileExistsError:
            if self._read(self._number) != self._holder:  # else that was the repetition of a request
                return False
        ages = self._ages()
        if _highest(ages) > self._number:
            storage.delete(self._at(self._number))
            return False
        for name in ages:
            if int(name.removesuffix(RELEASED)) < self._number:
                storage.delete(storage.join(self.uri, name))
        return True

    def is_held(self) -> bool:
        """Whether it is somebody's now."""
        ages = self._ages()
        highest = self._seen = _highest(ages)
        return bool(highest) and not (
            f"{_name(highest)}{RELEASED}" in ages
            or ages[_name(highest)] >= LIVE
            or _is_dead(self._read(highest))
        )

    def wait(self, seconds: float) -> None:
        """Return after so long, or when a holder on this machine has died."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not _is_dead(self._holders.get(self._seen, {})):
            time.sleep(min(left, GLANCE))

    def renew(self) -> None:
        """Make it young again. Once it may have been another's it is lost, and only keeps others waiting."""
        began = _now()
        storage.write_bytes(self._at(self._number), self._content)
        # Too late is lost, too: the higher number may be about to be written, or gone again.
        self._lost = _highest(self._ages()) > self._number or self.may_be_anothers()
        self._renewed = began

    def may_be_anothers(self) -> bool:
        """Whether it is another's, may be so soon, or may have been so; asks nobody."""
        return self._lost or _now() - self._renewed > 2 * RENEWAL

    def release(self) -> None:
        """Let the next one have it."""
        storage.write_bytes(self._at(self._number) + RELEASED, self._content)

    def _ages(self) -> dict[str, float]:
        found = storage.ages(self.uri).items()
        return {name: age for name, age in found if name.removesuffix(RELEASED).isdigit()}

    def _at(self, number: int) -> str:
        return storage.join(self.uri, _name(number))

    def _read(self, number: int) -> dict[str, Any]:
        """Who wrote it; nothing if that cannot be told."""
        if number not in self._holders:
            try:
                self._holders[number] = dict(json.loads(storage.read_bytes(self._at(number))))
            except (storage.NotFound, ValueError, TypeError):
                return {}
        return self._holders[number]


def _name(number: int) -> str:
    return f"{number:08d}"


def _highest(ages: dict[str, float]) -> int:
    return max((int(name) for name in ages if name.isdigit()), default=0)


def _this_process() -> dict[str, Any]:
    """What tells it from all others, in its place and elsewhere; nothing where the kernel does not say it."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
        return {"place": place, "process": os.getpid(), "started": _state(os.getpid())[1]}
    return {}


def _state(process: int) -> tuple[str, str]:
    """Of a process of this place: state and time of its start, fields 3 and 22 of proc_pid_stat(5)."""
    told = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return told[0], told[19]


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether a holder is a process of this place that is no more; what is elsewhere cannot be told."""
    if not holder.get("place") or holder["place"] != _this_process().get("place"):
        return False
    try:
        os.kill(holder["process"], 0)
        state, started = _state(holder["process"])
    except ProcessLookupError:
        return True
    except OSError:  # another user's, of which nothing more may be seen
        return False
    return state in "ZX" or started != holder["started"]


@contextmanager
def carried(name: str, run: str) -> Iterator[bool]:
    """Say in the store that a step carries a pipeline run, as long as the block runs.

    This is book-keeping: a store that is away is not waited for. Yields whether the run may have been ended
    as given up, since the step before did not come to its end, or long ago.

    Args:
        name: of the step.
        run: of the pipeline; "" is none, and nothing is said.
    """
    if not run:
        yield False
        return

    def say(what: bytes) -> None:
        storage.write_bytes(storage.join(storage.store_root(), RUNS, run), what)

    before = WAITS
    with suppress(UserError, OSError), storage.hasty(*QUICK):
        before = _became_of(run)
        say(CARRIED)
    renewal = _Renewal(name, "what tells that its run goes on", lambda: say(CARRIED))
    renewal.start()
    try:
        yield before != WAITS
    except Exception:
        renewal.stop()
        with suppress(UserError, OSError), storage.hasty(*QUICK):
            say(WAITS)
        raise
    except BaseException:  # told to end: nothing is said, and there is no time for more
        renewal.stop(patience=0)
        raise
    renewal.stop()
    with suppress(UserError, OSError), storage.hasty(*QUICK):
        say(WAITS)


def given_up() -> list[str]:
    """The pipeline runs of this store that no step carries any more, among them those that are over.

    Raises:
        UserError: the store does not answer.
    """
    return [run for run, lives in _runs().items() if not lives]


def living() -> list[str]:
    """The pipeline runs of this store that a step carries, or that wait for the next. Raises as above."""
    return [run for run, lives in _runs().items() if lives]


def _runs() -> dict[str, bool]:
    """Whether each run of this store lives."""
    ages = storage.ages(storage.join(storage.store_root(), RUNS))
    return {run: age < LIVE or (age < NEXT_STEP and _became_of(run) != CARRIED) for run, age in ages.items()}


def forget(run: str) -> None:
    """Say nothing of a run any more."""
    storage.delete(storage.join(storage.store_root(), RUNS, run))


def _became_of(run: str) -> bytes:
    try:
        return storage.read_bytes(storage.join(storage.store_root(), RUNS, run))
    except storage.NotFound:
        return b""
