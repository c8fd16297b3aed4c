"""Text encoder and judge: masks, states, caching, limits, and the words a person gets when weights lack."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.config import PretrainedCLIPConfig, TrainedCLIPConfig, TrainingConfig
from model.errors import UserError
from model.nets.clip import (
    END,
    START,
    TextEncoder,
    architecture,
    build_clip,
    import_pretrained,
    load_judge,
    load_text_encoder,
    text_mask,
    tokenize,
)

CONFIG = TrainedCLIPConfig(
    embed_dim=16,
    text_width=24,
    text_layers=2,
    text_heads=2,
    context_length=12,
    vision_width=32,
    vision_layers=1,
    patch_size=8,
    training=TrainingConfig(steps=2, batch_size=2, warmup_steps=1),
)
DESCRIPTION = {
    "architecture": architecture(CONFIG, image_size=16),
    "preprocess": {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `text` asset's folder with random weights."""
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = build_clip(DESCRIPTION)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path / "model.safetensors"
    )
    (path / "config.json").write_text(json.dumps(DESCRIPTION))
    return path


def test_tokens_are_open_clips() -> None:
    import open_clip

    captions = ["a red circle", "", "Größe & 日本 🍎", "one two three " * 20]
    expected = open_clip.SimpleTokenizer(context_length=12)(captions)
    assert torch.equal(tokenize(captions, 12), expected)


def test_long_captions_lose_their_end_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ids = tokenize(["word " * 50, "short", "other " * 50], 12)
    assert ids.shape == (3, 12)
    assert ids[0, -1] == END
    (record,) = caplog.records
    assert "2 of 3 captions exceed 12" in record.getMessage()


def test_mask_ends_with_the_caption_and_is_empty_for_an_empty_one() -> None:
    ids = tokenize(["a red circle", "", "cat"], 12)
    assert ids[0, :5].tolist()[0] == START
    assert text_mask(ids).sum(dim=1).tolist() == [5, 0, 3]


def test_states_are_the_towers_before_projection(folder: Path) -> None:
    """Projecting the state at the end token gives open_clip's own text features."""
    encoder = load_text_encoder(folder)
    judge = load_judge(folder)
    captions = ["a red circle", "two blue squares", "cat"]
    states, mask = encoder.encode(encoder.tokenize(captions))
    assert states.shape == (3, 12, 24) == (3, encoder.context_length, encoder.width)
    last = states[torch.arange(3), mask.sum(dim=1) - 1]
    features = torch.nn.functional.normalize(last @ judge.model.text_projection, dim=-1)
    torch.testing.assert_close(features, judge.text_features(captions))


def test_states_of_real_tokens_do_not_depend_on_padding_or_neighbours(folder: Path) -> None:
    encoder = load_text_encoder(folder)
    ids = encoder.tokenize(["a red circle", "two blue squares"])
    together, mask = encoder.encode(ids)
    noisy = ids.clone()
    noisy[:, 8:] = 77  # behind the end token
    other, _ = TextEncoder(judge_model(folder)).encode(noisy)
    torch.testing.assert_close(other[mask], together[mask])


def judge_model(folder: Path) -> torch.nn.Module:
    return load_judge(folder).model


def test_states_are_computed_once_per_caption_and_few_are_kept(folder: Path) -> None:
    encoder = TextEncoder(judge_model(folder), cached=2)
    calls: list[int] = []
    encoder._tower.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    a, b, c = (encoder.tokenize([word]) for word in ("ape", "bee", "cat"))
    first, _ = encoder.encode(torch.cat([a, a, b]))
    assert calls == [1, 1]
    again, _ = encoder.encode(torch.cat([a, b]))
    assert calls == [1, 1]
    torch.testing.assert_close(again, first[1:], rtol=0, atol=0)
    encoder.encode(c)  # pushes out a, used longest ago
    encoder.encode(b)
    assert calls == [1, 1, 1]
    encoder.encode(a)
    assert calls == [1, 1, 1, 1]
    every = encoder.encode(torch.cat([a, b, c]))[0]  # more captions than are kept
    assert every.shape[0] == 3


def test_states_do_not_depend_on_the_batch_to_the_last_bit(folder: Path) -> None:
    ids = load_text_encoder(folder).tokenize([f"{number} cats" for number in range(9)])
    together, _ = load_text_encoder(folder).encode(ids)
    alone = load_text_encoder(folder)
    assert torch.equal(torch.cat([alone.encode(row[None])[0] for row in ids]), together)


def test_precision_is_the_one_that_the_asset_names(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(DESCRIPTION | {"precision": "bf16"}))
    encoder = load_text_encoder(tmp_path)
    states, _ = encoder.encode(encoder.tokenize(["cat"]))
    exact, _ = load_text_encoder(folder).encode(encoder.tokenize(["cat"]))
    assert states.dtype == torch.bfloat16
    torch.testing.assert_close(states[:, :3].float(), exact[:, :3], atol=0.1, rtol=0.1)


def test_judge_gives_unit_vectors_at_any_size(folder: Path) -> None:
    judge = load_judge(folder)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    features = judge.image_features(images)
    assert features.shape == (3, 16)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(judge.model.encode_image(images, normalize=True), features)  # mean and std ½
    large = torch.nn.functional.interpolate(images, scale_factor=2, mode="nearest")
    assert judge.image_features(large).shape == (3, 16)
    assert judge.text_features(["a", "b"]).shape == (2, 16)
    assert judge.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(DESCRIPTION))
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        load_text_encoder(tmp_path)
    save_file({"positional_embedding": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="do not fit"):
        load_judge(tmp_path)


def test_pretrained_weights_come_from_a_file_or_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    small = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", small)
    path = tmp_path / "vit.safetensors"
    torch.manual_seed(1)
    weights = build_clip({"architecture": small}).state_dict()
    save_file(dict(weights), path)
    model, description = import_pretrained(PretrainedCLIPConfig(name="ViT-B-32", weights=str(path)))
    torch.testing.assert_close(dict(model.state_dict()), dict(weights))
    assert description["preprocess"]["mean"][0] == pytest.approx(0.48145466)
    assert description["precision"] == "fp32"
    with pytest.raises(UserError, match=r"neither a tag .* nor a \.safetensors"):
        import_pretrained(PretrainedCLIPConfig(name="ViT-B-32", weights="openia"))
    with pytest.raises(UserError, match=r"cannot be read .*HF_HOME"):
        import_pretrained(PretrainedCLIPConfig(name="ViT-B-32", weights=str(tmp_path / "no.safetensors")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be had here .*HF_HOME.*clip\.kind: trained"):
        import_pretrained(PretrainedCLIPConfig(name="ViT-B-32", weights="laion2b_s34b_b79k"))


def test_foreign_architectures_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="no open_clip architecture"):
        import_pretrained(PretrainedCLIPConfig(name="ViT-Z-99"))
    with pytest.raises(UserError, match="text tower or tokenizer of its own"):
        import_pretrained(PretrainedCLIPConfig(name="ViT-B-16-SigLIP", weights="webli"))
