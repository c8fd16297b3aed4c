"""Sizes and steps of a run, derived from its pictures, its hardware and one dial.

A config that has a section `recipe` need not say the rest: whatever it leaves out is derived here, by rules
that stand in the order in which they are applied, each with its reason. What it does say is kept, and the
rules that follow go by it. So every value can be set, and `latent-gpt plan` shows where each comes from.

The budget of a run is its minutes times what its hardware computes. Sizes come from the budget by the table's
speed of that hardware; steps fill the minutes, by speeds that are measured (`training/speed.py`) or foreseen.

Where the numbers come from is said beside them: the presets that they were tuned for, or docs/EXPERIMENTS.md.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from model.errors import UserError

VERSION = 1  # of these rules
Values = dict[str, Any]  # of a config, as YAML has them

# Dense peak of a device in FLOP/s (vendors' data sheets; for the CPU what two server cores reached) and its
# memory in bytes, by a word of its name.
HARDWARE = {
    "cpu": {"bf16": 0.4e12, "fp32": 0.18e12, "memory": 6 * 2**30},
    "l4": {"bf16": 121e12, "fp32": 30e12, "memory": 24 * 2**30},
    "a100": {"bf16": 312e12, "fp32": 19.5e12, "memory": 80 * 2**30},
    "h100": {"bf16": 989e12, "fp32": 67e12, "memory": 80 * 2**30},
    "h200": {"bf16": 989e12, "fp32": 67e12, "memory": 141 * 2**30},
}
UTILISATION = 0.4  # share of the peak that training is expected to reach, until `benchmarks/` has measured it


@dataclass(frozen=True)
class Survey:
    """What a look at a source found: the numbers that the rules read."""

    pictures: int  # usable, as estimated
    counted: bool  # whether that is exact
    looked: int  # pictures that were opened
    bad: float  # share of those that cannot be used
    side: float  # median shorter side, pixels
    lossy: float  # share of JPEG and lossy WEBP
    captions: int  # distinct ones, as estimated for all pictures
    length: float  # mean number of words in a caption
    seconds: float  # that one core takes to decode a picture and resize it


# What stands in for a survey until there is one, where only the form of a config is looked at.
UNSEEN = Survey(1000, False, 0, 0.0, 256.0, 0.0, 1000, 3.0, 0.005)


@dataclass(frozen=True)
class Speeds:
    """How long the parts of a run take on some hardware, in seconds."""

    start: float  # of a process: until it has imported what it needs
    step: Mapping[str, float]  # an optimiser step, by net
    encode: float  # a picture to its codes, all processes together
    draw: float  # a picture, under guidance, on one process
    spent: float = 0.0  # on finding this out, of the minutes that are asked for


class Memory(NamedTuple):
    """Bytes of a device that the training of a net takes."""

    state: float  # weights, gradients, moments, average
    sample: float  # what backward keeps of one


class Choice(NamedTuple):
    """A value of the config and where it comes from."""

    field: str
    value: Any
    reason: str
    given: bool  # by whoever wrote the config


class Part(NamedTuple):
    """What a part of a run takes."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Derived:
    """A whole config, and how it came about."""

    values: Values
    choices: list[Choice]
    parts: list[Part]  # of the run's time; empty where no speeds were given

    @property
    def minutes(self) -> float:
        """That the run will take."""
        return sum(part.seconds for part in self.parts) / 60


EVALUATION, SWEEP, END = "evaluation", "sweep", "end"  # parts that come after the training


def after_training(parts: Iterable[Part]) -> float:
    """Seconds from the end of the transformer's training to that of the run."""
    return sum(part.seconds for part in parts if part.name in (EVALUATION, SWEEP, END))


def is_underived(values: Any) -> bool:
    """Whether a config's values leave it to these rules to say the rest."""
    recipe = values.get("recipe") if isinstance(values, dict) else None
    return isinstance(recipe, dict) and not recipe.get("version")


Needs = Mapping[str, Memory]  # of nets


def derive(
    values: Values, survey: Survey = UNSEEN, speeds: Speeds | None = None, needs: Needs | None = None
) -> Derived:
    """The whole config of one that has a `recipe`.

    Args:
        values: as the YAML and overrides say; not changed.
        survey: of the source.
        speeds: on the hardware that `jobs` asks for; None leaves the steps open.
        needs: of the nets, by which batches are taken in parts where a device has no room for them.

    Raises:
        UserError: the minutes that are asked for are too few, with how many would do.
    """
    return _in_time(values, partial(_derived, survey=survey, speeds=speeds, needs=needs or {}))


def _derived(values: Values, survey: Survey, speeds: Speeds | None, needs: Needs) -> Derived:
    book = _Book(deepcopy(values))
    book.pick("name", _named_after(book.get("data.source")), "after the pictures")
    gpus = _number(book.get("jobs.gpus_per_worker", 0)) if book.get("jobs.gpus_per_worker") else 0
    book.pick("jobs.processes_per_worker", gpus or 2, "one for each GPU" if gpus else "for two cores")
    hardware = _hardware(book)
    minutes = _minutes(book, survey)
    budget = minutes * 60 * TRAINING_SHARE * hardware.speed
    _data(book, survey, hardware, budget)
    _tokenizer(book, survey, hardware)
    _clip(book, survey, hardware)
    _transformer(book, survey, hardware, minutes, budget)
    for net in NETS:
        _batch(book, net, hardware, needs)
    _after(book, survey, minutes, speeds)
    trial = deepcopy(book)  # how many views pay follows from the steps, which have what time these leave
    _steps(trial, survey, hardware, minutes, speeds)
    _views(book, trial, survey)
    parts = _steps(book, survey, hardware, minutes, speeds)
    if _turned(book) and all(one.given for one in book.choices if one.field.endswith(".training.steps")):
        raise UserError(
            "recipe: this config says the steps of each net itself, so minutes and effort change nothing;"
            " they are for preset auto, with --data"
        )
    _of_epochs(book, survey)
    book.values["recipe"] |= {
        "version": 0 if survey is UNSEEN else VERSION,
        "fitted": fitted(book.values),
        "after": round(after_training(parts)),
    }
    return Derived(book.values, book.choices, parts)


def refit(
    values: Values,
    survey: Survey,
    speeds: Speeds,
    needs: Needs,
    given: Callable[[str], bool] = lambda field: False,
) -> Derived:
    """A config that was derived before, with steps and batches for other minutes or other hardware.

    Sizes stay, so that weights and codes stay valid.

    Args:
        values: of the config; not changed.
        survey: of the source.
        speeds: on the hardware that `jobs` asks for.
        needs: of the nets, as `derive` takes them.
        given: whether somebody says the value of a dotted field now; it stays.

    Raises:
        UserError: as `derive`.
    """
    kept = deepcopy(values)
    for name in NETS:
        if isinstance(part := kept.get(name), dict) and "training" in part:
            for field in of_dial(name):
                if not given(field):
                    part["training"].pop(field.rpartition(".")[2], None)
    return _in_time(kept, partial(_refitted, survey=survey, speeds=speeds, needs=needs))


def _refitted(values: Values, survey: Survey, speeds: Speeds, needs: Needs) -> Derived:
    book = _Book(deepcopy(values))
    hardware = _hardware(book)
    minutes = _minutes(book, survey)
    for name in NETS:
        _batch(book, name, hardware, needs)
    parts = _steps(book, survey, hardware, minutes, speeds)
    after = round(after_training(parts))
    book.values["recipe"] |= {"version": VERSION, "fitted": fitted(book.values), "after": after}
    ours = [one for one in book.choices if not one.given or one.field.endswith(OF_DIAL)]
    return Derived(book.values, ours, parts)


class _TooShort(UserError):
    """The minutes that are asked for are too few."""


def _in_time(values: Values, derived: Callable[[Values], Derived]) -> Derived:
    """What a function makes of a config's values, or how many minutes would do."""
    try:
        return derived(values)
    except _TooShort as error:
        minutes = float(values["recipe"]["minutes"])
        while True:
            minutes = math.ceil(minutes * 1.1)
            try:
                derived(values | {"recipe": values["recipe"] | {"minutes": minutes}})
            except _TooShort:
                continue
            break
        # Nets of more minutes are larger, and their steps longer than those that were timed.
        raise UserError(f"{error}; {math.ceil(minutes * 1.2)} would do") from None


def of_dial(net: str) -> list[str]:
    """The fields of a net's training that follow from the dial and the hardware."""
    return [f"{net}.training.{name}" for name in OF_DIAL]


def fitted(values: Values) -> str:
    """What the steps of a config are for: its dial, and its hardware."""
    effort, minutes = _dial(values["recipe"])
    hardware = _hardware(_Book(deepcopy(values)))
    asked = f"{minutes:g} minutes" if minutes else f"effort {effort:g}"
    return f"{asked} on {hardware.devices} x {hardware.kind}"


def described(hardware: str, devices: int) -> str:
    """Hardware for people."""
    return f"{devices} processes on one CPU" if hardware == "cpu" else f"{devices} x {hardware.upper()}"


# ── the book of choices ─────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Book:
    """Values so far, and who said them."""

    values: Values
    choices: list[Choice] = field(default_factory=list)

    def get(self, path: str, default: Any = None) -> Any:
        """The value of a dotted field."""
        node: Any = self.values
        for name in path.split("."):
            if not isinstance(node, dict) or name not in node:
                return default
            node = node[name]
        return node

    def pick(self, path: str, value: Any, reason: str) -> Any:
        """The value of a field: what is given, or this one."""
        *parents, leaf = path.split(".")
        node = self.values
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"{'.'.join(parents)}: {parent} is a value, not a section")
        given = leaf in node
        found = node.setdefault(leaf, value)
        self.choices.append(Choice(path, found, "as you say" if given else reason, given))
        return found

    def is_null(self, path: str) -> bool:
        """Whether a section is there to say that there is none."""
        return path in self.values and self.values[path] is None

    def kind(self, path: str, default: str) -> str:
        """The kind of a section that has several."""
        return str(self.get(f"{path}.kind", default))


MOST_WORKERS = 1024  # that a config may ask for


class _Hardware(NamedTuple):
    kind: str
    devices: int  # processes, one for each GPU
    fewest: int  # of them, with which a job goes on
    unit: int  # what each number of them divides, from the fewest to all
    speed: float  # FLOP/s that training is expected to reach, of all devices together

    @property
    def gpu(self) -> bool:
        return self.kind != "cpu"


def _hardware(book: _Book) -> _Hardware:
    gpus = book.get("jobs.gpus_per_worker", 0)
    workers, processes = (
        max(1, int(_number(book.get(f"jobs.{name}", usual))))  # what is none is named by whoever validates
        for name, usual in (("workers", 1), ("processes_per_worker", gpus or 1))
    )
    least = int(_number(book.get("jobs.min_workers", 0))) or workers
    going = range(least, workers + 1) if 0 < least <= workers <= MOST_WORKERS else (workers,)
    kind = book.get("jobs.gpu", "a100") if gpus else "cpu"
    if not isinstance(kind, str) or kind not in HARDWARE:
        raise UserError(f"jobs.gpu '{kind}' is unknown; choose one of {', '.join(HARDWARE)}")
    devices = workers * processes
    times = devices if gpus else workers * _cores(book) / 2
    speed = HARDWARE[kind]["bf16"] * UTILISATION * times
    return _Hardware(kind, devices, going[0] * processes, math.lcm(*going) * processes, speed)


def _cores(book: _Book) -> float:
    """Cores of each worker: those that somebody asks for, or two."""
    said = str(book.get("jobs.cpu_limit") or book.get("jobs.cpu") or 2)
    return amount(said) or 2.0  # whoever validates the config names what is none


UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    f"{letter}i": 1024.0**power for power, letter in enumerate("KMGT", 1)
}


def amount(quantity: str) -> float:
    """What a quantity of Kubernetes says, such as 500m or 16Gi; 0 where it is none."""
    said = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-zA-Z]*)", quantity)
    return float(said[1]) * UNITS.get(said[2], 0.0) if said else 0.0


GENERIC = {
    "data",
    "dataset",
    "images",
    "img",
    "imgs",
    "pictures",
    "pics",
    "train",
    "training",
    "tars",
    "parquet",
}


def _named_after(source: Any) -> str:
    """What pictures are called by where they are: by the last part that says more than that it is data, and
    is nobody's home."""
    if not isinstance(source, dict):
        return "unnamed"
    where = next((source[name] for name in ("path", "urls", "repo") if isinstance(source.get(name), str)), "")
    parts = [
        re.sub(r"\{.*|\*.*|(\.(zip|tar|tgz|gz|bz2|xz|parquet))+$", "", part) for part in where.split("/")
    ]
    names = [_slug(part) for part in parts if part[-1:] != ":"]
    home = 2 if names[1:2] in (["home"], ["users"]) else 1 if names[1:2] == ["root"] else 0
    there = [name for name in names[1 + home if home else 0 :] if name]
    said = [name for name in there if name not in GENERIC] or there
    return said[-1][:60] if said else str(source.get("kind", "unnamed"))


def _slug(part: str) -> str:
    """Part of a path as a name may have it: of letters in other scripts alone, their hash."""
    name = re.sub("[^a-z0-9._-]+", "-", part.lower()).strip("-._")
    if re.search("[a-z]", name) or not any(map(str.isalpha, part)):
        return name
    mark = hashlib.sha256(unicodedata.normalize("NFC", part).encode(errors="surrogatepass")).hexdigest()[:6]
    return f"{name or 'pictures'}-{mark}"


# ── the rules ───────────────────────────────────────────────────────────────────────────────────────────

TRAINING_SHARE = 0.7  # of a run's minutes, for the choice of sizes

# Effort 1: five minutes for 60 pictures, an hour for 30,000.
EFFORT = "recipe.effort"
MINUTES, MINUTES_FOR, GROWTH = 5.0, 60, 0.4
LONGEST = 1e6  # minutes, beyond all that a config may ask for


def _dial(recipe: Values) -> tuple[float, float]:
    """Effort and minutes; 0 of these where effort decides."""
    said = []
    for name, usual in (("effort", 1.0), ("minutes", 0.0)):
        try:
            value = float(recipe.get(name, usual))
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        said.append(value if 0 < value < LONGEST else usual)  # whoever validates the config names it
    return said[0], said[1]


def _minutes(book: _Book, survey: Survey) -> float:
    recipe = book.values["recipe"]
    recipe.setdefault("effort", 1.0)
    recipe.setdefault("minutes", 0.0)
    effort, minutes = _dial(recipe)
    if minutes:
        book.choices.append(Choice("recipe.minutes", minutes, "as you say", True))
        return minutes
    usual = MINUTES * (max(survey.pictures, MINUTES_FOR) / MINUTES_FOR) ** GROWTH
    minutes = max(0.1, round(effort * usual, 1))
    reason = (
        f"{minutes:g} minutes for {survey.pictures:,} pictures: {MINUTES:g} for {MINUTES_FOR},"
        f" {2**GROWTH:.1f} times as long for twice as many"
    )
    book.choices.append(Choice(EFFORT, effort, reason, effort != 1))
    return minutes


# Sides of pictures by the budget of a run in FLOP, and what a tokenizer of that side looks like. The first is
# that of openmoji-tiny and shapes-tiny, those for GPUs that of openmoji and of coco256-xl; 64 px on a CPU and
# 128 px are between them and not tuned.
SIDES = ((0.0, 32), (1.2e15, 64), (1e18, 128), (1e19, 256))
_FLAT = {"pixel": "l2"}
TOKENIZERS: dict[tuple[int, bool], Values] = {  # (side, whether GPUs train it)
    (32, False): {"factor": 4, "stem": 2, "width": 32, "multipliers": [1, 2], "blocks": 1, "loss": _FLAT},
    (32, True): {"factor": 4, "stem": 2, "width": 64, "multipliers": [1, 2], "blocks": 2, "loss": _FLAT},
    (64, False): {"factor": 8, "stem": 2, "width": 32, "multipliers": [1, 2, 4], "blocks": 1, "loss": _FLAT},
    (64, True): {"factor": 8, "stem": 2, "width": 128, "multipliers": [1, 2, 4], "blocks": 2, "loss": {}},
    (128, True): {"factor": 8, "stem": 2, "width": 128, "multipliers": [1, 2, 4], "blocks": 2, "loss": {}},
    (256, True): {
        "factor": 16,
        "stem": 1,
        "width": 128,
        "multipliers": [1, 1, 2, 2, 4],
        "blocks": 2,
        "loss": {"pixel": "l2", "perceptual": 1.0, "adversarial": 0.5, "adversarial_from": 0.25},
    },
}
LARGEST_CODEBOOK = {32: 256, 64: 1024, 128: 4096, 256: 16384}
HELD_OUT = 12  # pictures at least, where there are enough
SMALLEST = 4  # pixels of a side: less is no picture


def least_side(median: float) -> int:
    """The side from which pictures are taken, pixels, where their shorter sides have this median."""
    return min(16, max(SMALLEST, int(median) // 2))


def _data(book: _Book, survey: Survey, hardware: _Hardware, budget: float) -> None:
    affordable = max(side for least, side in SIDES if budget >= least)
    there = next((side for _, side in reversed(SIDES) if side <= 1.25 * survey.side), SIDES[0][1])
    side = min(affordable, there, 64 if not hardware.gpu else 256)
    reason = (
        f"the pictures' shorter side has {survey.side:.0f} px in the median"
        if there < affordable
        else f"what {budget:.1g} FLOP are enough for"
    )
    book.pick("data.image_size", side, reason)
    drawn = survey.lossy < 0.5
    book.pick(
        "data.fit",
        "pad" if drawn else "crop",
        "mostly drawings (few JPEG or lossy WEBP): nothing is cut off"
        if drawn
        else "mostly photographs (JPEG or lossy WEBP): no borders",
    )
    book.pick("data.min_side", least_side(survey.side), "what is much smaller is left out")
    share = min(
        0.2, max(0.05 if survey.pictures < 20_000 else 1000 / survey.pictures, HELD_OUT / survey.pictures)
    )
    share = max(0.01, round(share, 3))
    book.pick(
        "data.validation_share",
        share,
        f"some {share * survey.pictures:.0f} pictures are held out, to measure on",
    )


def _tokenizer(book: _Book, survey: Survey, hardware: _Hardware) -> None:
    if book.kind("tokenizer", "vqvae") != "vqvae":
        return
    side = book.get("data.image_size")
    near = min(
        (known for known in TOKENIZERS if known[1] == hardware.gpu),
        key=lambda known: abs(known[0] - _number(side)),
    )
    shape = TOKENIZERS[near]
    book.pick("tokenizer.kind", "vqvae", "trained on these pictures")
    tuned = f"tuned for {near[0]} px {'on GPUs' if near[1] else 'on a CPU'}"
    for name, value in _levels(book, shape).items():
        why = tuned if value == shape[name] else f"nearest to what is {tuned}, with what you say"
        book.pick(f"tokenizer.{name}", value, why)
    for name in ("width", "blocks"):
        book.pick(f"tokenizer.{name}", shape[name], tuned)
    for name, value in shape["loss"].items():
        book.pick(f"tokenizer.loss.{name}", value, f"tuned for {near[0]} px")
    grid = _grid(book)
    codes = survey.pictures * grid
    size = min(LARGEST_CODEBOOK[near[0]], max(128, 2 ** round(math.log2(2 * math.sqrt(codes)))))
    if book.get("tokenizer.quantizer", "vq") == "vq":
        book.pick("tokenizer.codebook_size", size, f"about twice the root of {codes:,} codes of all pictures")
    training = "tokenizer.training"
    large = near[0] == 256
    rate = 1e-4 if large else 1e-3 if hardware.gpu else 6e-3
    book.pick(f"{training}.learning_rate", rate, tuned)
    book.pick(f"{training}.final_lr_share", 0.1 if large else 0.02, tuned)
    book.pick(f"{training}.precision", "bf16", "half the time on GPU and CPU")
    book.pick(f"{training}.compile", hardware.gpu, "pays on a GPU")


def _levels(book: _Book, shape: Values) -> Values:
    """Factor, stem and multipliers of a tokenizer: nearest to those of a shape that go with what is given."""
    side, given = _number(book.get("data.image_size")), book.get("tokenizer.multipliers")
    fitting = [
        (factor, stem)
        for factor in (4, 8, 16)
        for stem in (1, 2, 4)
        if book.get("tokenizer.factor", factor) == factor
        and book.get("tokenizer.stem", stem) == stem
        and (not isinstance(given, list) or factor == stem * 2 ** (len(given) - 1))
    ]
    usual = shape["factor"], shape["stem"]  # where nothing fits: whoever validates the config names it

    def distance(one: tuple[int, int]) -> tuple[float, ...]:
        away = (abs(math.log2(ours / theirs)) for ours, theirs in zip(one, usual, strict=True))
        return side % one[0] > 0, *away

    factor, stem = min(fitting or [usual], key=distance)
    levels = (factor // stem).bit_length()
    widths = shape["multipliers"]
    return {"factor": factor, "stem": stem, "multipliers": (widths + widths[-1:] * levels)[:levels]}


CLIPS: dict[bool, Values] = {  # whether GPUs train it
    False: {
        "embed_dim": 96,
        "text_width": 96,
        "text_layers": 2,
        "text_heads": 4,
        "vision_width": 96,
        "vision_layers": 2,
    },
    True: {
        "embed_dim": 256,
        "text_width": 256,
        "text_layers": 6,
        "text_heads": 8,
        "vision_width": 256,
        "vision_layers": 6,
    },
}


def _clip(book: _Book, survey: Survey, hardware: _Hardware) -> None:
    if book.kind("clip", "trained") != "trained":
        return
    book.pick(
        "clip.kind", "trained", "on these pictures and captions; no weights have to be had from elsewhere"
    )
    for name, value in CLIPS[hardware.gpu].items():
        book.pick(f"clip.{name}", value, f"tuned for {'a GPU' if hardware.gpu else 'a CPU'}")
    length = min(77, max(24, 8 * math.ceil((2 * survey.length + 8) / 8)))
    book.pick("clip.context_length", length, f"captions have {survey.length:.1f} words on average")
    side = _number(book.get("data.image_size"))
    patch = next((patch for patch in (16 if side >= 128 else 8, 8, 4, 2, 1) if side % patch == 0), 1)
    book.pick("clip.patch_size", patch, f"for pictures of {side} px")
    book.pick("clip.training.learning_rate", 5e-4 if hardware.gpu else 1e-3, "tuned for this size")
    book.pick("clip.training.precision", "bf16" if hardware.gpu else "fp32", "tuned for this size")


# Depth, width, heads of transformers; most are those of presets.
TRANSFORMERS = (
    *((3, 128, 4), (4, 128, 4), (5, 160, 5), (6, 192, 6), (6, 256, 8), (8, 384, 6), (12, 512, 8)),
    *((9, 768, 12), (12, 768, 12), (19, 1024, 16), (29, 1280, 20)),
)
PER_BLOCK = 16  # weights of a block, in squares of the width: 4 self-, 4 cross-attention, 8 of the MLP
TOKENS_PER_WEIGHT = 12  # openmoji-tiny sees 3, shapes-tiny 16; Hoffmann et al. 2022, arXiv:2203.15556, say 20
WEIGHTS_PER_CODE = 200  # at most; openmoji has 140 for each code of its pictures, openmoji-tiny 42
SMALL = 256  # width up to which Muon was compared
RANDOM_ORDER = 0.9  # of the transformer's steps; measured at 32 px and a width of 128
COMPILED = (
    12  # minutes of a run on a CPU, from which a third less of the transformer's time is worth a minute
)


def _heads(width: float) -> tuple[int, str]:
    """Heads of a transformer of some width, and why."""
    if known := next((heads for _, known, heads in TRANSFORMERS if known == width), 0):
        return known, "channels of a head: 32 to 64"
    fitting = [heads for heads in range(1, 257) if width % (4 * heads) == 0]  # as rope2d wants it
    nearest = min(fitting or [1], key=lambda heads: abs(heads - width / 32))
    return nearest, "channels of a head: as near to 32 as the width allows"


def _transformer(book: _Book, survey: Survey, hardware: _Hardware, minutes: float, budget: float) -> None:
    if book.is_null("transformer"):
        return
    affordable = math.sqrt(budget * SHARES["transformer"] / (6 * TOKENS_PER_WEIGHT))
    useful = WEIGHTS_PER_CODE * survey.pictures * _grid(book)
    weights = min(affordable, useful)
    depth, width, _ = min(
        TRANSFORMERS, key=lambda one: abs(math.log(PER_BLOCK * one[0] * one[1] ** 2 / weights))
    )
    reason = f"some {quantity(weights)} weights: " + (
        f"{TOKENS_PER_WEIGHT} tokens are seen for each"
        if affordable < useful
        else f"{WEIGHTS_PER_CODE} for each code of all pictures"
    )
    book.pick("transformer.depth", depth, reason)
    width = _number(book.pick("transformer.width", width, reason))
    heads, why = _heads(width)
    book.pick("transformer.heads", heads, why)
    small = width <= SMALL
    book.pick(
        "transformer.optimizer",
        "muon" if small else "adamw",
        "half the steps of AdamW at this size" if small else "as Muon was not compared at this size",
    )
    if book.get("transformer.positions", "rope2d") == "rope2d":
        book.pick(
            "transformer.random_order",
            RANDOM_ORDER,
            "pictures follow their captions better, also those that training never saw",
        )
    training = "transformer.training"
    muon = book.get("transformer.optimizer") == "muon"
    book.pick(
        f"{training}.learning_rate",
        1e-2 if muon else (3e-3 if small else float(f"{0.3 / width:.1g}")),
        "tuned for this size",
    )
    book.pick(f"{training}.final_lr_share", 0.02 if muon else 0.1, "tuned for this size")
    book.pick(f"{training}.weight_decay", 0.01 if muon else 0.05, "tuned for this size")
    book.pick(f"{training}.precision", "bf16", "half the time on GPU and CPU")
    pays = hardware.gpu or minutes >= COMPILED
    book.pick(f"{training}.compile", pays, f"pays on a GPU, and on a CPU from {COMPILED} minutes")


FILLED = 0.8  # share of a device's memory that is planned with
BATCHES = {"tokenizer": (16, 128), "clip": (64, 512), "transformer": (64, 256)}  # on a CPU, on GPUs


def _batch(book: _Book, net: str, hardware: _Hardware, needs: Needs) -> None:
    """The batch of a net, and in how many parts each device takes its share."""
    if book.is_null(net) or book.get(f"{net}.kind") == "pretrained":
        return
    training = f"{net}.training"
    usual = BATCHES[net][hardware.gpu]
    parts, room = 1, FILLED * HARDWARE[hardware.kind]["memory"]
    if hardware.gpu and (need := needs.get("text" if net == "clip" else net)):
        share = max(usual, hardware.unit) / hardware.fewest
        while parts < usual / hardware.unit and need.state + need.sample * share / parts > room:
            parts *= 2
    if net == "clip":  # captions are told apart within the whole batch
        usual, parts = max(usual // parts, 1), 1
    parts = _number(book.pick(f"{training}.accumulate", parts, f"what fits into {room / 2**30:.0f} GiB"))
    unit = hardware.unit * max(1, parts)
    size = max(usual, unit) // unit * unit
    tuned = f"tuned {'on GPUs' if hardware.gpu else 'on a CPU'}, a multiple of {unit}"
    book.pick(f"{training}.batch_size", size, tuned)


PICTURES = (512, 256, 128, 64)  # of each split that are measured on
EVALUATION_SHARE, SWEEP_SHARE = 0.1, 0.06  # of the minutes, at most
SWEPT = {"cfg_scale": [1.0, 1.5, 2.0, 3.0], "temperature": [0.7, 0.85, 1.0]}
PROMPTS = 128
RECALLED = 1000  # pictures up to which samples of captions seen are copies, more or less
FEW = 5000  # pictures up to which models recall more than they imagine


def _after(book: _Book, survey: Survey, minutes: float, speeds: Speeds | None) -> None:
    """What samples are drawn by, what is measured, by what margin a model is better."""
    few = survey.pictures < FEW
    book.pick("sampling.temperature", 0.7 if few else 1.0, f"measured on {'few' if few else 'many'} pictures")
    book.pick("sampling.cfg_scale", 1.5 if few else 2.0, f"measured on {'few' if few else 'many'} pictures")
    if book.is_null("transformer"):
        return
    each = speeds.draw if speeds else 0.05
    room = minutes * 60
    pictures = next((n for n in PICTURES if 2.5 * n * each <= EVALUATION_SHARE * room), PICTURES[-1])
    book.pick(
        "evaluation.pictures", pictures, f"drawing them takes less than {EVALUATION_SHARE:.0%} of the time"
    )
    cost = each * PROMPTS * (len(SWEPT["cfg_scale"]) + len(SWEPT["temperature"]))
    if speeds and cost <= SWEEP_SHARE * room and "sweep" not in book.values:
        for name, tried in SWEPT.items():
            book.pick(
                f"sweep.{name}", tried, "there is time to try them on captions that nothing is measured on"
            )
        book.pick("sweep.prompts", PROMPTS, "as many as a choice needs")
    held_out, seen = _measured(book, survey)
    prompts = held_out if held_out >= 200 else held_out + seen
    margin = round(min(0.3, max(0.03, 1.35 / math.sqrt(max(prompts, 1)))), 2)
    if survey.pictures < RECALLED:
        for split, share in (("seen", 1.0), ("held_out", 0.6)):
            book.pick(
                f"gate.max_near_duplicates.{split}", share, "so few are recalled, which the report shows"
            )
    book.pick("gate.margin", margin, f"what some {prompts:.0f} prompts can tell apart")


# ── steps ───────────────────────────────────────────────────────────────────────────────────────────────

SHARES = {"tokenizer": 0.36, "text": 0.05, "judge": 0.05, "transformer": 0.54}  # of what is left for training
MOST_STEPS = {"tokenizer": (6000, 200_000), "clip": (1000, 20_000)}  # on a CPU, on GPUs
LEAST_SHARE = 0.25  # of the minutes that are asked for, to train in
BEYOND = 1.2  # times the minutes that are asked for, that a run may take
LEAST_STEPS = {"tokenizer": 300, "clip": 150, "transformer": 100}
NOMINAL = {"tokenizer": 3500, "clip": 200, "transformer": 1000}  # where nobody knows how fast anything is
CADENCE = ("log_every", "eval_every", "checkpoint_every", "ema")
OF_DIAL = ("steps", "warmup_steps", "batch_size", "accumulate", *CADENCE)  # of each training
NETS = ("tokenizer", "clip", "transformer")  # sections that have one
EMA = ((6000, 0.999), (1000, 0.99), (0, 0.98))  # decay of the average by steps
# What a run takes beside training, in starts of a process of ours (two seconds on the machine where it was
# found out; see `Speeds.start`): so a slow machine's is longer.
OF_START, OF_PICTURES, OF_JOB, OF_EVALUATION, OF_END = 8.0, 2.5, 5.0, 6.0, 11.0
# A step in its loop, with data, log and validation, by one without; docs/EXPERIMENTS.md.
LOOP = {"tokenizer": 1.33, "clip": 1.29, "transformer": 1.15}


def _steps(
    book: _Book, survey: Survey, hardware: _Hardware, minutes: float, speeds: Speeds | None
) -> list[Part]:
    """Steps that fill the minutes, and what each part of the run takes."""
    trained = _nets(book)
    if book.kind("clip", "trained") == "trained" and book.is_null("transformer"):
        _training(book, "clip", NOMINAL["clip"], "none is trained without a transformer")
    if speeds is None:
        for net in dict.fromkeys(map(_section, trained)):
            _training(book, net, NOMINAL[net], "until the source is looked at")
        return []
    parts = _overhead(book, survey, speeds, hardware, trained)
    overhead, (effort, asked) = sum(part.seconds for part in parts), _dial(book.values["recipe"])
    left = minutes * 60 - overhead
    if left < LEAST_SHARE * minutes * 60:
        other = f"what is no training takes {overhead / 60:.1f}"
        if asked:
            raise _TooShort(f"recipe.minutes: {minutes:g} minutes are too few: {other}")
        left = max(left, effort * overhead * LEAST_SHARE / (1 - LEAST_SHARE))
        longer = f"; raised to {(overhead + left) / 60:.1f}: {other}"
        book.choices = [
            one._replace(reason=one.reason + longer) if one.field == EFFORT else one for one in book.choices
        ]
    taken: dict[str, float] = {}
    for name in trained:  # in order of the pipeline: what one leaves, those after it have
        net = _section(name)
        each = speeds.step[name] * LOOP[net]
        rest = left - sum(taken.values())
        own = rest * SHARES[name] / sum(SHARES[other] for other in trained if other not in taken)
        if (given := book.get(f"{net}.training.steps")) is not None and name != "judge":
            steps, why = _number(given), ""
        elif name == "judge" and "text" in taken:
            steps, why = _number(book.get("clip.training.steps")), ""
        else:
            steps, at = int(own / each), f"at {each * 1000:.0f} ms a step"
            why = f"{own / left:.0%} of {left / 60:.1f} minutes, {at}"
            if steps < LEAST_STEPS[net]:
                steps, why = LEAST_STEPS[net], f"no fewer make sense, {at}"
            if net in MOST_STEPS and steps > (most := MOST_STEPS[net][hardware.gpu]):
                steps, why = most, "more bring little at this size"
            steps = _round(steps)
        if name != "judge" or "text" not in taken:
            _training(book, net, steps, why)
        taken[name] = steps * each
    whole = overhead + sum(taken.values())
    if whole > 60 * minutes * BEYOND and asked:
        raise _TooShort(
            f"recipe.minutes: {minutes:g} minutes are too few: the fewest steps that make sense, or those"
            f" that are given, take {whole / 60:.1f} with all else"
        )
    return [*parts, *(Part(f"{name}'s steps", seconds) for name, seconds in taken.items())]


def _nets(book: _Book) -> list[str]:
    """The nets that a run trains, in its order."""
    transformer = not book.is_null("transformer")
    own_clip = transformer and book.kind("clip", "trained") == "trained"
    return [
        *(["tokenizer"] if book.kind("tokenizer", "vqvae") == "vqvae" else []),
        *(["text", "judge"] if own_clip else []),
        *(["transformer"] if transformer else []),
    ]


def _section(net: str) -> str:
    return "clip" if net in ("text", "judge") else net


def _training(book: _Book, net: str, steps: int, why: str) -> None:
    """Steps of a training, and what goes with them."""
    path = f"{net}.training"
    steps = _number(book.pick(f"{path}.steps", steps, why))
    if steps <= 0:
        steps = 1  # whoever validates the config names it
    warmup = max(1, min(max(200, steps // 50), steps // 15))
    book.pick(f"{path}.warmup_steps", warmup, "200, or a fiftieth of many steps, or a fifteenth of few")
    evaluations = max(1, math.ceil(steps / (3 if steps < 3000 else 4)))
    book.pick(f"{path}.log_every", max(1, min(50, steps // 40)), "some forty lines")
    book.pick(f"{path}.eval_every", evaluations, "three or four times")
    book.pick(f"{path}.checkpoint_every", evaluations, "as often as it is looked at")
    if net != "clip":
        decay = next(decay for least, decay in EMA if steps >= least)
        book.pick(f"{path}.ema", decay, f"for {steps} steps")


def _overhead(
    book: _Book, survey: Survey, speeds: Speeds, hardware: _Hardware, trained: list[str]
) -> list[Part]:
    """What a run takes beside training."""
    cores = 8 if hardware.gpu else _cores(book)
    transformer = not book.is_null("transformer")
    parts = [
        Part("start", OF_START * speeds.start + speeds.spent),
        Part("pictures", OF_PICTURES * speeds.start + survey.seconds * survey.pictures / cores),
        Part("start of trainings", len(trained) * OF_JOB * speeds.start),
        Part(END, OF_END * speeds.start),
    ]
    if not transformer:
        return parts
    views = _number(book.get("data.augment.views", 2))
    parts.append(Part("tokens", OF_JOB * speeds.start + views * survey.pictures * speeds.encode))
    held_out, seen = _measured(book, survey)
    drawn = (
        seen
        + held_out
        + 16
        + (12 + min(12, held_out)) * _number(book.get("evaluation.samples_per_prompt", 4))
    )
    parts.append(Part(EVALUATION, OF_EVALUATION * speeds.start + drawn * speeds.draw))
    if settings := sum(len(book.get(f"sweep.{name}", [])) for name in SWEPT):
        parts.append(
            Part(
                SWEEP,
                OF_JOB * speeds.start + settings * _number(book.get("sweep.prompts", PROMPTS)) * speeds.draw,
            )
        )
    return parts


EPOCHS_OF_A_VIEW, MOST_VIEWS = 7, 16  # docs/EXPERIMENTS.md, "Views per picture in long trainings"


def _epochs(book: _Book, survey: Survey) -> float:
    """How often the transformer sees a picture."""
    steps, batch = (_number(book.get(f"transformer.training.{name}", 1)) for name in ("steps", "batch_size"))
    return float(steps * batch / max(1, survey.pictures))


def _views(book: _Book, trial: _Book, survey: Survey) -> None:
    """How many views of each picture there are.

    Args:
        book: gets the choice.
        trial: the same with steps, as they would be with two.
        survey: of the source.
    """
    if book.is_null("transformer"):
        return
    epochs = _epochs(trial, survey)
    views = 2 ** round(math.log2(min(MOST_VIEWS, max(1, epochs / EPOCHS_OF_A_VIEW))))
    reason = (
        f"each picture is seen some {epochs:.0f} times; {EPOCHS_OF_A_VIEW} times each view, and no more than"
    )
    book.pick("data.augment.views", views, f"{reason} {MOST_VIEWS}")


def _of_epochs(book: _Book, survey: Survey) -> None:
    """What depends on how often a picture is seen."""
    if book.is_null("transformer"):
        return
    epochs = _epochs(book, survey)
    often = epochs > 10
    said = f"each picture is seen {epochs:.0f} times"
    book.pick("data.augment.shift", 0.04 if often else 0.0, said)
    book.pick("data.augment.scale", 0.06 if often else 0.0, said)
    book.pick("transformer.dropout", 0.0 if not often else 0.05 if epochs < 300 else 0.1, said)
    book.pick(
        "transformer.keep",
        "last" if often else "best",
        f"{said}; what is held out is too little then to choose by",
    )


def _turned(book: _Book) -> bool:
    """Whether somebody turned the dial."""
    return bool(book.get("recipe.minutes")) or book.get("recipe.effort") != 1


BEYOND_ALL = 1e18  # that a number of a config may be


def _number(value: Any) -> Any:
    """A number of the config; what is none is named when the config is validated."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_one and abs(value) < BEYOND_ALL else 1


def quantity(value: float) -> str:
    """A large number, short: 1.2M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:{'.2g' if value < 10 * unit else '.0f'}}{name}"
    return f"{value:.0f}"


def _measured(book: _Book, survey: Survey) -> tuple[float, float]:
    """Pictures that are measured on: those held out, and those seen in training."""
    most = _number(book.get("evaluation.pictures"))
    held_out = _number(book.get("data.validation_share")) * survey.pictures
    return min(most, held_out), min(most, survey.pictures - held_out)


def _grid(book: _Book) -> int:
    side, factor = _number(book.get("data.image_size")), _number(book.get("tokenizer.factor", 8))
    return max(1, int(side) // max(1, int(factor))) ** 2


def _round(steps: int) -> int:
    """To two digits, so that a config reads well."""
    unit = 10 ** max(0, len(str(steps)) - 2)
    return steps // unit * unit
