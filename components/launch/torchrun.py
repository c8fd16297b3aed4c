"""Jobs by torchrun, as processes of this machine.

They meet in files. Torchrun's store at a port is open to everybody who reaches this machine, and what is put
there is unpickled.

No restarts: on one machine a failure repeats itself, and the next launch resumes from the checkpoint anyway.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
from pathlib import Path

from components.launch.elastic import blamed
from model.plumbing import assets, environment, outcome, speech
from model.plumbing.jobs import JobSpec, write_spec
from model.plumbing.leases import alone
from model.plumbing.outcome import Outcome
from model.plumbing.parallel import cores


def run(spec: JobSpec) -> Outcome:
    """See `Backend.run`. SIGTERM and SIGINT reach the workers, which are gone when this raises."""
    with alone(spec.name, spec.output):
        if made := assets.find(spec.output):
            speech.reused(spec.name, made.uri)
            return Outcome(kind="finished")
        return _run(spec, _attempt(spec.name))


def _attempt(name: str) -> Path:
    """A new folder for the logs and outcomes of this attempt."""
    if logs := environment.LOGS.get():
        Path(logs).mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=logs or None))


def _run(spec: JobSpec, folder: Path) -> Outcome:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    processes = spec.jobs.workers * spec.jobs.processes_per_worker
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=spec.name,
        rdzv_backend="c10d",
        rdzv_endpoint=str(folder / "agent"),
        rdzv_configs={"store_type": "file", "keep_alive_interval": 3600},  # it says so by adding to the file
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(
            log_dir=str(folder),
            redirects=Std.ALL,
            tee={rank: Std.ALL if rank == 0 else Std.NONE for rank in range(processes)},
        ),
        log_line_prefix_template=" ",
        signals_to_handle="SIGTERM,SIGINT",
    )
    environment.put_default("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    outcomes = folder / "outcomes"
    told = {
        environment.OUTCOMES.name: str(outcomes),
        environment.MEETING.name: str(folder / "meeting"),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONUNBUFFERED": "1",  # a line must arrive when it is written, not when a buffer is full
    }
    ours = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        with environment.within(told):
            elastic_launch(config, sys.executable)("-m", spec.module, write_spec(spec))
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        sys.exit(outcome.EXIT_CODES["stopped"])
    except ChildFailedError as error:
        left = {int(who): end for who, end in outcome.left_in(str(outcomes)).items()}
        end = blamed(error.failures, left, folder)
        where = "" if end.expected else f"; its log is under {folder}"
        return end.model_copy(update={"reason": end.reason + where})
    finally:  # torch leaves its own, which raise what anybody may catch
        if threading.current_thread() is threading.main_thread():
            for one, handler in ours.items():
                signal.signal(one, handler)
    return Outcome(kind="finished")
