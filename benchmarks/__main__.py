"""`python -m benchmarks [--rows 1,4,7] [--gpu] [--out FOLDER]`: measure, print, and write the table."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import time
import traceback
from pathlib import Path

import torch

import benchmarks
from benchmarks.harness import Results, Row, RowFunction, machine, others

FOLDER = Path(__file__).parent / "results"


def discover(gpu: bool) -> tuple[dict[int, RowFunction], list[str]]:
    """Every row that a module beside this one offers, by number; and what is missing for the others."""
    found: dict[int, RowFunction] = {}
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
    return dict(sorted(found.items())), missing


def measure(number: int, function: RowFunction, device: torch.device) -> list[Row]:
    """All lines of one number; a row that breaks is a line that says so, and the others go on."""
    rows: list[Row] = []
    try:
        for row in function(device):
            rows.append(row)
            print(f"  {row.work}: {row.figures} {row.unit}; {row.goal or 'no goal'}: {row.met}", flush=True)
    except Exception as error:
        traceback.print_exc()
        reason = f"FAILED: {type(error).__name__}: {error}"
        rows.append(Row(number, function.__name__, "", {}, met=False, note=reason[:300]))
    return rows


def main() -> int:
    """Exit code 1 when a row broke, could not be loaded, or had another result than its peer."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ours beside its peers.")
    parser.add_argument("--rows", default="", help="numbers to measure, e.g. 1,4,7; all by default")
    parser.add_argument("--gpu", action="store_true", help="the GPU half")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the table")
    arguments = parser.parse_args()
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu: this machine has no CUDA device")
    offered, missing = discover(arguments.gpu)
    for line in missing:
        print(f"left out: {line}", file=sys.stderr)
    wanted = [int(number) for number in arguments.rows.split(",")] if arguments.rows else list(offered)
    if unknown := set(wanted) - set(offered):
        parser.error(f"--rows: there is no row {min(unknown)}; choose from {sorted(offered)}")
    device = torch.device("cuda" if arguments.gpu else "cpu")
    facts = machine(device)
    print(facts, flush=True)
    results = Results(arguments.out, device.type, facts)
    failed = bool(missing) and not arguments.rows
    for number in wanted:
        start, busy = time.monotonic(), others()
        print(f"row {number}", flush=True)
        rows = measure(number, offered[number], device)
        results.replace(number, rows, busy)
        failed |= any(row.note.startswith("FAILED") for row in rows)
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
    print((arguments.out / f"{device.type}.md").read_text())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
