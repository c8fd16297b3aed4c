"""What a step says while it runs: lines that are written here, and read here, and nowhere else.

`NAME | text`, one line each, flushed at once: they travel through torchrun, kfp and kubectl logs, which may
indent them but change nothing else. A line counts only if it bears the name of a step that is known, so that
what a library prints is never taken for progress.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import TextIO

LINE = re.compile(r"\s*(\w+) \| (\S.*?)\s*")
DONE = re.compile(r"done in (\d+\.\d) s")
COUNT = re.compile(
    r"[a-z][a-z' ]* (?P<done>\d+)(?:/(?P<total>\d+)  \d+%(?:  .*?)?|  .*?)"
    r"(?:  ETA (?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?(?:(?P<s>\d+)s)?)?"
)


def say(name: str, text: str, out: TextIO | None = None) -> None:
    """Say something about the step `name`; a line break in `text` becomes a space."""
    line = f"{name} | {' '.join(text.splitlines())}\n"  # at once: several threads speak
    print(line, end="", file=out or sys.stdout, flush=True)


def started(name: str) -> None:
    """A step begins."""
    say(name, "started")


def done(name: str, seconds: float) -> None:
    """A step has ended well."""
    say(name, f"done in {seconds:.1f} s")


def reused(name: str, what: str) -> None:
    """A step found its work done before; `what` names it, e.g. by URI."""
    say(name, f"reused {what}")


def warn(name: str, text: str) -> None:
    """Something is not as it should be, and the step goes on."""
    say(name, f"warning: {text}")


@dataclass(frozen=True)
class Count:
    """How far a step is."""

    done: int
    total: int  # 0 if unknown
    eta: int  # seconds; 0 if unknown, or at the end


@dataclass(frozen=True)
class Said:
    """A line of a step, read."""

    name: str
    text: str

    @property
    def started(self) -> bool:
        """Whether it is the step's first line."""
        return self.text == "started"

    @property
    def seconds(self) -> float | None:
        """How long the step took, where it is its last line."""
        match = DONE.fullmatch(self.text)
        return float(match[1]) if match else None

    @property
    def reused(self) -> bool:
        """Whether the step found its work done before."""
        return self.text.startswith("reused ")

    @property
    def count(self) -> Count | None:
        """How far the step is, where it is a line of `Progress`."""
        match = COUNT.fullmatch(self.text)
        if not match:
            return None
        done, total, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return Count(done, total, 3600 * hours + 60 * minutes + seconds)


def read(line: str, names: Collection[str]) -> Said | None:
    """What one of the steps `names` said with this line of output; None for everybody else's lines."""
    match = LINE.fullmatch(line)
    return Said(match[1], match[2]) if match and match[1] in names else None


class Progress:
    """Prints how far a step is, how fast it goes and when it will be done.

    `transformer | step 340/2000  17%  loss 3.21  41k tok/s  ETA 1m12s`
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
        if done:
            self.note(f"goes on from {counted} {done}")

    def note(self, text: str) -> None:
        """Say something beside."""
        if self.enabled:
            say(self.name, text, self._out)

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
        say(self.name, "  ".join(parts), self._out)
        self._last, self._last_done, self._printed, self._said_last = now, done, True, last


def figure(value: float) -> str:
    """A number at three significant digits, without an exponent where it is readable without."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def quantity(value: float) -> str:
    """1234567 is 1.2M, 41234 is 41k, 512.3 is 512, 3.21 is 3.2."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
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
