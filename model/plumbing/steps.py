"""Which work a run consists of: for each kind of set what it is made from, and the job that makes it.

The place of a set is the hash of what `settings` returns and of its inputs, so this file decides what is
reused when a setting changes: what does not influence a set's content (workers, log intervals) stays out.
It imports no nets: a step finds out that there is nothing to do before anything heavy is loaded.

A worker writes its set with `SetWriter(kind, settings(kind, spec.config, role), inputs)`.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from model.config import VQVAE_EXPERIMENT, RunConfig
from model.errors import UserError
from model.plumbing import storage
from model.plumbing.assets import Kind, Manifest, set_uri
from model.plumbing.jobs import JobSpec, TrackingIds

MODULES: dict[Kind, str] = {  # what makes a set of each kind, where a job does
    "clip": "model.training.clip",
    "tokenizer": "model.training.vqvae",
    "tokens": "model.training.tokenize",
    "transformer": "model.training.transformer",
    "evaluation": "model.evaluation.evaluate",
}
NO_CONTENT = {"log_every", "checkpoint_every"}  # training settings that change no weight
WEIGHTS = (".json", ".safetensors")  # what is read of a model made elsewhere


def settings(kind: Kind, config: RunConfig, role: str = "") -> dict[str, Any]:
    """The settings that decide the content of a set of this kind; `role` is "text" or "judge" for a CLIP.

    Raises:
        UserError: naming the field whose weights are not where it says.
    """
    seed = {"seed": config.seed}
    if kind == "clip":
        if config.clip.kind == "pretrained":
            return {"clip": _plain(config.clip)} | _content("clip.weights", config.clip.weights)
        return {"clip": _plain(config.clip), "role": role} | seed
    if kind == "tokenizer":
        tokenizer = config.tokenizer
        if tokenizer.kind == "pretrained":
            return {"tokenizer": _plain(tokenizer)} | _content("tokenizer.ref", tokenizer.ref)
        trained = {"tokenizer": _plain(tokenizer), "augment": _plain(config.data.augment)} | seed
        return trained | _content("tokenizer.loss.perceptual_weights", tokenizer.loss.perceptual_weights)
    if kind == "tokens":
        return {"augment": _plain(config.data.augment)} | seed
    if kind == "transformer":
        assert config.transformer
        return {"transformer": _plain(config.transformer)} | seed
    if kind == "evaluation":
        return {"evaluation": _plain(config.evaluation), "sampling": _plain(config.sampling)}
    raise ValueError(f"sets of kind {kind} are not made by a job")


def job(
    kind: Kind, step: str, config: RunConfig, run: str, inputs: dict[str, Manifest], role: str = ""
) -> JobSpec:
    """The job that makes the set of this kind: `run` is the pipeline's, `step` the name of its step."""
    trains_vqvae = kind == "tokenizer" and config.tokenizer.kind == "vqvae"
    experiment = VQVAE_EXPERIMENT if trains_vqvae else config.experiment
    return JobSpec(
        module=MODULES[kind],
        config=config,
        inputs={name: manifest.uri for name, manifest in inputs.items()},
        output=set_uri(kind, settings(kind, config, role), inputs),
        tracking=TrackingIds(experiment=experiment, run=run, step=step),
        options={"role": role} if role else {},
    )


def _content(field: str, ref: str) -> dict[str, str]:
    """What is stored at the path or S3 URI that a field names; nothing for the name of something on a hub."""
    if not storage.is_stored(ref):
        return {}
    try:
        return {"content": storage.fingerprint(ref, WEIGHTS)}
    except storage.NotFound as error:
        raise UserError(f"{field}: {error}") from None


def _plain(section: BaseModel) -> dict[str, Any]:
    values: dict[str, Any] = section.model_dump(mode="json")
    if isinstance(training := values.get("training"), dict):
        values["training"] = {name: value for name, value in training.items() if name not in NO_CONTENT}
    return values
