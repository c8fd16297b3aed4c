"""The CLIP job: roles, losses, resume, and import of a pretrained model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import PretrainedCLIPConfig, RunConfig
from model.nets.clip import load_judge, load_text_encoder
from model.plumbing import assets
from model.plumbing.assets import Kind, Manifest
from model.plumbing.checkpoints import Checkpointer
from model.training import clip
from tests.instances import config, ingest, make, make_in_rank
from tests.ranks import two_ranks

GOLDEN = {  # train/loss of `run_config()`, mean of four steps each
    "text": [3.4453, 2.7737, 2.7729, 2.7727],
    "judge": [3.6717, 2.7721, 2.7635, 2.7439],
}


def run_config(**training: object) -> RunConfig:
    """Shapes of 16 px and a CLIP of a few thousand weights (beside its vocabulary)."""
    return config(
        clip={
            "kind": "trained", "embed_dim": 16, "text_width": 32, "text_layers": 1, "text_heads": 2,
            "context_length": 24, "vision_width": 32, "vision_layers": 1, "patch_size": 8,
            "training": {
                "steps": 16, "batch_size": 16, "warmup_steps": 2, "learning_rate": 5e-3, "ema": 0.5,
                "log_every": 4, "eval_every": 8, "checkpoint_every": 6, **training,
            },
        }
    )  # fmt: skip


def fit(run: RunConfig, images: Manifest, kind: Kind) -> Manifest:
    """Train here, without MLflow."""
    return make(kind, run, {"images": images})


def history(made: Manifest) -> dict[str, list[list[float]]]:
    return json.loads((Path(made.uri) / "history.json").read_text())


def test_roles_are_two_models_that_load_through_one_door(store: str) -> None:
    run = run_config()
    images = ingest(run.data)
    text, judge = fit(run, images, "text"), fit(run, images, "judge")
    assert text.uri != judge.uri
    assert "retrieval" in text.info
    assert "retrieval_seen" in judge.info
    for made in (text, judge):
        losses = [value for _, value in history(made)["train/loss"]]
        assert losses[-1] < losses[0]
        assert losses == pytest.approx(GOLDEN[made.kind], abs=1e-2)
    encoder = load_text_encoder(text.uri)
    states, mask = encoder.encode(encoder.tokenize(["a red circle"]))
    assert states.shape == (1, 24, 32)
    assert mask.sum() == 5
    judge_features = load_judge(judge.uri).text_features(["a red circle"])
    assert (judge_features - load_judge(text.uri).text_features(["a red circle"])).abs().max() > 1e-3


def test_only_the_judge_sees_held_out_splits(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_config(steps=12, checkpoint_every=100)
    images = ingest(run.data)
    seen: dict[Kind, set[str]] = {"text": set(), "judge": set()}
    real = clip.image_batches
    for role, splits in seen.items():

        def spy(images: Manifest, split: str, *args: object, splits: set[str] = splits):
            for batch in real(images, split, *args):  # type: ignore[arg-type]
                splits.add(split)
                yield batch

        monkeypatch.setattr(clip, "image_batches", spy)
        fit(run, images, role)
    every = {name.split("-")[0] for name in images.info["shards"]}
    assert seen["text"] == {"train"}
    assert {"train", "validation"} <= seen["judge"] <= every


def test_a_killed_job_continues_as_if_nothing_had_happened(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_config()
    images = ingest(run.data)
    begin = Checkpointer.begin

    def begin_and_die(self: Checkpointer, *args: object) -> None:
        begin(self, *args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpointer, "begin", begin_and_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit(run, images, "judge")
    monkeypatch.setattr(Checkpointer, "begin", begin)
    continued = fit(run, images, "judge")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("LATENT_GPT_STORE", str(elsewhere))
    whole = fit(run, ingest(run.data), "judge")
    assert continued.files == whole.files


def test_equal_captions_are_right_answers_for_each_other() -> None:
    torch.manual_seed(0)
    pictures = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    texts = pictures.clone()
    texts[1] = texts[0]
    ids = torch.tensor([[5, 1], [5, 1], [6, 1], [7, 1]])
    scale = torch.tensor(50.0)
    pictures[1] = pictures[0]
    tied = clip.contrastive_loss(pictures, texts, ids, scale)
    apart = clip.contrastive_loss(pictures, texts, torch.arange(4)[:, None], scale)
    assert float(tied) == pytest.approx(0.5 * math.log(2), abs=1e-2)  # two rows of four split in half
    assert float(apart) == pytest.approx(float(tied), abs=1e-2)
    wrong = clip.contrastive_loss(pictures, texts.roll(1, 0), ids, scale)
    assert wrong > 5
    # With distinct captions it is open_clip's loss.
    from open_clip.loss import ClipLoss

    images, captions = torch.nn.functional.normalize(torch.randn(2, 6, 8), dim=-1)
    ours = clip.contrastive_loss(images, captions, torch.arange(6)[:, None], scale)
    torch.testing.assert_close(ours, ClipLoss()(images, captions, scale))


@pytest.mark.slow
def test_two_processes_contrast_with_all_pictures_of_the_batch(store: str, tmp_path: Path) -> None:
    """Features gathered from both, gradients sent back: the curve of one process with the whole batch."""
    run = run_config(checkpoint_every=100)
    images = ingest(run.data)
    one = history(fit(run, images, "text"))
    other = tmp_path / "other"
    shutil.copytree(Path(store) / "images", other / "images")
    there = images.uri.replace(store, str(other))
    two_ranks(make_in_rank, str(other), "text", run.model_dump_json(), {"images": there})
    (made,) = (other / "text").iterdir()
    two = history(assets.load(str(made)))
    assert np.allclose(two["train/loss"], one["train/loss"], atol=1e-3)
    assert np.allclose(two["validation/retrieval"], one["validation/retrieval"], atol=0.1)


def test_a_pretrained_model_is_imported_as_an_asset(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip
    from safetensors.torch import save_file

    from model.nets.clip import build_clip

    small = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", small)
    save_file(dict(build_clip({"architecture": small}).state_dict()), tmp_path / "vit.safetensors")
    pretrained = PretrainedCLIPConfig(name="ViT-B-32", weights=str(tmp_path / "vit.safetensors"))
    run = run_config().model_copy(update={"clip": pretrained})
    images = ingest(run.data)
    made = make("text", run, {"images": images})
    assert load_text_encoder(made.uri).width == 32
    assert load_judge(made.uri).image_features(torch.zeros(1, 3, 16, 16)).shape == (1, 16)
