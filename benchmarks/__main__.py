"""`python -m benchmarks [--rows 1,4,7] [--gpu] [--minutes N] [--rest]`: measure, print, tabulate."""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import pkgutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import benchmarks
from benchmarks.harness import LEFT_OUT, Part, Results, Row, machine, others

FOLDER = Path(__file__).parent / "results"
AGAIN = 30  # seconds until the alarm comes once more: what is raised in a destructor is lost
GPU_ORDER = (1, 3, 2, 4, 7, 5, 8, 6, 12)  # what matters most comes first: the time may not do for all


class TimeOver(BaseException):
    """The minutes are over. No `Exception`: libraries catch those."""


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """Break off what runs inside when `time.monotonic()` reaches the deadline; infinity: never.

    Raises:
        TimeOver: before anything runs, if it was reached already.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeOver
    if left == math.inf:
        yield
        return

    def over(*_: object) -> None:
        raise TimeOver

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, left, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def discover(gpu: bool) -> tuple[dict[int, list[Part]], list[str]]:
    """Every row that a module beside this one offers, by number; and what is missing for the others."""
    found: dict[int, list[Part]] = {}
    missing: list[str] = []
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name.startswith("__"):
            continue
        try:
            loaded = importlib.import_module(f"benchmarks.{module.name}")
        except ModuleNotFoundError as error:
            missing.append(f"benchmarks/{module.name}.py needs {error.name}")
        else:
            found |= getattr(loaded, "GPU_ROWS" if gpu else "ROWS", {})
    first = GPU_ORDER if gpu else ()
    order = [number for number in first if number in found] + sorted(found.keys() - set(first))
    return {number: found[number] for number in order}, missing


def plan(offered: Mapping[int, Sequence[Part]], wanted: Sequence[int]) -> list[tuple[int, Part]]:
    """Parts in the order of their rows, first those that do not wait, then those that do."""
    parts = [(number, part) for number in wanted for part in offered[number]]
    return sorted(parts, key=lambda numbered: numbered[1].later)


def measure(
    number: int, part: Part, device: torch.device, keep: Callable[[Row], None], deadline: float = math.inf
) -> None:
    """Hand over each line of a part as soon as it is measured.

    A part that breaks, or for which the time does not do, is a line that says so, and the others go on.
    """
    torch.compiler.reset()  # a second shape of the same code would be compiled as a dynamic one
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        with until(deadline):
            for row in part.measure(device):
                keep(row)
    except TimeOver:
        keep(Row(number, part.work, "", {}, note=f"{LEFT_OUT}the time was over (--minutes)"))
    except Exception as error:
        traceback.print_exc()
        reason = f"FAILED: {type(error).__name__}: {error}"
        keep(Row(number, part.work, "", {}, met=False, note=reason[:300]))


def main() -> int:
    """Exit code 1 when a row broke, could not be loaded, or had another result than its peer."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ours beside its peers.")
    parser.add_argument("--rows", default="", help="numbers to measure, e.g. 1,4,7; all by default")
    parser.add_argument(
        "--minutes", type=float, default=0, help="what is not done by then is left out; 0: no limit"
    )
    parser.add_argument("--rest", action="store_true", help="only what the table says was left out")
    parser.add_argument("--gpu", action="store_true", help="the GPU half")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the table")
    parser.add_argument("--no-table", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes else math.inf
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu: this machine has no CUDA device")
    offered, missing = discover(arguments.gpu)
    for line in missing:
        print(f"left out: {line}", file=sys.stderr)
    wanted = [int(number) for number in arguments.rows.split(",")] if arguments.rows else list(offered)
    if unknown := set(wanted) - set(offered):
        parser.error(f"--rows: there is no row {min(unknown)}; choose from {sorted(offered)}")
    if len(wanted) > 1 and not (arguments.gpu or arguments.minutes or arguments.rest):
        failed = one_process_each(wanted, arguments.out) or (bool(missing) and not arguments.rows)
        print((arguments.out / "cpu.md").read_text())
        return int(failed)
    device = torch.device("cuda" if arguments.gpu else "cpu")
    facts = machine(device)
    print(facts, flush=True)
    results = Results(arguments.out, device.type, facts, arguments.rest)
    parts = plan(offered, wanted)
    if arguments.rest:
        parts = [(number, part) for number, part in parts if (number, part.work) in results.left_out()]
        if not parts:
            parser.error(f"--rest: {arguments.out} has no table that says that something was left out")
    failed = bool(missing) and not arguments.rows
    for number, part in parts:
        start, busy = time.monotonic(), others()
        print(f"row {number}: {part.work}", flush=True)

        def keep(row: Row, busy: float = busy, part: Part = part) -> None:
            nonlocal failed
            results.add(row, busy, part.work)
            failed |= row.note.startswith("FAILED")
            said = f"{row.figures} {row.unit}; {row.goal or 'no goal'}: {row.met}"
            print(f"  {row.work}: {said if row.figures else row.note}", flush=True)

        measure(number, part, device, keep, deadline)
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
    if not arguments.no_table:
        print((arguments.out / f"{device.type}.md").read_text())
    return int(failed)


def one_process_each(numbers: Sequence[int], out: Path) -> bool:
    """Measure each row in a fresh process, as malloc's habits would depend on the rows before. Whether one
    failed."""
    command = [sys.executable, "-m", "benchmarks", "--no-table", "--out", str(out), "--rows"]
    codes = [subprocess.call([*command, str(number)]) for number in numbers]
    return any(codes)


if __name__ == "__main__":
    sys.exit(main())
