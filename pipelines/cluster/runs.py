"""Runs on a cluster as people see them: submitted, listed, followed, cancelled and taken up again."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from components.parameters import PRESET_GPUS, RETRAINING, TEXT_TO_IMAGE, VQVAE, pipeline_of, resolve
from model.config import RunConfig, load_config
from model.data.sources import DRAWN, hub, recognise
from model.errors import Unavailable, UserError
from model.plumbing import environment, speech
from model.steps import STEPS
from pipelines.cluster.deploy import LABEL
from pipelines.cluster.kfp import Kfp, Run, connected
from pipelines.cluster.kubectl import Kubectl
from pipelines.cluster.reach import services
from pipelines.cluster.settings import built
from pipelines.cluster.steps import RUN, Steps, condensed, remembered
from pipelines.terminal import Follower

PIPELINES = (TEXT_TO_IMAGE, VQVAE, RETRAINING)
LOOK = 2.0  # seconds between two looks of who follows
AWAY = 600.0  # seconds for which KFP may be away while a run is followed
LISTED = 20  # runs
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def upload() -> None:
    """Compile all pipelines for the image that was pushed, and make them the newest versions in KFP.

    Raises:
        UserError: no image was pushed, or KFP does not take them.
    """
    kfp = connected()
    environment.IMAGE.put(built("latent-gpt"))  # before what reads it
    from pipelines.compile import compile
    from pipelines.dag import PIPELINES as defined

    with tempfile.TemporaryDirectory() as folder:
        for name, pipeline in defined.items():
            path = Path(folder) / f"{name}.yaml"
            compile(name, path)
            uploaded = kfp.upload(name, path, pipeline.description or "")
            how = "uploaded" if uploaded.new else "unchanged:"
            print(f"{how} {name}, version {uploaded.version}, of {environment.IMAGE.get()}")
    print(
        f"{'KFP':10}{kfp.endpoint}: choose a pipeline, then Create run; or `make submit PRESET=openmoji-tiny`"
    )


def submit(
    preset: str,
    overrides: tuple[str, ...] = (),
    data: str = "",
    workers: int = 0,
    gpus_per_worker: int = PRESET_GPUS,
    experiment_name: str = "",
    name: str = "",
) -> str:
    """Start a run of the pipeline that fits the config; returns its id.

    Args:
        preset: name of a shipped one, or a YAML file, whose content is sent.
        overrides: settings that win over all else.
        data: other pictures.
        workers: pods of a training job; 0: the preset's.
        gpus_per_worker: of such a pod; -1: the preset's.
        experiment_name: of MLflow; "": that of the phase.
        name: of the run; "": preset and time.

    Raises:
        UserError: what is wrong with the config, from here; or KFP refuses.
    """
    file = Path(preset) if preset.endswith((".yaml", ".yml")) else None
    config = config_for_pods(preset, overrides, data)
    pipeline = pipeline_of(config)
    text = file.read_text() if file else ""
    asked = {
        "preset": "" if file else preset,
        "data": data,
        "workers": workers,
        "gpus_per_worker": gpus_per_worker,
        "overrides": "\n".join(overrides),
        "experiment_name": experiment_name,
        "config": text,
    }
    resolve(pipeline, **{**asked, "preset": preset, "look": False})  # type: ignore[arg-type]
    usual = {"workers": 0, "gpus_per_worker": PRESET_GPUS}
    parameters = {key: value for key, value in asked.items() if value != usual.get(key, "")}
    kfp = connected()
    identity = kfp.pipeline(pipeline)
    if not identity:
        raise UserError(f"KFP at {kfp.endpoint} has no pipeline {pipeline}; `make upload` first")
    name = name or f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = kfp.submit(identity, name, parameters)
    print(f"submitted {name} ({run}) to {pipeline}")
    if page := kfp.page(run):
        print(f"{'page':10}{page}")
    print(f"{'follow':10}latent-gpt status {name} --follow")
    print(f"{'logs':10}latent-gpt logs {config.name}-{run}, once its jobs have begun")
    return run


def runs() -> None:
    """List our newest runs."""
    kfp = connected()
    names = _pipelines(kfp)
    found = kfp.runs(set(names), LISTED)
    if not found:
        print(f"KFP at {kfp.endpoint} has no run of our pipelines; `make submit` makes one")
    for run in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.began))
        print(f"{run.id}  {when}  {run.state:15}  {_lasted(run):>6}  {run.name}  {names[run.pipeline]}")


def status(which: str, follow: bool, out: TextIO | None = None) -> bool:
    """Say how a run goes, in the lines that one on this machine has; returns whether it is well.

    Args:
        which: id, name, or id's beginning; "": our newest one.
        follow: whether to go on until it ends.
        out: where to; the default is stdout.

    Raises:
        UserError: there is no such run, or KFP cannot be reached.
    """
    out = out or sys.stdout
    kfp = connected()
    run = _found(kfp, which)
    print(f"{run.name} ({run.id}) is {run.state}, {_lasted(run)}", file=out, flush=True)
    if page := kfp.page(run.id):
        print(page, file=out, flush=True)
    names = _steps_of(kfp, run)
    follower = Follower(names, out)
    pods = Steps(Kubectl(environment.NAMESPACE.get()), run.id)
    reason, first, told = "", True, False
    while True:
        over = run.over  # before pods are looked at, so that the last look comes after the end
        try:
            lines = pods.look()
            for line in condensed(lines, names) if first else lines:
                follower.line(line)
            first = False
            if over:
                reason = pods.reason()
            else:
                follower.notes(pods.waits())
        except UserError as error:  # KFP knows whether the run goes on
            if not told:
                follower.notes([f"its pods cannot be asked: {error}"])
            told = True
        if over or not follow:
            break
        time.sleep(LOOK)
        run = _again(kfp, run)
    if not pods.found:
        with suppress(_Nothing):
            reason = _from_memory(run, names, follower) or reason
    follower.end_line()
    if run.over:
        because = f": {reason}" if reason and run.state == "failed" else ""
        print(f"{run.state} after {_lasted(run)}{because}", file=out, flush=True)
    return run.state not in ("failed", "cancelled")


def cancel(which: str) -> None:
    """End a run; its steps delete their jobs, whose checkpoints are kept."""
    kfp = connected()
    run = _found(kfp, which)
    if run.over:
        raise UserError(f"{run.name} ({run.id}) is over: it is {run.state}")
    kfp.terminate(run.id)
    print(f"{run.name} ({run.id}) is being cancelled; `latent-gpt retry {run.id}` has it go on where it was")


def retry(which: str) -> None:
    """Have a run that failed or was cancelled go on: what is made is found again."""
    kfp = connected()
    run = _found(kfp, which)
    if run.state not in ("failed", "cancelled"):
        raise UserError(f"{run.name} ({run.id}) is {run.state}; only what failed or was cancelled is retried")
    kfp.retry(run.id)
    print(f"{run.name} ({run.id}) goes on; `latent-gpt status {run.id} --follow`")


def remove(kfp: Kfp, kubectl: Kubectl, limit: float = 180.0) -> None:
    """End all runs of ours, those to come too, and take our pipelines out of KFP; its record of runs stays.

    Args:
        kfp: that one.
        kubectl: of the namespace in which their steps run.
        limit: seconds to wait until runs have ended.
    """
    for one in kfp.recurring(set(_pipelines(kfp))):
        kfp.stop(one.id)
        print(f"deleted recurring run {one.name}")
    found = {run.id: run for run in kfp.runs(set(_pipelines(kfp)), 1000)}
    for pod in kubectl.objects(
        "get", "pods", "-l", LABEL
    ):  # of a pipeline that was not uploaded, but handed over
        run = pod["metadata"]["labels"].get(RUN, "")
        if run and run not in found:
            with suppress(UserError):  # somebody deleted it
                found[run] = kfp.run(run)
    going = []
    for run in (one for one in found.values() if not one.over):
        try:
            kfp.terminate(run.id)
        except UserError as error:  # as of one whose workflow is gone, which KFP takes to run for ever
            print(f"{run.name} ({run.id}) cannot be cancelled: {error}")
        else:
            going.append(run)
            print(f"cancelled {run.name} ({run.id})")
    end = time.monotonic() + limit
    while going and time.monotonic() < end:
        time.sleep(LOOK)
        going = [run for run in going if not kfp.run(run.id).over]
    for run in going:
        print(f"{run.name} ({run.id}) has not ended within {speech.duration(limit)}")
    for name in PIPELINES:
        if kfp.remove(name):
            print(f"removed pipeline {name} from KFP")


def config_for_pods(preset: str, overrides: tuple[str, ...], data: str) -> RunConfig:
    """The config of a run on a cluster. Raises UserError: it is wrong, or its pictures are here."""
    _in_reach_of_pods(data)
    config = load_config(preset, overrides, recognise(data, look=False))
    source = config.data.source
    _in_reach_of_pods(source.urls if source.kind == "webdataset" else getattr(source, "path", ""))
    return config


def _in_reach_of_pods(data: str) -> None:
    """Refuse pictures of this machine, which no step of a cluster sees."""
    if data.strip() not in ("", *DRAWN) and "://" not in data and not hub.named(data.strip()):
        raise UserError(
            f"data: {data} is a path of this machine, which steps on a cluster do not see; put the pictures"
            " into S3: a folder of them with captions (s3://bucket/folder), tar shards"
            " (s3://bucket/{000..099}.tar) or parquet files"
        )


# ── which run, and how it goes ──────────────────────────────────────────────────────────────────────────


def _pipelines(kfp: Kfp) -> dict[str, str]:
    """Names of our pipelines that KFP has, by id."""
    return {identity: name for name in PIPELINES if (identity := kfp.pipeline(name))}


def _found(kfp: Kfp, which: str) -> Run:
    """A run by its id, by its name (the newest), by MLflow's name of it, or by the beginning of its id."""
    if match := re.search(f"{UUID}$", which):
        return kfp.run(match[0])
    ours = kfp.runs(set(_pipelines(kfp)), 200)
    if not ours:
        raise UserError(f"KFP at {kfp.endpoint} has no run of our pipelines; `make submit` makes one")
    for run in ours:
        if which in ("", run.name) or (len(which) >= 4 and run.id.startswith(which)):
            return run
    raise UserError(
        f"no run of ours is called '{which}'; `latent-gpt runs` lists them, the last {ours[0].name}"
    )


def _again(kfp: Kfp, run: Run) -> Run:
    """The run as it is now, however long KFP is away within reason."""
    end = time.monotonic() + AWAY
    while True:
        try:
            return kfp.run(run.id)
        except Unavailable:
            if time.monotonic() > end:
                raise
            time.sleep(LOOK)


def _steps_of(kfp: Kfp, run: Run) -> list[str]:
    """Names of the steps that a run takes."""
    return kfp.tasks(run) or ["prepare", *(kind for kind, one in STEPS.items() if not one.within), "register"]


class _Nothing(Exception):
    """Nobody remembers the run."""


def _from_memory(run: Run, names: list[str], follower: Follower) -> str:
    """Show what MLflow and the store know of a run; returns why it failed."""
    try:
        with services(Kubectl(environment.NAMESPACE.get())):
            lines, reason = remembered(run.id, names)
    except UserError as error:
        follower.notes([str(error)])
        raise _Nothing from None
    for line in lines:
        follower.line(line)
    return reason


def _lasted(run: Run) -> str:
    return speech.duration(max(0.0, (run.ended or time.time()) - run.began))
