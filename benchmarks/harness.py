"""Ours beside its peers in one run: interleaved timing, the machine's floors, and the table of rows.

A benchmark module exposes `ROWS`, and `GPU_ROWS` where the GPU half has the row too: number of the row → its
`Part`s. `python -m benchmarks` runs them.

    def nearest_code(device: torch.device) -> Iterator[Row]:
        comparison = compare({"ours": ours, "cdist": theirs}, device, same=torch.equal)
        yield comparison.row(7, "nearest code", amount=n, unit="vectors/s", goals={"cdist": 1.2})

    ROWS = {7: [Part("nearest code", nearest_code)]}
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from model.plumbing import environment

LEFT_OUT = "left out: "  # begins the note of a part that a run had no time for
FLOOR = "floor"  # the name under which goals and figures speak of the machine's limit
IDLE = 0.2  # cores that a quiet machine may use


# ── what a row says ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Ratio:
    """How many times better ours is than a peer, pair by pair."""

    median: float
    low: float  # of the pairs
    high: float

    def __str__(self) -> str:
        return f"{_short(self.median)}x ({_short(self.low)} to {_short(self.high)})"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    number: int  # of the work; one work may have several lines
    work: str
    unit: str  # of the figures
    figures: dict[str, float]  # ours first, then the peers: medians
    ratios: dict[str, Ratio] = field(default_factory=dict)  # peer → ours beside it
    floor: float | None = None  # the best that this machine could do, in `unit`
    share: float | None = None  # how much of the floor ours reaches, 1 is all
    goal: str = ""
    met: bool | None = None  # None: there is no goal here, or nothing to judge it by
    note: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)  # every round, as measured


@dataclass(frozen=True)
class Part:
    """What is measured, or left out, as one: a line of the table, or a few that belong together."""

    work: str  # its name in the table where it breaks or is left out
    measure: Callable[[torch.device], Iterator[Row]]
    later: bool = False  # it waits until the parts of all rows that do not wait are done


@dataclass(frozen=True)
class Comparison:
    """Seconds per round of several ways to do the same; the first is ours."""

    seconds: dict[str, list[float]]
    different: tuple[str, ...] = ()  # peers whose result is not ours

    def median(self, name: str) -> float:
        """Median seconds of one call."""
        return statistics.median(self.seconds[name])

    def ratio(self, peer: str) -> Ratio:
        """Seconds of the peer over seconds of ours, within each round: a slow moment hits both."""
        ours = next(iter(self.seconds.values()))
        pairs = [theirs / mine for mine, theirs in zip(ours, self.seconds[peer], strict=True)]
        return Ratio(statistics.median(pairs), min(pairs), max(pairs))

    def row(
        self,
        number: int,
        work: str,
        *,
        amount: float,
        unit: str,
        goals: Mapping[str, float] | None = None,
        floor: float | None = None,
        note: str = "",
    ) -> Row:
        """The row that this comparison makes.

        Args:
            amount: what one call does, in the unit before "/s", e.g. tokens.
            goals: peer → least ratio; "floor" → least share of the floor.
            floor: the highest rate that this machine allows, in `unit`.
        """
        ours, *peers = self.seconds
        figures = {name: amount / self.median(name) for name in self.seconds}
        ratios = {peer: self.ratio(peer) for peer in peers}
        share = figures[ours] / floor if floor else None
        goal, met = judge({peer: ratio.median for peer, ratio in ratios.items()}, share, goals or {})
        if self.different:
            met = False
            note = " ".join([f"FAILED: the result differs from that of {', '.join(self.different)}.", note])
        return Row(number, work, unit, figures, ratios, floor, share, goal, met, note.strip(), self.seconds)


def judge(
    ratios: Mapping[str, float], share: float | None, goals: Mapping[str, float]
) -> tuple[str, bool | None]:
    """The goals in words, and whether all are met; None where there are none.

    Raises:
        KeyError: a goal names a peer that was not measured.
    """
    words, met = [], True
    for name, least in goals.items():
        if name == FLOOR:
            words.append(f"≥ {least:.0%} of the floor")
            met &= share is not None and share >= least
        else:
            words.append(f"≥ {least:g}x {name}")
            met &= ratios[name] >= least
    return "; ".join(words), met if goals else None


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────


def compare(
    ways: Mapping[str, Callable[[], Any]],
    device: torch.device | str = "cpu",
    *,
    rounds: int = 5,
    warmup: int = 1,
    same: Callable[[Any, Any], bool] | None = None,
    incomparable: Sequence[str] = (),
    before: Callable[[], None] | None = None,
) -> Comparison:
    """Time several ways to do the same, side by side.

    Every round calls each way once, in an order that moves on by one from round to round, so that none is
    always first. Garbage is collected between calls, never within one.

    Args:
        ways: name → call; the first is ours, and every result is checked against its result.
        warmup: untimed calls of each way; compilation happens there.
        same: whether two results agree, given ours and a peer's; asked once, after the warm-up.
        incomparable: peers that `same` is not asked about, because they do the work with other weights.
        before: untimed, before every call.
    """
    device = torch.device(device)
    names = list(ways)
    different: list[str] = []
    results: dict[str, Any] = {}
    for turn in range(max(warmup, 1 if same else 0)):
        for name in names:
            if before:
                before()
            result = ways[name]()
            if turn == 0 and same:
                results[name] = result
    if same:
        asked = [name for name in names[1:] if name not in incomparable]
        different = [name for name in asked if not same(results[names[0]], results[name])]
    results.clear()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if before:
                before()
            seconds[name].append(timed(ways[name], device))
    return Comparison(seconds, tuple(different))


def timed(call: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Seconds of one call, to the end of what it started on the device."""
    on_gpu = torch.device(device).type == "cuda"
    gc.collect()
    gc.disable()
    try:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    finally:
        gc.enable()
    del result
    return seconds


def peak_memory(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes by which one call raises the memory in use at its height, its result included.

    On CPU that is the resident memory of the process (Linux): nothing else may run in it meanwhile.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size so far is forgotten
    start = _status("VmRSS")
    call()
    return _status("VmHWM") - start


def highest_memory() -> int:
    """Bytes that were resident in this process at its height: since its `exec`, unlike getrusage's figure,
    which begins with what the parent held."""
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


# ── the machine's floors ────────────────────────────────────────────────────────────────────────────────


def best_seconds(call: Callable[[], Any], device: torch.device | str, rounds: int = 10) -> float:
    """The fastest of several calls: what the machine can do when nothing disturbs it."""
    call()
    return min(timed(call, device) for _ in range(rounds))


@functools.cache
def copy_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes per second that a plain copy reads and writes, both counted."""
    size = 2**30 if torch.device(device).type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device)


@functools.cache
def gemm_rate(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> float:
    """Floating-point operations per second of a large matrix product, as PyTorch's defaults compute it."""
    side = 8192 if torch.device(device).type == "cuda" else 2048
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / best_seconds(lambda: left @ right, device)


def others(seconds: float = 0.3) -> float:
    """Cores that other processes keep busy while this one waits (Linux).

    Not the load average, which still remembers our own row before.
    """
    before = _busy()
    time.sleep(seconds)
    return (_busy() - before) / seconds


def _busy() -> float:
    """Seconds that all cores together have worked since the machine started."""
    user, nice, system, _, _, *rest = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return sum(map(int, (user, nice, system, *rest[:3]))) / os.sysconf("SC_CLK_TCK")


def machine(device: torch.device | str) -> dict[str, Any]:
    """What was measured on: the words and the floors that a reader needs to judge the figures."""
    device = torch.device(device)
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "copy GB/s": copy_bandwidth(device) / 1e9,
        "GEMM GFLOP/s fp32": gemm_rate(torch.float32, device) / 1e9,
        "GEMM GFLOP/s bf16": gemm_rate(torch.bfloat16, device) / 1e9,
    }
    if device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
    return facts


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────


class Results:
    """The table in a folder, as JSON and Markdown; rows that are measured again replace those of before.

    With `rest` they complete them: only lines of parts that had been left out are replaced.
    """

    def __init__(self, folder: Path, name: str, facts: Mapping[str, Any], rest: bool = False) -> None:
        self._json, self._markdown = folder / f"{name}.json", folder / f"{name}.md"
        self._facts = dict(facts)
        self._begun: set[int] = set()  # numbers that this run has lines of
        self._rows: list[dict[str, Any]] = []
        if self._json.exists():
            self._rows = json.loads(self._json.read_text())["rows"]
        if rest:
            self._begun = {row["number"] for row in self._rows}

    def left_out(self) -> list[tuple[int, str]]:
        """Number and name of the parts that the runs so far had no time for."""
        return [(row["number"], row["work"]) for row in self._rows if row["note"].startswith(LEFT_OUT)]

    def add(self, row: Row, others: float = 0.0, part: str = "") -> None:
        """Write both files with one more line; the first of a number drops what was there of it before.

        Args:
            others: cores that others kept busy before it was measured; a busy machine is marked.
            part: what it is a line of; a line that says that this was left out is replaced.
        """
        stamp = {
            "measured": datetime.date.today().isoformat(),
            "commit": commit(),
            "others": round(others, 1),
        }
        if row.number not in self._begun:
            self._begun.add(row.number)
            self._rows = [old for old in self._rows if old["number"] != row.number]
        left_out = row.note.startswith(LEFT_OUT)
        same = [old for old in self._rows if (old["number"], old["work"]) == (row.number, row.work)]
        if left_out and any(not old["note"].startswith(LEFT_OUT) for old in same):
            return  # it was measured: the time was over right after it
        asked = (row.number, part)
        self._rows = [
            old
            for old in self._rows
            if old not in same
            and ((old["number"], old["work"]) != asked or not old["note"].startswith(LEFT_OUT))
        ]
        self._rows.append(dataclasses.asdict(row) | stamp)
        self._rows.sort(key=lambda row: row["number"])
        self._json.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": self._facts, "rows": self._rows}
        write(self._json, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        write(self._markdown, markdown(document))


def write(path: Path, text: str) -> None:
    """All or nothing: the machine may be taken away at any moment."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def markdown(document: Mapping[str, Any]) -> str:
    """The table for people."""
    facts = ", ".join(
        f"{name} {_short(value) if isinstance(value, float) else value}"
        for name, value in document["machine"].items()
    )
    head = ["#", "Work", "Medians", "Ours beside it (median, range of pairs)", "Floor", "Goal", "Met", "Note"]
    lines = [facts, "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in document["rows"]:
        figures = [f"{name} {_short(value)}" for name, value in row["figures"].items()]
        ratios = [f"{peer} {Ratio(**ratio)}" for peer, ratio in row["ratios"].items()]
        floor = ""
        if row["floor"]:
            floor = f"{_short(row['floor'])}: {row['share']:.0%}"
        met = {True: "yes", False: "**no**", None: ""}[row["met"]]
        cells = [str(row["number"]), row["work"], f"{', '.join(figures)} {row['unit']}", ", ".join(ratios)]
        busy = f" (others kept {row['others']} cores busy)" if row["others"] > IDLE else ""
        cells += [floor, row["goal"], met, row["note"] + busy]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _short(value: float) -> str:
    """Three significant digits, thousands separated."""
    if value == 0 or 1e-3 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2e}"


@functools.cache
def commit() -> str:
    """What `LATENT_GPT_REVISION` says, as on a lent machine, which has no clone; else that of the clone."""
    if said := environment.REVISION.get():
        return said
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=10", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip()
