"""Progress as plain lines: they travel through torchrun, kfp and kubectl logs unchanged."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Prints how far a step is, how fast it goes and when it will be done.

    `transformer  step 340/2000  17%  loss 3.21  41k tok/s  ETA 1m12s`
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        per_count: float = 1.0,
        counted: str = "step",
        done: int = 0,
        every: float = 1.0,
        enabled: bool = True,
        out: TextIO | None = None,
    ) -> None:
        """
        Args:
            name: of the pipeline step.
            total: counts to the end; 0 if unknown, then no percent and no ETA.
            unit: of the rate, e.g. "tok" or "img".
            per_count: units in one count, e.g. tokens per optimiser step.
            counted: what is counted, e.g. "step" or "image".
            done: counts done before, by a run that this one resumes.
            every: least seconds between two lines; the last line always comes.
            enabled: False prints nothing (every rank but one).
        """
        self.name, self.total, self.unit = name, total, unit
        self.per_count, self.counted, self.every = per_count, counted, every
        self.enabled = enabled
        self._out = out
        self._start = self._last = time.monotonic()
        self._start_done = self._last_done = done
        self._said_last = False
        self._printed = False

    def update(self, done: int, **figures: float) -> None:
        """Say that `done` counts are behind us in all; figures such as `loss` are shown as they are."""
        now = time.monotonic()
        last = bool(self.total) and done >= self.total
        due = not self._printed or now - self._last >= self.every
        if not self.enabled or not (due or (last and not self._said_last)):
            return
        parts = [f"{self.counted} {done}/{self.total}" if self.total else f"{self.counted} {done}"]
        if self.total:
            parts.append(f"{100 * done // self.total}%")
        parts += [f"{name} {figure(value)}" for name, value in figures.items()]
        mean = (done - self._start_done) / max(now - self._start, 1e-9)  # counts per second
        lately = (done - self._last_done) / max(now - self._last, 1e-9)
        speed = lately if due else mean  # the last line may follow the one before at once
        if speed > 0:
            parts.append(f"{quantity(speed * self.per_count)} {self.unit}/s")
        if self.total and mean > 0:
            parts.append(f"ETA {duration((self.total - done) / mean)}")
        print(f"{self.name}  {'  '.join(parts)}", file=self._out or sys.stdout, flush=True)
        self._last, self._last_done, self._printed, self._said_last = now, done, True, last


def figure(value: float) -> str:
    """A number at three significant digits, without an exponent where it is readable without."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def quantity(value: float) -> str:
    """1234567 is 1.2M, 41234 is 41k, 512.3 is 512, 3.21 is 3.2."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{letter}" if value < 10 * limit else f"{value / limit:.0f}{letter}"
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """72.4 is 1m12s, 7260 is 2h01m, 5.2 is 5s."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
