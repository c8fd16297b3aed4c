"""The model of a run into the registry, and the decision which version is in use.

Versions of one registered model do the same task, so they can be compared: all are measured on one benchmark,
which the first champion brought and which stays pinned with its judge. A champion that cannot be measured so
(of an earlier release, made from other pictures) keeps its place, and where this release cannot read it the
step fails; one that is of no use to anybody (gone, damaged, no numbers) loses it.

Measuring takes as long as drawing some hundred pictures, so nobody is kept out meanwhile: only in the end
one is alone with the aliases, and where champion or benchmark have changed by then it is compared anew.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from components import data
from model import steps
from model.config import RunConfig
from model.errors import Diverged, Unavailable, UserError
from model.evaluation import gate
from model.evaluation.gate import Measured, Verdict
from model.plumbing import assets, cache, leases, registry, speech, storage
from model.plumbing.assets import Input, Kind, Manifest
from model.plumbing.jobs import TrackingIds
from model.plumbing.registry import Aliases

IMAGES_TAG = "latent_gpt.images"  # of a version: hash of the pictures it was made from
JUDGED_BY = ("images", "model", "benchmark", "evaluation")  # kinds of assets that a verdict may need


class Registered(BaseModel):
    """What became of the model of a run."""

    model: str  # name of the registered model
    version: int
    alias: str  # "champion", or what it is beside the champion that stayed
    reason: str
    report: str  # URI
    headline: list[tuple[str, str, str]]  # value, name and note of the figures that are named first
    headline_of: str  # which pictures they are of
    prompt: str = "red apple"  # one that it draws
    verdict: Verdict


class Judged(NamedTuple):
    """A verdict, and what it rests on."""

    verdict: Verdict
    pinned: Manifest | None = None  # the benchmark that versions are measured on from now on; None: as before


class Seen(NamedTuple):
    """What a verdict began from."""

    champion: int | None  # its version
    previous: int | None
    pin: Input | None  # the benchmark that versions are measured on


def _seen(name: str, aliases: Aliases) -> Seen:
    return Seen(aliases.champion, aliases.previous, registry.benchmark_of(name))


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
        seen = _seen(name, registry.aliases(name))
        verdict, pinned = judge(config, run, evaluation, name, version, seen)
        page = storage.read_bytes(evaluation.where("report.html")).decode()
        page = report.with_verdict(data.in_report(page, evaluation, config), verdict, name, version)
        where = storage.join(evaluation.uri, f"{assets.REPORT}{version}.html")
        with registry.changing(name, "register") as now:
            if _seen(name, now.before) != seen:
                speech.say("register", "champion or benchmark have changed meanwhile: compared anew")
                continue
            after = now.before.promoted(version) if verdict.promoted else now.before.refused(version)
            known = registry.tags_of(version, name)
            now.still_ours()
            if verdict.outcome == "in use":
                after = now.before  # and what was said of it when it came there stands
            else:
                storage.write_bytes(where, page.encode())
            if verdict.outcome != "in use" or f"{registry.VERDICT_TAG}.reason" not in known:
                text = card.card(config, name, version, evaluation, verdict)
                registry.note(version, name, text, **tags(verdict))
            if pinned:
                now.still_ours()
                registry.pin(pinned.as_input, name)
            now.settle(after)
            if verdict.outcome != "in use" or registry.VERDICT_TAG not in known:
                now.still_ours()
                registry.judged(version, name, verdict.outcome)
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
        prompt=evaluation.info.get("prompt", "red apple"),
        verdict=verdict,
    )


def tags(verdict: Verdict) -> dict[str, str]:
    """What is said of a verdict by tags of a version."""
    ours, theirs = (
        {name: float(f"{pair[side]:.5g}") for name, pair in verdict.columns.items() if pair[side] is not None}
        for side in (0, 1)
    )
    said = {
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


def judge(config: RunConfig, run: str, evaluation: Manifest, name: str, version: int, seen: Seen) -> Judged:
    """What the gate says of a version.

    Args:
        config: of the run that made it; its gate decides.
        run: of the pipeline.
        evaluation: of the version.
        name: of the registered model.
        version: its number.
        seen: what plays which role.

    Raises:
        UserError: a version in use is whole, and this release cannot read it.
    """
    from components.artifacts import use

    own = evaluation.input("benchmark")
    use("register", config, run, own.uri)
    if seen.champion == version:
        return Judged(Verdict(outcome="in use", reason="it was before"), None if seen.pin else own)
    if seen.champion is None:
        ours = _own_figures(config, run, evaluation, own)
        if isinstance(ours, str):
            return Judged(_on(gate.refused(config.gate, ours), own, evaluation))
        return Judged(_on(gate.decide(config.gate, ours), own, evaluation), own)
    useless: list[str] = []
    for role, other in (("champion", seen.champion), ("previous champion", seen.previous)):
        if other is None or other == version:
            continue
        try:
            found = _against(config, run, evaluation, name, role, other, seen.pin)
        except _Incomparable as why:
            if useless:
                break
            verdict = gate.not_compared(config.gate, _known(evaluation), f"{why}; {_instead(name, version)}")
            return Judged(verdict.model_copy(update={"against": other}))
        if isinstance(found, Judged):
            return _instead_of(useless, found, other)
        useless.append(found)
    ours = _own_figures(config, run, evaluation, own)
    if isinstance(ours, str):
        return Judged(_on(gate.refused(config.gate, ours), own, evaluation, seen.champion))
    verdict = gate.replaces(config.gate, ours, "; ".join(useless))
    return Judged(_on(verdict, own, evaluation, seen.champion), own if verdict.promoted else None)


def _instead_of(useless: list[str], found: Judged, previous: int) -> Judged:
    """A verdict against the previous champion, where the champion is of no use."""
    if not useless:
        return found
    said = [*useless, f"compared with the previous champion, version {previous}: {found.verdict.reason}"]
    if not found.verdict.promoted:
        said.append("`latent-gpt rollback` puts that one back in use")
    return found._replace(verdict=found.verdict.model_copy(update={"reason": "; ".join(said)}))


def _against(
    config: RunConfig, run: str, evaluation: Manifest, name: str, role: str, other: int, pin: Input | None
) -> Judged | str:
    """What the gate says of a run's model against a version that is in use, or was; or why that is of no use.

    Raises:
        _Incomparable: they cannot be measured on the same.
        UserError: it is whole, and this release cannot read it.
    """
    from components.artifacts import use

    lineage = registry.lineage(other, name)
    wanted = [one for one in (*lineage.values(), pin) if one and one.kind in JUDGED_BY]
    use("register", config, run, *(assets.place(one.kind, one.key) for one in wanted))
    try:
        folder = registry.resolve(f"models:/{name}/{other}")
    except (storage.NotFound, storage.Damaged) as error:
        return f"the {role} is lost: {error}"
    try:
        side = _drawn_side(folder)
    except Diverged as error:  # all of it is here and whole: nobody can draw with it
        return f"the {role}, version {other}, cannot be used: {error}"
    except Unavailable:
        raise
    except UserError as error:
        raise UserError(
            f"the {role}, version {other} of {name}, is whole, but this release cannot read it: {error};"
            " update latent-gpt, or put another version in use by `latent-gpt promote`"
        ) from None
    what = f"not compared with the {role}, version {other}, which"
    if not (folder / assets.NAME).is_file():
        raise _Incomparable(f"{what} an earlier release made, of which there are no measurements")
    benchmark, notes, pinned = _benchmark(config, run, evaluation, name, other, what, side, pin)
    ours = _own_figures(config, run, evaluation, benchmark)
    if isinstance(ours, str):
        return Judged(_on(gate.refused(config.gate, ours), benchmark, evaluation, other))
    bundle = assets.put_back(folder)
    theirs = _champions(config, run, evaluation, bundle, lineage, benchmark)
    if isinstance(theirs, str):
        return f"the {role}, version {other}, cannot be used: {theirs}"
    if config.gate.speed_ratio:
        ours, theirs = raced(config, run, evaluation.input("model"), bundle, benchmark, ours, theirs)
    verdict = gate.decide(config.gate, ours, theirs)
    if verdict.outcome == "replaces":
        return verdict.reason
    noted = verdict.model_copy(update={"reason": "; ".join([verdict.reason, *notes])})
    if verdict.promoted or "images" in config.origin:  # else its pictures may just be fewer
        pinned = benchmark
    return Judged(_on(noted, benchmark, evaluation, other), pinned)


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


def counts(evaluation: Manifest, benchmark: Manifest) -> bool:
    """Whether what was evaluated is a measurement on a benchmark: such as the job would come to now."""
    return evaluation.info.get("benchmark") == benchmark.key and steps.made_as_now(evaluation)


def _known(evaluation: Manifest) -> Measured:
    return measured(evaluation.info, evaluation.input("model"))


def _own_figures(config: RunConfig, run: str, evaluation: Manifest, benchmark: Manifest) -> Measured | str:
    """What a run's model is measured to on a benchmark; or why it cannot be."""
    if counts(evaluation, benchmark):
        return _known(evaluation)
    return measure(config, run, evaluation.input("model"), evaluation.input("images"), benchmark)


def _instead(name: str, version: int) -> str:
    return (
        f"draw with models:/{name}/{version}, put it in use by `latent-gpt promote {version}`, or give this"
        " task a name of its own: model_name"
    )


def _drawn_side(folder: Path) -> int:
    """The side of the pictures that a model draws, in pixels. Raises as `Generator.load`."""
    from model.inference.generate import Generator

    generator = Generator.load(folder)
    return generator.gpt.grid[0] * generator.tokenizer.factor


def _benchmark(
    config: RunConfig,
    run: str,
    evaluation: Manifest,
    name: str,
    other: int,
    what: str,
    side: int,
    pin: Input | None,
) -> tuple[Manifest, list[str], Manifest | None]:
    """The benchmark that a run's model and an earlier version can both be measured on.

    That is the pinned one; where it does not fit, the version's own; where there is none, the run's.

    Returns:
        The benchmark; what is to be said of it; what is to be pinned whatever the verdict will be.

    Raises:
        _Incomparable: there is none.
    """
    from components.artifacts import use
    from model.evaluation.benchmark import mostly_deleted, moved_into_training, without

    images, lineage = evaluation.input("images"), registry.lineage(other, name)
    theirs, own = there(lineage.get("images")), evaluation.input("benchmark")
    same = registry.tags_of(other, name).get(IMAGES_TAG) == images.sha256
    if not lineage and not same:
        raise _Incomparable(f"{what} an earlier release made from pictures that nobody knows any more")
    if images.info["image_size"] != side:
        sizes = f"{side} px, and this one of {images.info['image_size']} px"
        raise _Incomparable(f"{what} draws pictures of {sizes}")
    announce = partial(use, "register", config, run)
    faults: list[str] = []
    worn: tuple[Manifest, list[str], Manifest | None] | None = None
    known = {"the pinned one": there(pin), "its own": there(lineage.get("benchmark"))}
    for whose, whole in known.items():
        if whole is None:
            continue
        if whole.info["image_size"] != side:
            faults.append(f"{what} draws pictures of {side} px, on a benchmark of others")
            continue
        left = without(whole, images, announce)
        if left is None:
            faults.append(f"{what} was made from other pictures: none of the pinned ones is in this data")
            continue
        if moved := moved_into_training(left, images):
            held_out = f"pictures held out, of which this version was trained on {len(moved)}"
            raise _Incomparable(f"{what} is measured on {held_out}")
        if theirs and (moved := moved_into_training(left, theirs)):
            raise _Incomparable(f"{what} was trained on {len(moved)} of the pictures that are held out")
        deleted = "pinned pictures that are deleted from the data were left out"
        notes = [deleted] if left.key != whole.key else []
        if whose == "its own":
            why = _as(pin, known["the pinned one"], worn is not None)
            notes.append(f"measured on the benchmark of version {other}, {why}")
        if mostly_deleted(left):
            worn = worn or (left, notes, None)
            continue
        return left, notes, whole if whose == "its own" else None
    if fault := _unfair(own, images, theirs, lineage, same):
        if worn:
            return worn
        raise _Incomparable(faults[0] if faults else f"{what} {fault}")
    why = _as(pin, known["the pinned one"], worn is not None)
    return own, [f"measured on this run's benchmark, {why}"], None


def _as(pin: Input | None, pinned: Manifest | None, worn: bool) -> str:
    """Why it is not the pinned benchmark that is measured on."""
    if pin is None:
        return "as none was pinned"
    if pinned is None:
        return "as the pinned one is gone"
    return "as most of the pinned pictures are deleted" if worn else "as the pinned one does not fit"


def _unfair(
    own: Manifest, images: Manifest, theirs: Manifest | None, lineage: dict[Kind, Input], same: bool
) -> str:
    """Why an earlier version is not to be measured on a run's own benchmark; "": it may be."""
    from model.data.growth import GROWN_FROM
    from model.evaluation.benchmark import moved_into_training, shares

    before = lineage.get("images")
    grown = before is not None and images.settings.get(GROWN_FROM) == before.key  # what was held out stays so
    if theirs is None:
        return "" if same or grown else "was made from pictures that are not in the store any more"
    if moved := moved_into_training(own, theirs):
        return f"was trained on {len(moved)} of the pictures that this run holds out"
    return "" if shares(own, theirs) else "was made from other pictures"


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
    if before and counts(before, benchmark):
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


# ── by hand ─────────────────────────────────────────────────────────────────────────────────────────────


def promote(version: int, name: str) -> Aliases:
    """As `registry.promote`; where the pinned benchmark does not fit the version, its own is pinned."""
    before = registry.promote(version, name)
    _pin_what_fits(name, "promote")
    return before


def rollback(name: str) -> Aliases:
    """As `registry.rollback`, and likewise."""
    before = registry.rollback(name)
    _pin_what_fits(name, "rollback")
    return before


def _pin_what_fits(name: str, speaker: str) -> None:
    """Where this does not come to its end, the next registration finds a benchmark that fits."""
    try:
        with registry.changing(name, speaker) as now:
            if now.before.champion and (own := _own_that_fits(now.before.champion, name)):
                now.still_ours()
                registry.pin(own, name)
                speech.say(
                    speaker, f"versions are measured on the benchmark of {now.before.champion} from now on"
                )
    except UserError as error:
        speech.warn(speaker, f"the benchmark stays pinned that was: {error}")


def _own_that_fits(version: int, name: str) -> Input | None:
    """A version's own benchmark; None where that is gone, or the pinned one fits it."""
    from model.evaluation.benchmark import moved_into_training, shares

    lineage, pinned = registry.lineage(version, name), there(registry.benchmark_of(name))
    own, images = there(lineage.get("benchmark")), there(lineage.get("images"))
    if own is None:
        return None
    if pinned is None or pinned.info["image_size"] != own.info["image_size"]:
        return own.as_input
    fits = images is None or (shares(pinned, images) and not moved_into_training(pinned, images))
    return None if fits else own.as_input
