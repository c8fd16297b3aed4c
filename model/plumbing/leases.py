"""Who wants a piece of work, said in the store: a job that nobody wants any more is to end.

A holder renews its object below a folder every half minute; one that dies stops, and its lease runs out. All
ages are by the store's clock, so that machines need not agree on the time.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from types import TracebackType
from typing import Self

from model.errors import UserError
from model.plumbing import environment, speech, storage

RENEWAL = 30.0  # seconds
LIVE = 3 * RENEWAL  # seconds since its last renewal for which a holder is taken to live
QUICK = (5.0, 3)  # seconds to wait for an answer of the store, and tries: the next renewal is a try, too
AGAIN = 5.0  # seconds until the next try of a renewal that failed
LEFT = "left"  # who leaves what is still under way writes it last: so that "nobody" has an age


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
            run: of the pipeline, for people who read the lease.
        """
        self.uri, self.name = uri, name
        self.holder = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.urandom(6).hex()}.json"
        pod = environment.POD.get() or socket.gethostname()
        self._content = json.dumps({"run": run, "pod": pod}).encode()
        self._ages: dict[str, float] = {}
        self._seen = -LIVE  # when `_ages` were those
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @property
    def last(self) -> bool:
        """Whether nobody else wanted the work when we renewed ours last; asks nobody.

        False where that is so long ago that it means nothing.
        """
        others = [age for name, age in self._ages.items() if name not in (self.holder, LEFT)]
        return time.monotonic() - self._seen < LIVE and all(age >= LIVE for age in others)

    def _write(self) -> None:
        began = time.monotonic()
        storage.write_bytes(storage.join(self.uri, self.holder), self._content)
        self._ages = storage.ages(self.uri)
        self._seen = began

    def _renew(self) -> None:
        said = False
        wait = RENEWAL
        while not self._end.wait(wait):
            try:
                with storage.hasty(*QUICK):
                    self._write()
                wait, said = RENEWAL, False
            except (UserError, OSError) as error:
                wait = AGAIN
                if not said:
                    speech.warn(self.name, f"the lease of its job is not renewed for now: {error}")
                    said = True

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(QUICK[0])  # a renewal under way would bring back what is deleted here
        gone = [self.holder]
        if kind is None:
            gone += [name for name, age in self._ages.items() if age >= LIVE]
        try:
            with storage.hasty(*QUICK):
                if kind is not None:
                    storage.write_bytes(storage.join(self.uri, LEFT), self._content)
                for name in gone:
                    storage.delete(storage.join(self.uri, name))
        except (UserError, OSError):
            pass  # it runs out by itself


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
