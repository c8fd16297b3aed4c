"""The model of a run into the registry, and the decision which version is in use."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pydantic import BaseModel

from components.step import say
from model.config import RunConfig
from model.plumbing import registry
from model.plumbing.jobs import TrackingIds
from model.plumbing.manifests import Manifest


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
    from model.evaluate import compare, remeasure
    from model.generate import write_bundle
    from model.serving import log_model

    ids = TrackingIds(experiment=config.experiment, run=run, step="register")
    lineage = {f"latent_gpt.{name}": manifest.uri for name, manifest in sets.items()}
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        write_bundle(sets, config.sampling, bundle)
        version, new = registry.register(ids, bundle, log_model, lineage)
    if not new:
        say("register", f"reused {registry.MODEL} version {version}")
    champion = registry.version_of(registry.CHAMPION)
    if champion is None:
        better, reason = True, "the first version"
    elif champion == version:
        better, reason = False, "it is the champion already"
    else:
        folder = registry.resolve(f"models:/{registry.MODEL}/{champion}")
        verdict = compare(evaluation.info, remeasure(config, sets, folder))
        better, reason = verdict.better, verdict.reason
    if better:
        registry.promote(version)
    alias = registry.CHAMPION if better or champion == version else registry.CHALLENGER
    say("register", f"{registry.MODEL} version {version} is {alias}: {reason}")
    metrics = {name: value for name, value in evaluation.info.items() if isinstance(value, int | float)}
    return Registered(
        version=version, alias=alias, reason=reason, report=f"{evaluation.uri}/report.html", metrics=metrics
    )
