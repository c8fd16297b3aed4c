"""What this process's container may use of its machine, as the kernel's control groups say (version 2 or 1).

A machine without them, or a group without a limit, has none: that is no error here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MEMBERSHIP, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # bytes; version 1 has a number of about this size for none


def cpu_quota() -> float | None:
    """Cores' worth of time that the group gets, e.g. 2.5; None: no limit."""
    found = []
    for text in _texts("cpu", "cpu.max"):
        quota, _, period = text.partition(" ")
        if quota != "max":
            found.append(int(quota) / int(period))
    periods = _texts("cpu", "cpu.cfs_period_us")
    for text, period in zip(_texts("cpu", "cpu.cfs_quota_us"), periods, strict=False):
        if int(text) > 0:
            found.append(int(text) / int(period))
    return min(found, default=None)


def memory_limit() -> int | None:
    """Bytes that the group may have; None: no limit."""
    texts = [*_texts("memory", "memory.max"), *_texts("memory", "memory.limit_in_bytes")]
    return min((int(text) for text in texts if text != "max" and int(text) < NO_LIMIT), default=None)


def memory() -> int:
    """Bytes that this process can ever have: the machine's, or what the group may have of them."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(machine, memory_limit() or machine)


def out_of_memory_kills() -> int:
    """How many processes of the group the kernel has killed because memory was over."""
    for name in ("memory.events", "memory.oom_control"):
        for text in _texts("memory", name):
            counted = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
            return int(counted[1]) if counted else 0
    return 0


def _texts(controller: str, name: str) -> Iterator[str]:
    """A file of a controller, of this process's group first and then of the groups around it.

    A container often sees the tree from its own group on, while its membership is told from the machine's
    root: folders that are not there are passed over.
    """
    with suppress(OSError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = MOUNT / controller if controllers else MOUNT
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for depth in range(len(parts), -1, -1):
                with suppress(OSError):
                    yield top.joinpath(*parts[:depth], name).read_text().strip()
