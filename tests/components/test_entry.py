"""Training pods without a cluster: entries on this machine, killed and told to end as an operator would.

Every row of the table of exit codes is provoked with real processes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from components.launch import entry
from model.config import JobConfig, load_config
from model.plumbing import assets, attempts, leases, outcome
from model.plumbing.attempts import Attempt
from model.plumbing.jobs import JobSpec, TrackingIds, write_spec
from tests import ROOT
from tests.proxies import Answer, Request, proxy

pytestmark = pytest.mark.slow

JOB = """
import os, signal, sys, time
from pathlib import Path
from model.errors import Diverged, Unavailable, UserError
from model.plumbing import leases, stopping, tracking, worker

STEPS = 3000

class Keeper:
    def __init__(self, job):
        self.job = job
    def save(self, done):
        print("saves", flush=True)
        if self.job.processes.is_main:
            self.job.checkpoints.save(done, {"done": done})
    def wait(self):
        self.job.processes.barrier()

def main(job):
    toy = job.spec.settings
    rank, end = job.processes.rank, toy["end"]
    found = job.checkpoints.latest()
    print(f"toy | rank {rank} of {job.processes.world} on {os.environ['OMP_NUM_THREADS']} threads,"
          f" from {found[0] if found else 0}")
    print("to stderr", file=sys.stderr)
    job.processes.barrier()
    if end in ("hang", f"hang and {rank} kills itself"):
        Path(toy["folder"], f"pid-{rank}").write_text(str(os.getpid()))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # as one within a collective is deaf
        time.sleep(1000)
    if rank == 1 and end == "user error":
        raise UserError("batch_size 7 is odd; make it even")
    if end == "nan":
        raise Diverged("step 12: loss is nan", 12)
    if rank == 1 and end == "away":
        raise Unavailable("s3://bucket cannot be reached")
    if rank == 1 and end == "exit":
        print("the last words")
        sys.exit(3)
    if rank == 1 and end == "defect":
        raise ZeroDivisionError("by zero")
    if rank == 1 and end == "out of memory":
        Path(toy["folder"], "mount-1", "memory.events").write_text("oom_kill 1")
        os.kill(os.getpid(), 9)
    if rank == 1 and "kills itself" in end:
        os.kill(os.getpid(), 9)
    done = found[0] if found else 0
    if end == "train for ever" or (end == "train" and not found):
        for done in range(done + 1, STEPS):
            time.sleep(0.02)
            job.processes.barrier()
            if done == 5:
                Path(toy["folder"], f"pid-{rank}").write_text(str(os.getpid()))
                print("step 5", flush=True)
            job.stopping.heed(done, STEPS, Keeper(job))
    job.processes.barrier()
    if end == "nothing made":
        return
    if end in ("slow upload", "slow and deaf upload"):
        if rank:
            return
        if end != "slow upload":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Path(toy["folder"], "pid-0").write_text(str(os.getpid()))
        time.sleep(1000)
    if job.processes.is_main:
        job.output.add_bytes("a.txt", b"a")
        job.output.finish({})
    job.processes.barrier()

if __name__ == "__main__":
    stopping.EVERY = leases.LIVE = 1.0
    worker.Tracker = lambda ids, params, enabled: tracking.Tracker(ids, params, False)
    worker.run_worker(main)
"""

# As a container would have it: a termination log, and control groups.
CONTAINER = """
import os, sys
from pathlib import Path
from components.launch import entry
from model.plumbing import cgroups, leases, outcome

outcome.TERMINATION_LOG = Path(sys.argv.pop(1))
cgroups.MEMBERSHIP, cgroups.MOUNT = Path(sys.argv[1]).with_name("membership"), Path(sys.argv.pop(1))
entry.UPLOAD, entry.WANTED, entry.HANGS, leases.LIVE = 0.5, 0.5, 3.0, 1.0
if "TOY_LEAVES" in os.environ:
    entry.Ranks = lambda *_: os._exit(0)
entry.main()
"""

HERE, THERE = "127.0.0.1", "127.0.0.2"


class Pods:
    """Pods of one job, two workers of one process unless told otherwise."""

    def __init__(self, folder: Path, end: str, workers: int = 2, processes: int = 1) -> None:
        self.folder = folder
        jobs = JobConfig(workers=workers, processes_per_worker=processes, grace_seconds=20)
        self.spec = JobSpec(
            kind="tokenizer",
            module="toy_job",
            config=load_config("smoke"),
            settings={"end": end, "folder": str(folder)},
            inputs={},
            jobs=jobs,
            tracking=TrackingIds(experiment="e", run="r", step="toy"),
        )
        self.uri = write_spec(self.spec)
        self.join_timeout = 120
        self._workers, self._processes = workers, processes
        self._started: list[subprocess.Popen[bytes]] = []
        with socket.socket() as probe:
            probe.bind((HERE, 0))
            self._port = probe.getsockname()[1]

    def start(self, *workers: int) -> list[subprocess.Popen[bytes]]:
        started = []
        for worker in workers or range(self._workers):
            number = len(self._started)
            message = self.folder / f"message-{number}"
            message.touch()
            told = {
                "PET_RDZV_ENDPOINT": f"{HERE}:{self._port}",
                "PET_NNODES": f"{self._workers}:{self._workers}",
                "PET_NPROC_PER_NODE": str(self._processes),
                "PET_LOCAL_ADDR": (HERE, THERE)[worker],
                "PET_RDZV_CONF": f"join_timeout={self.join_timeout}",
                "GLOO_SOCKET_IFNAME": "lo",
                "LATENT_GPT_WORKER": str(worker),
                "LATENT_GPT_POD": f"toy-worker-{worker}",
                "LATENT_GPT_POD_UID": f"{number:08}-1234",
            }
            command = [sys.executable, str(self.folder / "container.py"), str(message)]
            with open(self.folder / f"said-{number}", "wb") as said:
                pod = subprocess.Popen(
                    [*command, str(self.folder / f"mount-{worker}"), self.uri],
                    env={**os.environ, **told},
                    cwd=ROOT,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                )
            self._started.append(pod)
            started.append(pod)
        return started

    @property
    def _lease(self) -> Path:
        return Path(self.spec.leases, "step.json")

    def wanted(self) -> None:
        """Hold the lease of a step."""
        self._lease.parent.mkdir(parents=True)
        self._lease.write_text("{}")

    def wanted_no_more(self) -> None:
        """Have it run out."""
        os.utime(self._lease, (time.time() - 3600,) * 2)

    def said(self, number: int) -> str:
        return (self.folder / f"said-{number}").read_text()

    def message(self, number: int) -> dict[str, object]:
        told: dict[str, object] = json.loads((self.folder / f"message-{number}").read_text())
        return told

    def attempts(self) -> dict[int, Attempt]:
        """By the number of the start."""
        found = {int(one.uri.rpartition("-")[2]): one for one in attempts.attempts(self.spec.output)}
        return dict(sorted(found.items()))

    def running(self, *ranks: int, patience: float = 90) -> list[int]:
        """Process ids of ranks, when they train."""
        marks = [self.folder / f"pid-{rank}" for rank in ranks]
        until = time.monotonic() + patience
        while not all(mark.exists() and mark.read_text() for mark in marks):
            assert time.monotonic() < until, [self.said(n) for n in range(len(self._started))]
            time.sleep(0.05)
        pids = [int(mark.read_text()) for mark in marks]
        for mark in marks:
            mark.unlink()
        return pids

    def kill(self) -> None:
        for pod in self._started:
            pod.kill()
            pod.wait()


@pytest.fixture
def pods(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Pods]]:
    (tmp_path / "toy_job.py").write_text(JOB)
    (tmp_path / "container.py").write_text(CONTAINER)
    (tmp_path / "membership").write_text("0::/\n")
    for mount in (tmp_path / "mount-0", tmp_path / "mount-1"):
        mount.mkdir()
        (mount / "memory.max").write_text(str(2**31))
        (mount / "memory.events").write_text("oom_kill 0")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    made: list[Pods] = []

    def make(*arguments: object, **settings: object) -> Pods:
        made.append(Pods(tmp_path, *arguments, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.kill()


def ended(started: list[subprocess.Popen[bytes]], within: float = 100) -> list[int]:
    """Their exit codes."""
    until = time.monotonic() + within
    return [pod.wait(max(0.1, until - time.monotonic())) for pod in started]


def gone(pid: int) -> bool:
    """Whether a process is, or will be as soon as somebody asks for its status."""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


@pytest.mark.parametrize(
    ("end", "codes", "kinds", "reason"),
    [
        ("well", [0, 0], ["finished", "finished"], ""),
        ("user error", [200, 1], ["lost", "refused"], "batch_size 7 is odd; make it even"),
        ("defect", [200, 1], ["lost", "failed"], "process 1 failed: ZeroDivisionError: by zero"),
        ("nan", [1, 1], ["diverged", "diverged"], "step 12: loss is nan"),
        ("exit", [200, 1], ["lost", "failed"], "process 1 failed: it left with exit code 3"),
        ("away", [200, 203], ["lost", "unavailable"], "s3://bucket cannot be reached"),
        (
            "out of memory",
            [200, 202],
            ["lost", "killed"],
            "process 1 was killed (out of memory; the container may have 2 GiB: raise jobs.memory)",
        ),
    ],
)
def test_how_a_rank_ends_is_what_its_pod_tells(
    pods: Callable[..., Pods], end: str, codes: list[int], kinds: list[str], reason: str
) -> None:
    job = pods(end)
    assert ended(job.start()) == codes, job.said(0) + job.said(1)
    found = job.attempts()
    assert [(one.worker, one.pod, one.step) for one in found.values()] == [
        (0, "toy-worker-0", 0),
        (1, "toy-worker-1", 0),
    ]
    assert [one.outcome.kind for one in found.values() if one.outcome] == kinds
    assert found[1].outcome
    assert found[1].outcome.reason.startswith(reason)
    assert [job.message(number)["kind"] for number in (0, 1)] == kinds
    assert str(job.message(1)["reason"]).startswith(reason)
    assert codes == [outcome.EXIT_CODES[kind] for kind in kinds]  # type: ignore[index]
    for rank in (0, 1):
        log = Path(found[rank].log(rank)).read_text()
        assert f"toy | rank {rank} of 2 on 1 threads, from 0\nto stderr\n" in log, "both streams, in order"
    assert "toy | rank 0 of 2" in job.said(0)
    assert "rank 1 of 2" not in job.said(1), "rank 0 alone speaks"
    assert (assets.find(job.spec.output) is not None) == (end == "well")


def test_a_killed_rank_ends_both_pods_at_once(pods: Callable[..., Pods]) -> None:
    job = pods("train")
    started = job.start()
    os.kill(job.running(0, 1)[1], signal.SIGKILL)
    began = time.monotonic()
    assert ended(started, within=15) == [200, 202]
    print(f"a killed rank: both ended after {time.monotonic() - began:.1f} s")
    found = job.attempts()
    assert found[1].outcome
    assert found[1].outcome.reason.startswith(f"process 1 was killed {outcome.SIGKILLED}")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_pod_ends_the_other_one_and_both_go_on_when_they_are_started_again(
    pods: Callable[..., Pods], killed: int
) -> None:
    job = pods("train")
    started = job.start()
    ranks = job.running(0, 1)
    log = Path(job.attempts()[killed].log(killed))
    until = time.monotonic() + 10
    while not (log.exists() and "step 5" in log.read_text()):
        assert time.monotonic() < until, "not uploaded while it runs"
        time.sleep(0.1)
    started[killed].kill()
    began = time.monotonic()
    again = job.start(killed)  # the operator is quick: it must not join those who are about to end
    codes = ended(started, within=15)
    print(f"worker {killed} killed: the other one ended after {time.monotonic() - began:.1f} s")
    assert (codes[killed], codes[1 - killed]) == (-9, 200)
    assert all(gone(rank) for rank in ranks)
    found = job.attempts()
    assert found[killed].outcome is None
    again += job.start(1 - killed)
    job.running(0, 1)
    print(f"and both trained again after {time.monotonic() - began:.1f} s")
    again[0].terminate()
    assert ended(again, within=40) == [143, 143]


@pytest.mark.parametrize("told", [0, 1])
def test_a_pod_that_is_told_to_end_saves_with_the_other_one_and_the_next_start_goes_on(
    pods: Callable[..., Pods], told: int
) -> None:
    job = pods("train")
    started = job.start()
    job.running(0, 1)
    started[told].terminate()
    began = time.monotonic()
    assert ended(started, within=30) == [143, 143], job.said(0) + job.said(1)
    print(f"told to end: both ended after {time.monotonic() - began:.1f} s")
    found = job.attempts()
    assert [one.outcome.kind for one in found.values() if one.outcome] == ["stopped", "stopped"]
    assert "a checkpoint of step" in str(job.message(told)["reason"])
    assert ended(job.start()) == [0, 0], job.said(2)
    assert job.attempts()[2].step > 5
    assert f"from {job.attempts()[2].step}\n" in job.said(2)


def test_one_who_is_told_to_end_before_there_are_ranks_does_so(pods: Callable[..., Pods]) -> None:
    job = pods("train")
    (alone,) = job.start(1)
    until = time.monotonic() + 60
    while not job.attempts() and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(1)
    alone.terminate()
    assert ended([alone], within=10) == [143]
    assert job.message(0)["kind"] == "stopped"


@pytest.mark.parametrize("told", [0, 1])
def test_one_who_is_told_to_end_while_its_ranks_start_takes_the_other_one_along(
    pods: Callable[..., Pods], told: int
) -> None:
    job = pods("train")
    started = job.start()
    until = time.monotonic() + 60
    # Of both: one that has not met yet would go on with the one who is started again.
    while any("runs ranks" not in job.said(number) for number in (0, 1)) and time.monotonic() < until:
        time.sleep(0.05)
    started[told].terminate()
    began = time.monotonic()
    again = job.start(told)
    codes = ended(started, within=60)
    print(f"worker {told} told while ranks start: the other one ended after {time.monotonic() - began:.1f} s")
    assert (codes[told], codes[1 - told]) == (143, 200)
    again[0].kill()


@pytest.mark.parametrize("there", [0, 1])
def test_who_meets_nobody_says_so(pods: Callable[..., Pods], there: int) -> None:
    job = pods("train")
    job.join_timeout = 3
    assert ended(job.start(there), within=60) == [201]
    found = job.attempts()[0]
    assert found.outcome
    assert found.outcome.kind == job.message(0)["kind"] == "unmet"
    assert "the 2 workers did not meet at 127.0.0.1:" in found.outcome.reason


def test_what_nobody_wants_any_more_ends_well(pods: Callable[..., Pods]) -> None:
    job = pods("train for ever")
    job.wanted()
    started = job.start()
    job.running(0, 1)
    job.wanted_no_more()
    assert ended(started) == [0, 0], job.said(0)
    assert [one.outcome.kind for one in job.attempts().values() if one.outcome] == ["orphaned"] * 2
    assert job.message(0)["kind"] == "orphaned"
    assert assets.find(job.spec.output) is None
    assert ended(job.start()) == [0, 0], "and does not begin again"
    assert job.attempts()[2].step > 5
    assert {one.outcome.kind for one in job.attempts().values() if one.outcome} == {"orphaned"}


def test_a_worker_that_waits_for_the_others_ends_when_nobody_wants_the_asset(
    pods: Callable[..., Pods],
) -> None:
    job = pods("train")
    job.wanted()
    (alone,) = job.start(0)
    until = time.monotonic() + 60
    while "meets the others" not in job.said(0) and time.monotonic() < until:
        time.sleep(0.1)
    job.wanted_no_more()
    assert ended([alone], within=20) == [0]
    assert job.message(0)["kind"] == "orphaned"


def test_a_rank_that_waits_for_one_of_a_worker_that_has_ended_well_ends_when_nobody_wants_the_asset(
    pods: Callable[..., Pods], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = pods("train")
    job.wanted()
    first = job.start(0)
    monkeypatch.setenv("TOY_LEAVES", "when they have met, as if it saw just then that nobody wants it")
    assert ended(job.start(1)) == [0]
    job.wanted_no_more()
    assert ended(first) == [0], job.said(0)
    assert job.message(0)["kind"] == "orphaned"


def test_a_worker_that_waits_for_an_upload_that_hangs_ends_when_nobody_wants_the_asset(
    pods: Callable[..., Pods],
) -> None:
    job = pods("slow and deaf upload")
    job.wanted()
    started = job.start()
    job.running(0)
    job.wanted_no_more()
    assert ended(started) == [0, 0], job.said(0) + job.said(1)
    assert [job.message(number)["kind"] for number in (0, 1)] == ["orphaned", "orphaned"]


def test_a_lease_that_is_renewed_when_the_worker_has_looked_once_has_not_run_out(
    pods: Callable[..., Pods], monkeypatch: pytest.MonkeyPatch
) -> None:
    ages = iter([700.0, 700.1])
    looked = threading.Event()

    def age(uri: str) -> float:
        if (found := next(ages, 5.0)) == 5.0:
            looked.set()
        return found

    monkeypatch.setattr(leases, "age", age)
    monkeypatch.setattr(entry, "WANTED", 0.01)
    monkeypatch.setattr(os, "kill", lambda *_: looked.set())
    told = entry.Told()
    with entry._while_wanted(pods("train").spec, told):
        assert looked.wait(20)
    assert not told.unwanted


def test_a_worker_does_not_end_well_before_the_asset_is_there(pods: Callable[..., Pods]) -> None:
    job = pods("slow upload")
    first, second = job.start()
    (rank,) = job.running(0)
    time.sleep(4)
    assert second.poll() is None, "to the operator the job would have succeeded"
    os.kill(rank, signal.SIGKILL)
    assert ended([first, second], within=30) == [202, 200]


def test_a_job_that_ends_well_without_its_asset_has_failed(pods: Callable[..., Pods]) -> None:
    job = pods("nothing made", workers=1, processes=2)
    assert ended(job.start()) == [1]
    assert "has no manifest" in str(job.message(0)["reason"])


def test_one_that_is_stuck_does_not_hold_up_its_pod(pods: Callable[..., Pods]) -> None:
    job = pods("hang and 0 kills itself", workers=1, processes=2)
    started = job.start()
    (stuck,) = job.running(0)
    began = time.monotonic()
    assert ended(started, within=25) == [202]
    print(f"one stuck: the pod ended after {time.monotonic() - began:.1f} s")
    assert gone(stuck)
    assert str(job.message(0)["reason"]).startswith("process 1 was killed")


def test_a_survivor_in_a_collective_that_says_nothing_ends_when_the_other_is_replaced(
    pods: Callable[..., Pods],
) -> None:
    job = pods("hang")
    started = job.start()
    ranks = job.running(0, 1)
    started[1].kill()
    began = time.monotonic()
    job.start(1)
    assert ended(started[:1], within=60) == [200]
    print(f"worker 1 replaced: a hanging worker 0 ended after {time.monotonic() - began:.1f} s")
    assert gone(ranks[0])
    assert job.message(0)["reason"] == "another worker was replaced"


def test_a_survivor_in_a_collective_that_says_nothing_ends_with_the_other_ones_rank(
    pods: Callable[..., Pods],
) -> None:
    job = pods("hang")
    started = job.start()
    ranks = job.running(0, 1)
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    assert ended(started, within=25) == [200, 202]
    print(f"rank 1 killed: a hanging worker 0 ended after {time.monotonic() - began:.1f} s")
    assert job.message(0)["reason"] == "another worker has ended"


def test_a_survivor_in_a_collective_that_says_nothing_ends_when_worker_0_is_gone(
    pods: Callable[..., Pods],
) -> None:
    job = pods("hang")
    started = job.start()
    job.running(0, 1)
    started[0].kill()
    began = time.monotonic()
    assert ended(started[1:], within=40) == [200]
    print(f"worker 0 gone: a hanging worker 1 ended after {time.monotonic() - began:.1f} s")
    assert str(job.message(1)["reason"]).startswith("worker 0 cannot be reached any more")


def test_an_asset_that_is_made_is_not_made_again(pods: Callable[..., Pods]) -> None:
    job = pods("well")
    assert ended(job.start()) == [0, 0]
    assert ended(job.start(1)) == [0], "nobody has to be met for it"
    assert "toy | reused" in job.said(2)
    assert len(job.attempts()) == 2


def test_a_spec_that_is_not_there_is_bad_input(pods: Callable[..., Pods]) -> None:
    job = pods("well")
    Path(job.uri).unlink()
    assert ended(job.start(0)) == [1]
    assert job.message(0)["kind"] == "refused"


class TestOnS3:
    """The same on a store that may be away."""

    @pytest.fixture
    def store(self, services: dict[str, str]) -> str:
        return services["LATENT_GPT_STORE"]

    def test_a_store_that_goes_away_does_not_hold_up_the_end(
        self, pods: Callable[..., Pods], services: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = pods("train")
        away = threading.Event()

        def hook(request: Request, ask: Callable[[], Answer]) -> Answer:
            if not away.is_set():
                return ask()
            while away.is_set():  # the slowest way to be away
                time.sleep(0.1)
            return Answer.error(503, "SlowDown")

        with proxy(services["S3_ENDPOINT_URL"], hook) as url:
            monkeypatch.setenv("S3_ENDPOINT_URL", url)
            started = job.start()
            ranks = job.running(0, 1)
            away.set()
            os.kill(ranks[1], signal.SIGKILL)
            began = time.monotonic()
            assert ended(started, within=60) == [200, 202]
            print(f"store away: both ended after {time.monotonic() - began:.1f} s")
            assert job.message(1)["kind"] == "killed"
            away.clear()
            assert [one.outcome for one in job.attempts().values()] == [None, None]

    def test_a_store_that_is_away_at_the_start_is_worth_another_try(
        self, pods: Callable[..., Pods], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = pods("well")
        monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
        began = time.monotonic()
        assert ended(job.start(0)) == [203]
        print(f"store away at the start: ended after {time.monotonic() - began:.1f} s")
        assert job.message(0)["kind"] == "unavailable"
