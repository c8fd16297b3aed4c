"""The loop around a job of a cluster, against an API server whose operator the test plays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from components.launch import cluster, follow, launch, pods, pytorchjob
from model.config import JobConfig, load_config
from model.errors import UserError
from model.plumbing import storage
from model.plumbing.assets import AssetWriter, Manifest
from model.plumbing.jobs import JobSpec, TrackingIds
from model.plumbing.outcome import JobFailed, Outcome
from tests import ROOT
from tests.apiserver import JOBS, PODS, ApiServer, Refused

pytestmark = pytest.mark.slow

SHORT = 0.05  # seconds where the loop takes seconds or a minute


@pytest.fixture
def server(api_server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> ApiServer:
    for name in ("FIRST_WORD", "NEXT_WORD"):
        monkeypatch.setattr(follow, name, SHORT)
    monkeypatch.setattr(follow, "LOOKS", 1.0)
    monkeypatch.setattr(cluster, "LONGEST_PAUSE", 0.1)
    return api_server


def spec(run: str = "r", **jobs: Any) -> JobSpec:
    return JobSpec(
        kind="tokenizer",
        module="toy",
        config=load_config("smoke"),
        settings={"a": 1},
        inputs={},
        jobs=JobConfig(workers=2, **jobs),
        tracking=TrackingIds(experiment="e", run=run, step="tokenizer"),
    )


def finish(one: JobSpec) -> Manifest:
    """The asset is made."""
    return AssetWriter(one.kind, one.settings, {}).finish({})


class Operator:
    """Runs jobs by a script: a function of the job's name and of how many jobs there were before it."""

    def __init__(self, server: ApiServer, script: Callable[[str, int], None]) -> None:
        self.server, self.script, self.made = server, script, 0
        self.error: BaseException | None = None
        server.on_create = self

    def __call__(self, job: dict[str, Any]) -> None:
        number, self.made = self.made, self.made + 1
        try:
            self.script(job["metadata"]["name"], number)
        except BaseException as error:
            self.error = error

    def run(self, job: str) -> None:
        """Both workers run."""
        self.server.condition(job, "Running")
        for number in (0, 1):
            self.server.pod(job, number)

    def succeed(self, job: str, one: JobSpec | None) -> None:
        """Both workers end well; with the asset of a spec, if one is given."""
        if one:
            finish(one)
        for number in (0, 1):
            self.server.pod(job, number, "Succeeded")
        self.server.condition(job, "Running", status="False")
        self.server.condition(job, "Succeeded")

    def fail(self, job: str, code: int = 1, reason: str = "Error", message: str = "") -> None:
        """Worker 1 ends with this exit code, which loses worker 0."""
        lost = Outcome(kind="lost", reason="gloo").model_dump_json()
        self.server.pod(job, 1, "Failed", terminated={"exitCode": code, "reason": reason, "message": message})
        time.sleep(1.1)  # times are whole seconds
        self.server.pod(job, 0, "Failed", terminated={"exitCode": 200, "reason": "Error", "message": lost})
        self.server.condition(job, "Failed")


def deletions(server: ApiServer) -> list[Any]:
    return [one.body for one in server.requests if one.method == "DELETE"]


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_job_is_made_and_followed_to_its_asset(
    server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    one = spec()

    def script(job: str, _: int) -> None:
        operator.run(job)
        server.log(f"{job}-worker-0", "tokenizer | step 1/2  50%", "tokenizer | step 2/2  100%")
        server.log(f"{job}-worker-1", "not rank 0")
        time.sleep(0.5)
        operator.succeed(job, one)

    operator = Operator(server, script)
    made = launch(one)
    assert made == finish(one)
    assert operator.error is None
    assert operator.made == 1
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if "step " in line] == [
        "tokenizer | step 1/2  50%",
        "tokenizer | step 2/2  100%",
    ]
    assert "not rank 0" not in shown
    assert deletions(server) == [], "a job that succeeded is left to its TTL, as others may follow it"
    (created,) = [request for request in server.requests if request.method == "POST"]
    assert created.body["metadata"]["name"] == pytorchjob.name(one)
    assert not storage.exists(storage.join(one.output, "leases")) or not storage.list_sizes(one.leases)


def test_a_set_that_is_there_makes_no_request(server: ApiServer) -> None:
    made = finish(spec())
    assert launch(spec()) == made
    assert server.requests == []


def test_a_failed_job_is_read_for_its_reason_and_deleted(server: ApiServer) -> None:
    def script(job: str, _: int) -> None:
        operator.run(job)
        operator.fail(
            job, message=Outcome(kind="failed", reason="ZeroDivisionError: by zero").model_dump_json()
        )

    operator = Operator(server, script)
    with pytest.raises(JobFailed) as caught:
        launch(spec())
    name = pytorchjob.name(spec())
    assert str(caught.value) == f"pod {name}-worker-1 failed: ZeroDivisionError: by zero"
    (body,) = deletions(server)
    assert body["preconditions"]["uid"]
    assert body["propagationPolicy"] == "Background"


def test_bad_input_is_the_steps_bad_input(server: ApiServer) -> None:
    def script(job: str, _: int) -> None:
        operator.run(job)
        operator.fail(job, message=Outcome(kind="refused", reason="batch_size 7 is odd").model_dump_json())

    operator = Operator(server, script)
    with pytest.raises(UserError, match=r"^batch_size 7 is odd$"):
        launch(spec())


def test_out_of_memory_is_named_with_pod_limit_and_remedy(server: ApiServer) -> None:
    def script(job: str, _: int) -> None:
        operator.run(job)
        operator.fail(job, 137, "OOMKilled")

    operator = Operator(server, script)
    with pytest.raises(JobFailed) as caught:
        launch(spec(memory="300Mi"))
    name = pytorchjob.name(spec())
    assert str(caught.value) == (
        f"pod {name}-worker-1 ran out of memory (OOMKilled): its limit is 300Mi; raise jobs.memory"
    )


def test_a_failed_job_of_an_earlier_launch_says_why_and_is_made_anew(
    server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    one = spec()

    def script(job: str, number: int) -> None:
        operator.run(job)
        if number:
            operator.succeed(job, one)
        else:
            operator.fail(job, 137, "OOMKilled")

    operator = Operator(server, script)
    body = pytorchjob.job(one, "uri", "image", server.namespace, {})
    there = cluster.here(print)
    there.create(pytorchjob.RESOURCE, body)
    until(lambda: "Failed" in json.dumps(server.job(pytorchjob.name(one))))
    launch(one)
    assert operator.made == 2
    said = capsys.readouterr().out
    assert "the job before this one failed: pod" in said
    assert "raise jobs.memory; it is made anew" in said


@pytest.mark.parametrize("gone", [True, False], ids=["its pods said so", "its attempts said so"])
def test_an_orphaned_job_is_made_anew(server: ApiServer, gone: bool) -> None:
    one = spec()

    def script(job: str, number: int) -> None:
        operator.run(job)
        if number:
            operator.succeed(job, one)
            return
        message = Outcome(kind="orphaned", reason="nobody wants it").model_dump_json()
        for worker in (0, 1):
            name = f"{job}-worker-{worker}"
            uid = server.get(PODS, name)["metadata"]["uid"]
            if gone:
                folder = storage.join(one.output, "attempts", f"20261126T091500-{worker}-{uid[:8]}")
                start = json.dumps({"worker": worker, "pod": name, "when": time.time()})
                storage.write_bytes(storage.join(folder, "start.json"), start.encode())
                storage.write_bytes(storage.join(folder, "outcome.json"), message.encode())
            ended = {"exitCode": 0, "message": "" if gone else message}
            server.pod(job, worker, "Succeeded", terminated=ended)
        server.condition(job, "Succeeded")

    operator = Operator(server, script)
    launch(one)
    assert operator.made == 2


def test_a_job_that_succeeds_without_its_asset_has_failed(server: ApiServer) -> None:
    def script(job: str, _: int) -> None:
        operator.run(job)
        operator.succeed(job, None)

    operator = Operator(server, script)
    with pytest.raises(JobFailed, match="all workers ended well, but the asset has no manifest"):
        launch(spec())
    assert len(deletions(server)) == 1


def test_a_job_that_vanishes_is_made_anew(server: ApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    one = spec()

    def script(job: str, number: int) -> None:
        operator.run(job)
        time.sleep(0.5)
        if number:
            operator.succeed(job, one)
        else:
            server.remove(JOBS, job)

    operator = Operator(server, script)
    launch(one)
    assert operator.made == 2
    assert "its job is gone and is made anew" in capsys.readouterr().out


def test_a_job_whose_set_is_there_when_it_vanishes_is_not_made_anew(server: ApiServer) -> None:
    one = spec()

    def script(job: str, _: int) -> None:
        operator.run(job)
        time.sleep(0.5)
        finish(one)
        server.remove(JOBS, job)

    operator = Operator(server, script)
    launch(one)
    assert operator.made == 1


def test_a_job_that_runs_is_adopted_and_its_spec_is_not_written_again(
    server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    one = spec()
    operator = there_already(server, one)
    (written,) = [name for name in storage.list_sizes(one.output) if name.startswith("job")]
    before = storage.read_bytes(storage.join(one.output, written))
    job = pytorchjob.name(one)
    threading.Timer(1.0, lambda: operator.succeed(job, one)).start()
    launch(spec(run="another"))
    assert operator.made == 1
    assert storage.read_bytes(storage.join(one.output, written)) == before
    assert f"adopts {job}" in capsys.readouterr().out


def there_already(server: ApiServer, one: JobSpec) -> Operator:
    """A job that another step has made, and that runs."""
    operator = Operator(server, lambda job, _: operator.run(job))
    first = follow.Followed(one, pytorchjob, cluster.here(), NoLease())
    first._create()
    first.server.end.set()
    until(lambda: len(server.names(PODS)) == 2)
    return operator


def test_who_adopts_a_job_repeats_its_last_lines(
    server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    one = spec()
    operator, job = there_already(server, one), pytorchjob.name(one)
    server.log(f"{job}-worker-0", *(f"line {number}" for number in range(50)))
    threading.Timer(1.5, lambda: operator.succeed(job, one)).start()
    launch(one)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("line ")]
    assert said == [f"line {number}" for number in range(40, 50)]


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        ({"max_restarts": 3}, "started 5 times without a new checkpoint"),
        ({"max_restarts": 9, "deadline_hours": 4}, "not done after jobs.deadline_hours (4)"),
    ],
)
def test_who_adopts_a_job_counts_its_starts_and_its_hours(
    server: ApiServer, jobs: dict[str, Any], said: str
) -> None:
    one = spec()
    there_already(server, one)
    now = time.time() + 2  # a job's creation is told in whole seconds
    hour = Outcome(kind="killed", reason="w", when=now + 3600).model_dump_json()
    for number in range(5):  # of worker 0, all from the beginning
        folder = storage.join(one.output, "attempts", f"20261126T09150{number}-0-{number}")
        start = json.dumps({"worker": 0, "pod": "p", "when": now, "step": 0})
        storage.write_bytes(storage.join(folder, "start.json"), start.encode())
        storage.write_bytes(storage.join(folder, "outcome.json"), hour.encode())
    with pytest.raises(JobFailed) as caught:
        launch(spec(**jobs))
    assert said in str(caught.value)


@pytest.mark.parametrize("pods_are_gone", [False, True])
def test_who_adopts_a_job_counts_no_time_at_work_as_waiting(server: ApiServer, pods_are_gone: bool) -> None:
    """It is hours old, and one of its workers, or each, waits for room again."""
    one = spec()
    there_already(server, one)
    job = pytorchjob.name(one)
    server.get(JOBS, job)["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    server.restart(job, 1)
    if pods_are_gone:
        server.restart(job, 0)
        folder = storage.join(one.output, "attempts", "20261126T091500-0-0")
        start = json.dumps({"worker": 0, "pod": "p", "when": time.time() - 7200, "step": 0})
        storage.write_bytes(storage.join(folder, "start.json"), start.encode())
        evicted = Outcome(kind="stopped", reason="evicted").model_dump_json()
        storage.write_bytes(storage.join(folder, "outcome.json"), evicted.encode())
    followed = follow.Followed(one, pytorchjob, cluster.here(), NoLease())
    assert followed._look().waited < 60
    followed.server.end.set()


def test_the_workers_that_a_job_goes_on_with_are_at_work(server: ApiServer) -> None:
    running = pods.Pod(name="p", uid="u", worker=0, created=1.0, since=2.0)
    job = cast(follow.Job, SimpleNamespace(workers=2))
    for least, waits in ((1, False), (0, True)):
        followed = follow.Followed(spec(min_workers=least), pytorchjob, cluster.here(), NoLease())
        followed.idle_since = 0.0
        followed._clock(job, (running,))
        assert (followed.idle_since == 0.0) == waits
        assert followed.ran == 0.0, "with all workers"


class NoLease:
    """Of nobody else."""

    last = True


def test_409_after_a_retry_counts_as_made(server: ApiServer) -> None:
    one = spec()

    def script(job: str, _: int) -> None:
        operator.run(job)
        time.sleep(0.5)
        operator.succeed(job, one)

    operator = Operator(server, script)
    server.fail(500, method="POST", done=True)  # carried out, and the answer is lost
    launch(one)
    assert operator.made == 1


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            {"unschedulable": "0/1 nodes are available: 1 Insufficient cpu."},
            "is unschedulable: 0/1 nodes are available: 1 Insufficient cpu",
        ),
        (
            {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}},
            "cannot pull its image registry/latent-gpt@sha256:1: ImagePullBackOff: Back-off pulling image",
        ),
        (
            {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "latent-gpt" not found'}},
            'cannot be started: CreateContainerConfigError: secret "latent-gpt" not found',
        ),
    ],
)
def test_a_job_that_waits_says_for_what(
    server: ApiServer, capsys: pytest.CaptureFixture[str], how: Any, said: str
) -> None:
    one = spec()

    def script(job: str, _: int) -> None:
        for worker in (0, 1):
            server.pod(job, worker, "Pending", **how)
        time.sleep(1)
        operator.run(job)
        operator.succeed(job, one)

    operator = Operator(server, script)
    launch(one)
    assert f"pod {pytorchjob.name(one)}-worker-0 {said}" in capsys.readouterr().out


def test_an_image_without_a_name_is_hopeless(server: ApiServer) -> None:
    waiting = {"reason": "InvalidImageName", "message": "invalid reference format"}
    Operator(server, lambda job, _: server.pod(job, 0, "Pending", waiting=waiting) and None)
    with pytest.raises(JobFailed, match=r"cannot pull its image .*: InvalidImageName: .*give the image"):
        launch(spec())
    assert len(deletions(server)) == 1


def test_pods_that_a_quota_forbids_are_told_by_the_jobs_events(
    server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    one = spec()

    def script(job: str, _: int) -> None:
        server.event(JOBS, job, "FailedCreatePod", "exceeded quota: team, requested: cpu=8")
        time.sleep(1)
        operator.run(job)
        operator.succeed(job, one)

    operator = Operator(server, script)
    launch(one)
    assert "FailedCreatePod: exceeded quota: team" in capsys.readouterr().out


def test_a_job_that_a_queue_holds_back_waits_for_it(
    server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    one = spec(queue="gpus")

    def script(job: str, _: int) -> None:
        server._change(JOBS, job, lambda found: found["spec"]["runPolicy"].update(suspend=True))
        time.sleep(1)
        server._change(JOBS, job, lambda found: found["spec"]["runPolicy"].update(suspend=False))
        operator.run(job)
        operator.succeed(job, one)

    operator = Operator(server, script)
    launch(one)
    assert "queue 'gpus' has not admitted the job" in capsys.readouterr().out


def test_a_job_that_a_queue_stops_and_admits_again_has_not_failed(server: ApiServer) -> None:
    one = spec(max_restarts=1)

    def suspend(job: str, yes: bool) -> None:
        server._change(JOBS, job, lambda found: found["spec"]["runPolicy"].update(suspend=yes))

    def script(job: str, _: int) -> None:
        for _ in range(4):
            operator.run(job)
            time.sleep(0.5)
            suspend(job, True)
            for worker in (0, 1):
                server.remove(PODS, f"{job}-worker-{worker}")
            time.sleep(0.5)
            suspend(job, False)
        operator.run(job)
        operator.succeed(job, one)

    operator = Operator(server, script)
    launch(one)
    assert operator.error is None
    assert operator.made == 1


def test_restarts_without_progress_are_bounded_and_their_reason_is_told(
    server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(job: str, _: int) -> None:
        for _ in range(6):
            for worker in (0, 1):
                server.restart(job, worker, "Running")
            time.sleep(0.3)
            ended = {"exitCode": 137, "reason": "OOMKilled"}
            server.pod(job, 1, "Failed", terminated=ended)
            server.condition(job, "Restarting")
            time.sleep(0.3)
            if JOBS not in json.dumps(server.names(JOBS)) and job not in server.names(JOBS):
                return

    Operator(server, script)
    with pytest.raises(JobFailed) as caught:
        launch(spec(max_restarts=2))
    said = capsys.readouterr().out
    assert "raise jobs.memory; its workers start again (1 of 2 times without a new checkpoint)" in said
    assert "(2 of 2 times without a new checkpoint)" in said
    assert "(3 of 2" not in said
    assert "ran out of memory (OOMKilled)" in str(caught.value)
    assert "started 4 times without a new checkpoint (jobs.max_restarts)" in str(caught.value)
    assert len(deletions(server)) == 1


def test_progress_resets_the_count_of_restarts(server: ApiServer) -> None:
    one = spec(max_restarts=1)

    def script(job: str, _: int) -> None:
        for step in range(1, 6):
            for worker in (0, 1):
                server.restart(job, worker, "Running")
            time.sleep(0.5)
            complete = storage.join(one.checkpoints, f"step-{100 * step:08d}", "complete.json")
            storage.write_bytes(complete, b"{}")
        operator.succeed(job, one)

    operator = Operator(server, script)
    launch(one)
    assert operator.made == 1


def test_pending_hours_and_deadline_hours_end_a_job(server: ApiServer) -> None:
    Operator(server, lambda job, _: server.pod(job, 0, "Pending", unschedulable="no room") and None)
    with pytest.raises(JobFailed, match=r"not started within jobs.pending_hours \(0.0003\): .*no room"):
        launch(spec(pending_hours=0.0003))
    operator = Operator(server, lambda job, _: operator.run(job))
    with pytest.raises(JobFailed, match=r"not done after jobs.deadline_hours \(0.0003\)"):
        launch(spec(deadline_hours=0.0003))
    assert len(deletions(server)) == 2


@pytest.mark.parametrize("fault", ["500", "429", "drop", "forget", "away"])
def test_an_api_server_that_misbehaves_is_weathered(
    server: ApiServer, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    one = spec()

    def script(job: str, _: int) -> None:
        operator.run(job)
        zero = f"{job}-worker-0"
        server.log(zero, "tokenizer | step 1/3  33%")
        time.sleep(0.5)
        if fault == "500":
            server.fail(500, times=8)
        elif fault == "429":
            server.fail(429, times=8, retry_after=1)
        elif fault == "forget":
            server.forget()
            server.drop()
        elif fault == "away":
            server.away(2)
        else:
            server.drop()
        server.log(zero, "tokenizer | step 2/3  66%")
        time.sleep(0.5)
        server.drop()
        server.log(zero, "tokenizer | step 3/3  100%")
        time.sleep(0.3)
        operator.succeed(job, one)

    operator = Operator(server, script)
    launch(one)
    assert operator.error is None
    assert operator.made == 1
    steps = [line for line in capsys.readouterr().out.splitlines() if " step " in line]
    assert steps == [f"tokenizer | step {n}/3  {p}%" for n, p in ((1, 33), (2, 66), (3, 100))]


def test_a_server_that_is_silent_is_asked_again(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PATIENCE", (1.0, 1.0))
    monkeypatch.setattr(cluster, "SILENCE", (1.0, 1.0))
    one = spec()

    def script(job: str, _: int) -> None:
        operator.run(job)
        server.silent(4)
        operator.succeed(job, one)

    operator = Operator(server, script)
    began = time.monotonic()
    launch(one)
    assert operator.made == 1
    assert time.monotonic() - began < 15


def test_who_may_not_is_told_what_to_apply(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "TRIED_IN_VAIN", 0.5)
    server.denied.add(("create", JOBS))
    with pytest.raises(UserError, match=r"cannot create resource .*apply k8s/base/rbac.yaml"):
        launch(spec())


def test_a_quota_on_jobs_is_waited_for(
    server: ApiServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = spec()

    def script(job: str, _: int) -> None:
        operator.run(job)
        operator.succeed(job, one)

    operator = Operator(server, script)
    real = server._create
    times = [0]

    def create(plural: str, given: Any) -> Any:
        times[0] += plural == JOBS
        if plural == JOBS and times[0] < 3:
            raise Refused(403, 'pytorchjobs "x" is forbidden: exceeded quota: team')
        return real(plural, given)

    monkeypatch.setattr(server, "_create", create)
    launch(one)
    assert times[0] == 3
    assert "exceeded quota: team" in capsys.readouterr().out


def test_without_the_operators_api_it_is_told_what_to_install(server: ApiServer) -> None:
    del server.kinds[JOBS]
    with pytest.raises(UserError, match="install the training operator"):
        launch(spec())


# ── told to end ─────────────────────────────────────────────────────────────────────────────────────────

STEP = """
import sys
from components.launch import launch
from components.step import step
from model.plumbing.jobs import JobSpec
with step("tokenizer"):
    launch(JobSpec.model_validate_json(sys.argv[1]))
"""


def start(one: JobSpec, **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STEP, one.model_dump_json()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **how)


@pytest.mark.parametrize("reader", ["alive", "dead"])
def test_sigterm_deletes_the_job_first_of_all(server: ApiServer, reader: str) -> None:
    one = spec()
    operator = Operator(server, lambda job, _: operator.run(job))
    step = start(one, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until(lambda: len(server.names(PODS)) == 2)
    time.sleep(1)
    uid = server.job(pytorchjob.name(one))["metadata"]["uid"]
    assert step.stdout
    connections = list(server._server._open)
    if reader == "dead":
        step.stdout.close()
        server.log(f"{pytorchjob.name(one)}-worker-0", "a line that nobody reads")
        time.sleep(0.5)
    began = time.monotonic()
    step.send_signal(signal.SIGTERM)
    until(lambda: deletions(server), 5)
    took = next(one.when for one in server.requests if one.method == "DELETE") - began
    assert took < 0.4, "KFP leaves it no longer"
    assert set(server._server._open) <= set(connections), "it goes over a connection that is open already"
    assert deletions(server)[0]["preconditions"] == {"uid": uid}
    assert step.wait(10) == 143
    assert len(deletions(server)) == 1
    assert [name for name in storage.list_sizes(one.leases) if name != "left"] == []


@pytest.mark.parametrize(
    "when", ["the request is under way", "its answer is under way", "it had been there before"]
)
def test_sigterm_deletes_a_job_that_is_just_being_made(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    one = spec()
    fault = server.fault

    def slowly(method: str, path: str) -> Any:
        if method == "POST":
            step.send_signal(signal.SIGTERM)
            time.sleep(0.15)
        return fault(method, path)

    if when == "the request is under way":
        monkeypatch.setattr(server, "fault", slowly)
    else:
        before = [] if when.startswith("its") else ["one that goes when the step has seen it"]

        def created(job: dict[str, Any]) -> None:
            if before:
                time.sleep(1)
                server.remove(JOBS, job["metadata"]["name"])
                before.pop()
            else:
                step.send_signal(signal.SIGTERM)

        server.on_create = created
    step = start(one)
    assert step.wait(20) == 143
    assert [body["propagationPolicy"] for body in deletions(server)][-1:] == ["Background"]
    until(lambda: server.names(JOBS) == [], 5)


def test_two_steps_share_a_job_and_it_goes_with_the_last_of_them(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = spec()
    operator = Operator(server, lambda job, _: operator.run(job))
    first = start(one)
    until(lambda: len(server.names(PODS)) == 2)
    second = start(spec(run="another"))
    until(lambda: len(storage.list_sizes(one.leases)) == 2)
    time.sleep(1)
    second.send_signal(signal.SIGTERM)  # which has seen the lease of the first
    assert second.wait(10) == 143
    assert deletions(server) == []
    first.send_signal(signal.SIGTERM)
    assert first.wait(10) == 143
    assert len(deletions(server)) == 1
    assert operator.made == 1


def test_a_failure_of_a_shared_job_is_both_steps_failure(server: ApiServer) -> None:
    one = spec()
    operator = Operator(server, lambda job, _: operator.run(job))
    both = [start(one, stdout=subprocess.PIPE)]
    until(lambda: len(server.names(PODS)) == 2)
    both.append(start(one, stdout=subprocess.PIPE))
    until(lambda: len(storage.list_sizes(one.leases)) == 2)
    time.sleep(1.5)
    operator.fail(pytorchjob.name(one), message=Outcome(kind="refused", reason="odd").model_dump_json())
    said = [step.communicate(timeout=20)[0] for step in both]
    assert [step.returncode for step in both] == [2, 2]
    assert all("error: odd" in text for text in said)
    assert operator.made == 1
