"""Shapes in the nets' signatures are checked while the suite runs (`addopts` in pyproject.toml)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from jaxtyping import TypeCheckError

from model.config import SamplingConfig, TrainingConfig, TransformerConfig, VQVAEConfig
from model.nets import clip, metrics, quantize, sampler
from model.nets.attention import attend
from model.nets.gpt import GPT
from model.nets.tokenizers import Pretrained
from model.nets.vqvae import VQVAE

TRAINING = TrainingConfig(steps=2, batch_size=1, warmup_steps=1)


def gpt() -> GPT:
    config = TransformerConfig(depth=1, width=8, heads=1, training=TRAINING)
    return GPT(config, vocabulary=4, grid=(2, 2), text_width=8)


def vqvae() -> VQVAE:
    return VQVAE(VQVAEConfig(factor=4, width=8, multipliers=[1, 1, 1], blocks=1, training=TRAINING))


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.long)


WRONG: dict[str, Callable[[], object]] = {
    "attention: as many values as keys": lambda: attend(*(zeros(1, 1, n, 4) for n in (2, 3, 5))),
    "gpt: codes are whole numbers": lambda: gpt()(zeros(1, 4)),
    "gpt: a mask for each text": lambda: gpt()(ids(2, 4), zeros(2, 3, 8), zeros(1, 3).bool()),
    "sampler: a seed for each row": lambda: sampler.draw(
        zeros(3, 4), SamplingConfig(), ids(2), 0, sampler.noise_keys(4)
    ),
    "clip: ids are a batch": lambda: clip.text_mask(ids(5)),
    "metrics: pictures of one size": lambda: metrics.psnr(zeros(1, 3, 8, 8), zeros(1, 3, 8, 4)),
    "quantize: latents as wide as codes": lambda: quantize.nearest_codes(zeros(5, 3), zeros(7, 2)),
    "tokenizers: codes are a grid": lambda: Pretrained(zeros(4, 2)).decode(ids(1, 4)),
    "vqvae: pictures have three channels": lambda: vqvae().encode(zeros(1, 1, 8, 8)),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_shape_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(TypeCheckError):
        call()
