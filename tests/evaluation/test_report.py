"""The report page: complete, self-contained, escaped, and showing what it says."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from model.config import SamplingConfig
from model.data.images import to_pixels
from model.evaluation import report, sheets
from model.evaluation.gate import Guard, Verdict
from model.evaluation.report import Grid, Page
from model.evaluation.sheets import Pairs
from model.plumbing.assets import File, Input, Manifest
from model.plumbing.curves import panels
from tests.instances import config

FILE = File(name="model.safetensors", size=1_234_567, sha256="1" * 64)
FILES = tuple(
    FILE.model_copy(update={"name": name})
    for name in (
        *(f"{part}/{FILE.name}" for part in ("text", "tokenizer", "transformer")),
        "sampling.json",
    )
)
SWEPT = {
    "kept": "",
    "prompts": 64,
    "decided_by": "all attributes right",
    "curves": {
        "cfg_scale": {"CLIP score": [[2.0, 18.0], [3.0, 20.0]]},
        "temperature": {"CLIP score": [[0.9, 20.5], [1.0, 20.0]]},
    },
}
SPLITS = {"train": 24, "validation": 20, "composition": 8}


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def figures() -> dict[str, float]:
    made = {"codebook_use": 0.9, "codebook_perplexity": 12.0, "bits_per_token_gap": 0.1}
    for split in SPLITS:
        made |= {
            f"{split}/bits_per_token{suffix}": 1.5
            for suffix in ("", "_shuffled", "_unconditional", "_text_gain")
        }
        likeness = ("frechet", "reconstruction_frechet", "cmmd", "precision", "recall", "diversity", "ssim")
        made |= {f"{split}/{name}": 0.875 for name in likeness}
        made |= {f"{split}/psnr": 27.25, f"{split}/nearest_distance": 0.15}
        made |= {f"{split}/near_duplicates": 0.1, f"{split}/near_duplicates_reconstructed": 0.2}
        made |= {f"{split}/retrieval_chance": 0.05, f"{split}/clip_score_shuffled": 4.0}
        for key, value in (("clip_score", 20.0), ("retrieval", 0.4), ("oracle_all_right", 0.75)):
            made |= {f"{split}/{key}{suffix}": value for suffix in ("", "_real", "_reconstructed")}
        made |= {f"{split}/oracle_{name}": 0.8 for name in ("colour", "shape", "size", "relation")}
    return made


def manifest(kind: str, **inputs: str) -> Manifest:
    return Manifest(
        kind=kind,  # type: ignore[arg-type]
        key="0123456789abcdef",
        settings={},
        inputs={name: Input(kind=name, key=key, sha256="0" * 64) for name, key in inputs.items()},  # type: ignore[arg-type]
        files=(FILE,),
        info={"train": 24, "quarantined": 3, "shards": {"train-0.tar": 24}},
    )


def judged(sha256: str) -> Manifest:
    """A benchmark whose judge has weights of this hash."""
    weights = FILE.model_copy(update={"name": f"judge/{FILE.name}", "sha256": sha256})
    return manifest("benchmark", judge="z").model_copy(update={"files": (FILE, weights)})


@pytest.fixture
def page() -> Page:
    return Page(
        config=config(),
        images=manifest("images"),
        model=manifest("model", tokenizer="x", text="y", judge="z", transformer="w", sampling="v").model_copy(
            update={"files": FILES,
                    "info": {"tokenizer": {"psnr": 27.25}, "sampling": SWEPT}}),
        benchmark=judged(FILE.sha256),
        metrics=figures(),
        parameters={"transformer": 2_325_824, "tokenizer": 1_327_540},
        grids=[
            Grid("train", ["red <apple> & pear", "blue square"], images(2, 3), images(2, seed=1)),
            Grid("composition", ["green cross above red circle"], images(1, 3), images(1, seed=2)),
            Grid("closest", ["blue square"], images(1, 1), images(1, seed=3), ["0.123"]),
        ],
        reconstructions=Pairs(images(4, seed=4), images(4, seed=5)),
        unconditional=images(16, seed=6),
        sampling=SamplingConfig(cfg_scale=3.0, temperature=0.9),
        histories={"transformer": {"train/nll": [[1, 3.0], [2, 2.0]], "validation/nll": [[2, 2.5]],
                                   "train/learning_rate": [[1, 0.1]]}},
        pictures=SPLITS,
        searched=(24, 40),
    )  # fmt: skip


class Reader(HTMLParser):
    """Collects what a browser would fetch, the text, and unclosed elements."""

    EMPTY = ("meta", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sources: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.EMPTY:
            self.open.append(tag)
        values = dict(attributes)
        for name in ("src", "href", "srcset", "data"):
            if values.get(name):
                self.sources.append((str(values.get("alt")), str(values[name])))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_asks_no_server_for_anything(page: Page) -> None:
    html = report.render(page)
    read = Reader(html)
    assert not read.open
    assert read.sources
    assert all(source.startswith("data:image/") for _, source in read.sources)
    assert not re.search(r"url\(|@import|<script|<link", html)


def test_pictures_stand_beside_their_prompts(page: Page) -> None:
    read = Reader(report.render(page))
    shown = [source for alt, source in read.sources if alt == "sample: red <apple> & pear"]
    assert len(shown) == 3
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[1].partition(",")[2]))))
    expected = to_pixels(page.grids[0].samples[0, 1][None])[0].permute(1, 2, 0).numpy()
    assert np.array_equal(decoded, expected)
    assert "red <apple> & pear" in read.text, "prompts are escaped"


def test_what_the_page_says(page: Page) -> None:
    text = " ".join(Reader(report.render(page)).text.split())
    for said in (
        "75.0 %", "27.2 dB", "compact CLIP trained in this run", "2.3M weights", "Combinations held out",
        "images/0123456789abcdef", "quarantined 3", "1.2MB", "tokenizer/x", "psnr 27.25", "4.9MB",
        "codebook_size: 16", "0.123",
        "the model draws at guidance 3.0 and temperature 0.9", "over the same 64 prompts",
        "24 captions seen in training, 20 captions held out", "latent-gpt run --preset tiny.yaml",
    ):  # fmt: skip
        assert said in text, said
    assert "flatters" not in text


def test_robustness_is_shown_where_it_was_measured(page: Page) -> None:
    lost = {f"robustness_psnr_{share}": share / 10 for share in (1, 5, 10, 20)} | {"robustness_psnr": 0.5}
    read = Reader(report.render(Page(**{**page.__dict__, "metrics": page.metrics | lost})))
    assert "With 5 % of them a picture loses 0.50 dB." in " ".join(read.text.split())
    assert [alt for alt, _ in read.sources if alt == "what replaced codes cost"]
    without = Reader(report.render(page))
    assert "Not measured: this tokenizer's codebook" in without.text
    assert "what replaced codes cost" not in [alt for alt, _ in without.sources]


def test_a_sweep_that_tried_nothing_is_said(page: Page) -> None:
    kept = {"kept": "7 captions are set apart for the sweep, which wants 128", "cfg_scale": 3.0}
    model = page.model.model_copy(update={"info": {"sampling": kept}})
    text = " ".join(Reader(report.render(Page(**{**page.__dict__, "model": model}))).text.split())
    assert "No sweep: 7 captions are set apart for the sweep, which wants 128. The model draws as" in text


def test_the_report_names_no_store_and_no_version_of_python(page: Page) -> None:
    html = report.render(page)
    assert "s3://" not in html
    assert "Python" not in html
    assert "workers:" not in html, "nor on how many processes it was made"


def test_the_headline_is_chosen_once(page: Page) -> None:
    html = Reader(report.render(page)).text
    assert page.headline[0] == (
        "75.0 %",
        "all attributes right",
        "combinations held out, by the exact detector",
    )
    for value, name, note in page.headline:
        assert f"{value}{name}{note}" in html


def test_few_held_out_pictures_do_not_make_the_headline(page: Page) -> None:
    few = Page(**{**page.__dict__, "pictures": {**SPLITS, "validation": 3}})
    text = " ".join(Reader(report.render(few)).text.split())
    assert "captions seen in training, as only 3 pictures are held out" in text


def test_a_judge_that_also_reads_or_chooses_is_named_so(page: Page) -> None:
    changed = {"config": config(clip={"kind": "pretrained"}), "sampling": SamplingConfig(best_of=4)}
    text = " ".join(Reader(report.render(Page(**{**page.__dict__, **changed}))).text.split())
    assert "ViT-L-14 (openai), pretrained; the same model reads the prompts" in text
    assert "best of 4 draws, chosen by the CLIP that reads the prompts, which flatters these scores" in text
    changed |= {"benchmark": judged("2" * 64)}
    text = " ".join(Reader(report.render(Page(**{**page.__dict__, **changed}))).text.split())
    assert "chosen by the CLIP that reads the prompts." in text
    assert "ViT-L-14 (openai), pretrained. Pictures" in text


def test_files_of_the_asset(page: Page) -> None:
    made = report.files(page)
    assert set(made) == {
        "report.html", "samples-train.png", "samples-composition.png", "reconstructions.png",
        "unconditional.png", "curves.png",
    }  # fmt: skip
    sheet = Image.open(io.BytesIO(made["samples-train.png"]))
    assert sheet.size == (sheets.LABEL + 3 * (96 + sheets.GAP), sheets.GAP + 2 * (96 + sheets.GAP))
    assert report.files(page) == made, "the same page gives the same bytes"


def test_curves_of_one_quantity_share_a_panel(page: Page) -> None:
    (panel, rate) = panels(page.histories["transformer"])
    assert panel == ("nll", {"train": [[1, 3.0], [2, 2.0]], "validation": [[2, 2.5]]})
    assert rate[0] == "learning_rate"


@pytest.mark.parametrize("side", [64, 96, 512])
def test_three_hundred_pictures_fit_a_page_of_five_megabytes(side: int) -> None:
    coarse = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    photo = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)[0]
    mime, data = sheets.tile(photo)
    assert mime == ("image/png" if side == 64 else "image/jpeg")
    assert Image.open(io.BytesIO(data)).size == (min(side, 192),) * 2
    assert 300 * len(data) * 4 / 3 < 5_000_000


def test_the_floor_of_a_score_is_what_chance_gives(page: Page) -> None:
    html = report.render(page)
    assert re.search(r'<span class="mark floor" style="left: 5\.0%">', html), "chance of retrieval"
    assert '<td class="number">5.0 %</td>' in html
    assert '<td class="number">4.0</td>' in html, "the CLIP score of shuffled captions"


def test_a_verdict_stands_on_top_of_a_report() -> None:
    champion = Guard(figure="validation/psnr", value=25.0, theirs=24.0, bound=23.5, holds=True, said="x < y")
    decided = Verdict(
        outcome="better",
        reason="by <far>",
        metric="retrieval",
        prompts="90 prompts held out",
        ours=0.75,
        theirs=0.5,
        against=2,
        benchmark="b" * 16,
        judge="j, pinned",
        columns={"train/cmmd": (0.5, None)},
        guards=[champion],
    )
    page = report.with_verdict("<html><main>\nrest</main></html>", decided, "latent-gpt-x", 3)
    assert page.index("latent-gpt-x version 3: better") < page.index("rest")
    for said in ("by &lt;far&gt;", "by judge j, pinned", "champion, version 2", "<td>0.75</td><td>0.5</td>"):
        assert said in page
    assert "<td>holds</td><td>x &lt; y</td>" in page
    assert "<td>train/cmmd</td><td>0.5</td>" in page
