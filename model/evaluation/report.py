"""The report of an evaluation: one self-contained HTML page, and the same pictures as files beside it."""

from __future__ import annotations

import base64
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
import yaml
from torch import Tensor

from model.config import RunConfig
from model.evaluation import sheets
from model.evaluation.sheets import Curves, Pairs
from model.nets import metrics
from model.plumbing.assets import Manifest
from model.plumbing.progress import quantity

TILE = 96  # side of a picture on the page, pixels
FEWEST = 16  # held-out pictures that the figures on top may rest on
TEMPLATES = Path(__file__).parent / "templates"
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
    sets: dict[str, Manifest]
    metrics: dict[str, float]
    parameters: dict[str, int]  # weights per net
    grids: list[Grid]
    reconstructions: Pairs
    unconditional: Tensor  # (N, 3, H, W)
    sweep: Curves  # over the guidance scale
    histories: dict[str, Curves]  # per set
    pictures: dict[str, int]  # scored, per split


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
    """`report.html` and the picture files of an evaluation set."""
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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"embedded": _embedded, "png": _data_uri, "quantity": quantity, "size": _size}
    side = page.reconstructions.originals.shape[-1]
    charts = _charts(page)
    sweep = [(name, {name: points}) for name, points in page.sweep.items()]
    return environment.get_template("report.html").render(
        page=page,
        metrics=page.metrics,
        headline=_headline(page.pictures),
        splits=[split for split in SPLIT_NAMES if split in page.pictures],
        split_names=SPLIT_NAMES,
        scores=_scores(page.metrics),
        grids={grid.kind: grid for grid in page.grids},
        pairs=list(zip(*page.reconstructions, strict=True)),
        charts=sheets.plot(charts, "step") if charts else None,
        sweep=sheets.plot(sweep, "guidance scale", marked=True) if sweep else None,
        judge=judge_name(page.config, page.sets),
        shown=TILE,
        pixelated=side < TILE and TILE % side == 0,
        lineage=_lineage(page.sets),
        copy_distance=metrics.COPY_DISTANCE,
        config=yaml.safe_dump(page.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        software=_software(),
    )


def _headline(counts: dict[str, int]) -> str:
    """The split that the figures on top are of: held-out captions, unless they are too few."""
    return "validation" if counts.get("validation", 0) >= FEWEST else "train"


def judge_name(config: RunConfig, sets: dict[str, Manifest]) -> str:
    """Which CLIP judged, and how independent it is of the one that reads prompts."""
    if config.clip.kind == "trained":
        return (
            "a compact CLIP trained in this run from another seed than the one that reads prompts, on all"
            " pictures, the held-out ones included"
        )
    name = f"{config.clip.name} ({config.clip.weights}), pretrained"
    same = sets["judge"].files == sets["text"].files
    return f"{name}; the same model reads the prompts" if same else name


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
    """Training curves by set and quantity; the learning rate, which nobody doubts, left out."""
    return [
        (f"{name}: {title}", lines)
        for name, curves in page.histories.items()
        for title, lines in sheets.panels(curves)
        if title != "learning_rate"
    ]


def _lineage(sets: dict[str, Manifest]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "place": f"{one.kind}/{one.key}",
            "sha256": one.sha256,
            "files": len(one.files),
            "bytes": sum(file.size for file in one.files),
            "inputs": ", ".join(one.inputs) or "the source",
            "info": {key: value for key, value in one.info.items() if isinstance(value, int | float | str)},
        }
        for name, one in sets.items()
    ]


def _software() -> str:
    names = ("torch", "open_clip_torch", "transformers")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


def _embedded(picture: Tensor) -> str:
    mime, data = sheets.tile(picture)
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _size(value: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:.0f} B"
