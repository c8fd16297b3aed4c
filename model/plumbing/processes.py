"""Processes and their ends: tied to their parents, started in sessions, stopped as a whole.

The standard library alone, so that what imports this starts quickly.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

GRACE = 20.0  # seconds that processes get to stop before they are killed
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def tie_to_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Ask the kernel for a signal to this process when its parent dies, however it dies.

    Args:
        number: of the signal.
        parent: its process id where that was known before this process began, as in a `preexec_fn`: a
            parent that has died since is noticed, too.
    """
    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), number)


def end(child: subprocess.Popen[Any], patience: float = GRACE, group: bool = False) -> None:
    """Stop a process, or with it all of the group it leads; return when they are gone.

    SIGTERM asks, and `patience` seconds later SIGKILL does not.
    """

    def gone() -> bool:
        ended = child.poll() is not None  # and is waited for: what is not is there still
        if not group:
            return ended
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            return True
        return False

    for number in (signal.SIGTERM, signal.SIGKILL):
        if gone():
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number) if group else child.send_signal(number)
        until = time.monotonic() + patience
        while not gone() and time.monotonic() < until:
            time.sleep(0.05)


@contextlib.contextmanager
def session(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a session of its own, its output a pipe of lines; end all of it on the way out."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    ) as child:
        try:
            yield child
        finally:
            end(child, group=True)


@contextlib.contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Make SIGTERM unwind the stack as Ctrl-C does, so that what was started is stopped."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
