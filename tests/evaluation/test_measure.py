"""Measuring tiny random models over drawn shapes: by the benchmark's judge, and the same each time."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from model.config import RunConfig
from model.errors import UserError
from model.evaluation import measure
from model.evaluation.benchmark import (
    Drawn,
    load_benchmark,
    load_benchmarks_judge,
    make_benchmark,
    training_pictures,
)
from model.inference.bundle import make_bundle
from model.inference.generate import Generator
from model.nets import metrics
from model.nets.clip import load_judge
from model.nets.tokenizers import neighbours
from model.plumbing import cache, storage
from model.plumbing.assets import Manifest
from model.plumbing.speech import Progress
from tests.instances import config, ingest, make, publish_models


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return config(evaluation={"samples_per_prompt": 2, "pictures": 4})


@pytest.fixture(scope="module")
def inputs(root: Path, tmp_path_factory: pytest.TempPathFactory, run: RunConfig) -> dict[str, Manifest]:
    """Shapes ingested for real, a model with random weights, and a benchmark whose judge is another run's."""
    images = ingest(run.data)
    parts = publish_models(tmp_path_factory.mktemp("models"), run, images)
    judge = publish_models(tmp_path_factory.mktemp("others"), run, images, seed=1)["judge"]
    return {
        "images": images,
        "model": make_bundle(run, parts),
        "benchmark": make_benchmark(run, images, judge),
    }


@pytest.fixture(scope="module")
def made(inputs: dict[str, Manifest], run: RunConfig) -> Manifest:
    return make("measurement", run, inputs)


@pytest.fixture(scope="module")
def drawn(inputs: dict[str, Manifest]) -> Drawn:
    """What the model makes of the benchmark, computed where a test asks."""
    judge, benchmark = load_benchmarks_judge(inputs["benchmark"]), load_benchmark(inputs["benchmark"])
    progress = Progress("test", 0, "img", enabled=False)
    generator = Generator.load(inputs["model"].uri)
    return Drawn(generator, judge, benchmark, training_pictures(inputs["images"]), progress)


def test_a_measurement_says_what_models_are_compared_by(made: Manifest, inputs: dict[str, Manifest]) -> None:
    assert made.info["benchmark"] == inputs["benchmark"].key
    assert json.loads(storage.read_bytes(f"{made.uri}/metrics.json")) == made.info
    named = {
        "retrieval", "clip_score", "oracle_all_right", "bits_per_token", "psnr", "ssim", "frechet", "cmmd",
        "precision", "recall", "diversity", "near_duplicates", "nearest_distance", "reconstruction_frechet",
    }  # fmt: skip
    for split in ("train", "validation", "composition"):
        assert {f"{split}/{name}" for name in named} <= made.info["figures"].keys()
        assert len(made.info["scores"]["retrieval"][split]) == 4
        assert made.info["chance"]["retrieval"][split] == 1 / 4
    alone = {"codebook_use", "codebook_perplexity", "robustness_psnr", "robustness_oracle", "bundle_bytes"}
    assert alone <= made.info["figures"].keys()


@pytest.mark.slow
def test_measuring_twice_gives_the_same_bytes(
    made: Manifest, inputs: dict[str, Manifest], run: RunConfig
) -> None:
    storage.delete_prefix(made.uri)
    assert make("measurement", run, inputs) == made


def test_the_judge_is_the_benchmarks_and_not_the_runs_own(
    made: Manifest, drawn: Drawn, inputs: dict[str, Manifest]
) -> None:
    own = load_judge(cache.folder(inputs["model"].input("judge")))
    captions = drawn.benchmark.splits["train"].captions
    by_own = own.text_features(captions)
    scores = metrics.clip_score(drawn.features("train"), drawn.judge.text_features(captions))
    assert made.info["figures"]["train/clip_score"] == pytest.approx(float(scores.mean()), abs=1e-3)
    assert not torch.allclose(by_own, drawn.judge.text_features(captions))


def test_an_evaluation_measures_the_same(made: Manifest, inputs: dict[str, Manifest], run: RunConfig) -> None:
    evaluation = make("evaluation", run, inputs)
    for name in ("benchmark", "figures", "scores", "chance"):
        assert evaluation.info[name] == made.info[name]


def test_a_model_of_another_size_is_not_measured(
    inputs: dict[str, Manifest], run: RunConfig, tmp_path: Path
) -> None:
    larger = config(data={**run.data.model_dump(), "image_size": 32})
    images = ingest(larger.data)
    parts = publish_models(tmp_path, larger, images)
    other = {**inputs, "model": make_bundle(larger, parts)}
    with pytest.raises(UserError, match=r"draws pictures of 32 px, and the benchmark .* holds some of 16 px"):
        make("measurement", run, other)


def test_likelihoods_are_those_of_the_codes(drawn: Drawn) -> None:
    figures = measure.likelihoods(drawn)
    codes = drawn.codes["validation"]
    with torch.no_grad():
        logits = drawn.generator.gpt(codes).log_softmax(-1)
    expected = -logits.gather(2, codes[..., None]).mean().item() / math.log(2)
    assert figures["validation/bits_per_token_unconditional"] == pytest.approx(expected, abs=1e-4)
    gap = figures["validation/bits_per_token"] - figures["train/bits_per_token"]
    assert figures["bits_per_token_gap"] == pytest.approx(gap)


def test_robustness_is_what_replaced_codes_cost(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by decoding it again: the share is kept, each code replaced goes to a neighbour of its own."""
    decoded: list[torch.Tensor] = []
    decode = type(drawn.generator.tokenizer).decode
    whole = drawn.codes["validation"]
    lost = float(metrics.psnr(drawn.reconstructed["validation"], drawn.real("validation")).mean())

    def watched(self: object, codes: torch.Tensor) -> torch.Tensor:
        decoded.append(codes.flatten(1))
        return decode(self, codes)

    monkeypatch.setattr(type(drawn.generator.tokenizer), "decode", watched)
    figures = measure.robustness(drawn)
    shares = [float((codes != whole).double().mean()) for codes in decoded]
    assert shares == sorted(shares), "more and more of the same codes"
    assert shares[-1] == pytest.approx(0.2, abs=0.1)
    assert all((later == earlier)[earlier != whole].all() for earlier, later in pairwise(decoded))
    every = torch.arange(drawn.generator.tokenizer.vocabulary)
    near = neighbours(drawn.generator.tokenizer, every)
    assert near is not None
    changed = decoded[-1] != whole
    assert (near[whole[changed]] == decoded[-1][changed][:, None]).any(1).all()
    grid = decoded[-1].view(-1, *drawn.generator.gpt.grid)
    left = float(metrics.psnr(decode(drawn.generator.tokenizer, grid), drawn.real("validation")).mean())
    assert figures["robustness_psnr_20"] == pytest.approx(lost - left, abs=1e-4)
    assert figures["robustness_psnr"] == figures["robustness_psnr_5"]
    assert figures["robustness_oracle"] == figures["robustness_oracle_5"]


def test_where_no_codebook_can_be_reached_robustness_is_left_out(
    drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "neighbours", lambda *_: None)
    assert measure.robustness(drawn) == {}


def test_a_model_that_draws_training_pictures_is_found_out(drawn: Drawn) -> None:
    copies = Drawn(drawn.generator, drawn.judge, drawn.benchmark, drawn.training, Progress("t", 0, "img"))
    copies._samples = {split: drawn.real("train") for split in drawn.benchmark.splits}
    figures = measure.memorisation(copies)
    assert figures["validation/near_duplicates"] == 1
    assert figures["validation/nearest_distance"] == pytest.approx(0, abs=1e-3)
    honest = measure.memorisation(drawn)
    assert honest["validation/near_duplicates"] == 0
    assert honest["validation/nearest_distance"] > metrics.NEAR_DUPLICATE
