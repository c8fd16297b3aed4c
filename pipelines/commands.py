"""The commands. Each imports what it needs when it runs, so that `--help` is instant.

A function is its command: its parameters are the options, its docstring is the help.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Optional

import typer

from model.errors import UserError, reason

AUTO = "auto"  # the preset of who names none: see `model.config.load_config`

Preset = Annotated[str, typer.Option(help="Name of a shipped preset, or a .yaml file.")]
Data = Annotated[
    str,
    typer.Option(
        help="Your captioned pictures: a folder, tar shards, parquet, an archive of these, s3:// too; a data"
        " set of the hub."
    ),
]
Minutes = Annotated[
    float, typer.Option(help="The whole run takes so long, within a fifth; 0: as --effort says.")
]
Effort = Annotated[
    float,
    typer.Option(help="Times what is usual for so many pictures, for a preset with a recipe; 0: as it says."),
]
Registered = Annotated[str, typer.Option(help="Name of a registered model; left out, the last one.")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer reads it at run time)
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a setting; may be repeated."),
]

Model = Annotated[str, typer.Option(help="Name of the registered model; left out, that of the preset.")]
Start = Annotated[
    str, typer.Option(help="Weights to begin from: champion or scratch; left out, as the settings say.")
]


def run(
    preset: Preset = AUTO,
    data: Data = "",
    minutes: Minutes = 0,
    effort: Effort = 0,
    overrides: Overrides = None,
) -> None:
    """Run the whole pipeline on this machine."""
    from pipelines.run import run

    run(preset, _dialled(overrides, minutes, effort), data)


def _dialled(overrides: list[str] | None, minutes: float, effort: float) -> tuple[str, ...]:
    """Overrides, with the dial before them. Raises UserError: it is out of range."""
    from pydantic import ValidationError

    from model.config import RecipeConfig

    if minutes and effort:
        raise UserError("--minutes and --effort both say how long a run takes; give one of them")
    dial = {"recipe.minutes": minutes} if minutes else {"recipe.effort": effort, "recipe.minutes": 0.0}
    said = dial.items() if minutes or effort else ()
    try:
        RecipeConfig.model_validate({name.removeprefix("recipe."): value for name, value in said})
    except ValidationError as error:
        raise UserError(f"--{reason(error)}") from None
    return (*(f"{name}={value:g}" for name, value in said), *(overrides or ()))


def retrain(
    preset: Preset = AUTO,
    model: Model = "",
    data: Annotated[str, typer.Option(help="Other pictures than those of the model in use.")] = "",
    start: Start = "",
    minutes: Minutes = 0,
    effort: Effort = 0,
    overrides: Overrides = None,
) -> None:
    """Train the model in use anew on this machine, where there is anything new to learn."""
    from pipelines.run import retrain

    retrain(preset, model, data, start, _dialled(overrides, minutes, effort))


def compile_(
    pipeline: Annotated[
        str,
        typer.Option(
            help="latent-gpt-text-to-image, latent-gpt-vqvae (the tokenizer alone) or latent-gpt-retraining."
        ),
    ] = "latent-gpt-text-to-image",
    out: Annotated[Path, typer.Option(help="Where the pipeline's YAML goes.")] = Path("latent-gpt.yaml"),
) -> None:
    """Compile a pipeline for a KFP cluster."""
    from pipelines.compile import compile

    compile(pipeline, out)
    print(f"wrote {out}")


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")] = "",
    out: Annotated[Path, typer.Option(help="Picture file; more than one are numbered.")] = Path("out.png"),
    model: Annotated[
        str,
        typer.Option(
            help="models:/NAME@ALIAS, models:/NAME/VERSION, a folder, or s3://…; left out, the champion of"
            " the model registered last."
        ),
    ] = "",
    num_images: Annotated[int, typer.Option(min=1, max=10_000)] = 1,
    size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, max=4096, help="Side in pixels, enlarged; left out, as the model draws."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next ones count on.")] = 0,
    cfg_scale: Annotated[Optional[float], typer.Option(min=0, help="Guidance; 1 is none.")] = None,  # noqa: UP045
    temperature: Annotated[Optional[float], typer.Option(min=0, help="0 is greedy.")] = None,  # noqa: UP045
    top_k: Annotated[Optional[int], typer.Option(min=0, help="0 keeps all.")] = None,  # noqa: UP045
    top_p: Annotated[Optional[float], typer.Option(min=0, max=1, help="1 keeps all.")] = None,  # noqa: UP045
    best_of: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, max=256, help="Draws per picture; the CLIP that reads prompts keeps the best."),
    ] = None,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Draw without a prompt.")] = False,
) -> None:
    """Draw pictures from a prompt. Options left out are those that the model was registered with."""
    from model.inference import files

    if out.suffix.lower() not in files.SUFFIXES:
        raise UserError(f"--out {out} must end in .png, .jpg or .webp")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: folder {out.parent} does not exist")
    paths = [out if num_images == 1 else out.with_stem(f"{out.stem}-{n}") for n in range(num_images)]
    for path in paths:
        if path.is_dir():
            raise UserError(f"--out {path} is a folder; name a file, e.g. {path / 'out.png'}")
    from model.inference.generate import Generator, check_prompt
    from model.plumbing import registry

    if not unconditional:
        check_prompt(prompt)
    needs_services = not model or model.startswith(("models:/", "s3://"))
    with _services_of_runs() if needs_services else contextlib.nullcontext(False) as shared:
        left_out = not model
        if left_out:
            model = f"models:/{registry.last_registered(shared)}@{registry.CHAMPION}"
        # Of a folder, or in S3: no more of a path goes into a picture
        called = os.path.basename(os.path.realpath(model))
        if model.startswith("models:/"):
            name, number = registry.named(model)
            model, called = f"models:/{name}/{number}", f"{name} version {number}"
            if left_out:
                print(f"draws with {name}, version {number}")
        folder = registry.resolve(model)
    generator = Generator.load(folder)
    side = size or generator.side
    files.check_side(side, generator.side)
    options = {"cfg_scale": cfg_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    options["best_of"] = best_of
    given = {name: value for name, value in options.items() if value is not None}
    sampling = generator.sampling.model_copy(update=given)
    seeds = list(range(seed, seed + num_images))
    pictures = generator.generate([prompt] * num_images, seeds, sampling, unconditional)
    for path, picture, own_seed in zip(paths, pictures, seeds, strict=True):
        told = None if unconditional else prompt
        said = files.origin(called, told, own_seed, sampling, generator.side, side)
        if side != generator.side:
            picture = files.enlarged(picture, side)
        try:
            files.save(picture, path, said)
        except OSError as error:
            raise UserError(f"--out {path} cannot be written: {error.strerror or error}") from None
        print(path)


def logs(
    run: Annotated[
        str, typer.Argument(help="Name or id of a pipeline's run in MLflow, or of a folder in runs/.")
    ],
    step: Annotated[str, typer.Option(help="Of this step only, e.g. transformer.")] = "",
    rank: Annotated[Optional[int], typer.Option(min=0, help="Of this process only.")] = None,  # noqa: UP045
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until the work is done, or Ctrl-C.")
    ] = False,
) -> None:
    """Print what the training jobs of a run said, also when their pods are gone."""
    from pipelines.logs import local_logs, print_logs, stored_logs
    from pipelines.run import state_folder

    with contextlib.suppress(KeyboardInterrupt):
        if found := local_logs(state_folder() / "runs", run):
            print_logs(found, step, rank, follow)
            return
        with _services_of_runs():
            print_logs(stored_logs(run), step, rank, follow)


def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Do it; left out, it is only listed.")] = False,
    hours: Annotated[float, typer.Option(min=0, help="What was written since then stays.")] = 168,
    versions: Annotated[
        int, typer.Option(min=1, help="Newest of each registered model whose assets stay.")
    ] = 5,
) -> None:
    """List what no registered model and no run needs any more, or delete it."""
    from model.plumbing import environment
    from pipelines.cluster import settings
    from pipelines.cluster.kubectl import Kubectl
    from pipelines.gc import gc
    from pipelines.run import state_folder

    settings.read()
    # An MLflow that somebody names need not be our namespace's, whose pod would delete for good.
    ours = environment.KFP_ENDPOINT.get() and not environment.MLFLOW_TRACKING_URI.get()
    with _services_of_runs():
        cluster = Kubectl(environment.NAMESPACE.get()) if ours else None
        gc(delete, hours, versions, state_folder(), cluster)


def mlflow_ui() -> None:
    """Keep MLflow and S3 running on what the runs left, until Ctrl-C."""
    from pipelines.embedded.servers import link

    with _services() as environment:
        print(f"MLflow, until Ctrl-C: {link(environment)}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


def preflight(
    preset: Preset = AUTO,
    data: Data = "",
    minutes: Minutes = 0,
    effort: Effort = 0,
    overrides: Overrides = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Look from a pod, as the steps' account, instead of from here.")
    ] = False,
) -> None:
    """Check config, source, storage, tracking, disk or cluster without running anything."""
    dialled = _dialled(overrides, minutes, effort)
    if cluster:
        from pipelines.cluster.preflight import look
        from pipelines.cluster.runs import config_for_pods

        look(config_for_pods(preset, dialled, data), data)
        return
    from model.config import load_config
    from model.data.sources import recognise
    from pipelines.run import absolute, state_folder

    data = absolute(data)
    load_config(preset, dialled, recognise(data, look=False))  # what is wrong with it is said at once
    from components.preflight import PROBES, check_state, findings

    check_state(state_folder())
    with _services():
        found = findings(load_config(preset, dialled, recognise(data)), PROBES)
    print(*found, sep="\n")
    if errors := [one.error for one in found if one.error]:
        raise UserError(f"{len(errors)} of these would stop a run" if len(errors) > 1 else str(errors[0]))


def slurm(
    preset: Preset = AUTO,
    data: Data = "",
    minutes: Minutes = 0,
    effort: Effort = 0,
    overrides: Overrides = None,
    nodes: Annotated[
        int, typer.Option(min=1, help="Nodes of the allocation; each is a worker of a job.")
    ] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of a node, and processes on it.")] = 0,
    cpus: Annotated[int, typer.Option(min=0, help="Cores of a node; 0: as Slurm gives them.")] = 0,
    time: Annotated[str, typer.Option(help="Longest turn, e.g. 1-00:00:00; the next one goes on.")] = "",
    partition: Annotated[str, typer.Option(help="Of Slurm.")] = "",
    account: Annotated[str, typer.Option(help="Of Slurm.")] = "",
    env: Annotated[Path, typer.Option(help="File of NAME=value: where store and MLflow are.")] = Path(
        "slurm.env"
    ),
    out: Annotated[Path, typer.Option(help="Folder for scripts and logs; all nodes see it.")] = Path("slurm"),
    mlflow: Annotated[
        Path, typer.Option(help="Virtual environment with requirements-mlflow.lock, for MLflow's server.")
    ] = Path("build/mlflow"),
) -> None:
    """Write the scripts that sbatch takes: run.sbatch, and mlflow.sbatch for who has no MLflow."""
    from pipelines.slurm import scripts

    asked = {"data": data, "time": time, "partition": partition, "account": account}
    written = scripts(
        preset, _dialled(overrides, minutes, effort), env, out, mlflow, nodes, gpus, cpus, **asked
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        (out / name).write_text(text)
        print(f"wrote {out / name}")


def plan(
    preset: Annotated[str, typer.Argument(help="Name of a shipped preset, or a .yaml file.")] = AUTO,
    data: Data = "",
    minutes: Minutes = 0,
    effort: Effort = 0,
    hardware: Annotated[
        str, typer.Option(help="cpu, l4, a100, h100 or h200, as foreseen; left out, what `jobs` asks for.")
    ] = "",
    overrides: Overrides = None,
) -> None:
    """Say what a run needs and takes; of one whose sizes are derived, each choice with its reason."""
    from pipelines import plan
    from pipelines.run import absolute

    asked = preset, absolute(data), _dialled(overrides, minutes, effort)
    with _services() if plan.is_timed(*asked, hardware) else contextlib.nullcontext():
        for line in plan.lines(*asked, hardware):
            print(line)


def promote(
    version: Annotated[
        int, typer.Argument(min=0, help="Its number; left out, the challenger's.", show_default=False)
    ] = 0,
    model: Registered = "",
) -> None:
    """Put a version in use, whatever its verdict was; the champion so far is what a rollback returns to."""
    from components import registration
    from model.plumbing import registry

    with _services_of_runs() as shared:
        name = model or registry.last_registered(shared)
        number = version or registry.version_of(registry.CHALLENGER, name)
        if not number:
            raise UserError(f"{name} has no challenger; say which version, see `latent-gpt models`")
        before = registration.promote(number, name).champion
    if before == number:
        print(f"{name} version {number} is champion already: nothing has changed")
        return
    print(f"{name} version {number} is champion")
    if before:
        print(
            f"version {before}, champion until now, is previous champion: `latent-gpt rollback` returns to it"
        )


def rollback(model: Registered = "") -> None:
    """Put the previous champion back in use; the champion so far takes its place."""
    from components import registration
    from model.plumbing import registry

    with _services_of_runs() as shared:
        name = model or registry.last_registered(shared)
        before = registration.rollback(name)
    print(f"{name} version {before.previous} is champion")
    if before.champion:
        print(f"version {before.champion}, champion until now, is previous champion: once more returns to it")


def models(
    model: Annotated[str, typer.Option(help="Name of a registered model; left out, all.")] = "",
) -> None:
    """List the registered models: versions, which are in use, what was decided, when."""
    import time

    from model.plumbing import registry

    with _services_of_runs():
        found = registry.listed(model)
    if not found:
        print("no model is registered yet; run the pipeline first")
    for name in dict.fromkeys(one.name for one in found):
        print(name)
        for one in (one for one in found if one.name == name):
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.registered / 1000))
            plays = ", ".join(one.aliases) or "-"
            said = f"{one.verdict}: {one.reason}" if one.verdict else "not judged, or by an earlier release"
            print(f"  {one.version:>4}  {when}  {plays:17}  {said}")


def evaluate(
    model: Annotated[str, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION, a folder, or s3://…")],
    against: Annotated[
        str, typer.Option(help="The same; left out, the champion of the same registered model.")
    ] = "",
) -> None:
    """Measure two models on the same and say what the gate would; promotes nothing."""
    from components.comparison import compare
    from model.evaluation.gate import shown
    from model.plumbing import registry

    with _services_of_runs():
        if not against:
            if not model.startswith("models:/"):
                raise UserError(f"--against is missing: {model} is no registered model that has a champion")
            against = f"models:/{registry.named(model)[0]}@{registry.CHAMPION}"
        verdict = compare(model, against)
    print(f"{'':48}{model}  |  {against}")
    for what, ours, theirs in shown(verdict):
        print(f"{what:48}{ours}  |  {theirs}" if theirs else f"{what:48}{ours}")
    print(f"measured on benchmark {verdict.benchmark}, by judge {verdict.judge}")
    print(f"{verdict.outcome}: {verdict.reason}")
    print("nothing was promoted")


def presets() -> None:
    """List the shipped presets; the header of each file has its command, hardware, duration and promise."""
    from model.config import PRESETS, preset_names

    for name in preset_names():
        header = (PRESETS / f"{name}.yaml").read_text().splitlines()[0]
        print(f"{name:20} {header.lstrip('# ')}")


# ── on a cluster ────────────────────────────────────────────────────────────────────────────────────────

AnyRun = Annotated[
    str,
    typer.Argument(help="Its name, its id, or the id's beginning; left out, the newest.", show_default=False),
]
TheRun = Annotated[str, typer.Argument(help="Its name, its id, or the id's beginning.")]


def secrets(
    replace: Annotated[
        bool, typer.Option("--replace", help="What the environment says wins over what is there.")
    ] = False,
) -> None:
    """Make the cluster's Secrets, of the environment's values and of chance; what is there is kept."""
    namespace = _cluster()
    from components.launch.cluster import here
    from model.plumbing import environment
    from pipelines.cluster.deploy import manifests
    from pipelines.cluster.kubectl import Kubectl
    from pipelines.cluster.secrets import keep

    overlay = manifests(Kubectl(namespace), environment.OVERLAY.get())
    print("\n".join(keep(here(), overlay, replace)))


def deploy(
    overlay: Annotated[
        str, typer.Option(help="One of k8s/overlays, or a folder; left out, that of OVERLAY, or local.")
    ] = "",
) -> None:
    """Put our services on a cluster, with the images that were pushed, and say where they are."""
    namespace = _cluster()
    from model.plumbing import environment
    from pipelines.cluster.deploy import deploy

    deploy(overlay or environment.OVERLAY.get(), namespace)


def undeploy() -> None:
    """Take all of ours but the data from a cluster: services, pipelines, jobs."""
    namespace = _cluster()
    from model.plumbing import environment
    from pipelines.cluster.deploy import undeploy
    from pipelines.cluster.kfp import connected
    from pipelines.cluster.kubectl import Kubectl
    from pipelines.cluster.runs import remove

    if environment.KFP_ENDPOINT.get():
        remove(connected(), Kubectl(namespace))
    else:
        print("KFP_ENDPOINT is not set: what was uploaded to KFP stays there")
    undeploy(namespace)


def upload() -> None:
    """Make the pipelines of this clone the newest versions in KFP."""
    _cluster()
    from pipelines.cluster.runs import upload

    upload()


def submit(
    preset: Preset = AUTO,
    data: Annotated[str, typer.Option(help="Your captioned pictures, s3://…; left out, the preset's.")] = "",
    workers: Annotated[int, typer.Option(min=0, help="Pods of a training job; 0: the preset's.")] = 0,
    gpus_per_worker: Annotated[int, typer.Option(min=-1, help="GPUs of such a pod; -1: the preset's.")] = -1,
    experiment_name: Annotated[str, typer.Option(help="In MLflow; left out, the phase's.")] = "",
    name: Annotated[str, typer.Option(help="Of the run; left out, preset and time.")] = "",
    follow: Annotated[bool, typer.Option("--follow", help="Show how it goes, to its end.")] = False,
    minutes: Minutes = 0,
    effort: Effort = 0,
    overrides: Overrides = None,
) -> None:
    """Run a pipeline on a cluster."""
    _cluster()
    from pipelines.cluster.runs import submit

    run = submit(
        preset, _dialled(overrides, minutes, effort), data, workers, gpus_per_worker, experiment_name, name
    )
    if follow:
        status(run, follow=True)


def schedule(
    cron: Annotated[
        str, typer.Option(help='When: second, minute, hour, day, month, weekday, e.g. "0 0 3 * * *".')
    ] = "",
    zone: Annotated[str, typer.Option(help="That these times are of: that of KFP's controller.")] = "UTC",
    preset: Preset = AUTO,
    model: Model = "",
    data: Annotated[
        str, typer.Option(help="Your captioned pictures, s3://…; left out, the champion's.")
    ] = "",
    start: Start = "",
    workers: Annotated[int, typer.Option(min=0, help="Pods of a training job; 0: as before.")] = 0,
    gpus_per_worker: Annotated[int, typer.Option(min=-1, help="GPUs of such a pod; -1: as before.")] = -1,
    experiment_name: Annotated[str, typer.Option(help="In MLflow; left out, as before.")] = "",
    name: Annotated[str, typer.Option(help="Of the recurring run; left out, the model's.")] = "",
    list_: Annotated[bool, typer.Option("--list", help="List what is scheduled.")] = False,
    pause: Annotated[bool, typer.Option("--pause", help="Let nothing start until --resume.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after --pause.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Take it away.")] = False,
    minutes: Minutes = 0,
    effort: Effort = 0,
    overrides: Overrides = None,
) -> None:
    """Train anew on a cluster at set times, where there is anything new to learn then."""
    if [bool(cron), list_, pause, resume, delete].count(True) != 1:
        raise UserError("schedule wants one of --cron, --list, --pause, --resume and --delete")
    _cluster()
    from pipelines.cluster import schedule

    if list_:
        schedule.listed()
    elif delete:
        schedule.delete(name)
    elif pause or resume:
        schedule.pause(name, pause)
    else:
        asked = (workers, gpus_per_worker, experiment_name, name)
        dialled = _dialled(overrides, minutes, effort)
        schedule.schedule(cron, zone, preset, model, data, start, dialled, *asked)


def runs() -> None:
    """List the newest runs on a cluster."""
    _cluster()
    from pipelines.cluster.runs import runs

    runs()


def status(
    run: AnyRun = "",
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until it ends, or Ctrl-C; status 1 where it ends badly.")
    ] = False,
) -> None:
    """Say how a run on a cluster goes."""
    _cluster()
    from pipelines.cluster.runs import status

    if not status(run, follow) and follow:
        raise typer.Exit(1)


def cancel(run: TheRun) -> None:
    """End a run on a cluster, with its jobs; checkpoints are kept."""
    _cluster()
    from pipelines.cluster.runs import cancel

    cancel(run)


def retry(run: TheRun) -> None:
    """Have a run on a cluster go on that failed or was cancelled."""
    _cluster()
    from pipelines.cluster.runs import retry

    retry(run)


def _cluster() -> str:
    """Have the environment say what `cluster.env` says; returns the namespace."""
    from model.plumbing import environment
    from pipelines.cluster import settings

    settings.read()
    return environment.NAMESPACE.get()


def _shared() -> bool:
    """Whether the environment names the MLflow server, which then is not this state folder's alone."""
    from model.plumbing import environment

    return bool(environment.MLFLOW_TRACKING_URI.get())


@contextlib.contextmanager
def _services_of_runs() -> Iterator[bool]:
    """S3 and MLflow of the cluster, where KFP_ENDPOINT says that there is one; else those of runs here.

    Yields whether that MLflow is shared with others.
    """
    from model.plumbing import environment
    from pipelines.cluster import settings

    settings.read()
    if not environment.KFP_ENDPOINT.get():
        shared = _shared()
        with _services():
            yield shared
        return
    from pipelines.cluster.kubectl import Kubectl
    from pipelines.cluster.reach import services

    with services(Kubectl(environment.NAMESPACE.get())):
        yield True


@contextlib.contextmanager
def _services() -> Iterator[dict[str, str]]:
    """S3 and MLflow as a run would have them, until the block ends or SIGTERM comes."""
    from components.preflight import check_writable
    from model.plumbing.processes import stopping_on_sigterm
    from pipelines.embedded.services import services
    from pipelines.run import state_folder

    check_writable(state_folder())
    with stopping_on_sigterm(), services(state_folder()) as environment:
        yield environment
