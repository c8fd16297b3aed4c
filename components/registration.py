"""The model of a run into the registry, and the decision which version is in use.

Versions of one registered model do the same task, so they can be compared: the champion is measured anew on
the pictures, prompts and seeds of this run. A champion that was made from other pictures is not, as nobody
knows what it saw of these: it keeps its place. One that is of no use to anybody loses it.
"""

from __future__ import annotations

import json
from functools import partial

from pydantic import BaseModel

from model import steps
from model.config import RunConfig
from model.errors import UserError
from model.plumbing import cache, registry, speech, storage
from model.plumbing.assets import Manifest
from model.plumbing.jobs import TrackingIds

IMAGES_TAG = "latent_gpt.images"  # of a version: hash of the pictures it was made from


class Registered(BaseModel):
    """What became of the model of a run."""

    model: str  # name of the registered model
    version: int
    alias: str  # "champion", or "challenger" where the champion stayed
    reason: str
    report: str  # URI
    headline: list[tuple[str, str, str]]  # value, name and note of the figures that are named first
    headline_of: str  # which pictures they are of


def register_model(config: RunConfig, run: str, evaluation: Manifest) -> Registered:
    """Register the model of an evaluation as challenger; the better one of it and the champion is champion.

    Raises:
        UserError: MLflow or the store cannot be reached, or do not hold what they should.
    """
    model, name = evaluation.input("model"), config.registered_model
    version = registry.find(model, name)
    if version is not None:
        speech.reused("register", f"{name} version {version}")
        registry.tag(version, name, _made_by(config, evaluation))
    else:
        version = _register(config, run, model, evaluation)
    better, reason = _judge(config, evaluation, name, version)
    with registry.changing(name, "register") as before:
        after = before.promoted(version) if better else before.refused(version)
        registry.settle(name, after)
    alias = registry.CHAMPION if after.champion == version else registry.CHALLENGER
    speech.say("register", f"{name} version {version} is {alias}: {reason}")
    return Registered(
        model=name,
        version=version,
        alias=alias,
        reason=reason,
        report=evaluation.where("report.html"),
        headline=evaluation.info["headline"],
        headline_of=evaluation.info["headline_of"],
    )


def _register(config: RunConfig, run: str, model: Manifest, evaluation: Manifest) -> int:
    from model.inference.serving import log_model

    made_from = [*model.inputs.values(), *evaluation.inputs.values(), evaluation.as_input]
    tags = {**_made_by(config, evaluation), **registry.lineage_tags(made_from)}
    ids = TrackingIds(experiment=config.experiment, run=run, step="register")
    log = partial(log_model, config=config)
    figures, images = evaluation.info.get("figures", {}), evaluation.input("images")
    return registry.register(ids, cache.folder(model), log, tags, config.registered_model, figures, images)


def _made_by(config: RunConfig, evaluation: Manifest) -> dict[str, str]:
    """Tags that say what the run was made from, by which a later one knows whether there is anything new.

    Its source is that of its pictures, and not what is there by now.
    """
    parts = steps.parts(config, evaluation.input("images").settings)
    return {registry.FINGERPRINT_TAG: steps.fingerprint(parts), registry.PARTS_TAG: json.dumps(parts)}


def _judge(config: RunConfig, evaluation: Manifest, name: str, version: int) -> tuple[bool, str]:
    """Whether a version takes the champion's place, and why."""
    from model.evaluation.evaluate import compare, deciding, finite, remeasure
    from model.inference.generate import Generator, Unfit

    if not finite(deciding(evaluation.info)):
        return False, "its scores are not finite"
    champion = registry.version_of(registry.CHAMPION, name)
    if champion is None:
        return True, "no other is in use"
    if champion == version:
        return False, "it was before"
    try:
        folder = registry.resolve(f"models:/{name}/{champion}")
    except (storage.NotFound, storage.Damaged) as error:
        return True, f"the champion is lost: {error}"
    try:
        generator = Generator.load(folder, pictures=len(deciding(evaluation.info)))
    except UserError as error:  # all of it is here and whole: nobody can draw with it
        return True, f"the champion, version {champion}, cannot be used: {error}"
    if registry.tags_of(champion, name).get(IMAGES_TAG) != evaluation.inputs["images"].sha256:
        return False, (
            f"not compared with the champion, version {champion}, which was made from other pictures; draw"
            f" with models:/{name}/{version}, or give this task a name of its own: model_name"
        )
    try:
        verdict = compare(evaluation.info, remeasure(evaluation, generator))
    except Unfit as error:
        return True, f"the champion, version {champion}, cannot be used: {error}"
    return verdict.better, verdict.reason
