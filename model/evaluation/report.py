"""The report of an evaluation: one self-contained HTML page, and the same pictures as files beside it."""

from __future__ import annotations

import base64
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import torch
import yaml
from torch import Tensor

from model.config import RunConfig, SamplingConfig
from model.data.ingest import LONGER, SIDES
from model.evaluation import findings, gate, sheets
from model.evaluation.benchmark import FEWEST, JUDGE
from model.evaluation.census import Census
from model.evaluation.gate import Verdict
from model.evaluation.sheets import Curves, Pairs
from model.evaluation.sweep import SCORE
from model.nets import metrics
from model.plumbing.assets import File, Manifest
from model.plumbing.curves import panels
from model.plumbing.speech import quantity
from model.steps import STEPS

TILE = 96  # side of a picture on the page, pixels
SETTINGS = {"cfg_scale": "guidance scale", "temperature": "temperature"}
TEMPLATES = Path(__file__).parent / "templates"
COUNTS = {  # of pictures, as the section on the data names them
    "read": "pictures found",
    "train": "to train on",
    "validation": "held out",
    "composition": "combinations held out",
    "quarantined": "left out",
}
SPLIT_NAMES = {
    "train": "captions seen in training",
    "validation": "captions held out",
    "composition": "combinations held out",
}


@dataclass(frozen=True)
class Grid:
    """Prompts and their samples, one row each."""

    kind: Literal["prompts", "train", "validation", "composition", "closest"]
    prompts: list[str]
    samples: Tensor  # (R, C, 3, H, W) in [-1, 1]
    real: Tensor | None = None  # (R, 3, H', W'): the real picture of the caption, or the nearest of training
    notes: list[str] | None = None  # a word per row


@dataclass(frozen=True)
class Page:
    """Everything the report shows."""

    config: RunConfig
    images: Manifest
    model: Manifest  # names its parts
    benchmark: Manifest  # that it was measured on
    metrics: dict[str, float]
    parameters: dict[str, int]  # weights per net
    grids: list[Grid]
    reconstructions: Pairs
    unconditional: Tensor  # (N, 3, H, W)
    sampling: SamplingConfig  # that the model draws with
    histories: dict[str, Curves]  # per part of the model
    pictures: dict[str, int]  # scored, per split
    searched: tuple[int, int]  # near-duplicates: training pictures among which they were, and of how many

    @property
    def headline(self) -> list[Figure]:
        """The figures on top."""
        return headline(self.metrics, self.pictures)

    @property
    def headline_of(self) -> str:
        """Which pictures they are of, in words."""
        held = _shown_split(self.pictures)
        few = held == "train" and "validation" in self.pictures
        why = f", as only {self.pictures['validation']} pictures are held out" if few else ""
        return f"{SPLIT_NAMES[held]}{why}"


class Figure(NamedTuple):
    """One of the few figures that are named first, here and in the closing lines of a run."""

    value: str
    name: str
    note: str


@dataclass(frozen=True)
class Score:
    """A line of the table of scores; marks are places on a bar, shares of its length."""

    name: str
    split: str
    samples: str
    floor: str
    reconstructed: str
    real: str
    marks: dict[str, float]  # of the same four


def files(page: Page) -> dict[str, bytes]:
    """`report.html` and the picture files of an evaluation."""
    made = {
        f"samples-{grid.kind}.png": sheets.sheet(grid.samples, grid.prompts)
        for grid in page.grids
        if grid.kind != "closest"
    }
    made["reconstructions.png"] = sheets.sheet(torch.stack(list(page.reconstructions)), ["original", "after"])
    made["unconditional.png"] = sheets.sheet(page.unconditional.unflatten(0, (-1, 8)))
    if charts := _charts(page):
        made["curves.png"] = sheets.plot(charts, "step")
    made["report.html"] = render(page).encode()
    return made


def render(page: Page) -> str:
    """The page; it asks no server for anything."""
    environment = _environment()
    side = page.reconstructions.originals.shape[-1]
    charts = _charts(page)
    swept = page.model.info.get("sampling", {})
    return environment.get_template("report.html").render(
        page=page,
        metrics=page.metrics,
        held=_shown_split(page.pictures),
        splits=[split for split in SPLIT_NAMES if split in page.pictures],
        split_names=SPLIT_NAMES,
        scores=_scores(page.metrics),
        grids={grid.kind: grid for grid in page.grids},
        pairs=list(zip(*page.reconstructions, strict=True)),
        charts=sheets.plot(charts, "step") if charts else None,
        swept=swept,
        sweeps=_sweeps(swept),
        robustness=_robustness(page.metrics),
        judge=judge_name(page),
        judge_reads=_judge_reads(page),
        shown=TILE,
        pixelated=side < TILE and TILE % side == 0,
        lineage=_lineage(page),
        near_duplicate=metrics.NEAR_DUPLICATE,
        config=yaml.safe_dump(
            page.config.model_dump(mode="json", exclude={"jobs", "experiment_name"}),
            sort_keys=False,
            allow_unicode=True,
        ),
    )


def with_verdict(page: str, verdict: Verdict, name: str, version: int) -> str:
    """A report with the verdict on the version that it is of on top, and every figure of both models.

    Args:
        page: what `render` made, of this release or an earlier one.
        verdict: on the version.
        name: of the registered model.
        version: its number.
    """
    block = (
        _environment()
        .get_template("verdict.html")
        .render(verdict=verdict, name=name, version=version, rows=gate.shown(verdict), words=gate.words)
    )
    return page.replace("<main>", f"<main>\n{block}", 1)


LENGTHS = (1, 2, 3, 4, 5, 6, 8, 11, 16, 21, 30)  # of captions, words: counted together from one to the next


def data(census: Census, context_length: int) -> str:
    """What a set of pictures is like and what that means: a section of the report, and a page of its own.

    Args:
        census: its figures.
        context_length: tokens that the text encoder reads.
    """
    sizes = census.sizes if census.sizes.get("pictures") else {}
    return (
        _environment()
        .get_template("data.html")
        .render(
            census=census,
            findings=findings.findings(census, context_length),
            bound=metrics.NEAR_DUPLICATE,
            counts=[(COUNTS.get(name, name), number) for name, number in census.counts.items()],
            sides=_ranges(_counted(sizes, "side "), SIDES),
            shapes=_ranges(_counted(sizes, "longer "), LONGER),
            lengths=_ranges(census.captions.words, LENGTHS),
            captions=_captions(census, context_length),
        )
    )


def with_data(page: str, section: str) -> str:
    """A report with a section on its data, before the lineage.

    Args:
        page: what `render` made, of this release or an earlier one.
        section: what `data` made.
    """
    before = page.rfind("<section>", 0, max(page.rfind("<h2>Lineage</h2>"), 0))
    place = before if before >= 0 else page.rfind("</main>")
    return f"{page[:place]}{section}\n{page[place:]}" if place >= 0 else page


def _counted(sizes: Mapping[str, int], what: str) -> dict[float, int]:
    return {float(name.removeprefix(what)): n for name, n in sizes.items() if name.startswith(what)}


def _ranges(counted: Mapping[Any, int], bounds: Sequence[float]) -> list[tuple[str, int]]:
    """How many values lie from one bound to the next, from the first with any to the last."""
    whole = all(isinstance(bound, int) for bound in bounds)
    rows = []
    for low, high in zip(bounds, [*bounds[1:], None], strict=True):
        number = sum(n for value, n in counted.items() if low <= value and (high is None or value < high))
        if high is None:
            label = f"{low} or more"
        elif whole:
            label = f"{low}" if high == low + 1 else f"{low} to {high - 1}"
        else:
            label = f"{low} to {high}"
        rows.append((label, number))
    some = [place for place, (_, number) in enumerate(rows) if number]
    return rows[some[0] : some[-1] + 1] if some else []


def _captions(census: Census, context_length: int) -> list[tuple[str, int, str]]:
    said, words, share = census.captions, census.words, findings.share
    held_out = findings.held_out_of(census)
    return [
        ("captions", said.captions, f"{said.several:,} pictures have several"),
        ("different ones", said.distinct, share(said.distinct, said.captions)),
        ("pictures without a caption of their own", said.shared, share(said.shared, census.seen)),
        ("captions cut", findings.cut(census, context_length), f"beyond {context_length - 2} tokens"),
        ("different words", words.distinct, f"half of them in {words.median:g} or fewer"),
        ("words in a single picture", words.once, share(words.once, words.distinct)),
        ("pictures with such a word", words.own, share(words.own, census.seen)),
        ("held-out pictures with a word new to training", words.unheard, share(words.unheard, held_out)),
    ]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "embedded": _embedded,
        "png": _data_uri,
        "quantity": quantity,
        "share": findings.share,
    }
    return environment


def headline(figures: dict[str, float], counts: dict[str, int]) -> list[Figure]:
    """What is said first of a model: the choice is made here, for the report and the end of a run alike.

    Args:
        figures: of the evaluation.
        counts: scored pictures per split; too few held-out ones say nothing.
    """
    held = _shown_split(counts)
    of = {name.removeprefix(f"{held}/"): value for name, value in figures.items()}
    use = f"{_share(of['codebook_use'])} of the codebook in use"
    chosen = [
        Figure(
            _share(of["retrieval"], 1),
            "retrieval accuracy",
            f"{_share(of['retrieval_real'], 1)} on real pictures,"
            f" {_share(of['retrieval_chance'], 1)} by chance",
        ),
        Figure(
            f"{of['clip_score']:.1f}",
            "CLIP score",
            f"{of['clip_score_real']:.1f} on real pictures,"
            f" {of['clip_score_shuffled']:.1f} with other captions",
        ),
        Figure(f"{of['psnr']:.1f} dB", "tokenizer PSNR", use),
        Figure(
            f"{of['bits_per_token_text_gain']:.2f}",
            "bits per token for a wrong caption",
            f"{of['bits_per_token_shuffled']:.2f} with another's, {of['bits_per_token']:.2f} with its own",
        ),
        Figure(
            _share(of["near_duplicates"]),
            "near-duplicates",
            f"of a training picture among samples; half of them are {of['nearest_distance']:.2f} or nearer",
        ),
    ]
    if "oracle_all_right" in of:
        split = "composition" if "composition" in counts else held
        right = _share(figures[f"{split}/oracle_all_right"], 1)
        chosen.insert(
            0, Figure(right, "all attributes right", f"{SPLIT_NAMES[split]}, by the exact detector")
        )
    return chosen


def _share(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %"


def _shown_split(counts: dict[str, int]) -> str:
    """The split that the figures on top are of: held-out captions, unless they are too few."""
    return "validation" if counts.get("validation", 0) >= FEWEST else "train"


def judge_name(page: Page) -> str:
    """Which CLIP judged, and how independent it is of the one that reads prompts."""
    config = page.config
    if config.clip.kind == "trained":
        return (
            "a compact CLIP trained in this run from another seed than the one that reads prompts, on all"
            " pictures, the held-out ones included"
        )
    name = f"{config.clip.name} ({config.clip.weights}), pretrained"
    return f"{name}; the same model reads the prompts" if _judge_reads(page) else name


def _judge_reads(page: Page) -> bool:
    """Whether the judge is the CLIP that reads the prompts."""
    parts = _parts(page)
    return parts["judge"] == parts["text"]


def _parts(page: Page) -> dict[str, dict[str, File]]:
    """The files of each part of the model and of its judge, by their names within; settings lie in no
    folder."""
    parts: dict[str, dict[str, File]] = defaultdict(dict)
    for file in (
        *page.model.files,
        *(one for one in page.benchmark.files if one.name.startswith(f"{JUDGE}/")),
    ):
        part, _, name = file.name.rpartition("/")
        parts[part or "sampling"][name] = file.model_copy(update={"name": name})
    return parts


def _scores(figures: dict[str, float]) -> list[Score]:
    """CLIP score, retrieval and oracle of each split, beside their floors and ceilings."""
    lines = []
    for split, shown in SPLIT_NAMES.items():
        for name, key, floor, share in (
            ("all attributes right", "oracle_all_right", "", True),
            ("retrieval accuracy", "retrieval", "retrieval_chance", True),
            ("CLIP score", "clip_score", "clip_score_shuffled", False),
        ):
            if f"{split}/{key}" not in figures:
                continue
            values = {
                "samples": figures[f"{split}/{key}"],
                "floor": figures[f"{split}/{floor}"] if floor else 0.0,
                "reconstructed": figures[f"{split}/{key}_reconstructed"],
                "real": figures[f"{split}/{key}_real"],
            }
            low, high = (0.0, 1.0) if share else (min(values.values()), max(values.values()))
            said = {
                what: f"{100 * value:.1f} %" if share else f"{value:.1f}" for what, value in values.items()
            }
            marks = {what: (value - low) / ((high - low) or 1) for what, value in values.items()}
            lines.append(Score(name=name, split=shown, marks=marks, **said))
    return lines


def _charts(page: Page) -> list[tuple[str, Curves]]:
    """Training curves by asset and quantity; the learning rate, which nobody doubts, left out."""
    return [
        (f"{name}: {title}", lines)
        for name, curves in page.histories.items()
        for title, lines in panels(curves)
        if title != "learning_rate"
    ]


def _sweeps(swept: dict[str, Any]) -> list[tuple[str, bytes]]:
    """A chart for each sampling setting that was tried: every figure over its values, CLIP's score last."""
    shown = []
    for name, curves in swept.get("curves", {}).items():
        figures = sorted(curves.items(), key=lambda one: one[0] == SCORE)
        charts = [(figure, {figure: points}) for figure, points in figures]
        shown.append((SETTINGS[name], sheets.plot(charts, SETTINGS[name], marked=True)))
    return shown


def _robustness(figures: dict[str, float]) -> bytes | None:
    """A chart of what replaced codes cost, over their share in percent; None where it was not measured."""
    charts = []
    for name, title in (("psnr", "PSNR lost, dB"), ("oracle", "all attributes right, share lost")):
        points = [
            [float(key.rpartition("_")[2]), lost]
            for key, lost in figures.items()
            if key.startswith(f"robustness_{name}_")
        ]
        if points:
            charts.append((title, {title: [[0.0, 0.0], *points]}))
    return sheets.plot(charts, "codes replaced, %", marked=True) if charts else None


def _lineage(page: Page) -> list[dict[str, Any]]:
    """What the evaluation was made from: by key and hash, as places differ from store to store."""
    images, model, benchmark = page.images, page.model, page.benchmark
    files: dict[str, list[File]] = {one.kind: list(one.files) for one in (images, model, benchmark)}
    files |= {part: list(named.values()) for part, named in _parts(page).items()}
    info = {"images": images.info, **{part: model.info.get(part, {}) for part in model.inputs}}
    named = {"images": images.as_input, **model.inputs}
    named |= {one.kind: one.as_input for one in (model, benchmark)}
    return [
        {
            "name": name,
            "inputs": ", ".join(STEPS[one.kind].needs) or "the source",
            "place": f"{one.kind}/{one.key}",
            "sha256": one.sha256,
            "files": len(files[name]),
            "bytes": sum(file.size for file in files[name]),
            "info": {
                key: value for key, value in info.get(name, {}).items() if isinstance(value, int | float)
            },
        }
        for name, one in named.items()
    ]


def software() -> str:
    """The versions of what a model was measured with."""
    names = ("torch", "open_clip_torch", "transformers")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


def _embedded(picture: Tensor) -> str:
    mime, data = sheets.tile(picture)
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
