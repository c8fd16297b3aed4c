"""A try in a process of its own: what it says, how long it takes, and what memory it has at most.

Processes are forked from one that has imported all that a try needs and computed nothing. What a try costs is
told above that one, the idle process.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import LONGEST_LINE

SECONDS, MEBIBYTES = 10.0, 1024.0  # bounds of a refusal
PATIENCE = 100.0  # seconds on the clock after which a try is killed
RUNAWAY = 6 << 30  # bytes that a try may take before it gets no more
NOBODY = 65534
ELSEWHERE = (  # what a stranger's files must never bring about
    *("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"),
    "pickle.find_class",
)


@dataclass(frozen=True)
class Refusal:
    """How a try ended."""

    name: str
    said: list[str]  # lines
    status: int  # exit status; negative: the signal that ended it
    seconds: float  # of a core: what the clock says depends on who else computes
    mebibytes: float  # the most that it had above the idle process

    @property
    def wrong(self) -> str:
        """What is not as it should be; "" where nothing is."""
        if self.status != 2:
            return f"ended with {self.status}"
        if len(self.said) != 1 or not self.said[0].startswith("error: "):
            return f"{len(self.said)} lines"
        if not self.said[0].isprintable():
            return "what it says cannot be printed"
        if len(self.said[0]) > LONGEST_LINE + 20:
            return f"a line of {len(self.said[0])} characters"
        if self.seconds > SECONDS:
            return f"took {self.seconds:.1f} s"
        return f"took {self.mebibytes:.0f} MiB" if self.mebibytes > MEBIBYTES else ""


def refusal(name: str, work: Callable[[], object], as_nobody: bool = False) -> Refusal:
    """How `work` ends in a process of its own.

    Args:
        name: of the try.
        work: says what is wrong, and ends with status 2.
        as_nobody: without root's rights.
    """
    begins, begun = os.pipe()
    with tempfile.TemporaryFile() as out:
        began = time.monotonic()
        child = os.fork()
        if not child:
            os.write(begun, b"%d" % _kibibytes("VmRSS"))
            _work(work, out.fileno(), as_nobody)
        idle = int(os.read(begins, 32))
        status, usage = _waited(child, began + PATIENCE)
        out.seek(0)
        os.close(begins)
        os.close(begun)
        said = [line for line in out.read().decode(errors="backslashreplace").split("\n") if line]
    said = [line for line in said if not line.startswith("images | ")]  # how an ingest goes on
    seconds = usage.ru_utime + usage.ru_stime
    return Refusal(name, said, status, seconds, max(0.0, (usage.ru_maxrss - idle) / 1024))


def _work(work: Callable[[], object], out: int, as_nobody: bool) -> None:
    """In the child: all that is said goes to `out`."""
    status = 1
    try:
        os.dup2(out, 1)
        os.dup2(out, 2)
        data = _kibibytes("VmData") * 1024 + RUNAWAY
        resource.setrlimit(resource.RLIMIT_DATA, (data, data))
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # all work is done in this very process
        if as_nobody and not os.getuid():
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        sys.addaudithook(_watch)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ELSEWHERE:
        os.write(2, f"{event} {arguments}\n".encode(errors="replace"))


def _waited(child: int, until: float) -> tuple[int, resource.struct_rusage]:
    """Exit status of a child, which is killed when it is too late, and what it took of the machine."""
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


def _kibibytes(name: str) -> int:
    """A figure of this process, as the kernel has it."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])
