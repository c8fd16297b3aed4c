"""Training jobs on a real cluster: they survive, say why they end, and end when nobody wants them.

`make test-cluster PART=jobs` runs this file against the cluster of KUBECONFIG, in a namespace of its own,
with the image that `make push` left. It ends within an hour.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence

import pytest

from components.launch import pytorchjob
from model import steps
from model.config import load_config
from model.plumbing import assets, attempts, storage
from model.plumbing.assets import Manifest
from model.plumbing.checkpoints import Checkpointer
from model.plumbing.jobs import JobSpec
from tests.cluster.cluster import ALL, Cluster, Step, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

# Two workers of one process each; some minutes of steps, and a checkpoint every few seconds of them.
TWO = (
    "jobs.workers=2",
    "jobs.processes_per_worker=1",
    "jobs.cpu=200m",
    "jobs.cpu_limit=1",
    "jobs.memory=2Gi",
    "jobs.grace_seconds=30",
    "jobs.orphan_minutes=2",
    "transformer.training.log_every=50",
    "transformer.training.eval_every=2000",
    "transformer.training.checkpoint_every=100",
)
LONG, SHORT = "transformer.training.steps=12000", "transformer.training.steps=400"
INPUTS = ALL[:-1]
OPERATOR = "control-plane=kubeflow-training-operator"


class Training:
    """A training of the transformer: its step, its job, and what it left in the store."""

    def __init__(self, cluster: Cluster, name: str, overrides: Sequence[str], inputs: dict[str, Manifest]):
        self.cluster, self.name, self.overrides = cluster, name, (*TWO, *overrides)
        config = load_config("smoke", self.overrides)
        needed = {one: inputs[one] for one in steps.STEPS["transformer"].needs}
        self.spec: JobSpec = steps.job("transformer", config, name, needed)
        self.job = pytorchjob.name(self.spec)
        self.steps: list[str] = []

    def start(self, run: str = "", **changes: Any) -> Step:
        """Start a step that wants it, of a pipeline run; each has a name of its own, as KFP's pods do."""
        self.steps.append(f"{self.name}-{len(self.steps) + 1}")
        return self.cluster.step(self.steps[-1], self.overrides, run=run or self.name, **changes)

    def end(self) -> None:
        """Leave nothing that runs."""
        self.cluster.kubectl("delete", "pod", *self.steps, "--ignore-not-found", "--grace-period=1")
        self.cluster.kubectl("delete", "pytorchjob", self.job, "--ignore-not-found")
        until(lambda: self.cluster.job_is_gone(self.job), 120, f"the end of {self.job}")

    @property
    def checkpoint(self) -> int:
        """Steps done at the newest complete checkpoint."""
        newest = Checkpointer(self.spec.checkpoints).newest()
        return int(newest.rpartition("-")[2]) if newest else 0

    def goes_on(self, seconds: float = 120) -> float:
        """Wait until there is a newer checkpoint than now; returns the seconds that took."""
        then, began = self.checkpoint, time.monotonic()
        until(
            lambda: self.checkpoint > then or assets.find(self.spec.output),
            seconds,
            f"a checkpoint of {self.name} after {then}; attempts {attempts.attempts(self.spec.output)[-3:]}",
        )
        return time.monotonic() - began

    @property
    def pods(self) -> dict[str, str]:
        """Uids of its worker pods that run, by name."""
        pods = self.cluster.job_pods(self.job)
        return {
            name: one["metadata"]["uid"] for name, one in pods.items() if one["status"]["phase"] == "Running"
        }

    def runs(self, seconds: float = 180) -> dict[str, str]:
        """Its worker pods, as soon as both run."""
        return until(lambda: self.pods if len(self.pods) == 2 else {}, seconds, f"two pods of {self.job}")


@pytest.fixture(scope="module")
def inputs(cluster: Cluster) -> dict[str, Manifest]:
    """All that the transformer is made from, made by processes of one pod."""
    step = cluster.step("inputs", TWO, INPUTS, launcher="torchrun")
    code, why = step.ended(600)
    assert code == 0, why + step.log
    config, made = load_config("smoke", TWO), {}
    for kind in INPUTS:
        needed = {name: made[name] for name in steps.STEPS[kind].needs}
        found = assets.find(steps.writer(kind, config, needed).uri)
        assert found, kind
        made[kind] = found
    step.gone()
    return made


@pytest.fixture
def train(cluster: Cluster, inputs: dict[str, Manifest]) -> Iterator[Callable[..., Training]]:
    """Make trainings that no other test knows; what is left of them ends with the test."""
    made: list[Training] = []

    def one(name: str, *overrides: str) -> Training:
        number = zlib.crc32(name.encode()) % 10**6
        mine = f"transformer.training.weight_decay={0.01 + number / 10**8}"
        made.append(Training(cluster, name, (mine, *overrides), inputs))
        return made[-1]

    yield one
    for training in made:
        if training.steps:
            training.end()


@pytest.fixture
def training(train: Callable[..., Training], request: pytest.FixtureRequest) -> Training:
    """A long training."""
    name = request.node.name.removeprefix("test_").replace("_", "-")[:40].strip("-")
    return train(name, LONG)


# ── survives ────────────────────────────────────────────────────────────────────────────────────────────


def test_killed_twenty_times_it_makes_what_two_processes_of_one_machine_make(
    cluster: Cluster, training: Training
) -> None:
    def ranks(number: int) -> None:
        """SIGKILL to all that runs in a worker's pod but its entry."""
        others = "for p in /proc/[0-9]*; do p=${p#/proc/}; [ $p = 1 ] || [ $p = $$ ] || kill -9 $p; done"
        cluster.kubectl("exec", f"{training.job}-worker-{number}", "--", "sh", "-c", others)

    def both() -> None:
        names = [f"{training.job}-worker-{number}" for number in (0, 1)]
        cluster.kubectl("delete", "pod", *names, "--grace-period=0", "--force", "--wait=false")

    def operator() -> None:
        (one,) = cluster.get("pods", "-A", "-l", OPERATOR)
        name, where = one["metadata"]["name"], one["metadata"]["namespace"]
        cluster.kubectl("-n", where, "delete", "pod", name, "--grace-period=1", "--wait=false")

    kills = {"worker": lambda: ranks(1), "rank 0": lambda: ranks(0), "both": both, "operator": operator}
    step = training.start()
    training.runs()
    training.goes_on(180)
    took: dict[str, list[float]] = {what: [] for what in (*kills, "step")}
    for _ in range(4):
        for what in took:
            before, began = training.runs(), time.monotonic()
            if what == "step":
                step.kill()
                assert step.ended()[0] == 128 + signal.SIGKILL
                step = training.start()
                step.says(f"adopts {training.job}")
            else:
                kills[what]()
            if what in ("worker", "rank 0", "both"):
                until(lambda: not before.items() & training.runs().items(), 120, "two new pods")  # noqa: B023
            training.goes_on()
            if what in ("operator", "step"):
                assert training.pods == before, f"when the {what} is killed no worker starts again"
            took[what].append(time.monotonic() - began)
            print(f"{what} killed: a new checkpoint after {took[what][-1]:.0f} s", flush=True)
    code, why = step.ended(900)
    assert code == 0, why + step.log
    alone = cluster.step(
        "alone",
        [*training.overrides, "jobs.workers=1", "jobs.processes_per_worker=2"],
        launcher="torchrun",
        store="s3://latent-gpt/alone",
    )
    code, why = alone.ended(900)
    assert code == 0, why + alone.log
    made = assets.find(training.spec.output)
    assert made
    other = storage.join("s3://latent-gpt/alone", made.kind, made.key, assets.NAME)
    files = {one["name"]: one["sha256"] for one in json.loads(storage.read_bytes(other))["files"]}
    assert {one.name: one.sha256 for one in made.files} == files
    print("longest:", ", ".join(f"{what} {max(seconds):.0f} s" for what, seconds in took.items()))


def test_when_its_step_is_deleted_it_goes_and_the_next_start_resumes(training: Training) -> None:
    step = training.start()
    training.runs()
    training.goes_on(180)
    step.terminate()
    began = time.monotonic()
    until(lambda: training.cluster.job_is_gone(training.job), 60, f"the end of {training.job}")
    print(f"job and pods were gone after {time.monotonic() - began:.0f} s")
    kept = training.checkpoint
    assert kept > 0
    step = training.start()
    log = step.says("goes on from step", 180)
    assert f"goes on from step {kept}" in log
    step.terminate()


def test_two_steps_share_a_job_and_one_of_them_is_enough(train: Callable[..., Training]) -> None:
    training = train("shared", "transformer.training.steps=4000")
    first = training.start()
    before = training.runs()
    training.goes_on(180)
    second = training.start(run="another")
    second.says(f"adopts {training.job}")
    time.sleep(40)  # both leases are renewed and seen
    first.terminate()
    time.sleep(5)
    assert training.pods == before, "the job goes on for the one that is left"
    code, why = second.ended(600)
    assert code == 0, why + second.log


def test_a_step_that_is_killed_and_never_comes_back_ends_its_job(train: Callable[..., Training]) -> None:
    training = train("abandoned", "transformer.training.steps=60000")  # four minutes are not to be enough
    step = training.start()
    training.runs()
    training.goes_on(180)
    step.kill()
    until(
        lambda: [one for one in attempts.attempts(training.spec.output) if one.outcome],
        420,
        "an outcome of the orphan",
        every=5,
    )
    ends = [one.outcome.kind for one in attempts.attempts(training.spec.output) if one.outcome]
    assert set(ends) == {"orphaned"}, ends

    def succeeded() -> bool:
        """Whether the operator says so, who has to see first that its pods have ended."""
        (job,) = training.cluster.get("pytorchjobs", "--field-selector", f"metadata.name={training.job}")
        return ("Succeeded", "True") in [(one["type"], one["status"]) for one in job["status"]["conditions"]]

    until(succeeded, 60, f"the success of {training.job}")
    assert training.checkpoint > 0
    step = training.start()
    step.says("goes on from step", 180)
    step.terminate()


# ── waits ───────────────────────────────────────────────────────────────────────────────────────────────


def test_it_waits_ten_minutes_for_a_node_and_says_for_what(
    cluster: Cluster, train: Callable[..., Training]
) -> None:
    (node, *_) = [one["metadata"]["labels"]["kubernetes.io/hostname"] for one in cluster.get("nodes")]
    only = f"jobs.node_selector={{kubernetes.io/hostname: {node}}}"
    training = train("pending", LONG, only)
    step = training.start()
    until(lambda: step.status["phase"] == "Running", 60, "the step's own pod", every=0.1)
    cluster.kubectl("cordon", node)  # before Python has started, and with it the job
    try:
        step.says("unschedulable", 120)
        time.sleep(600)
        assert step.status["phase"] == "Running"
        assert step.log.count("unschedulable") >= 9, step.log  # once a minute
        assert not training.pods
    finally:
        cluster.kubectl("uncordon", node)
    training.runs(60)
    training.goes_on(180)
    step.terminate()


def test_a_suspended_job_waits_and_goes_on(training: Training) -> None:
    def suspended(yes: bool) -> None:
        patch = json.dumps({"spec": {"runPolicy": {"suspend": yes}}})
        training.cluster.kubectl("patch", "pytorchjob", training.job, "--type=merge", "-p", patch)

    step = training.start()
    training.runs()
    training.goes_on(180)
    suspended(True)
    step.says("suspended", 120)
    until(lambda: not training.pods, 90, "pods of a suspended job to go")
    kept = training.checkpoint
    suspended(False)
    step.says(f"goes on from step {kept}", 180)
    training.goes_on()
    step.terminate()


def test_it_compiles_in_its_pods(train: Callable[..., Training]) -> None:
    """With the compiler that its image has, as every preset for GPUs does."""
    compiled = ("transformer.training.compile=true", "transformer.random_order=0.9", "jobs.memory=3Gi")
    step = train("compiled", SHORT, *compiled).start()
    code, why = step.ended(600)
    assert code == 0, why + step.log
    assert "transformer | step 400/400" in step.log


# ── tells why ───────────────────────────────────────────────────────────────────────────────────────────


def test_logs_of_all_ranks_are_there_when_every_pod_is_gone(
    cluster: Cluster, train: Callable[..., Training]
) -> None:
    training = train("logs", SHORT)
    step = training.start()
    code, why = step.ended(300)
    assert code == 0, why + step.log
    assert "transformer | step 400/400" in step.log, "rank 0 speaks in the step's log"
    cluster.kubectl("delete", "pytorchjob", training.job)
    until(lambda: cluster.job_is_gone(training.job), 60, "the job to go")
    command = [sys.executable, "-m", "pipelines.cli", "logs", "logs", "--step", "transformer"]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "step 400/400" in said.stdout
    other = subprocess.run([*command, "--rank", "1"], capture_output=True, text=True).stdout
    assert "rank 1 of 2, on cpu" in other
    assert "step 400/400" not in other


CAUSES = {
    "out of memory": (
        ["jobs.memory=300Mi", "jobs.shared_memory=64Mi", "jobs.max_restarts=0"],
        ["OOMKilled", "300Mi"],
    ),
    "diverged": (["transformer.training.learning_rate=1e30"], ["diverged"]),
    "no such device": (["jobs.gpus_per_worker=64", "jobs.pending_hours=0.02"], ["nvidia.com/gpu"]),
    "too large": (["jobs.cpu=4000", "jobs.cpu_limit=4000", "jobs.pending_hours=0.02"], ["cpu"]),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_it_says_why_it_failed(cluster: Cluster, train: Callable[..., Training], cause: str) -> None:
    overrides, words = CAUSES[cause]
    training = train(cause.replace(" ", "-"), SHORT, *overrides)
    step = training.start()
    code, why = step.ended(420)
    assert code != 0
    last = [line for line in step.log.splitlines() if line.startswith("error: ")][-1]
    for word in words:
        assert word in last, last
        assert word in why, why
    until(lambda: cluster.job_is_gone(training.job), 120, "a failed job is cleaned away")


def test_an_image_that_cannot_be_pulled_is_named(cluster: Cluster, train: Callable[..., Training]) -> None:
    training = train("no-image", SHORT)
    step = training.start(environment={"LATENT_GPT_IMAGE": "localhost:1/nobody/has:this"})
    step.says("localhost:1/nobody/has:this", 240)
    step.terminate()
    until(lambda: cluster.job_is_gone(training.job), 60, "the job to go")


def test_what_was_lost_from_the_store_is_named(
    cluster: Cluster, train: Callable[..., Training], inputs: dict[str, Manifest]
) -> None:
    training = train("lost", LONG)
    step = training.start()
    training.runs()
    training.goes_on(180)
    lost = storage.join(inputs["tokens"].uri, "manifest.json")
    kept = storage.read_bytes(lost)
    storage.delete(lost)
    try:
        cluster.kubectl("delete", "pod", f"{training.job}-worker-1", "--wait=false")
        code, why = step.ended(180)
    finally:
        storage.write_bytes(lost, kept)
    assert code == 2
    assert inputs["tokens"].uri in why
