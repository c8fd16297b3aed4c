"""Make every mutant and see whether its test notices it: `python -m tests.mutants [WORD …]`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import ROOT
from tests.mutants import Mutant
from tests.mutants.behaviours import MUTANTS

VERDICTS = {0: "SURVIVED", 1: "noticed"}  # by pytest's exit status: all passed, some failed


def main(words: list[str]) -> int:
    """Run the mutants whose name holds one of the words, or all; a line each. 0 where each was noticed."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    if not chosen:
        print(f"error: no mutant's name holds {' or '.join(words)}", file=sys.stderr)
        return 2
    status, said = run(sorted({mutant.test for mutant in chosen}))
    if status:
        print(f"{said}\nerror: these tests have to pass without any mutant", file=sys.stderr)
        return 2
    unnoticed, width = 0, max(len(mutant.name) for mutant in chosen) + 2
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for mutant, (verdict, seconds) in zip(chosen, pool.map(judge, chosen), strict=True):
            print(f"{verdict:10}{seconds:5.0f} s  {mutant.name:{width}}{mutant.test}", flush=True)
            unnoticed += verdict != "noticed"
    print(f"{len(chosen) - unnoticed} of {len(chosen)} mutants were noticed by their tests")
    return bool(unnoticed)


def judge(mutant: Mutant) -> tuple[str, float]:
    """What becomes of a mutant (BROKEN: no test ran), and the seconds that it took."""
    started = time.monotonic()
    status, _ = run([mutant.test], mutant)
    verdict = "NOT FOUND" if status is None else VERDICTS.get(status, "BROKEN")
    return verdict, time.monotonic() - started


def run(tests: list[str], mutant: Mutant | None = None) -> tuple[int | None, str]:
    """pytest's exit status and output on a copy of the tree; None where the mutant's text is not there."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    with tempfile.TemporaryDirectory(prefix="latent-gpt-mutant-") as folder:
        for name in files:
            if (ROOT / name).is_file():  # git lists what is deleted and not yet committed
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, Path(folder) / name)
        if mutant:
            path = Path(folder) / mutant.file
            text = path.read_text() if path.is_file() else ""
            if text.count(mutant.old) != 1:
                return None, ""
            path.write_text(text.replace(mutant.old, mutant.new))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *tests],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
