"""Where processes listen, as the kernel says."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

LOOPBACK = "0100007F"  # 127.0.0.1, as the kernel writes it


def inodes(pids: Iterable[int]) -> set[str]:
    """Of the sockets that processes hold."""
    found = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def listening(pids: Iterable[int]) -> tuple[dict[int, str], list[Path]]:
    """Ports with the addresses they are bound to, and paths of Unix sockets, where processes wait."""
    ours, ports = inodes(pids), {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in ours:
                address, port = fields[1].split(":")
                ports[int(port, 16)] = address
    paths = []
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "00010000" and fields[6] in ours:
            paths.append(Path(fields[7]))
    return ports, paths
