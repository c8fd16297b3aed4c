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
from model.plumbing.jobs import JobSpec, TrackingIds
from model.plumbing.manifests import Kind, Manifest, set_uri

MODULES: dict[Kind, str] = {  # what makes a set of each kind, where a job does
    "clip": "model.train_clip",
    "tokenizer": "model.train_vqvae",
    "tokens": "model.tokenization",
    "transformer": "model.train_gpt",
    "evaluation": "model.evaluate",
}
NO_CONTENT = {"log_every", "checkpoint_every"}  # training settings that change no weight


def settings(kind: Kind, config: RunConfig, role: str = "") -> dict[str, Any]:
    """The settings that decide the content of a set of this kind; `role` is "text" or "judge" for a CLIP."""
    seed = {"seed": config.seed}
    if kind == "clip":
        return {"clip": _plain(config.clip)} | (
            {"role": role} | seed if config.clip.kind == "trained" else {}
        )
    if kind == "tokenizer":
        trained = {"augment": _plain(config.data.augment)} | seed if config.tokenizer.kind == "vqvae" else {}
        return {"tokenizer": _plain(config.tokenizer)} | trained
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


def _plain(section: BaseModel) -> dict[str, Any]:
    values: dict[str, Any] = section.model_dump(mode="json")
    if isinstance(training := values.get("training"), dict):
        values["training"] = {name: value for name, value in training.items() if name not in NO_CONTENT}
    return values
