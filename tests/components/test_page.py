"""Pages of KFP's own interface: they hold all that they show, and say what there is to say."""

from __future__ import annotations

import io
import re

import pytest
from PIL import Image

from components import page
from components.page import Example
from components.recipe import Resolved
from components.registration import Registered
from model.config import load_config
from model.evaluation.gate import Verdict
from model.plumbing import storage
from model.plumbing.assets import PICTURES, RECONSTRUCTIONS, File, Manifest
from tests.instances import config, ingest

LARGEST_PAGE = 5 << 20  # bytes


def verdict() -> Verdict:
    """One that was compared."""
    return Verdict(
        outcome="not better",
        reason="a < b",
        metric="retrieval",
        prompts="90 prompts held out",
        ours=0.25,
        theirs=0.5,
        against=2,
        judge="abc, this run's own",
    )


def png(side: int, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def trained(files: dict[str, bytes], beside: dict[str, bytes], **info: float) -> Manifest:
    """A tokenizer in the store, with files of its own and others beside them."""
    made = Manifest(
        kind="tokenizer",
        key="0" * 16,
        settings={},
        inputs={},
        files=tuple(File(name=name, size=len(data), sha256="0" * 64) for name, data in files.items()),
        info=info,
    )
    for name, data in files.items() | {(f"{PICTURES}/{name}", data) for name, data in beside.items()}:
        storage.write_bytes(storage.join(made.uri, name), data)
    return made


def test_a_page_loads_nothing_and_runs_nothing() -> None:
    text = page.page("<Title> & more", page.link("http://mlflow/#/x?a=1&b=2"), page.picture(png(8), "eight"))
    assert re.findall(r"(?:src|href|url)[=(]\s*(.{6})", text) == ['"data:']
    assert "<script" not in text
    assert "&lt;Title&gt; &amp; more" in text
    assert "http://mlflow/#/x?a=1&amp;b=2" in text


def test_examples_are_the_first_training_pictures_with_their_captions(store: str) -> None:
    made = ingest(config().data)
    shown = page.examples(made)
    assert len(shown) == min(page.EXAMPLES, made.info["train"])
    assert all(Image.open(io.BytesIO(one.data)).size == (16, 16) for one in shown)
    assert all(re.search("circle|square|triangle|cross", one.caption) for one in shown)
    sheet = Image.open(io.BytesIO(page.sheet(shown)))
    assert sheet.size == (6 * 100 - 4, 4 * 100 - 4)
    pixel, corner = Image.open(io.BytesIO(shown[7].data)).convert("RGB").getpixel((8, 8)), (151, 151)
    assert sheet.getpixel(corner) == pixel, "the eighth stands in the second row and column"


def test_a_page_of_large_pictures_is_small() -> None:
    noise = Image.effect_noise((1024, 1024), 99).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    shown = [Example(buffer.getvalue(), f"<number {number}>") for number in range(page.EXAMPLES)]
    text = page.page("Large", page.gallery(shown), page.picture(buffer.getvalue(), "a wide one"))
    assert len(text.encode()) < LARGEST_PAGE
    assert "&lt;number 3&gt;" in text


def test_curves_of_one_quantity_share_a_chart_and_stay_in_it() -> None:
    drawn = page.curves(
        {
            "train/loss": [[1, 3.0], [10, 1.0]],
            "validation/loss": [[10, 2.0]],
            "train/learning_rate": [[1, 0.1]],
            "train/constant": [[1, 5.0], [2, 5.0]],
        }
    )
    charts = re.findall(r"<svg.*?</svg>", drawn)
    assert len(charts) == 2, "the learning rate is known"
    assert charts[0].count("<polyline") == 2
    assert "step 10" in charts[0]
    for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", drawn):
        assert 0 <= float(x) <= page.WIDTH
        assert 0 <= float(y) <= page.HEIGHT


def test_the_page_of_a_net_shows_what_is_there_of_it(store: str) -> None:
    made = trained(
        {"history.json": b'{"train/loss": [[1, 3.0], [2, 1.0]]}'}, {RECONSTRUCTIONS: png(9)}, psnr=27.25
    )
    text = page.training(made, page.about(made, reused=True))
    assert "<svg" in text
    assert "data:image/png;base64," in text
    assert "<td>psnr</td><td>27.2</td>" in text
    assert "Found made before" in text
    assert made.uri in text


def test_a_net_that_was_imported_has_a_page_without_curves(store: str) -> None:
    made = trained({"config.json": b"{}"}, {}, vocabulary=16384)
    text = page.training(made, page.about(made, reused=False))
    assert "<svg" not in text
    assert "<img" not in text
    assert "<td>vocabulary</td><td>16k</td>" in text
    assert "Made by this run" in text
    assert Image.open(io.BytesIO(page.nothing("none"))).size[0] > 100


def test_the_figures_that_are_named_first_are_those_that_an_asset_has(store: str) -> None:
    made = trained({}, {}, psnr=20.0, best_step=7)
    assert page.headline(made) == {"psnr": 20.0}


def test_the_first_page_says_what_was_found_and_every_setting() -> None:
    text = page.checks(
        Resolved(load_config("smoke")), "smoke-1", ["source    shapes-1", "disk"], "http://m/#/1"
    )
    assert "<td>source</td><td>shapes-1</td>" in text
    assert "prepare, images, tokenizer, text, judge" in text
    assert "learning_rate: 0.0003" in text
    assert "http://m/#/1" in text


def test_the_last_page_says_which_version_it_is_and_why(store: str) -> None:
    made = trained({"samples-train.png": png(20)}, {})
    registered = Registered(
        model="latent-gpt-x",
        version=3,
        alias="challenger",
        reason="a < b",
        report="s3://r",
        headline=[("25.0 %", "retrieval accuracy", "20 % by chance")],
        headline_of="captions held out",
        verdict=verdict(),
    )
    text = page.registered(registered, made, "http://m")
    for said in ("latent-gpt-x version 3", "<b>challenger</b>: a &lt; b", "25.0 % retrieval accuracy"):
        assert said in text
    assert "models:/latent-gpt-x/3" in text
    assert "Verdict: not better" in text
    assert "<td>this one</td><td>version 2</td>" in text
    assert "retrieval accuracy over 90 prompts held out</td><td>0.25</td><td>0.5</td>" in text
    assert "Judge: abc, this run&#x27;s own." in text
    assert "data:image/png;base64," in text


@pytest.mark.parametrize("kind", page.HEADLINE)
def test_every_step_with_an_asset_has_few_figures_in_front(kind: str) -> None:
    assert 0 < len(page.HEADLINE[kind]) <= 8  # type: ignore[index]
