"""The table of steps: what each one makes, from what, and which settings decide it.

Everybody who needs to know reads it here: components, workers, the list of steps of a run, the docs' table.
The place of an asset is the hash of its step's settings, version and inputs, so this file decides what is
reused when a setting changes: what does not influence a content (processes, log intervals) stays out. A
step's version is raised by hand when the same settings give another result than before.

No nets are imported: a step finds out that there is nothing to do before anything heavy is loaded.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from pydantic import BaseModel

from model.config import VQVAE_EXPERIMENT, DataConfig, RunConfig, config_hash
from model.errors import UserError
from model.plumbing import assets, environment, storage
from model.plumbing.assets import START, AssetWriter, Input, Kind, Manifest
from model.plumbing.jobs import JobSpec, TrackingIds
from model.plumbing.parallel import processor

NO_CONTENT = {"log_every", "checkpoint_every"}  # training settings that change no weight
OF_SPEED = ("batch_size", "accumulate", "precision", "compile")  # training settings that decide a step's time
CHAMPION = "champion"  # the race's input that another model draws against
PICTURES = "pictures of the source"  # among `changes`: what the source says of itself
TAKEN_OVER = ("tokenizer", "text")  # kinds that a retraining may take as they are
WEIGHTS = (".json", ".safetensors")  # what is read of a model made elsewhere

Settings = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """How assets of one kind are made."""

    title: str  # for people
    settings: Callable[[RunConfig], Settings]  # those that decide the content
    needs: tuple[Kind, ...] = ()  # the assets that it is made from, named by their kinds
    module: str = ""  # what a job runs; empty where no job is launched
    version: int = 1
    taken: Callable[[RunConfig], bool] = lambda config: config.transformer is not None
    within: str = ""  # the step whose component makes it, where it has none of its own
    one_process: bool = False
    also: tuple[str, ...] = ()  # assets that it is made from, too, in runs that have them


def image_settings(data: DataConfig) -> Settings:
    """Those that decide what ingest makes of a source. Raises UserError: the source is not there."""
    from model.data import sources

    chosen = data.model_dump(mode="json", exclude={"augment", "max_bad_share"})
    return {"data": chosen, "fingerprint": sources.fingerprint(data.source)}


def _fingerprint(config: RunConfig) -> str:
    from model.data import sources

    return sources.fingerprint(config.data.source)


def _images(config: RunConfig) -> Settings:
    """Those of the source, and from which asset it grows; that one's own where nothing is other than then."""
    settings = image_settings(config.data)
    ref = config.origin.get("images")
    if not ref:
        return settings
    from model.data import growth

    version = STEPS["images"].version
    grown = settings | {growth.GROWN_FROM: ref.key}
    made = assets.place("images", assets.asset_key("images", grown, {}, version))
    if storage.exists(storage.join(made, assets.NAME)):
        return grown  # whether or not the earlier one is there still
    try:
        earlier = growth.earlier(ref, config.data, version)
    except growth.Unfit:
        return settings
    same = {name: value for name, value in earlier.settings.items() if name != growth.GROWN_FROM} == settings
    return dict(earlier.settings) if same else grown


def _tokenizer(config: RunConfig) -> Settings:
    tokenizer = config.tokenizer
    if tokenizer.kind == "pretrained":
        return {"tokenizer": _plain(tokenizer)} | _content("tokenizer.ref", tokenizer.ref)
    trained = {"tokenizer": _plain(tokenizer), "augment": _moves(config.data), "seed": config.seed}
    return trained | _content("tokenizer.loss.perceptual_weights", tokenizer.loss.perceptual_weights)


def _clip(config: RunConfig) -> Settings:
    clip = config.clip
    if clip.kind == "pretrained":
        return {"clip": _plain(clip)} | _content("clip.weights", clip.weights)
    return {"clip": _plain(clip), "augment": _moves(config.data), "seed": config.seed}


def _speed(config: RunConfig) -> Settings:
    """The nets, the hardware and what computes on it, without what makes no step longer."""
    nets: Settings = {}
    for name in ("tokenizer", "clip", "transformer"):
        if (section := getattr(config, name)) is not None:
            nets[name] = section.model_dump(mode="json")
            if training := nets[name].get("training"):
                nets[name]["training"] = {field: training[field] for field in OF_SPEED}
    hardware = {"gpu", "workers", "processes_per_worker", "gpus_per_worker", "cpu", "cpu_limit"}
    jobs = config.jobs.model_dump(mode="json", include=hardware)
    here = environment.LAUNCHER.get() == environment.LAUNCHER.default
    machine = processor() if here else config.jobs.node_selector
    return nets | {
        "image_size": config.data.image_size,
        "jobs": jobs,
        "machine": machine,
        "torch": metadata.version("torch"),
        "day": datetime.datetime.now(datetime.UTC).date().isoformat(),  # it may have been a busy one
    }


def _recipe(config: RunConfig) -> Settings:
    """What is derived from: all that was said and foreseen, and the pictures."""
    return {"config": config.model_dump(mode="json")} | {"fingerprint": _fingerprint(config)}


def _tokens(config: RunConfig) -> Settings:
    return {"augment": _plain(config.data.augment), "seed": config.seed}


def _transformer(config: RunConfig) -> Settings:
    assert config.transformer
    timed = config.recipe is not None and config.recipe.until > 0
    return {
        "transformer": _plain(config.transformer),
        "seed": config.seed,
        **({"steps": "fitted to the time"} if timed else {}),
    }


def _sampling(config: RunConfig) -> Settings:
    return {
        "sweep": _plain(config.sweep),
        "sampling": _plain(config.sampling),
        "seed": config.evaluation.seed,
    }


def _benchmark(config: RunConfig) -> Settings:
    chosen = config.evaluation.model_dump(mode="json", include={"seed", "pictures"})
    return {"evaluation": chosen, "augment": _moves(config.data)}


def _evaluation(config: RunConfig) -> Settings:
    return {"evaluation": config.evaluation.model_dump(mode="json", exclude={"seed", "pictures"})}


STEPS: dict[Kind, Step] = {  # in the order of the pipeline
    # How a config came about that is derived: no part of what a run makes.
    "speed": Step(
        "Speed", _speed, module="model.training.speed", version=2, taken=lambda _: False, within="prepare"
    ),
    "recipe": Step("Recipe", _recipe, version=3, taken=lambda _: False, within="prepare"),
    "images": Step("Pictures and captions", _images, version=3, taken=lambda _: True),
    "tokenizer": Step("Tokenizer", _tokenizer, ("images",), "model.training.vqvae", taken=lambda _: True),
    "text": Step("Text encoder", _clip, ("images",), "model.training.clip"),
    "judge": Step("Judge", _clip, ("images",), "model.training.clip"),
    "tokens": Step("Tokens", _tokens, ("images", "tokenizer", "text"), "model.training.tokenize"),
    "transformer": Step(
        "Transformer", _transformer, ("tokens", "text", "tokenizer"), "model.training.transformer", version=4
    ),
    "sampling": Step(
        "Sampling settings",
        _sampling,
        ("images", "tokenizer", "text", "judge", "transformer"),
        "model.evaluation.sweep",
        version=2,
        taken=lambda config: config.transformer is not None and config.sweep.configured,
        within="evaluation",
        one_process=True,
    ),
    "model": Step(
        "Model",
        lambda config: {"sampling": _plain(config.sampling)},
        ("tokenizer", "text", "judge", "transformer"),
        version=2,
        also=("sampling",),
        within="evaluation",
    ),
    # Names its images by hash in its settings, and not among its inputs: see `evaluation/benchmark.py`.
    "benchmark": Step("Benchmark", _benchmark, ("images", "judge"), within="evaluation"),
    "evaluation": Step(
        "Evaluation",
        _evaluation,
        ("images", "model", "benchmark"),
        "model.evaluation.evaluate",
        version=3,
        one_process=True,
    ),
    "measurement": Step(
        "Measurement",
        lambda config: {},
        ("images", "model", "benchmark"),
        "model.evaluation.measure",
        version=2,
        within="register",
        one_process=True,
    ),
    "race": Step(
        "Race",
        lambda config: {},
        ("model", "benchmark"),
        "model.evaluation.race",
        taken=lambda config: config.transformer is not None and config.gate.speed_ratio > 0,
        within="register",
        one_process=True,
        also=(CHAMPION,),
    ),
}


def names(config: RunConfig) -> list[str]:
    """The steps that a run with this config takes, in order."""
    own = [kind for kind, step in STEPS.items() if step.taken(config) and not step.within]
    return ["prepare", *own, *(["register"] if config.transformer else [])]


def settings(kind: Kind, config: RunConfig) -> Settings:
    """The settings that decide the content of an asset.

    Raises:
        UserError: naming the field whose weights, or the source whose pictures, are not where it says.
    """
    return STEPS[kind].settings(config)


def parts(config: RunConfig, images: Settings | None = None) -> dict[str, Any]:
    """What decides what a run makes, by kind: its source, its settings, its steps' versions.

    What a retraining starts from is no part of it.

    Args:
        config: of the run.
        images: settings of the pictures that it has made, which say what the source held then; None: as it is
            now.

    Raises:
        UserError: as `settings`.
    """
    plain = config.model_copy(update={"origin": {}})
    found: dict[str, Any] = {}
    for kind, step in STEPS.items():
        if step.taken(config):
            made = kind == "images" and images is not None
            decided_by = dict(images or {}) if made else step.settings(plain)
            decided_by.pop("grown_from", None)
            found[kind] = {"version": step.version, "settings": decided_by}
    return found


def fingerprint(of: Mapping[str, Any]) -> str:
    """Hash over the `parts` of a run: two runs with the same one make the same."""
    return config_hash(dict(of))


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between the `parts` of two runs, each for people: `setting transformer.depth 3 -> 4`."""
    said: dict[str, None] = {}  # a setting that decides several kinds is said once
    for kind in after.keys() & before.keys():
        if before[kind]["version"] != after[kind]["version"]:
            said[f"step {kind}: version {before[kind]['version']} -> {after[kind]['version']}"] = None
    for kind in (kind for kind in after if kind in before):
        for path, (was, now) in _differences(before[kind]["settings"], after[kind]["settings"]).items():
            of_source = path == "fingerprint"
            said[PICTURES if of_source else f"setting {path} {was} -> {now}"] = None
    said |= {f"step {kind} is new": None for kind in after if kind not in before}
    said |= {f"step {kind} is gone": None for kind in before if kind not in after}
    return list(said)


def _differences(before: Any, after: Any, path: str = "") -> dict[str, tuple[str, str]]:
    """Dotted names of the settings that differ, with both values as JSON."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, tuple[str, str]] = {}
        for name in (*after, *(name for name in before if name not in after)):
            found |= _differences(before.get(name), after.get(name), f"{path}.{name}" if path else name)
        return found
    if before == after:
        return {}
    return {path: (_short(before), _short(after))}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def taken_over(kind: Kind, config: RunConfig) -> Manifest | None:
    """The asset of an earlier run that a retraining takes as it is; None: it makes one of its own.

    Raises:
        UserError: the store does not have that very asset any more.
    """
    return _origin(kind, config) if kind in TAKEN_OVER else None


def _origin(kind: Kind, config: RunConfig) -> Manifest | None:
    ref = config.origin.get(kind)  # type: ignore[arg-type]
    return Input(kind=kind, key=ref.key, sha256=ref.sha256).load() if ref else None


def writer(kind: Kind, config: RunConfig, inputs: Mapping[str, Manifest]) -> AssetWriter:
    """The writer of an asset, at its place. Raises as `settings`."""
    step = STEPS[kind]
    known = {*step.needs, *step.also}
    assert set(step.needs) <= inputs.keys() <= known, f"{kind} needs {step.needs}, not {list(inputs)}"
    return AssetWriter(kind, step.settings(config), inputs, step.version)


def made_as_now(made: Manifest) -> bool:
    """Whether the step as it is makes this asset; one of another version may mean others by its figures."""
    return made.key == assets.asset_key(made.kind, made.settings, made.inputs, STEPS[made.kind].version)


def run_name(kind: Kind, inputs: Mapping[str, Input]) -> str:
    """What a job is called within its run, which may measure several models."""
    return f"{kind}-{inputs['model'].key[:8]}" if kind == "measurement" else kind


def job(kind: Kind, config: RunConfig, run: str, inputs: Mapping[str, Manifest]) -> JobSpec:
    """The job that makes an asset of this kind within the pipeline's run `run`. Raises as `settings`."""
    step, output = STEPS[kind], writer(kind, config, inputs)
    made_from = dict(output.inputs)
    if kind == "transformer" and (start := _origin(kind, config)):
        made_from[START] = start.as_input
    trains_vqvae = kind == "tokenizer" and config.tokenizer.kind == "vqvae"
    experiment = VQVAE_EXPERIMENT if trains_vqvae and not config.experiment_name else config.experiment
    alone = {"workers": 1, "processes_per_worker": 1} if step.one_process else {}
    return JobSpec(
        kind=kind,
        version=step.version,
        module=step.module,
        config=config,
        settings=output.settings,
        inputs=made_from,
        jobs=config.jobs.model_copy(update=alone),
        tracking=TrackingIds(experiment=experiment, run=run, step=run_name(kind, output.inputs)),
    )


def earlier_tokens(spec: JobSpec, images: Manifest) -> str:
    """Where the tokens are, encoded as a job does it, of the images that its own have grown from; or ""."""
    from model.data.growth import GROWN_FROM

    if not (key := images.settings.get(GROWN_FROM)):
        return ""
    was = Input(kind="images", key=key, sha256=images.info["grown"]["from"])
    return assets.place(
        "tokens", assets.asset_key("tokens", spec.settings, {**spec.inputs, "images": was}, spec.version)
    )


def _content(field: str, ref: str) -> dict[str, str]:
    """What is stored at the path or S3 URI that a field names; nothing for the name of something on a hub."""
    if not storage.is_stored(ref):
        return {}
    try:
        return {"content": storage.fingerprint(ref, WEIGHTS)}
    except storage.NotFound as error:
        raise UserError(f"{field}: {error}") from None


def _plain(section: BaseModel) -> Settings:
    values: Settings = section.model_dump(mode="json")
    if isinstance(training := values.get("training"), dict):
        values["training"] = {name: value for name, value in training.items() if name not in NO_CONTENT}
    return values


def _moves(data: DataConfig) -> Settings:
    """The augmentation without its number of views, which only tokens have."""
    return data.augment.model_dump(mode="json", exclude={"views"})
