"""What is reused when a setting changes."""

import subprocess
import sys
from pathlib import Path

import pytest

from model.config import load_config
from model.errors import UserError
from model.plumbing.assets import Kind
from model.plumbing.steps import MODULES, job, settings


@pytest.mark.parametrize(
    ("kind", "override", "changes"),
    [
        ("clip", "jobs.processes_per_worker=1", False),
        ("clip", "clip.training.log_every=7", False),
        ("clip", "clip.training.steps=7", True),
        ("clip", "clip.training.eval_every=7", True),
        ("clip", "seed=1", True),
        ("tokenizer", "clip.text_width=32", False),
        ("tokenizer", "data.augment.flip=true", True),
        ("transformer", "sampling.cfg_scale=3", False),
        ("transformer", "transformer.dropout=0.5", True),
        ("evaluation", "sampling.cfg_scale=3", True),
    ],
)
def test_a_set_depends_on_what_changes_its_content(kind: Kind, override: str, changes: bool) -> None:
    before, after = load_config("smoke"), load_config("smoke", [override])
    assert (settings(kind, before, "text") != settings(kind, after, "text")) is changes


def test_reader_and_judge_are_different_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_STORE", "s3://b")
    config = load_config("smoke")
    text, judge = (job("clip", "clip", config, "r", {}, role) for role in ("text", "judge"))
    assert text.output != judge.output
    assert (text.module, text.options) == ("model.training.clip", {"role": "text"})


def test_a_pretrained_clip_reads_and_judges_as_one_set() -> None:
    config = load_config("coco256-base")
    assert settings("clip", config, "text") == settings("clip", config, "judge")


@pytest.mark.parametrize(
    ("kind", "override"),
    [
        ("tokenizer", "tokenizer={{kind: pretrained, family: latent-gpt, ref: {}}}"),
        ("tokenizer", "tokenizer.loss.perceptual_weights={}/model.safetensors"),
        ("clip", "clip={{kind: pretrained, weights: {}/model.safetensors}}"),
    ],
)
def test_weights_made_elsewhere_are_known_by_their_content(kind: Kind, override: str, tmp_path: Path) -> None:
    config = load_config("smoke", [override.format(tmp_path)])
    with pytest.raises(UserError, match=r"^(tokenizer\.(ref|loss\.perceptual_weights)|clip\.weights): "):
        settings(kind, config)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    before = settings(kind, config)
    assert settings(kind, config) == before
    weights.write_bytes(b"two")
    assert settings(kind, config) != before


def test_weights_of_a_hub_are_known_by_name() -> None:
    config = load_config("coco256-base")
    assert "content" not in settings("tokenizer", config) | settings("clip", config)


def test_every_kind_has_its_module() -> None:
    for kind in MODULES:
        assert settings(kind, load_config("smoke"), "text")


def test_finding_out_that_there_is_nothing_to_do_needs_no_torch() -> None:
    code = "import model.plumbing.steps, components.launcher, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_vqvae_is_tracked_in_the_experiment_of_its_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_STORE", "s3://b")
    config = load_config("smoke")
    experiments = {
        kind: job(kind, kind, config, "r", {}).tracking.experiment for kind in ("tokenizer", "transformer")
    }
    assert experiments == {"tokenizer": "vqvae-training", "transformer": "latent-gpt-custom-vqvae"}
    alone = load_config("smoke", ["transformer=null"])
    assert job("tokenizer", "tokenizer", alone, "r", {}).tracking.experiment == alone.experiment
