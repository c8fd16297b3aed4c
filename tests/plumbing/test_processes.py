"""Processes end with their parents, and as a whole."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from model.plumbing.processes import end, session
from tests import ROOT

SLEEPING = "import time; print('up', flush=True); time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPING}"


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return found.stdout.strip()[:1] not in ("", "Z")


def wait_until_gone(process: int) -> bool:
    until = time.monotonic() + 20
    while alive(process) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(process)


def started(code: str) -> subprocess.Popen[str]:
    """A process that has said that it is up."""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    child.stdout.readline()
    return child


def test_a_process_that_listens_is_asked_to_end() -> None:
    child = started(SLEEPING)
    end(child)
    assert child.returncode == -signal.SIGTERM


def test_a_process_that_does_not_listen_is_killed() -> None:
    child = started(DEAF)
    end(child, patience=0.2)
    assert child.returncode == -signal.SIGKILL


def test_leaving_a_session_ends_its_grandchildren() -> None:
    code = "import subprocess; s = subprocess.Popen(['sleep', '60']); print(s.pid, flush=True); s.wait()"
    with session([sys.executable, "-c", code], {}) as child:
        assert child.stdout
        grandchild = int(child.stdout.readline())
        assert alive(grandchild)
    assert child.returncode is not None
    assert wait_until_gone(grandchild)


def test_a_tied_process_dies_with_its_parent_however_that_dies(tmp_path: Path) -> None:
    child = f"from model.plumbing.processes import tie_to_parent; tie_to_parent(); {SLEEPING}"
    parent = (
        f"import subprocess, sys, time; c = subprocess.Popen([sys.executable, '-c', {child!r}],"
        " stdout=subprocess.PIPE); c.stdout.readline(); print(c.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    tied = int(process.stdout.readline())
    assert alive(tied)
    process.kill()
    process.wait()
    assert wait_until_gone(tied)


def test_a_parent_that_died_before_the_tie_is_noticed() -> None:
    from model.plumbing.processes import tie_to_parent

    orphan = subprocess.Popen(["sleep", "60"], preexec_fn=partial(tie_to_parent, parent=1_000_000_000))
    assert orphan.wait(20) == -signal.SIGKILL
