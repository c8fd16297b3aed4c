"""What launchers of torch's processes share: how workers meet, how processes run, and whose end it was."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from model.plumbing import environment, outcome, speech
from model.plumbing.outcome import Outcome

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo

AT_ONCE = 1  # seconds within which processes failed together; who does not stop then is killed later
STORE_PATIENCE = 20  # seconds to wait for an answer of the store at which workers meet
LOOK = 2.0  # seconds between two looks at who is waiting there, or has left
LEFT = "left"  # key there, set by a worker that cannot go on
AGAIN = 1.0  # seconds until the next try to meet
TOLD_TO_END = (-signal.SIGTERM, outcome.EXIT_CODES["stopped"])  # exit codes of who was


# ── whose end it was ────────────────────────────────────────────────────────────────────────────────────


def blamed(failures: Mapping[int, ProcessFailure], left: Mapping[int, Outcome], folder: Path) -> Outcome:
    """How that process ended which made its job fail.

    It is the first that refused its input; else the first that ended without a word; else the first that said
    why and was not only told to end, or lost another. When one ends, the others fail, too, in any order of
    time.

    Args:
        failures: of processes whose exit code is not 0, by rank; those that were stopped are among them.
        left: the outcomes that processes left, by rank.
        folder: the attempt's, where the logs are.
    """
    spoken = [
        (rank, end) for rank, end in sorted(left.items(), key=lambda item: item[1].when) if not end.well
    ]
    for _, end in spoken:
        if end.expected:
            return end
    silent = {rank: one for rank, one in sorted(failures.items()) if rank not in left or left[rank].well}
    start = min(one.timestamp for one in failures.values())
    unstopped = [
        rank
        for rank, one in silent.items()
        if one.exitcode not in TOLD_TO_END and one.timestamp <= start + AT_ONCE
    ]
    if spoken and not unstopped:
        rank, end = next((one for one in spoken if one[1].kind not in ("lost", "stopped")), spoken[0])
        lines = end.last_lines or tuple(log_of(folder, rank)[-outcome.LAST_LINES :])
        return end.model_copy(update={"reason": end.told_of(f"process {rank}"), "last_lines": lines})
    rank = unstopped[0] if unstopped else next(iter(silent))
    return outcome.of_status(f"process {rank}", failures[rank].exitcode, log_of(folder, rank))


def log_of(folder: Path, rank: int) -> list[str]:
    """What a rank printed, its errors last."""
    return [
        line.rstrip()
        for name in ("stdout.log", "stderr.log")
        for path in sorted(folder.rglob(f"{rank}/{name}"))
        for line in path.read_text(errors="replace").splitlines()
    ]


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────


class Ranks:
    """Processes of a job on this machine, each in a session of its own, what it prints in a file."""

    def __init__(
        self, command: Sequence[str], environments: Mapping[int, Mapping[str, str]], folder: Path
    ) -> None:
        """Start them.

        Args:
            command: of all.
            environments: theirs, by rank.
            folder: for their logs, `<rank>/stdout.log`.
        """
        self.failures: dict[int, ProcessFailure] = {}
        self.logs = {rank: folder / str(rank) / "stdout.log" for rank in environments}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._ended: set[int] = set()
        for rank, surroundings in environments.items():
            self.logs[rank].parent.mkdir(parents=True)
            with self.logs[rank].open("wb") as log:
                self._processes[rank] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=surroundings,
                    start_new_session=True,
                )
        self._shown: BinaryIO | None = self.logs[0].open("rb") if 0 in self.logs else None

    def running(self) -> bool:
        """Whether one of them runs still; notes who has failed."""
        from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

        for rank, process in self._processes.items():
            code = process.poll()
            if code is not None and rank not in self._ended:
                self._ended.add(rank)
                if code:
                    self.failures[rank] = ProcessFailure(rank, process.pid, code, error_file="")
        return len(self._ended) < len(self._processes)

    @property
    def broken(self) -> bool:
        """Whether one has failed that was not told to end."""
        return any(one.exitcode not in TOLD_TO_END for one in self.failures.values())

    def signal(self, number: int) -> None:
        """Send a signal to all that run."""
        for process in self._processes.values():
            process.send_signal(number)  # none to one that has ended

    def show(self, out: BinaryIO) -> None:
        """Copy what rank 0 has printed since the last call, if it is here."""
        if self._shown and (lines := self._shown.read()):
            out.write(lines)
            out.flush()


# ── meeting ─────────────────────────────────────────────────────────────────────────────────────────────


class Unmet(Exception):
    """The workers of a job did not find each other."""


class Meeting:
    """Workers of a job that have met: which ranks are this one's, and whether the others are there still."""

    def __init__(self, handler: RendezvousHandler, info: RendezvousInfo, processes: int) -> None:
        """
        Args:
            handler: that has led to it.
            info: what came of it.
            processes: of each worker.
        """
        self._handler, self._info = handler, info
        self.ranks = range(info.rank * processes, (info.rank + 1) * processes)
        self.world = info.world_size * processes
        self.lost = ""  # why it is over, where that came from another worker
        self._left = False

    def told(self, rank: int) -> dict[str, str]:
        """Environment of a rank, as torchrun sets it."""
        store = self._info.bootstrap_store_info
        assert store
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank - self.ranks.start),
            "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(len(self.ranks)),
            "GROUP_RANK": str(self._info.rank),
            "GROUP_WORLD_SIZE": str(self._info.world_size),
            "MASTER_ADDR": store.master_addr,
            "MASTER_PORT": str(store.master_port),
            "TORCHELASTIC_RUN_ID": self._handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": str(self._handler.use_agent_store),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
        }

    def watch(self) -> None:
        """Look after the others, from a thread: the store may take its time to answer.

        Gloo notices by itself when a process at the other end is gone, and raises in ours: this is not needed
        then. With nccl ours may stand in a collective until its watchdog ends them, after half an hour. But a
        worker says so when it cannot go on; one that could not say it, and was replaced, waits at the store
        to be let in, as soon as its predecessor's heartbeats have been missing for a quarter of a minute; and
        a worker 0 that is gone has taken the store along.
        """
        threading.Thread(target=self._watch, name="meeting", daemon=True).start()

    def leave(self) -> None:
        """Tell the others that this worker cannot go on; returns at once, and may be called again."""

        def say() -> None:
            with suppress(Exception):  # of any type: the store is gone
                self._info.store.set(LEFT, "")

        self._left = True
        threading.Thread(target=say, name="leaves", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(LOOK)
            try:
                if self._info.store.check([LEFT]):
                    why = "another worker has ended"
                elif self._handler.num_nodes_waiting():
                    why = "another worker was replaced"
                else:
                    continue
            except Exception as error:  # of any type: the store is gone
                why = f"worker 0 cannot be reached any more ({type(error).__name__})"
            if not self._left:
                self.lost = why
            return


def meet(
    name: str, run_id: str, processes: int, workers: tuple[int, int], host: bool, patience: float
) -> Meeting:
    """Wait until all workers of a job are there.

    Where a try ends early, as when worker 0 goes and comes again, there is another one: nothing is lost yet.

    Args:
        name: of the step, for what is said.
        run_id: of the job.
        processes: of each worker.
        workers: how many there must be, and how many there may be.
        host: whether the others find each other at this one.
        patience: seconds to wait.

    Raises:
        Unmet: they were not there in time.
    """
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    endpoint = environment.MEETING_POINT.get()
    until = time.monotonic() + patience
    while True:
        left = max(1, round(until - time.monotonic()))
        try:
            if not host:
                _reach(endpoint, until)
            parameters = RendezvousParameters(
                "c10d",
                endpoint,
                run_id,
                *workers,
                local_addr=environment.MEETING_ADDRESS.get() or socket.gethostname(),
                is_host=host,
                read_timeout=STORE_PATIENCE,
                join_timeout=left,
            )
            handler = get_rendezvous_handler(parameters)
            return Meeting(handler, handler.next_rendezvous(), processes)
        except (RendezvousError, RuntimeError, OSError) as error:
            what = " ".join(f"{type(error).__name__} {error}".split())[:200]
            if time.monotonic() + AGAIN >= until:
                raise Unmet(
                    f"the {workers[0]} workers did not meet at {endpoint} in {patience:g} s ({what}); check"
                    " that all pods of the job run, and that they may reach each other"
                ) from None
            speech.say(name, f"meets the other workers again ({what})")
            time.sleep(AGAIN)


def _reach(endpoint: str, until: float) -> None:
    """Return when somebody listens there; a signal comes through meanwhile, unlike in torch's own try."""
    host, _, port = endpoint.rpartition(":")
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
            return
        except OSError:  # no such name, as long as its pod is not there
            if time.monotonic() + AGAIN >= until:
                raise
            time.sleep(AGAIN)
