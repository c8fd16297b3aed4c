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

from model import metrics, pictures
from model.config import RunConfig
from model.pictures import Curves, Pairs
from model.plumbing.manifests import Manifest

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
    scored: int  # prompts behind the scores


@dataclass(frozen=True)
class Scale:
    """A score on the way from its floor to its ceiling; places are shares of that way, 0 to 1."""

    name: str
    split: str
    value: str
    marks: list[tuple[str, str, float]]  # (what, value, place)
    place: float


def files(page: Page) -> dict[str, bytes]:
    """`report.html` and the picture files of an evaluation set."""
    made = {
        f"samples-{grid.kind}.png": pictures.sheet(grid.samples, grid.prompts)
        for grid in page.grids
        if grid.kind != "closest"
    }
    made["reconstructions.png"] = pictures.sheet(
        torch.stack(list(page.reconstructions)), ["original", "after"]
    )
    made["unconditional.png"] = pictures.sheet(page.unconditional.unflatten(0, (-1, 8)))
    if charts := _charts(page):
        made["curves.png"] = pictures.plot([chart for _, group in charts for chart in group], "step")
    made["report.html"] = render(page).encode()
    return made


def render(page: Page) -> str:
    """The page; it asks no server for anything."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"embedded": _embedded, "png": _data_uri, "count": _count, "size": _size}
    side = page.reconstructions.originals.shape[-1]
    return environment.get_template("report.html").render(
        page=page,
        metrics=page.metrics,
        splits=[split for split in SPLIT_NAMES if f"{split}/nll" in page.metrics],
        split_names=SPLIT_NAMES,
        scales=_scales(page.metrics),
        grids={grid.kind: grid for grid in page.grids},
        pairs=list(zip(*page.reconstructions, strict=True)),
        charts=[(name, pictures.plot(group, "step")) for name, group in _charts(page)],
        sweep=pictures.plot(
            [*((name, {name: points}) for name, points in page.sweep.items())], "guidance", True
        )
        if page.sweep
        else None,
        judge=judge_name(page.config, page.sets),
        shown=max(64, min(side, 160)),
        pixelated=side < 96,
        lineage=_lineage(page.sets),
        copy_distance=metrics.COPY_DISTANCE,
        config=yaml.safe_dump(page.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        software=_software(),
    )


def judge_name(config: RunConfig, sets: dict[str, Manifest]) -> str:
    """Which CLIP judged, and how independent it is of the one that reads prompts."""
    if config.clip.kind == "trained":
        return (
            "a compact CLIP trained in this run, from another seed and split than the one that reads prompts"
        )
    name = f"{config.clip.name} ({config.clip.weights}), pretrained"
    same = sets["judge"].files == sets["text"].files
    return f"{name}; the same model reads the prompts" if same else name


def _scales(figures: dict[str, float]) -> list[Scale]:
    """CLIP score, retrieval and oracle of each split between their floors and ceilings."""
    scales = []
    for split, shown in SPLIT_NAMES.items():
        for name, key, floor, percent in (
            ("CLIP score", "clip_score", ("other captions", "clip_score_shuffled"), False),
            ("retrieval accuracy", "retrieval", ("chance", "retrieval_chance"), True),
            ("all attributes right", "oracle_all_right", ("none", ""), True),
        ):
            if f"{split}/{key}" not in figures:
                continue
            low = figures[f"{split}/{floor[1]}"] if floor[1] else 0.0
            points = [(floor[0], low)]
            points += [
                (what, figures[f"{split}/{key}_{suffix}"])
                for what, suffix in (("after the tokenizer", "reconstructed"), ("real pictures", "real"))
            ]
            value = figures[f"{split}/{key}"]
            bottom = 0.0 if percent else min(value, *(mark for _, mark in points))
            top = 1.0 if percent else max(value, *(mark for _, mark in points))
            width = (top - bottom) or 1.0

            def said(number: float, percent: bool = percent) -> str:
                return f"{100 * number:.1f} %" if percent else f"{number:.1f}"

            scales.append(
                Scale(
                    name=name,
                    split=shown,
                    value=said(value),
                    marks=[(what, said(mark), (mark - bottom) / width) for what, mark in points],
                    place=(value - bottom) / width,
                )
            )
    return scales


def _charts(page: Page) -> list[tuple[str, list[tuple[str, Curves]]]]:
    """Training curves by set; the learning rate, which nobody doubts, left out."""
    groups = []
    for name, curves in page.histories.items():
        group = [
            (f"{name}: {title}", lines)
            for title, lines in pictures.panels(curves)
            if title != "learning_rate"
        ]
        if group:
            groups.append((name, group))
    return groups


def _lineage(sets: dict[str, Manifest]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "uri": one.uri,
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
    mime, data = pictures.tile(picture)
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _count(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def _size(value: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:.0f} B"
