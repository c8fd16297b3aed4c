"""The model of a run into the registry, and the decision which version is in use.

Versions of one registered model do the same task, so they can be compared: all are measured on one benchmark,
which the first champion brought and which stays pinned with its judge. A champion that cannot be measured so
(of an earlier release, made from other pictures) keeps its place; one that is of no use to anybody loses it.

Measuring takes as long as drawing some hundred pictures, so nobody is kept out meanwhile: only in the end
one is alone with the aliases, and where the champion has changed by then it is compared anew.
"""

from __future__ import annotations

import json
from functools import partial
from typing import NamedTuple

from pydantic import BaseModel

from model import steps
from model.config import RunConfig
from model.errors import Diverged, UserError
from model.evaluation import gate
from model.evaluation.gate import Measured, Verdict
from model.plumbing import assets, cache, leases, registry, speech, storage
from model.plumbing.assets import Input, Kind, Manifest
from model.plumbing.jobs import TrackingIds

IMAGES_TAG = "latent_gpt.images"  # of a version: hash of the pictures it was made from


class Registered(BaseModel):
    """What became of the model of a run."""

    model: str  # name of the registered model
    version: int
    alias: str  # "champion", or what it is beside the champion that stayed
    reason: str
    report: str  # URI
    headline: list[tuple[str, str, str]]  # value, name and note of the figures that are named first
    headline_of: str  # which pictures they are of
    verdict: Verdict


class Judged(NamedTuple):
    """A verdict, and what it rests on."""

    verdict: Verdict
    pinned: Manifest | None = None  # the benchmark that versions are measured on from now on; None: as before


def register_model(config: RunConfig, run: str, evaluation: Manifest) -> Registered:
    """Register the model of an evaluation; champion is what the gate says.

    Raises:
        UserError: MLflow or the store cannot be reached, or do not hold what they should.
    """
    from model.evaluation import card, report

    model, name = evaluation.input("model"), config.registered_model
    with leases.alone("register", f"registering/{name}/{model.key}"):
        version = registry.find(model, name)
        if version is not None:
            speech.reused("register", f"{name} version {version}")
            registry.tag(version, name, _made_by(config, evaluation))
        else:
            version = _register(config, run, model, evaluation)
    while True:
        champion = registry.aliases(name).champion
        verdict, pinned = judge(config, run, evaluation, name, version, champion)
        page = storage.read_bytes(evaluation.where("report.html")).decode()
        page = report.with_verdict(page, verdict, name, version)
        where = storage.join(evaluation.uri, f"{assets.REPORT}{version}.html")
        with registry.changing(name, "register") as before:
            if before.champion != champion:
                speech.say("register", "the champion has changed meanwhile: compared anew")
                continue
            after = before.promoted(version) if verdict.promoted else before.refused(version)
            if verdict.outcome == "in use":
                after = before  # and what was said of it when it came there stands
            else:
                storage.write_bytes(where, page.encode())
                text = card.card(config, name, version, evaluation, verdict)
                registry.note(version, name, text, **tags(verdict))
            if pinned:
                registry.pin(pinned.key, pinned.sha256, name)
            registry.settle(name, after)
        break
    if verdict.outcome != "in use":
        _log_report(config, run, page)
    alias = next((alias for alias, one in after.by_name.items() if one == version), "no alias")
    speech.say("register", f"{name} version {version} is {alias}: {verdict.outcome}: {verdict.reason}")
    for what, ours, theirs in gate.shown(verdict):
        speech.say("register", f"{what}: {ours}" + (f", the champion's {theirs}" if theirs else ""))
    return Registered(
        model=name,
        version=version,
        alias=alias,
        reason=verdict.reason,
        report=where if storage.exists(where) else evaluation.where("report.html"),
        headline=evaluation.info["headline"],
        headline_of=evaluation.info["headline_of"],
        verdict=verdict,
    )


def tags(verdict: Verdict) -> dict[str, str]:
    """A verdict as the tags of a version."""
    ours, theirs = (
        {name: float(f"{pair[side]:.5g}") for name, pair in verdict.columns.items() if pair[side] is not None}
        for side in (0, 1)
    )
    said = {
        "outcome": verdict.outcome,
        "reason": verdict.reason,
        "against": str(verdict.against or ""),
        "benchmark": verdict.benchmark,
        "judge": verdict.judge,
        "prompts": verdict.prompts,
        "figures": _fitting(ours),
        "figures_of_champion": _fitting(theirs),
    }
    if verdict.difference is not None:
        said["interval"] = f"{verdict.difference:+.4f} [{verdict.low:+.4f}, {verdict.high:+.4f}]"
    return {name: value for name, value in said.items() if value}


def _fitting(figures: dict[str, float]) -> str:
    """Figures as JSON, as many as a tag holds; what stands between floor and ceiling goes last."""
    names = sorted(figures, key=lambda name: name.endswith(("_reconstructed", "_real", "_shuffled")))
    while len(text := json.dumps({name: figures[name] for name in names})) > registry.LONGEST_TAG:
        names.pop()
    return text if names else ""


def _register(config: RunConfig, run: str, model: Manifest, evaluation: Manifest) -> int:
    from model.inference.serving import log_model

    made_from = [*model.inputs.values(), *evaluation.inputs.values(), evaluation.as_input]
    lineage = {**_made_by(config, evaluation), **registry.lineage_tags(made_from)}
    ids = TrackingIds(experiment=config.experiment, run=run, step="register")
    log = partial(log_model, config=config)
    figures, images = evaluation.info.get("figures", {}), evaluation.input("images")
    return registry.register(ids, cache.folder(model), log, lineage, config.registered_model, figures, images)


def _made_by(config: RunConfig, evaluation: Manifest) -> dict[str, str]:
    """Tags that say what the run was made from, by which a later one knows whether there is anything new.

    Its source is that of its pictures, and not what is there by now.
    """
    parts = steps.parts(config, evaluation.input("images").settings)
    return {registry.FINGERPRINT_TAG: steps.fingerprint(parts), registry.PARTS_TAG: json.dumps(parts)}


def _log_report(config: RunConfig, run: str, page: str) -> None:
    from model.plumbing.tracking import Tracker

    with Tracker(TrackingIds(experiment=config.experiment, run=run, step="register")) as tracker:
        tracker.text("report.html", page)


# ── the verdict ─────────────────────────────────────────────────────────────────────────────────────────


def judge(
    config: RunConfig, run: str, evaluation: Manifest, name: str, version: int, champion: int | None
) -> Judged:
    """What the gate says of a version.

    Args:
        config: of the run that made it; its gate decides.
        run: of the pipeline.
        evaluation: of the version.
        name: of the registered model.
        version: its number.
        champion: the version in use; None where there is none.
    """
    if champion == version:
        unpinned = registry.benchmark_of(name) is None
        return Judged(
            Verdict(outcome="in use", reason="it was before"),
            evaluation.input("benchmark") if unpinned else None,
        )
    own = evaluation.input("benchmark")
    ours = measured(evaluation.info, evaluation.input("model"))
    if champion is None:
        return Judged(_on(gate.decide(config.gate, ours), own, evaluation), own)
    useless = partial(_useless, config, evaluation, own, ours, champion)
    try:
        folder = registry.resolve(f"models:/{name}/{champion}")
    except (storage.NotFound, storage.Damaged) as error:
        return useless(f"the champion is lost: {error}")
    side, fault = _drawn_side(folder)
    if fault:  # all of it is here and whole: nobody can draw with it
        return useless(f"the champion, version {champion}, cannot be used: {fault}")
    try:
        benchmark, notes = _benchmark(config, evaluation, name, champion, side)
    except _Incomparable as why:
        verdict = gate.not_compared(config.gate, ours, f"{why}; {_instead(name, version)}")
        return Judged(verdict.model_copy(update={"against": champion}))
    if evaluation.info["benchmark"] != benchmark.key:
        anew = measure(config, run, evaluation.input("model"), evaluation.input("images"), benchmark)
        if isinstance(anew, str):
            return Judged(_on(gate.refused(config.gate, anew), benchmark, evaluation, champion))
        ours = anew
    bundle = assets.put_back(folder)
    theirs = _champions(config, run, evaluation, bundle, registry.lineage(champion, name), benchmark)
    if isinstance(theirs, str):
        return useless(f"the champion, version {champion}, cannot be used: {theirs}")
    if config.gate.speed_ratio:
        ours, theirs = raced(config, run, evaluation.input("model"), bundle, benchmark, ours, theirs)
    verdict = gate.decide(config.gate, ours, theirs)
    noted = verdict.model_copy(update={"reason": "; ".join([verdict.reason, *notes])})
    first_or_grown = verdict.promoted or "images" in config.origin  # else its pictures may just be fewer
    return Judged(_on(noted, benchmark, evaluation, champion), benchmark if first_or_grown else None)


class _Incomparable(Exception):
    """Two versions that cannot be measured on the same, and why."""


def measured(info: dict[str, object], model: Manifest) -> Measured:
    """What a model was measured to, from the `info` of its evaluation or measurement."""
    return Measured.of(info, model.inputs["tokenizer"].sha256)


def _on(verdict: Verdict, benchmark: Manifest, evaluation: Manifest, against: int | None = None) -> Verdict:
    """The verdict with what it was measured on, against whom, and by whom."""
    judge, own = benchmark.inputs["judge"], evaluation.input("model").inputs["judge"]
    by = f"{judge.key}, this run's own"
    if judge.sha256 != own.sha256:
        by = f"{judge.key}, pinned with the benchmark; the figures of the report are by this run's, {own.key}"
    return verdict.model_copy(update={"benchmark": benchmark.key, "judge": by, "against": against})


def _useless(
    config: RunConfig, evaluation: Manifest, own: Manifest, ours: Measured, champion: int, why: str
) -> Judged:
    verdict = gate.replaces(config.gate, ours, why)
    return Judged(_on(verdict, own, evaluation, champion), own if verdict.promoted else None)


def _instead(name: str, version: int) -> str:
    return (
        f"draw with models:/{name}/{version}, put it in use by `latent-gpt promote {version}`, or give this"
        " task a name of its own: model_name"
    )


def _drawn_side(folder: object) -> tuple[int, str]:
    """The side of the pictures that a model draws, in pixels; and why it draws none."""
    from model.inference.generate import Generator

    try:
        generator = Generator.load(str(folder))
    except UserError as error:
        return 0, str(error)
    return generator.gpt.grid[0] * generator.tokenizer.factor, ""


def _benchmark(
    config: RunConfig, evaluation: Manifest, name: str, champion: int, side: int
) -> tuple[Manifest, list[str]]:
    """The benchmark that both can be measured on, and what is to be said of it.

    Raises:
        _Incomparable: there is none.
    """
    from model.evaluation.benchmark import moved_into_training, without

    images, lineage = evaluation.input("images"), registry.lineage(champion, name)
    what = f"not compared with the champion, version {champion}, which"
    theirs = there(lineage.get("images"))
    same = registry.tags_of(champion, name).get(IMAGES_TAG) == images.sha256
    if not lineage and not same:
        raise _Incomparable(f"{what} an earlier release made from pictures that nobody knows any more")
    pinned, notes = _pinned(name)
    if pinned:
        left = without(pinned, images)
        if left is None:
            raise _Incomparable(
                f"{what} was made from other pictures: none of the pinned ones is in this data"
            )
        if left.key != pinned.key:
            notes = ["pinned pictures that are deleted from the data were left out"]
        pinned = left
    benchmark = pinned or evaluation.input("benchmark")
    if benchmark.info["image_size"] != images.info["image_size"] or benchmark.info["image_size"] != side:
        sizes = f"{side} px, and this one of {images.info['image_size']} px"
        raise _Incomparable(f"{what} draws pictures of {sizes}, on a benchmark of others")
    if moved := moved_into_training(benchmark, images):
        raise _Incomparable(
            f"{what} is measured on pictures held out, of which this version was trained on {len(moved)}"
        )
    if theirs and (moved := moved_into_training(benchmark, theirs)):
        raise _Incomparable(f"{what} was trained on {len(moved)} of the pictures that this run holds out")
    if not (theirs or pinned or same):
        raise _Incomparable(f"{what} was made from pictures that are not in the store any more")
    return benchmark, notes


def _pinned(name: str) -> tuple[Manifest | None, list[str]]:
    """The benchmark of a registered model, and what is to be said where there is none."""
    ref = registry.benchmark_of(name)
    if ref is None:
        return None, ["measured on this run's benchmark, as none was pinned"]
    try:
        manifest = Input(kind="benchmark", key=ref[0], sha256=ref[1]).load()
        if assets.find(manifest.uri):
            return manifest, []
    except UserError as error:
        return None, [f"measured on this run's benchmark, as the pinned one is gone: {error}"]
    return None, ["measured on this run's benchmark, as the pinned one is gone"]


def there(one: Input | None) -> Manifest | None:
    """An asset, if it is in the store and whole."""
    try:
        return assets.find(one.load().uri) if one else None
    except UserError:
        return None


def _champions(
    config: RunConfig,
    run: str,
    evaluation: Manifest,
    model: Manifest,
    lineage: dict[Kind, Input],
    benchmark: Manifest,
) -> Measured | str:
    """What the champion was measured to on a benchmark, now or before; or why it cannot be."""
    before = there(lineage.get("evaluation"))
    if before and before.info.get("benchmark") == benchmark.key:
        return measured(before.info, model)
    # Those that it was made from may be gone: then near-duplicates are searched in those of this run.
    images = there(lineage.get("images")) or evaluation.input("images")
    return measure(config, run, model, images, benchmark)


def raced(
    config: RunConfig,
    run: str,
    challenger: Manifest,
    champion: Manifest,
    benchmark: Manifest,
    ours: Measured,
    theirs: Measured,
) -> tuple[Measured, Measured]:
    """The same of both with the pictures that they draw per second, in one process by turns."""
    from components.artifacts import launched

    inputs = {"model": challenger, steps.CHAMPION: champion, "benchmark": benchmark}
    speeds = launched("race", config, run, inputs).manifest.info[gate.SPEED]
    return ours.with_figure(gate.SPEED, speeds["model"]), theirs.with_figure(
        gate.SPEED, speeds[steps.CHAMPION]
    )


def measure(
    config: RunConfig, run: str, model: Manifest, images: Manifest, benchmark: Manifest
) -> Measured | str:
    """What a model is measured to by a job; or why it cannot be.

    Args:
        config: of the run that wants to know.
        run: of the pipeline.
        model: the bundle.
        images: among whose training pictures near-duplicates are searched.
        benchmark: what it is measured on.
    """
    from components.artifacts import launched

    inputs = {"images": images, "model": model, "benchmark": benchmark}
    try:
        return measured(launched("measurement", config, run, inputs).manifest.info, model)
    except Diverged as error:
        return str(error)
