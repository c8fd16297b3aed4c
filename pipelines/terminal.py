"""What a person sees of a run: the lines of its steps while it runs, and what came of it at the end."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from model.evaluation.gate import Verdict, shown
from model.plumbing import speech

HEADING = re.compile(r"\[\d+/\d+\] (\w+)")  # of a step


@dataclass
class Follower:
    """Turns a run's output into progress on the terminal, and remembers how its steps went."""

    steps: list[str]
    out: TextIO = sys.stdout
    under_way: list[str] = field(default_factory=list)  # steps that have started, and not ended
    seconds: dict[str, float] = field(default_factory=dict)  # of the steps that have ended well
    reused: set[str] = field(default_factory=set)
    last: str = ""  # the last line of a step, whoever printed it; KFP indents them, and not its own
    _started: list[str] = field(default_factory=list)  # steps, each once
    _open: bool = False  # a progress line stands on the terminal that the next one replaces

    @property
    def running(self) -> str:
        """The step that started last, of those that have not ended."""
        return self.under_way[-1] if self.under_way else ""

    def line(self, text: str) -> None:
        """Take one line of output."""
        if text[:1].isspace() and text.strip():
            self.last = text.strip()
        said = speech.read(text, self.steps)
        if said and said.started:
            for known in (self._started, self.under_way):  # a step that is tried again is one
                if said.name not in known:
                    known.append(said.name)
            number = self._started.index(said.name) + 1
            self._print(f"[{number}/{len(self.steps)}] {said.name}")
        elif said and said.name in self.under_way:
            who = f"{said.name} | " if len(self.under_way) > 1 else ""  # some run side by side on a cluster
            if said.seconds is not None:
                self.seconds[said.name] = said.seconds
                self.under_way.remove(said.name)
            if said.reused:
                self.reused.add(said.name)
            self._print(f"      {who}{said.text}", replaceable=bool(said.count and said.count.total))

    def notes(self, texts: list[str]) -> None:
        """Print what somebody else has to say."""
        for text in texts:
            self._print(f"      {text}")

    def _print(self, text: str, replaceable: bool = False) -> None:
        tty = self.out.isatty()
        if tty and self._open:
            self.out.write("\r\033[2K" if replaceable else "\n")
        self._open = tty and replaceable
        self.out.write(text if self._open else f"{text}\n")
        self.out.flush()

    def end_line(self) -> None:
        """Leave the terminal at the start of a line."""
        if self._open:
            self.out.write("\n")
            self._open = False


def summary(follower: Follower, folder: Path, total: float, registered: dict[str, Any] | None) -> str:
    """What came of a run, in a few lines.

    Args:
        follower: of the run.
        folder: the run's, with log and report.
        total: seconds from its start to its end.
        registered: `components.registration.Registered`, if the run ended with a model.
    """
    steps = sum(follower.seconds.values())
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in follower.seconds.items())
    lines = ["", f"finished in {total:.0f} s, {100 * (1 - steps / total):.0f} % of it outside the steps"]
    lines.append(f"{'steps':10}{times}")
    if reused := [name for name in follower.seconds if name in follower.reused]:
        lines.append(f"{'reused':10}{', '.join(reused)}")
    if registered:
        name, version = registered["model"], registered["version"]
        lines.append(f"{'model':10}{name} version {version}, {registered['alias']}")
        decided = Verdict.model_validate(registered["verdict"])
        lines.append(f"{'verdict':10}{decided.outcome}: {decided.reason}")
        lines += [
            f"{'':10}{what}: {ours}" + (f" (champion {theirs})" if theirs else "")
            for what, ours, theirs in shown(decided)
        ]
        lines.append(f"{'measured':10}on {registered['headline_of']}:")
        lines += [f"{'':10}{value} {what} ({note})" for value, what, note in registered["headline"]]
        lines.append(f"{'report':10}{folder / 'report.html'}")
        in_use = registered["alias"] == "champion"
        which = "" if in_use else f' ARGS="--model models:/{name}/{version}"'
        prompt = shlex.quote(registered["prompt"])
        lines.append(f"{'draw':10}make generate PROMPT={prompt} OUT=picture.png{which}")
    lines.append(f"{'MLflow':10}make mlflow-ui")
    lines.append(f"{'log':10}{folder / 'log.txt'}")
    return "\n".join(lines)
