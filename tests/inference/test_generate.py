"""Prompts to pictures on tiny random models: what depends on what, and what is refused."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.config import SamplingConfig
from model.errors import Diverged, UserError
from model.inference.generate import Generator, checked
from model.nets.clip import load_judge
from model.nets.compiled import CompiledSampler
from model.plumbing.checkpoints import load_model, save_model
from tests.instances import config, write_models

TWO = ["a small red circle above a large blue square", "a large green cross"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_models(tmp_path / "bundle", config())
    (tmp_path / "bundle" / "sampling.json").write_text('{"cfg_scale": 1.5}')
    return tmp_path / "bundle"


@pytest.fixture
def generator(bundle: Path) -> Generator:
    return Generator.load(bundle, "cpu")


def arrays(pictures: list[Image.Image]) -> list[np.ndarray]:
    return [np.asarray(picture) for picture in pictures]


def test_pictures_have_the_size_of_the_data_and_the_models_settings(generator: Generator) -> None:
    pictures = generator.generate(TWO, [1, 2])
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    assert generator.sampling.cfg_scale == 1.5
    given = generator.generate(TWO, [1, 2], SamplingConfig(cfg_scale=1.5))
    assert np.array_equal(arrays(given), arrays(pictures))


def test_a_seed_draws_the_same_picture_in_any_company(generator: Generator) -> None:
    together = arrays(generator.generate(TWO, [1, 2]))
    alone = arrays(generator.generate(TWO[1:], [2]))
    assert np.array_equal(together[1], alone[0])
    other = arrays(generator.generate(TWO[1:], [3]))
    assert not np.array_equal(alone[0], other[0])


def test_the_prompt_matters_unless_unconditional(generator: Generator) -> None:
    with_text = arrays(generator.generate(TWO, [5, 5]))
    assert not np.array_equal(with_text[0], with_text[1])
    without = arrays(generator.generate(["", "ignored"], [5, 5], unconditional=True))
    assert np.array_equal(without[0], without[1])


def test_more_pictures_than_a_batch(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generator.draw(TWO * 2, [1, 2, 3, 4])
    monkeypatch.setattr("model.inference.generate.BATCH_CPU", 3)
    heard: list[int] = []
    torch.testing.assert_close(generator.draw(TWO * 2, [1, 2, 3, 4], on_batch=heard.append), whole)
    assert heard == [3, 4]


@pytest.mark.slow
@pytest.mark.compiles
def test_a_compiled_generator_draws_the_same_and_compiles_for_full_batches_alone(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # tracing is what is tried
    monkeypatch.setattr("model.nets.compiled.CPU_PICTURES", 4)
    monkeypatch.setattr("model.inference.generate.BATCH_CPU", 3)
    few, many = (Generator.load(bundle, "cpu", pictures=pictures) for pictures in (3, 4))
    assert not isinstance(few.sampler, CompiledSampler)
    assert isinstance(many.sampler, CompiledSampler)
    for unconditional in (False, True):
        plain = few.draw(TWO * 2, [1, 2, 3, 4], unconditional=unconditional)
        torch.testing.assert_close(many.draw(TWO * 2, [1, 2, 3, 4], unconditional=unconditional), plain)
    assert [key[0] for key in many.sampler._programs] == [3, 3]


def test_best_of_keeps_what_the_clip_that_reads_prompts_prefers(generator: Generator, bundle: Path) -> None:
    clip = load_judge(bundle / "text")
    several = SamplingConfig(best_of=8)
    chosen = generator.draw(TWO[:1], [1], several)
    own = generator.draw(TWO[:1], [1], SamplingConfig())
    text = clip.text_features(TWO[:1])[0]
    scores = [float(clip.image_features(image) @ text) for image in (chosen, own)]
    assert scores[0] >= scores[1]
    alone = Generator(generator.tokenizer, generator.text, generator.gpt)
    with pytest.raises(ValueError, match="needs a rerank function"):
        alone.draw(TWO[:1], [1], several)


@pytest.mark.parametrize(
    ("part", "says"),
    [("gpt", "codes would be drawn"), ("tokenizer", "codes are decoded"), ("clip", "pictures are chosen")],
)
def test_weights_so_great_that_nothing_is_a_number_any_more_draw_nothing(
    generator: Generator, bundle: Path, part: str, says: str
) -> None:
    clip = load_judge(bundle / "text")
    for weight in (clip.model if part == "clip" else getattr(generator, part)).parameters():
        weight.requires_grad_(False).fill_(1e38)
    spoiled = Generator(generator.tokenizer, generator.text, generator.gpt, lambda: clip)
    with pytest.raises(Diverged, match=f"{says} .* no finite number"):
        spoiled.generate(TWO, [1, 2], SamplingConfig(best_of=2))


@pytest.mark.parametrize(
    ("prompt", "says"), [("", "empty"), (" \n", "empty"), ("x" * 1001, "1001 characters; at most 1000")]
)
def test_prompts_that_are_refused(generator: Generator, prompt: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        generator.generate([prompt], [0])


def test_a_prompt_beyond_the_context_loses_its_end_with_a_warning(
    generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        pictures = generator.generate(["red circle " * 40], [0])
    assert len(pictures) == 1
    assert "exceed 24 text tokens" in caplog.text


def test_impossible_settings_are_named(generator: Generator) -> None:
    with pytest.raises(UserError, match="seed -1 is out of range"):
        generator.generate(TWO[:1], [-1])
    bad = SamplingConfig().model_copy(update={"top_p": 0.0})  # as the command line changes settings
    with pytest.raises(UserError, match=r"top_p is 0\.0"):
        generator.generate(TWO[:1], [0], bad)
    with pytest.raises(UserError, match="warmth"):
        checked({"warmth": 1})


def test_what_is_no_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no model"):
        Generator.load(tmp_path, "cpu")
    other = config(tokenizer=config().tokenizer.model_dump() | {"codebook_size": 32})
    folders = write_models(tmp_path / "other", other)
    save_model(bundle / "tokenizer", *load_model(folders["tokenizer"]))
    with pytest.raises(UserError, match="do not belong together"):
        Generator.load(bundle, "cpu")
