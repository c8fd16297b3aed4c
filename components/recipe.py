"""The config of a run whose `recipe` leaves the rest open: pictures are looked at, hardware is timed.

What is derived once is kept: beside the run's assets until a model is registered, and with the model then. So
a run that was killed goes on, and later runs of the same model have its sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Set
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from components.parameters import resolve
from model import recipe, steps
from model.config import RunConfig, parse_config
from model.errors import Unavailable, UserError
from model.plumbing import assets, registry, speech, uses
from model.plumbing.assets import AssetWriter
from model.plumbing.leases import alone
from model.recipe import Choice, Derived, Memory, Part, Speeds, Values

if TYPE_CHECKING:
    from model.data.survey import Look


FITTED = "transformer.training.steps"
FIRST = "as the first model of these pictures would have it; one that is registered keeps its sizes"


class Resolved(NamedTuple):
    """A whole config, and how it came about."""

    config: RunConfig
    look: Look | None = None  # at its source, where it was looked at now
    choices: tuple[Choice, ...] = ()
    parts: tuple[Part, ...] = ()  # of the run's time, as foreseen
    said: tuple[str, ...] = ()  # for people
    timed: bool = False  # whether the transformer's steps are fitted to what is left of the run's minutes


def resolved(asked: dict[str, Any]) -> Resolved:
    """The config of a run, with what its recipe leaves out.

    Args:
        asked: as `components.parameters.resolve` takes it.

    Raises:
        UserError: a parameter is wrong, the source holds nothing that can be used, the minutes are too few,
            or the registered model of this name is of other pictures.
    """
    foreseen, chosen = _foreseen(asked)
    if foreseen.recipe is None:
        return Resolved(foreseen)
    if foreseen.recipe.version:
        return _fitted(foreseen, chosen)
    if former := _former(foreseen, named="name" in chosen or bool(foreseen.model_name)):
        version, config = former
        merged = resolve(**asked, derive=partial(_like, former=config))
        found = _fitted(merged, chosen)
        return found._replace(
            said=(f"sizes are those of version {version} of {config.registered_model}", *found.said)
        )
    return _once(foreseen, partial(_derived, asked))


def _once(config: RunConfig, make: Callable[[], Resolved]) -> Resolved:
    """What was made for this config before, or is made now and kept."""
    writer = steps.writer("recipe", config, {})
    uses.use("prepare", "", writer.uri)
    with alone("prepare", writer.uri):  # two would measure other seconds
        if made := assets.find(writer.uri):
            return _kept(made)
        found = make()
        _keep(writer, found)
    return found


def _foreseen(asked: dict[str, Any]) -> tuple[RunConfig, set[str]]:
    """The config as long as its pictures are not seen, and the fields that somebody chose."""
    overrides = str(asked.get("overrides", "")).splitlines()
    chosen = {line.partition("=")[0].strip() for line in overrides}

    def derive(values: Values) -> Derived:
        found = recipe.derive(values)
        chosen.update(choice.field for choice in found.choices if choice.given)
        return found

    return resolve(**asked, derive=derive), chosen


def planned(asked: dict[str, Any], here: bool = True) -> Resolved:
    """The same of a run that is the first of its pictures; nothing is kept.

    Args:
        asked: as `resolved` takes it.
        here: the hardware is at hand to be timed; else its speed is the table's.

    Raises:
        UserError: as `resolved`.
    """
    if not resolve(**asked).recipe:
        return Resolved(resolve(**asked))
    return _derived(asked, here)._replace(said=(FIRST,))


def _derived(asked: dict[str, Any], here: bool = True) -> Resolved:
    """Look at the pictures, choose sizes, find out how fast these are, and fill the time."""
    config, chosen = _foreseen(asked)
    look = _look(config, "data.min_side" in chosen)
    needs = needs_of(resolve(**asked, derive=partial(recipe.derive, survey=look.survey)))
    config = resolve(**asked, derive=partial(recipe.derive, survey=look.survey, needs=needs))
    speeds = speeds_of(config) if here else _of_the_table(config)
    found: list[Derived] = []

    def derive(values: Values) -> Derived:
        found.append(recipe.derive(values, look.survey, speeds, needs))
        return found[-1]

    config = resolve(**asked, derive=derive)
    return _of(config, found[-1])._replace(look=look)


def _of(config: RunConfig, derived: Derived) -> Resolved:
    return Resolved(config, None, tuple(derived.choices), tuple(derived.parts), timed=_timed(derived.choices))


def _timed(choices: Iterable[Choice]) -> bool:
    """Whether nobody says how many steps the transformer takes."""
    return not any(one.given and one.field == FITTED for one in choices)


def lines(found: Resolved) -> list[str]:
    """What a person is told of a run: its pictures; where the rest was derived, sizes, steps, time."""
    config = found.config
    seen = found.look.lines() if found.look else []
    if config.recipe is None:
        return seen
    side, transformer = config.data.image_size, config.transformer
    sizes = [f"{side} px"]
    if config.tokenizer.kind == "vqvae":
        sizes.append(
            f"{(side // config.tokenizer.factor) ** 2} tokens of {config.tokenizer.vocabulary} codes"
        )
    if transformer:
        sizes.append(f"a transformer of {transformer.depth} x {transformer.width}")
    names = {"clip": "CLIPs"}
    steps = ", ".join(f"{one.steps:,} of the {names.get(net, net)}" for net, one in config.trainings.items())
    took = sum(part.seconds for part in found.parts)
    return [
        *seen,
        *found.said,
        f"chosen for {config.recipe.fitted}: {', '.join(sizes)}; steps: {steps}",
        *([f"about {speech.duration(took)} in all"] if took else []),
    ]


def speeds_of(config: RunConfig) -> Speeds:
    """How fast the hardware is that `jobs` asks for: timed for a run with its minutes, else by the table."""
    assert config.recipe
    if not config.recipe.minutes:
        return _of_the_table(config)
    from components.launch import launch
    from components.preflight import check_compiler
    from model.training import speed

    check_compiler(config)
    job = steps.job("speed", config, "", {})
    uses.use("prepare", "", job.output)
    known = assets.find(job.output)
    return speed.of(known or launch(job), spent=not known)


def _of_the_table(config: RunConfig) -> Speeds:
    from model.training import speed

    return speed.foreseen(config, config.jobs.hardware, config.jobs.devices)


def needs_of(config: RunConfig) -> dict[str, Memory]:
    """The memory that training takes on a GPU; nothing on a CPU, whose processes share the machine's."""
    if not config.jobs.gpus_per_worker:
        return {}
    from model.training.rehearsal import foresee, rehearsals

    costs = {one.name: foresee(one) for one in rehearsals(config)}
    return {name: Memory(cost.state_bytes, cost.sample_bytes) for name, cost in costs.items()}


def with_end(found: Resolved, began: float) -> Resolved:
    """A config that says until when its transformer may train, where its steps are fitted to that.

    Args:
        began: when the run did, in seconds since 1970.
    """
    section = found.config.recipe
    if section is None:
        return found
    until = began + 60 * section.minutes - section.after
    ending = section.model_copy(update={"until": round(until) if section.minutes and found.timed else 0})
    return found._replace(config=found.config.model_copy(update={"recipe": ending}))


def looked(found: Resolved) -> Resolved:
    """The same with a look at its pictures, where there was none. Raises UserError: as `resolved`."""
    return found if found.look else found._replace(look=_look(found.config))


def _look(config: RunConfig, side_given: bool = True) -> Look:
    """A look at a run's pictures, judged as the run will.

    Args:
        config: of the run.
        side_given: its `data.min_side` stands; else that follows from the pictures.

    Raises:
        UserError: more of them cannot be used than may be, with the reason of most, and what would do.
    """
    from model.data import survey

    source, data = config.data.source, config.data
    if side_given:
        found = survey.look(source, data=data)
    else:
        found = survey.look(source, data=data.model_copy(update={"min_side": recipe.SMALLEST}))
        if found.smallest < (least := recipe.least_side(found.survey.side)):
            found = survey.look(source, data=data.model_copy(update={"min_side": least}))
    seen, most = found.survey, data.max_bad_share
    # Of all pictures the share may be smaller than of some: by three standard deviations at most.
    chance = 0.0 if seen.counted else 3 * math.sqrt(most * (1 - most) / seen.looked)
    if seen.bad > most + chance:
        enough = min(1.0, round(seen.bad + 0.1, 1))
        raise UserError(
            f"data: {seen.bad:.0%} of {seen.looked} pictures that were looked at cannot be used, more than"
            f" data.max_bad_share {most:g}: {found.worst}; or name a folder of those that can be used, or"
            f" leave the others out by --set data.max_bad_share={enough:g}"
        )
    return found


def _fitted(config: RunConfig, chosen: Set[str]) -> Resolved:
    """A config that was derived before, with its steps for the dial and the hardware of now.

    Args:
        config: of the run.
        chosen: fields and sections whose values somebody says now; they stay.
    """
    assert config.recipe

    def given(field: str) -> bool:
        return any(field == one or field.startswith(f"{one}.") for one in chosen)

    values = config.model_dump(mode="json")
    if config.recipe.fitted == recipe.fitted(values):
        return Resolved(config, timed=config.recipe.until > 0 and not given(FITTED))

    def refitted() -> Resolved:
        look = _look(config)
        found = recipe.refit(values, look.survey, speeds_of(config), needs_of(config), given)
        return _of(parse_config(found.values), found)._replace(look=look)

    # What is given may be what it was, too: by the config alone nobody could tell.
    kept = [field for net in recipe.NETS for field in recipe.of_dial(net) if given(field)]
    mark = {"fitted": ", ".join([config.recipe.fitted, *kept])}
    found = _once(config.model_copy(update={"recipe": config.recipe.model_copy(update=mark)}), refitted)
    dial = found.config.recipe.fitted if found.config.recipe else ""
    return found._replace(said=(f"steps are for {dial} now",))


def _former(config: RunConfig, named: bool) -> tuple[int, RunConfig] | None:
    """The version whose sizes a registered model has, and its config: the champion's.

    Args:
        config: of the run.
        named: somebody chose the model's name.

    Raises:
        UserError: nobody did, and the model that has it is of other pictures.
    """
    name = config.registered_model
    version = registry.version_of(registry.CHAMPION, name)
    if version is None:
        return None
    try:
        former = registry.config_of(version, name)
    except Unavailable:
        raise
    except UserError as error:
        speech.warn("prepare", f"sizes are derived anew: {error}")
        return None
    if former is None or former.recipe is None or not former.recipe.version:
        return None
    if not named and _where(former) != _where(config):
        theirs = former.data.source.model_dump(exclude={"kind"}, exclude_defaults=True)
        raise UserError(
            f"{name} is the model of other pictures ({', '.join(map(str, theirs.values()))}); say"
            f" --set model_name={name}-2 for a new one, or --set model_name={name} to go on with it"
        )
    return version, former


def _where(config: RunConfig) -> dict[str, Any]:
    """The place of a run's pictures, however they are read there."""
    source = config.data.source.model_dump()
    found: dict[str, Any] = {name: source[name] for name in ("path", "urls", "repo") if name in source}
    return found or source


def _like(values: Values, former: RunConfig) -> Derived:
    """What a config says, and for the rest what a former one says."""
    whole = former.model_copy(update={"origin": {}}).model_dump(mode="json")
    return Derived(_merged(whole, values), [], [])


def _merged(under: Any, over: Any) -> Any:
    if not (isinstance(under, dict) and isinstance(over, dict)) or (
        "kind" in over and over["kind"] != under.get("kind")
    ):
        return deepcopy(over)
    return {
        **deepcopy(under),
        **{name: _merged(under.get(name), value) for name, value in over.items()},
    }


def _keep(writer: AssetWriter, found: Resolved) -> None:
    config = found.config.model_dump(mode="json")
    stored = {"config": config, "choices": found.choices, "parts": found.parts}
    writer.add_bytes("recipe.json", json.dumps(stored).encode())
    writer.finish({})


def _kept(made: assets.Manifest) -> Resolved:
    from model.plumbing import cache

    stored = json.loads(cache.path(made, "recipe.json").read_text())
    choices = tuple(Choice(*choice) for choice in stored["choices"])
    parts = tuple(Part(*part) for part in stored["parts"])
    return Resolved(parse_config(stored["config"]), None, choices, parts, timed=_timed(choices))
