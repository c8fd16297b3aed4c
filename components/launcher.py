"""Run a training job where we are: torchrun processes here, a PyTorchJob on a cluster.

A job is a `JobSpec`: what to make, from what, on how many processes. The launcher knows processes, logs and
exit codes; it knows nothing of nets.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from components.step import JobFailed, alone, say
from model.errors import UserError
from model.plumbing import assets
from model.plumbing.assets import Manifest
from model.plumbing.jobs import JobSpec, write_spec
from model.plumbing.parallel import cores

LAST_LINES = 15  # of a failed rank's log, repeated where the failure is reported


def launch(spec: JobSpec) -> Manifest:
    """Run `python -m <spec.module> <spec uri>` on every process of the job; return the asset it made.

    A job is repeatable: what it left unfinished is resumed from its checkpoints by the next launch.

    Raises:
        UserError: what a worker found wrong with its input, in the worker's own line.
        JobFailed: any other end without a complete asset.
    """
    if made := assets.find(spec.output):
        say(spec.name, f"reused {made.uri}")
        return made
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        raise UserError("training jobs on Kubernetes (PyTorchJob) are not built yet; run outside the cluster")
    with alone(spec.name, spec.output):
        if made := assets.find(spec.output):
            say(spec.name, f"reused {made.uri}")
            return made
        logs = Path(os.environ.get("LATENT_GPT_LOGS") or tempfile.mkdtemp(prefix="latent-gpt-")) / spec.name
        run_torchrun(spec, logs)
        manifest = assets.find(spec.output)
    if manifest is None:
        raise JobFailed(f"all processes ended well, but {spec.output} has no manifest")
    return manifest


def run_torchrun(spec: JobSpec, logs: Path) -> None:
    """Run the job's processes on this machine; rank 0 speaks on our stdout, every rank into `logs`.

    SIGTERM and SIGINT reach the workers, which are gone when this returns. No restarts: on one machine a
    failure repeats itself, and the next run resumes from the checkpoint anyway.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    processes = spec.jobs.workers * spec.jobs.processes_per_worker
    logs.mkdir(parents=True, exist_ok=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=spec.name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(
            log_dir=str(logs),
            redirects=Std.ALL,
            tee={rank: Std.ALL if rank == 0 else Std.NONE for rank in range(processes)},
        ),
        log_line_prefix_template=" ",
        signals_to_handle="SIGTERM,SIGINT",
    )
    threads = max(1, cores() // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ["PYTHONUNBUFFERED"] = "1"  # a line must arrive when it is written, not when a buffer is full
    try:
        elastic_launch(config, sys.executable)("-m", spec.module, write_spec(spec))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise _reason(rank, failure.exitcode, logs) from None


def _reason(rank: int, exitcode: int, logs: Path) -> UserError | JobFailed:
    """What the first failed rank said, or how it ended."""
    lines = [
        line.rstrip()
        for name in ("stdout.log", "stderr.log")
        for path in sorted(logs.rglob(f"{rank}/{name}"))
        for line in path.read_text(errors="replace").splitlines()
    ]
    for line in reversed(lines):
        if match := re.match(r"error: (.*)", line):
            return UserError(match[1])
    if exitcode == -9:
        how = "was killed (SIGKILL; most often the machine ran out of memory)"
    elif exitcode < 0:
        how = f"was ended by signal {-exitcode}"
    else:
        how = f"ended with exit code {exitcode}"
    last = f" ({lines[-1].strip()[:200]})" if lines else ""
    tail = "\n".join(lines[-LAST_LINES:])
    return JobFailed(f"process {rank} {how}{last}; its log is under {logs}\n{tail}")
