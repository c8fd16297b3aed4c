"""Whether there is anything new to learn, and the config of the run that learns it.

Data decides: a run would make what a registered version was made from, unless the source, a setting or a
step's version has changed since. It goes on from the champion: its config as it was resolved, its tokenizer,
its weights. Pictures grow from those of the newest version, champion or not, as those of an older one may
still hold what was deleted since.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import yaml

from components.parameters import TEXT_TO_IMAGE, resolve
from model import steps
from model.config import AssetRef, Origin, RunConfig
from model.errors import Unavailable, UserError
from model.plumbing import registry, storage
from model.plumbing.assets import Input, Kind

NEW, NOTHING = "new", "nothing"  # what the step "Anything new?" returns


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


def look(model: str, start: str, asked: Mapping[str, str | int]) -> News:
    """Compare what a run would make now with what each registered version was made from.

    Args:
        model: name of the registered model; "": that of the preset.
        start: "champion" or "scratch", as `retrain.start`; "": as the config says.
        asked: the other parameters, as `resolve` takes them.

    Raises:
        UserError: a parameter is wrong, the source is not there, or MLflow or the store cannot be reached.
    """
    asked = {**asked, "overrides": with_start(start, str(asked["overrides"]))}
    config = resolve(TEXT_TO_IMAGE, **asked)  # type: ignore[arg-type]
    name = model or config.registered_model
    versions = registry.tags_of_all(name)
    champion = registry.version_of(registry.CHAMPION, name)
    said = []
    former = None
    if champion is not None:
        former, why = _config_of(champion, name)
        said += why
    if former:
        settings = yaml.safe_dump(former.model_copy(update={"origin": {}}).model_dump(mode="json"))
        config = resolve(TEXT_TO_IMAGE, **{**asked, "config": settings})  # type: ignore[arg-type]
    if config.registered_model != name:
        config = config.model_copy(update={"model_name": name})
    parts = steps.parts(config)
    mark = steps.fingerprint(parts)
    same = [one for one, tags in versions.items() if tags.get(registry.FINGERPRINT_TAG) == mark]
    if same:
        role = registry.CHAMPION if same[-1] == champion else "not champion"
        verdict = f"nothing new since version {same[-1]} of {name} ({role})"
        return News(False, [verdict, *said], config, name)
    verdict = _what_is_new(name, versions, parts)
    if former and champion is not None:
        found, why = _origin(config, former, name, champion, max(versions))
        config, said = config.model_copy(update={"origin": found}), [*said, *why]
    return News(True, [verdict, *said], config, name)


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


def _what_is_new(name: str, versions: dict[int, dict[str, str]], parts: dict[str, object]) -> str:
    """In one line, what has changed since the newest version."""
    if not versions:
        return f"new: {name} has no version yet"
    newest = max(versions)
    known = versions[newest].get(registry.PARTS_TAG)
    if not known:
        return f"new: version {newest} of {name} does not say what it was made from"
    changed = steps.changes(json.loads(known), parts)
    return f"new since version {newest} of {name}: {', '.join(changed) or 'as an older one had it'}"


def _origin(
    config: RunConfig, former: RunConfig, name: str, champion: int, newest: int
) -> tuple[Origin, list[str]]:
    """What a run takes over, and what it does not and why."""
    of_newest, of_champion = registry.lineage(newest, name), registry.lineage(champion, name)
    found: Origin = {}
    said: list[str] = []

    def take(kind: Kind, lineage: dict[Kind, Input], version: int) -> bool:
        one = lineage.get(kind)
        try:
            if one is None:
                raise storage.NotFound("which one it was is not known")
            one.load()
        except Unavailable:
            raise
        except UserError as error:
            said.append(f"{kind} of version {version} is not taken over, and made anew: {error}")
            return False
        found[kind] = AssetRef(key=one.key, sha256=one.sha256)  # type: ignore[index]
        return True

    if take("images", of_newest, newest):
        said.append(f"images grow from those of version {newest}")
    if config.retrain.tokenizer != "frozen":
        return found, [*said, "all nets are trained anew, as retrain.tokenizer says"]
    if config.tokenizer != former.tokenizer:
        return found, [*said, "all nets are trained anew, as settings of the tokenizer have changed"]
    if not take("tokenizer", of_champion, champion):
        return found, said
    said.append(f"tokenizer is that of version {champion}")
    if config.retrain.start != "champion":
        return found, [*said, "the transformer begins from scratch, as retrain.start says"]
    if config.clip != former.clip:
        return found, [*said, "the transformer begins from scratch, as settings of the text encoder changed"]
    if take("text", of_champion, champion) and take("transformer", of_champion, champion):
        said.append(f"text encoder is that of version {champion}, whose weights the transformer begins from")
    else:
        found.pop("text", None)
    return found, said
