"""The table of steps: what each one makes, from what, and which settings decide it.

Everybody who needs to know reads it here: components, workers, the list of steps of a run, the docs' table.
The place of an asset is the hash of its step's settings, version and inputs, so this file decides what is
reused when a setting changes: what does not influence a content (processes, log intervals) stays out. A
step's version is raised by hand when the same settings give another result than before.

No nets are imported: a step finds out that there is nothing to do before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from model.config import VQVAE_EXPERIMENT, DataConfig, RunConfig, config_hash
from model.errors import UserError
from model.plumbing import storage
from model.plumbing.assets import AssetWriter, Kind, Manifest
from model.plumbing.jobs import JobSpec, TrackingIds

NO_CONTENT = {"log_every", "checkpoint_every"}  # training settings that change no weight
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
    within: Kind | None = None  # the step whose component makes it, where it has none of its own
    one_process: bool = False


def image_settings(data: DataConfig) -> Settings:
    """Those that decide what ingest makes of a source. Raises UserError: the source is not there."""
    from model.data import sources

    chosen = data.model_dump(mode="json", exclude={"augment", "max_bad_share"})
    return {"data": chosen, "fingerprint": sources.fingerprint(data.source)}


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


def _tokens(config: RunConfig) -> Settings:
    return {"augment": _plain(config.data.augment), "seed": config.seed}


def _transformer(config: RunConfig) -> Settings:
    assert config.transformer
    return {"transformer": _plain(config.transformer), "seed": config.seed}


def _evaluation(config: RunConfig) -> Settings:
    return {"evaluation": _plain(config.evaluation), "augment": _moves(config.data)}


STEPS: dict[Kind, Step] = {  # in the order of the pipeline
    "images": Step("Pictures and captions", lambda config: image_settings(config.data), taken=lambda _: True),
    "tokenizer": Step("Tokenizer", _tokenizer, ("images",), "model.training.vqvae", taken=lambda _: True),
    "text": Step("Text encoder", _clip, ("images",), "model.training.clip"),
    "judge": Step("Judge", _clip, ("images",), "model.training.clip"),
    "tokens": Step("Tokens", _tokens, ("images", "tokenizer", "text"), "model.training.tokenize"),
    "transformer": Step(
        "Transformer", _transformer, ("tokens", "text", "tokenizer"), "model.training.transformer"
    ),
    "model": Step(
        "Model",
        lambda config: {"sampling": _plain(config.sampling)},
        ("tokenizer", "text", "judge", "transformer"),
        within="evaluation",
    ),
    "evaluation": Step(
        "Evaluation",
        _evaluation,
        ("images", "model"),
        "model.evaluation.evaluate",
        version=2,
        one_process=True,
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


def fingerprint(config: RunConfig) -> str:
    """Hash over what decides what a run makes: its source as it is now, its settings, its steps' versions.

    Two runs with the same one make the same. What a retraining starts from is no part of it.

    Raises:
        UserError: as `settings`.
    """
    plain = config.model_copy(update={"origin": {}})
    taken = {kind: step for kind, step in STEPS.items() if step.taken(config)}
    return config_hash(
        {kind: {"version": step.version, "settings": step.settings(plain)} for kind, step in taken.items()}
    )


def writer(kind: Kind, config: RunConfig, inputs: Mapping[str, Manifest]) -> AssetWriter:
    """The writer of an asset, at its place. Raises as `settings`."""
    step = STEPS[kind]
    assert inputs.keys() == set(step.needs), f"{kind} needs {step.needs}, not {list(inputs)}"
    return AssetWriter(kind, step.settings(config), inputs, step.version)


def job(kind: Kind, config: RunConfig, run: str, inputs: Mapping[str, Manifest]) -> JobSpec:
    """The job that makes an asset of this kind within the pipeline's run `run`. Raises as `settings`."""
    step, output = STEPS[kind], writer(kind, config, inputs)
    trains_vqvae = kind == "tokenizer" and config.tokenizer.kind == "vqvae"
    experiment = VQVAE_EXPERIMENT if trains_vqvae and not config.experiment_name else config.experiment
    alone = {"workers": 1, "processes_per_worker": 1} if step.one_process else {}
    return JobSpec(
        kind=kind,
        version=step.version,
        module=step.module,
        config=config,
        settings=output.settings,
        inputs=output.inputs,
        jobs=config.jobs.model_copy(update=alone),
        tracking=TrackingIds(experiment=experiment, run=run, step=kind),
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
