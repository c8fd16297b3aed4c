"""Jobs by Slurm, as one `srun` within the allocation that this process is in; see `pipelines/slurm.py`.

Workers run the same entry as on a cluster, and meet as there. There are no restarts: Slurm requeues the whole
batch job when a node is gone, and the next launch resumes from the checkpoint.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress

from components.launch.pods import CAUSES
from components.launch.pytorchjob import ENTRY
from model.errors import UserError
from model.plumbing import assets, attempts, environment, outcome, speech
from model.plumbing.attempts import Attempt
from model.plumbing.jobs import JobSpec, write_spec
from model.plumbing.leases import Lease, alone
from model.plumbing.outcome import Outcome

# Slurm numbers the tasks of a step; ours are workers.
AS_A_WORKER = f'{environment.WORKER.name}=$SLURM_PROCID {environment.POD.name}=$SLURMD_NODENAME exec "$@"'
LAST_WORDS = 15.0  # seconds for workers to save and end when we are told to: whoever tells us waits no longer


def run(spec: JobSpec) -> Outcome:
    """See `Backend.run`. Workers are told to end when this process is, and save first."""
    if not environment.SLURM_JOB.get():
        raise UserError(
            f"{environment.LAUNCHER.name} is 'slurm', and this is no job of Slurm's; `latent-gpt slurm` makes"
            " the script for sbatch"
        )
    with alone(spec.name, spec.output), Lease(spec.leases, spec.name, spec.tracking.run):
        if made := assets.find(spec.output):
            speech.reused(spec.name, made.uri)
            return Outcome(kind="finished")
        before = {one.uri for one in attempts.attempts(spec.output)}
        code = _srun(spec)
        end = judged((one for one in attempts.attempts(spec.output) if one.uri not in before), code)
        if end.kind == "stopped":  # its time is up: the next turn goes on
            sys.exit(outcome.EXIT_CODES["stopped"])
        return end


def _srun(spec: JobSpec) -> int:
    """Run the workers to their end; returns the exit code of srun: the highest of theirs."""
    told = {
        environment.MEETING_POINT.name: f"{socket.gethostname()}:{_free_port()}",
        environment.WORKERS.name: str(spec.jobs.workers),
    }
    command = srun(spec.jobs.workers, int(environment.SLURM_NODES.get()), write_spec(spec))
    # In a session of its own: srun kills its tasks at once when it is told to end, and they are to save.
    child = subprocess.Popen(command, env=environment.of_a_child(told), start_new_session=True)
    try:
        return child.wait()
    finally:
        if child.poll() is None:
            subprocess.run(["scancel", "--signal=TERM", environment.SLURM_JOB.get()], check=False)
            with suppress(subprocess.TimeoutExpired):
                child.wait(LAST_WORDS)
            child.terminate()


def srun(workers: int, nodes: int, spec_uri: str) -> list[str]:
    """The command that starts the workers, side by side on as many nodes as there are.

    Args:
        workers: of the job.
        nodes: of the allocation, the first of which is this one: worker 0 has to be here.
        spec_uri: what they are told.
    """
    used = min(workers, nodes)
    if workers % used:
        raise UserError(
            f"jobs.workers ({workers}) cannot be spread evenly over {nodes} nodes; one for each is usual"
        )
    return [
        "srun",
        f"--nodes={used}",
        f"--ntasks={workers}",
        f"--ntasks-per-node={workers // used}",
        "--relative=0",
        "--distribution=block",
        "--cpu-bind=none",
        *([f"--cpus-per-task={cpus}"] if (cpus := environment.SLURM_CPUS.get()) else []),
        *("sh", "-c", AS_A_WORKER, "sh", sys.executable, "-m", ENTRY, spec_uri),
    ]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def judged(ended: Iterable[Attempt], code: int) -> Outcome:
    """How the job ended: as the worker did that made the others fail.

    Args:
        ended: the workers that have started.
        code: of srun.
    """
    if not code:
        return Outcome(kind="finished")
    ends = sorted(
        (one.outcome for one in ended if one.outcome and not one.outcome.well), key=lambda end: end.when
    )
    for final in (("refused", "diverged"), set(outcome.EXIT_CODES) - set(CAUSES), outcome.EXIT_CODES):
        for end in ends:
            if end.kind in final:
                return end
    return outcome.of_status("srun", code)
