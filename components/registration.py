"""The model of a run into the registry, and the decision which version is in use."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pydantic import BaseModel

from model.config import RunConfig
from model.plumbing import registry, speech
from model.plumbing.assets import Manifest
from model.plumbing.jobs import TrackingIds


class Registered(BaseModel):
    """What became of the model of a run."""

    version: int
    alias: str  # "champion", or "challenger" where the champion stayed
    reason: str
    report: str  # URI
    metrics: dict[str, float]


def register_model(
    config: RunConfig, run: str, sets: dict[str, Manifest], evaluation: Manifest
) -> Registered:
    """Register the bundle of these sets as challenger; the better one of it and the champion is champion."""
    lineage = {f"latent_gpt.{name}": one.sha256 for name, one in {**sets, "evaluation": evaluation}.items()}
    version = registry.find(lineage)
    if version is not None:
        speech.reused("register", f"{registry.MODEL} version {version}")
    else:
        version = _register(config, run, sets, lineage)
    better, reason = _judge(config, sets, evaluation, version)
    if better:
        registry.promote(version)
    alias = registry.CHAMPION if registry.version_of(registry.CHAMPION) == version else registry.CHALLENGER
    speech.say("register", f"{registry.MODEL} version {version} is {alias}: {reason}")
    metrics = {name: value for name, value in evaluation.info.items() if isinstance(value, int | float)}
    return Registered(
        version=version, alias=alias, reason=reason, report=f"{evaluation.uri}/report.html", metrics=metrics
    )


def _register(config: RunConfig, run: str, sets: dict[str, Manifest], lineage: dict[str, str]) -> int:
    from model.inference.generate import write_bundle
    from model.inference.serving import log_model

    ids = TrackingIds(experiment=config.experiment, run=run, step="register")
    with tempfile.TemporaryDirectory() as scratch:
        bundle = write_bundle(sets, config.sampling, Path(scratch) / "bundle")
        version, _ = registry.register(ids, bundle, log_model, lineage)
    return version


def _judge(
    config: RunConfig, sets: dict[str, Manifest], evaluation: Manifest, version: int
) -> tuple[bool, str]:
    """Whether a version takes the champion's place, and why."""
    champion = registry.version_of(registry.CHAMPION)
    if champion is None:
        return True, "the first version"
    if champion == version:
        return False, "it was before"
    from model.evaluation.evaluate import compare, remeasure

    folder = registry.resolve(f"models:/{registry.MODEL}/{champion}")
    verdict = compare(evaluation.info, remeasure(config, sets, folder))
    return verdict.better, verdict.reason
