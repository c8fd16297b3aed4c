"""Whether there is anything new to learn, and the config of the run that learns it.

Data decides: a run would make what a version was made from that was judged, unless the source, a setting or
a step's version has changed since. It goes on from the champion: its config as it was resolved, its
tokenizer, its weights. Pictures grow from the registered model's current ones, whichever version was made
from these, as all others may still hold what was deleted since.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import NamedTuple

import yaml

from components.parameters import TEXT_TO_IMAGE, resolve
from components.recipe import resolved, with_end
from components.step import end_given_up_runs
from model import steps
from model.config import AssetRef, Origin, RunConfig, config_hash
from model.data.sources import remembered
from model.errors import Unavailable, UserError
from model.plumbing import provenance, registry, speech, storage, tracking
from model.plumbing.assets import Input, Kind

Versions = dict[int, dict[str, str]]  # of a registered model: number to tags
# Of the transformer: settings by which its weights are of another shape, or mean something else.
SHAPE = ("arch", "depth", "width", "heads", "mlp", "positions", "qk_norm")
NEW, NOTHING = "new", "nothing"  # what the step "Anything new?" returns
MARK_TAG = "latent_gpt.learns"  # of a pipeline's run in MLflow: see `mark`
FAILURES = 3  # in a row, after which the same is not begun once more for a while
PAUSE = 12 * 3600.0  # seconds of that, and twice as long after each further one


class News(NamedTuple):
    """What a look at source, settings and registered versions came to."""

    new: bool
    said: list[str]  # in lines for people, the verdict first
    config: RunConfig  # of the run that learns what is new
    model: str  # name of the registered model


def with_start(start: str, overrides: str) -> str:
    """Overrides with the choice of a start before them. Raises UserError: there is no such start."""
    if start not in ("", "champion", "scratch"):
        raise UserError(f"start is '{start}'; it is champion, scratch, or empty for what the config says")
    return f"retrain.start={start}\n{overrides}" if start else overrides


@remembered()
def look(model: str, start: str, asked: Mapping[str, str | int]) -> News:
    """Compare what a run would make now with what each registered version was made from.

    Where that is nothing new, the images of that version are the registered model's current ones from now on.

    Args:
        model: name of the registered model; "": that of the preset.
        start: "champion" or "scratch", as `retrain.start`; "": as the config says.
        asked: the other parameters, as `resolve` takes them.

    Raises:
        UserError: a parameter is wrong, the source is not there, or MLflow or the store cannot be reached.
    """
    asked = {**asked, "overrides": with_start(start, str(asked["overrides"])), "pipeline": TEXT_TO_IMAGE}
    config = resolve(**asked)  # type: ignore[arg-type]
    name = model or config.registered_model
    end_given_up_runs("news")
    versions = registry.tags_of_all(name)
    champion = registry.version_of(registry.CHAMPION, name)
    verdict, former = _none_in_use(name, versions, champion), None
    said: list[str] = []
    if not verdict and champion is not None:
        former, said = _config_of(champion, name)
    if former:
        settings = yaml.safe_dump(former.model_copy(update={"origin": {}}).model_dump(mode="json"))
        asked["config"] = settings
    config = with_end(resolved(asked), time.time()).config  # as the run will say, to the second
    if config.registered_model != name:
        config = config.model_copy(update={"model_name": name})
    parts = steps.parts(config)
    same: int | None = None
    if not verdict:
        judged = [one for one, tags in versions.items() if registry.VERDICT_TAG in tags or one == champion]
        same = _made_before(config, name, {one: versions[one] for one in judged}, parts)
    if same:
        role = registry.CHAMPION if same == champion else "not champion"
        verdict = f"nothing new since version {same} of {name} ({role})"
        if images := registry.lineage_of(versions[same]).get("images"):
            registry.see_images(images, name)
        return News(False, [verdict, *said], config, name)
    verdict = verdict or _what_is_new(name, versions, parts)
    if former and champion is not None:
        found, why = _origin(config, former, name, champion, versions)
        config, said = config.model_copy(update={"origin": found}), [*said, *why]
    if left := _left(config):
        return News(False, [f"{left}; {verdict}", *said], config, name)
    return News(True, [verdict, *said], config, name)


def mark(config: RunConfig) -> str:
    """What tells whether two runs are to learn the same, from the same start. Raises as `steps.settings`."""
    recipe = config.recipe and config.recipe.model_copy(update={"until": 0.0})  # which each run says anew
    parts = steps.parts(config.model_copy(update={"recipe": recipe}))
    return config_hash({"parts": parts, **config.model_dump(mode="json", include={"retrain", "origin"})})


def _left(config: RunConfig) -> str:
    """Why a run is not begun for now: runs like it failed, one after the other; "" where it is.

    A failure that repeats itself would else take the hardware at each tick. It is tried again all the same,
    ever more seldom: what failed may have been the cluster.
    """
    failed = tracking.failed_runs(config.experiment, {MARK_TAG: mark(config), **provenance.tags()})
    if len(failed) < FAILURES:
        return ""
    ended, reason = failed[0]
    rest = ended + PAUSE * 2.0 ** (len(failed) - FAILURES) - time.time()
    if rest <= 0:
        return ""
    return (
        f"left for {speech.duration(rest)}, unless pictures, settings (as --start scratch), champion or image"
        f" become others: {len(failed)} runs of the same failed in a row, the last as {reason}"
    )


def _none_in_use(name: str, versions: Versions, champion: int | None) -> str:
    """Why nobody draws with a registered model, which is news; "" where it has a champion."""
    if not versions:
        return f"new: {name} has no version yet"
    if champion not in versions:  # or its version was deleted
        return f"new: no version of {name} is in use"
    if not registry.is_there(champion, name):
        return f"new: the files of version {champion} of {name}, the champion, are gone from MLflow"
    return ""


def _made_before(config: RunConfig, name: str, versions: Versions, parts: dict[str, object]) -> int | None:
    """The newest of some versions that was made from what a run would make, or from what comes to the same.

    Where all that is other is what the source says of itself, it is asked what it holds: a file that was
    written anew may hold what it held. Then the version is known by what the source says now, so that the
    next look is quick.
    """
    mark = steps.fingerprint(parts)
    for one in sorted(versions, reverse=True):
        if versions[one].get(registry.FINGERPRINT_TAG) == mark:
            return one
    current = registry.current_images(name)
    for one in sorted(versions, reverse=True):
        known = json.loads(versions[one].get(registry.PARTS_TAG, "{}"))
        if current is None or registry.lineage_of(versions[one]).get("images") != current:
            continue
        if steps.changes(known, parts) == [steps.PICTURES]:
            if not _holds_the_same(config, current):
                return None
            registry.tag(one, name, {registry.FINGERPRINT_TAG: mark, registry.PARTS_TAG: json.dumps(parts)})
            return one
    return None


def _holds_the_same(config: RunConfig, images: Input) -> bool:
    """Whether a source holds the pictures and captions that images were made from."""
    from model.data import growth
    from model.data.ingest import is_as_it_was

    ref = AssetRef(key=images.key, sha256=images.sha256)
    try:
        earlier = growth.earlier(ref, config.data, steps.STEPS["images"].version)
        speech.say("news", "the source says that it has changed; looks whether its pictures have")
        return is_as_it_was(config.data, earlier)
    except (growth.Unfit, storage.NotFound, storage.Damaged):  # nobody can tell
        return False


def _config_of(champion: int, name: str) -> tuple[RunConfig | None, list[str]]:
    """The config of the champion's run, or why there is none."""
    try:
        found = registry.config_of(champion, name)
    except Unavailable:
        raise
    except UserError as error:
        return None, [f"from scratch, with the preset's settings: {error}"]
    if found is None:
        of = f"version {champion} of {name} is of an earlier release and has no config"
        return None, [f"from scratch, with the preset's settings: {of}"]
    return found, []


def _what_is_new(name: str, versions: Versions, parts: dict[str, object]) -> str:
    """In one line, what has changed since the newest version."""
    newest = max(versions)
    known = versions[newest].get(registry.PARTS_TAG)
    if not known:
        return f"new: version {newest} of {name} does not say what it was made from"
    if changed := steps.changes(json.loads(known), parts):
        return f"new since version {newest} of {name}: {', '.join(changed)}"
    return f"new: version {newest} of {name} was made from the same, and was not judged"


def _origin(
    config: RunConfig, former: RunConfig, name: str, champion: int, versions: Versions
) -> tuple[Origin, list[str]]:
    """What a run takes over, and what it does not and why."""
    lineage = {one: registry.lineage_of(tags) for one, tags in versions.items()}
    images, of_champion = registry.current_images(name), lineage[champion]
    grown = [one for one in versions if lineage[one].get("images") == images]
    of_images = f"version {max(grown)}" if grown else name
    found: Origin = {}
    said: list[str] = []

    def take(kind: Kind, one: Input | None, of: str = f"version {champion}") -> bool:
        try:
            if one is None:
                raise storage.NotFound("which one it was is not known")
            one.load()
        except Unavailable:
            raise
        except UserError as error:
            said.append(f"{kind} of {of} is not taken over, and made anew: {error}")
            return False
        found[kind] = AssetRef(key=one.key, sha256=one.sha256)  # type: ignore[index]
        return True

    if take("images", images, of_images):
        said.append(f"images grow from those of {of_images}")
    if config.retrain.tokenizer != "frozen":
        return found, [*said, "all nets are trained anew, as retrain.tokenizer says"]
    if config.tokenizer != former.tokenizer:
        return found, [*said, "all nets are trained anew, as settings of the tokenizer have changed"]
    if not take("tokenizer", of_champion.get("tokenizer")):
        return found, said
    said.append(f"tokenizer is that of version {champion}")
    if config.retrain.start != "champion":
        return found, [*said, "the transformer begins from scratch, as retrain.start says"]
    if config.clip != former.clip:
        return found, [*said, "the transformer begins from scratch, as settings of the text encoder changed"]
    if unfit := _unfit(config, former):
        return found, [*said, f"the transformer begins from scratch, as weights do not fit: {unfit}"]
    if take("text", of_champion.get("text")) and take("transformer", of_champion.get("transformer")):
        said.append(f"text encoder is that of version {champion}, whose weights the transformer begins from")
    else:
        found.pop("text", None)
    return found, said


def _unfit(config: RunConfig, former: RunConfig) -> str:
    """The settings by which a transformer's weights are no start for another; "" where there are none."""
    now, then = (
        {"data.image_size": one.data.image_size}
        | {f"transformer.{name}": getattr(one.transformer, name) for name in SHAPE}
        for one in (config, former)
    )
    return ", ".join(f"{name} {then[name]} -> {now[name]}" for name in now if now[name] != then[name])
