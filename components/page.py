"""What KFP's page shows of a step: a few figures, pictures, and a small page in HTML that holds all of it.

KFP draws a page in a frame of some 530 × 600 pixels that has no network and no storage. Pages are made
without nets, within a second, from what lies in the store.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
import tarfile
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import yaml
from PIL import Image, ImageDraw, ImageOps

from components import recipe
from components.recipe import Resolved
from components.registration import Registered
from components.retraining import News
from model.evaluation.gate import Verdict, shown
from model.plumbing import assets, storage
from model.plumbing.assets import Kind, Manifest
from model.plumbing.curves import HISTORY, History, panels
from model.plumbing.speech import figure, quantity
from model.steps import STEPS, names

EXAMPLES = 24  # pictures of a data set that are shown
SIDE, GAP, COLUMNS = 96, 4, 6  # of a sheet of them: pixels, and pictures in a row
FRAME, LARGEST = 500, 192  # width of a page, and of a picture in it, pixels; wider ones are made smaller
WIDTH, HEIGHT = 238, 120  # of a chart, pixels
COLOURS = ("#1f5fbf", "#d2691e", "#2a8a57", "#8a3fa0")  # of curves, as in the report
STYLE = """
  body { margin: 0; padding: 14px; color: #1c2026; font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif; }
  h1 { font-size: 18px; margin: 0 0 2px; } h2 { font-size: 14px; margin: 16px 0 4px; }
  p { margin: 0 0 8px; } .soft, small { color: #5b626b; }
  table { border-collapse: collapse; margin-bottom: 8px; font-variant-numeric: tabular-nums; }
  td { padding: 2px 14px 2px 0; border-bottom: 1px solid #e3e6ea; vertical-align: top;
       overflow-wrap: anywhere; }
  td:first-child { min-width: 90px; } svg text { paint-order: stroke; stroke: #fff; stroke-width: 3px; }
  code, pre { font: 12px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
  code { user-select: all; } pre { white-space: pre-wrap; }
  figure { display: inline-block; width: 96px; margin: 0 6px 8px 0; vertical-align: top; }
  figure img { width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated; }
  figcaption { font-size: 11px; line-height: 1.25; overflow-wrap: anywhere; }
  .whole { width: 100%; } svg { margin: 0 8px 8px 0; }
"""

# Of each step the figures that are named first, by their names in the asset's `info`.
HEADLINE: dict[Kind, tuple[str, ...]] = {
    "images": ("train", "validation", "composition", "duplicates", "quarantined"),
    "tokenizer": ("psnr", "codebook_use", "vocabulary", "parameters"),
    "text": ("loss", "retrieval"),
    "judge": ("loss", "retrieval_seen"),
    "tokens": ("train", "validation", "composition", "tokens", "views"),
    "transformer": (
        "validation_text_gain",
        "validation_nll",
        "validation_nll_unconditional",
        "validation_nll_shuffled",
        "parameters",
        "steps",  # that were fitted to the time
    ),
    "evaluation": (
        *("validation/retrieval", "validation/clip_score", "validation/psnr"),
        "validation/bits_per_token_text_gain",
        *("validation/near_duplicates", "composition/oracle_all_right", "train/retrieval"),
        "train/clip_score",
    ),
}


SAMPLES = tuple(f"samples-{kind}.png" for kind in ("prompts", "train", "validation"))  # of an evaluation


class Example(NamedTuple):
    """A picture as the shards have it, PNG or JPEG, and its first caption."""

    data: bytes
    caption: str


def headline(manifest: Manifest) -> dict[str, float]:
    """The figures of an asset that are named first; those that it has."""
    figures = manifest.info.get("figures", manifest.info)  # what was measured stands in a group of its own
    return {name: figures[name] for name in HEADLINE.get(manifest.kind, ()) if name in figures}


def page(title: str, *parts: str) -> str:
    """A whole page: it asks no server for anything."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def checks(derived: Resolved, run: str, found: Sequence[str], address: str) -> str:
    """The first step's page: what was found, the steps to come, and every setting with what it came of."""
    config = derived.config
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return page(
        run,
        link(address),
        table((line.partition(" ")[0], line.partition(" ")[2].strip()) for line in found),
        f"<p class='soft'>Steps: {escape(', '.join(names(config)))}</p>",
        _chosen(derived),
        f"<h2>All settings</h2><pre>{escape(settings)}</pre>",
    )


def _chosen(derived: Resolved) -> str:
    """What was looked at, and what follows from it, each with its reason."""
    if not (derived.choices or derived.look):
        return ""
    shown = (
        [Example(_png(_fitted(one.image)), "; ".join(one.captions)) for one in derived.look.examples]
        if derived.look
        else []
    )
    rows = "".join(
        f"<tr><td>{escape(one.field)}</td><td>{escape(str(one.value))}</td><td>{escape(one.reason)}</td></tr>"
        for one in derived.choices
    )
    return "\n".join(
        [
            "<h2>Your pictures</h2>" if shown else "",
            gallery(shown),
            *(f"<p class='soft'>{escape(line)}</p>" for line in recipe.lines(derived)),
            f"<h2>What was chosen, and why</h2><table>{rows}</table>" if rows else "",
        ]
    )


def news(seen: News) -> str:
    """The page of a look for news: what is new, what the run begins from, and its settings."""
    verdict, *others = seen.said
    settings = yaml.safe_dump(seen.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return page(
        "Anything new?",
        f"<p><b>{escape(verdict)}</b></p>",
        "".join(f"<p class='soft'>{escape(one)}</p>" for one in others),
        f"<h2>All settings</h2><pre>{escape(settings)}</pre>",
    )


def training(manifest: Manifest, *about: str) -> str:
    """The page of a net that was trained: figures, curves and what it makes of pictures."""
    history = left(manifest, HISTORY)
    pairs = left(manifest, assets.RECONSTRUCTIONS)
    parts = [*about, figures(manifest)]
    if history:
        parts.append(f"<h2>Training</h2>{curves(json.loads(history))}")
    if pairs:
        parts.append(f"<h2>Held-out pictures, each before its reconstruction</h2>{picture(pairs, 'pairs')}")
    return page(STEPS[manifest.kind].title, *parts)


def registered(model: Registered, evaluation: Manifest, run: str) -> str:
    """The page of a version that was registered: whether it is in use, why, and how to draw with it."""
    named = f"{model.model} version {model.version}"
    samples = next(data for name in SAMPLES if (data := left(evaluation, name)))
    command = f"latent-gpt generate {shlex.quote(model.prompt)} --model models:/{model.model}/{model.version}"
    return page(
        named,
        f"<p><b>{escape(model.alias)}</b>: {escape(model.reason)}</p>{link(run)}",
        verdict(model.verdict),
        table((f"{value} {name}", note) for value, name, note in model.headline),
        f"<p class='soft'>On {escape(model.headline_of)}.</p><p>To draw: <code>{escape(command)}</code></p>",
        f"<h2>What it draws</h2>{picture(samples, 'samples')}",
    )


def verdict(decided: Verdict) -> str:
    """What a verdict rests on: the figures of both, side by side."""
    rows = shown(decided)
    if not rows:
        return ""
    against = "" if decided.against is None else f"version {decided.against}"
    heads = f"<tr><td></td><td>this one</td><td>{escape(against)}</td></tr>" if against else ""
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    judge = f"<p class='soft'>Judge: {escape(decided.judge)}.</p>" if decided.judge else ""
    return f"<h2>Verdict: {escape(decided.outcome)}</h2><table>{heads}{cells}</table>{judge}"


def about(manifest: Manifest, reused: bool) -> str:
    """Which asset it is, and whether it was made just now."""
    made = "Found made before, by its settings and inputs" if reused else "Made by this run"
    return f'<p class="soft">{made}: <code>{escape(manifest.uri)}</code></p>'


def link(address: str) -> str:
    """Where people open the run in MLflow: to be copied, as a frame opens nothing outside of itself."""
    return f'<p class="soft">MLflow: <code>{escape(address)}</code></p>' if address else ""


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and values."""
    cells = (f"<tr><td>{escape(name)}</td><td>{escape(_shown(value))}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def figures(manifest: Manifest) -> str:
    """The headline as a table."""
    return table((name.replace("_", " "), value) for name, value in headline(manifest).items())


def examples(images: Manifest) -> list[Example]:
    """The first training pictures of an asset of images, read from the head of its first shard."""
    shard = min(name for name in images.info["shards"] if name.startswith("train-"))
    found: list[Example] = []
    with (
        storage.open_read(images.where(shard)) as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        picture = b""
        for member in tar:
            content = tar.extractfile(member)
            assert content
            if not member.name.endswith(".json"):
                picture = content.read()
                continue
            found.append(Example(picture, json.load(content)["captions"][0]))
            if len(found) == EXAMPLES:
                break
    return found


def gallery(shown: Sequence[Example]) -> str:
    """Pictures with their captions below."""
    images = (f'<img src="{_embedded(one.data)}" alt="">' for one in shown)
    captions = (f"<figcaption>{escape(one.caption)}</figcaption>" for one in shown)
    return "".join(f"<figure>{''.join(pair)}</figure>" for pair in zip(images, captions, strict=True))


def sheet(shown: Sequence[Example]) -> bytes:
    """Pictures side by side, as one PNG."""
    step = SIDE + GAP
    rows = -(-len(shown) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * step - GAP, rows * step - GAP), "white")
    for number, one in enumerate(shown):
        row, column = divmod(number, COLUMNS)
        canvas.paste(_fitted(one.data), (column * step, row * step))
    return _png(canvas)


def picture(data: bytes, alt: str) -> str:
    """A picture as wide as the page."""
    return f'<img class="whole" src="{_embedded(data, 2 * FRAME)}" alt="{escape(alt)}">'


def left(manifest: Manifest, name: str) -> bytes | None:
    """A file of an asset, or a picture that was left beside it; None where there is neither."""
    of_asset = name in {file.name for file in manifest.files}
    beside = storage.join(manifest.uri, assets.PICTURES, name)
    try:
        return storage.read_bytes(manifest.where(name) if of_asset else beside)
    except storage.NotFound:
        return None


def nothing(text: str) -> bytes:
    """A picture that says why there is none."""
    canvas = Image.new("RGB", (480, 40), "white")
    ImageDraw.Draw(canvas).text((8, 12), text, "#5b626b")
    return _png(canvas)


def curves(history: History) -> str:
    """Curves of a training, one chart for each quantity."""
    shown = [(title, lines) for title, lines in panels(history) if title != "learning_rate"]
    return "".join(_chart(title, lines) for title, lines in shown)


def _chart(title: str, lines: History) -> str:
    points = [point for line in lines.values() for point in line]
    (x0, x1), (y0, y1) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    left, right, top, bottom = 4, WIDTH - 4, 20, HEIGHT - 16

    def place(point: list[float]) -> str:
        x = left + (right - left) * (point[0] - x0) / ((x1 - x0) or 1)
        y = bottom - (bottom - top) * (point[1] - y0) / ((y1 - y0) or 1)
        return f"{x:.1f},{y:.1f}"

    def label(x: float, y: float, text: str, colour: str = "#5b626b", anchor: str = "start") -> str:
        style = f'fill="{colour}" font-size="10" text-anchor="{anchor}"'
        return f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>'

    drawn = []
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(map(place, line))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if len(line) == 1:
            x, y = place(line[0]).split(",")
            drawn.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>')
        drawn.append(label(right - 62 * (len(lines) - 1 - number), 10, name, colour, "end"))
    drawn += [label(left, 10, title, "#1c2026"), label(right, HEIGHT - 4, f"step {x1:.0f}", anchor="end")]
    drawn += [label(left, top + 8, figure(y1)), label(left, HEIGHT - 4, figure(y0))]
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    return f'<svg {size} role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return figure(value)
    return quantity(value) if isinstance(value, int) and value >= 10_000 else str(value)


def _embedded(data: bytes, widest: int = LARGEST) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    image = Image.open(io.BytesIO(data))
    if image.width > widest:
        size = (widest, round(image.height * widest / image.width))
        buffer = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=85)
        kind, data = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _fitted(data: bytes) -> Image.Image:
    """A picture of any form in a white square."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    way = Image.Resampling.NEAREST if image.width < SIDE else Image.Resampling.LANCZOS
    image = ImageOps.contain(image, (SIDE, SIDE), way)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2), image)
    return square


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
