"""Keeps one server running for as long as anybody uses it. Run by `services`, as a process of its own.

Three lock files in the server's folder say everything; the kernel lets go of a lock when its holder dies,
however it dies, so nothing stale is ever left:

- `clients.lock` is held shared by everyone who uses the server;
- `keeper.lock` is held by the keeper and, inherited, by the server: free means that both are gone;
- `start.lock` is held by the client that is starting the server.

A server that crashes is started again; one that dies young is given up, and the keeper leaves with it. The
kernel kills the server when its keeper dies.
"""

import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import IO

from model.plumbing import processes

POLL = 0.1  # seconds
YOUNG = 10.0  # seconds; a server that ends sooner would end again
PATIENCE = 3.0  # seconds that a server gets to stop; SeaweedFS may wait longer for connections of its own


def lock(file: IO[str], kind: int) -> bool:
    """Try to get a lock without waiting."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main(folder: Path) -> int:
    """Run what `folder/server.json` describes until nobody uses it; 0 if it ended because of that."""
    stop = False

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal stop
        stop = True

    os.umask(0o077)
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(folder / "keeper.lock", "a+") as own, open(folder / "clients.lock", "a+") as clients:
        if not lock(own, fcntl.LOCK_EX):
            return 1
        own.truncate(0)
        own.write(str(os.getpid()))
        own.flush()
        server = json.loads((folder / "server.json").read_text())
        while True:
            started = time.monotonic()
            child = _start(server, own.fileno())
            while child.poll() is None:
                # From here to the end of this process, a newcomer waits for the lock and then starts afresh.
                if stop or lock(clients, fcntl.LOCK_EX):
                    processes.end(child, PATIENCE)
                    return 0
                time.sleep(POLL)
            print(f"keeper: {server['name']} ended with status {child.returncode}", flush=True)
            if time.monotonic() - started < YOUNG:
                return 1


def _start(server: dict[str, object], inherited: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        server["command"],  # type: ignore[call-overload]
        stdin=subprocess.DEVNULL,
        pass_fds=[inherited],
        preexec_fn=functools.partial(processes.tie_to_parent, parent=os.getpid()),
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
