"""What a person fills in to start a pipeline, and the config that comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable

from model import recipe
from model.config import RunConfig, load_config, preset_names
from model.data.sources import recognise
from model.errors import UserError
from model.recipe import Derived, Values

TEXT_TO_IMAGE = "latent-gpt-text-to-image"  # phases 1 and 3
RETRAINING = "latent-gpt-retraining"  # the same, where there is anything new to learn
VQVAE = "latent-gpt-vqvae"  # phase 2: it leaves the transformer out, whatever the preset says
PRESET_GPUS = -1  # for `gpus_per_worker`, as 0 is a number of GPUs


def pipeline_of(config: RunConfig) -> str:
    """Name of the pipeline that runs this config."""
    return TEXT_TO_IMAGE if config.transformer else VQVAE


def presets_of(pipeline: str) -> list[str]:
    """The shipped presets that a pipeline takes."""
    configs = {name: load_config(name) for name in preset_names()}
    if pipeline == VQVAE:
        return [name for name, config in configs.items() if config.tokenizer.kind == "vqvae"]
    runs = TEXT_TO_IMAGE if pipeline == RETRAINING else pipeline
    return [name for name, config in configs.items() if pipeline_of(config) == runs]


def resolve(
    pipeline: str,
    preset: str,
    data: str = "",
    workers: int = 0,
    gpus_per_worker: int = PRESET_GPUS,
    overrides: str = "",
    experiment_name: str = "",
    config: str = "",
    look: bool = True,
    derive: Callable[[Values], Derived] = recipe.derive,
) -> RunConfig:
    """The config of a run: overrides win over the other parameters, and these over the preset.

    Args:
        pipeline: that is to run it; the others as `pipelines.dag` describes them.
        look: at the data in S3; not from a machine that need not reach it, see `recognise`.
        derive: as `load_config` takes it.

    Raises:
        UserError: naming the field, what is wrong and what would be right.
    """
    lines = [line.strip() for line in overrides.splitlines()]
    changes = [
        *([f"jobs.workers={workers}"] if workers else []),
        *_gpus(gpus_per_worker),
        *([f"experiment_name={json.dumps(experiment_name, ensure_ascii=False)}"] if experiment_name else []),
        *(line for line in lines if line and not line.startswith("#")),
    ]
    source = recognise(data, look)
    if pipeline == VQVAE:
        tokenizer = load_config(preset, changes, source, config).tokenizer
        if tokenizer.kind == "pretrained":
            raise UserError(
                f"tokenizer.kind: {VQVAE} trains a VQ-VAE, and this tokenizer is pretrained; choose"
                f" {TEXT_TO_IMAGE} instead"
            )
        changes = ["transformer=null", *changes]
    resolved = load_config(preset, changes, source, config, derive)
    if (right := pipeline_of(resolved)) != pipeline:
        what = "has a" if resolved.transformer else "has no"
        raise UserError(f"this config {what} transformer; choose {right} instead of {pipeline}")
    return resolved


def _gpus(per_worker: int) -> list[str]:
    """One process for each GPU; without GPUs as many as the preset has."""
    if per_worker == PRESET_GPUS:
        return []
    processes = [f"jobs.processes_per_worker={per_worker}"] if per_worker > 0 else []
    return [f"jobs.gpus_per_worker={per_worker}", *processes]
