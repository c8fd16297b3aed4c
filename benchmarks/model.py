"""Rows 1 to 3: generation and training of the transformer beside Hugging Face's GPT-2 of the same weights.

`arch: gpt2`, so that both compute the same: a row whose tokens or losses differ fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor, LogitsProcessorList

from benchmarks.harness import FLOOR, Part, Row, compare, copy_bandwidth, gemm_rate
from model.config import SamplingConfig, TrainingConfig, TransformerConfig
from model.nets.compiled import CompiledSampler
from model.nets.gpt import GPT
from model.nets.sampler import Sampler
from model.training.optim import adamw

TEXT = 77  # states of a caption, unpadded
SCALE = 2.0  # of guidance
STEPS = 4  # of training, timed together
Size = tuple[int, int, int, int, int]  # depth, width, heads, codes, side of the grid
TINY: Size = (8, 256, 8, 1024, 16)
SMALL: Size = (12, 768, 12, 16384, 16)
SMALL_LONG: Size = (12, 768, 12, 16384, 32)
MEDIUM: Size = (24, 1024, 16, 16384, 16)
LARGE: Size = (36, 1280, 20, 16384, 16)


# ── rows 1 and 2 ────────────────────────────────────────────────────────────────────────────────────────


def _generation(
    number: int,
    size: Size,
    batch: int,
    guided: bool,
    compiled: bool,
    goals: dict[str, float],
) -> Part:
    what = f"{size[0]} x {size[1]}, batch {batch}{', guided' if guided else ''}"
    work = f"generate {size[4] ** 2} tokens, {what}{', compiled' if compiled else ''}"
    measure = partial(_generate, number, work, size, batch, guided, compiled, goals)
    return Part(work, measure, later=size == LARGE)


def _generate(
    number: int,
    work: str,
    size: Size,
    batch: int,
    guided: bool,
    compiled: bool,
    goals: dict[str, float],
    device: torch.device,
) -> Iterator[Row]:
    gpt = random_gpt(size, device)
    if device.type == "cuda":
        gpt = gpt.bfloat16()
    twin = hugging_face_twin(gpt).to(gpt.embedding.weight.dtype)
    text = torch.randn(batch, TEXT, gpt.text_width, device=device, dtype=gpt.embedding.weight.dtype)
    config = SamplingConfig(temperature=0, cfg_scale=SCALE if guided else 1)
    sampler = CompiledSampler(gpt) if compiled else Sampler(gpt)
    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: sampler(text, None, config, range(batch)),
        "transformers": lambda: twin_generate(gpt, twin, text, guided),
    }
    # In bf16 a rounding decides between codes that are nearly equal, after which pictures differ.
    same = torch.equal if gpt.embedding.weight.dtype == torch.float32 else (lambda a, b: a.shape == b.shape)
    comparison = compare(ways, device, warmup=1, rounds=3, same=same)
    rows = batch * (2 if guided else 1)
    yield comparison.row(
        number,
        work,
        amount=batch * gpt.tokens,
        unit="tokens/s",
        goals=goals,
        floor=batch / step_floor(gpt, rows, device),
    )


def step_floor(gpt: GPT, rows: int, device: torch.device) -> float:
    """Least seconds of a step: its weights and caches read once, or its operations done."""
    weight = gpt.embedding.weight
    config = gpt.config
    weights = sum(p.numel() for p in gpt.blocks.parameters()) + weight.numel()
    weights -= sum(p.numel() for block in gpt.blocks for p in block.cross.kv.parameters())
    cache = rows * 2 * config.depth * config.width * (gpt.tokens // 2 + TEXT)
    moved = (weights + cache) * weight.element_size()
    operations = 2 * rows * weights + 2 * cache
    return max(moved / copy_bandwidth(device), operations / gemm_rate(weight.dtype, device))


class Guidance(LogitsProcessor):  # type: ignore[misc]
    """Classifier-free guidance over rows [text; null]: both halves get the same scores."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        with_text, without = scores.chunk(2)
        guided = torch.lerp(without, with_text, SCALE)
        return guided.nan_to_num(nan=-torch.inf).repeat(2, 1)  # the suppressed start token is -inf - -inf


@torch.no_grad()
def twin_generate(gpt: GPT, twin: GPT2LMHeadModel, text: Tensor, guided: bool) -> Tensor:
    """Hugging Face's `generate` with its cache, greedy: codes (B, T)."""
    states = gpt.text_in(text)
    if guided:
        null = gpt.text_in(gpt.null_text).expand_as(states)
        states = torch.cat([states, null])
    rows = len(states)
    start = torch.full((rows, 1), gpt.vocabulary, device=text.device)
    codes = twin.generate(
        start,
        attention_mask=torch.ones_like(start),
        encoder_hidden_states=states,
        max_new_tokens=gpt.tokens,
        do_sample=False,
        use_cache=True,
        suppress_tokens=[gpt.vocabulary],
        logits_processor=LogitsProcessorList([Guidance()] if guided else []),
    )
    return codes[: len(text), 1:]


# ── row 3 ───────────────────────────────────────────────────────────────────────────────────────────────


def _training(size: Size, batch: int, dtype: torch.dtype, goals: dict[str, float]) -> Part:
    name = "fp32" if dtype == torch.float32 else "bf16"
    work = f"training step, {size[0]} x {size[1]}, {batch} x {size[4] ** 2} tokens, {name}"
    measure = partial(_train, work, size, batch, dtype, goals)
    return Part(work, measure, later=size in (MEDIUM, LARGE))


def _train(
    work: str, size: Size, batch: int, dtype: torch.dtype, goals: dict[str, float], device: torch.device
) -> Iterator[Row]:
    """Forward, backward, fused AdamW."""
    gpt = random_gpt(size, device).train()
    twin = hugging_face_twin(gpt).train()
    compiled_twin = hugging_face_twin(gpt).train()
    text = torch.randn(batch, TEXT, gpt.text_width, device=device)
    codes = torch.randint(gpt.vocabulary, (batch, gpt.tokens), device=device)
    inputs = F.pad(codes[:, :-1], (1, 0), value=gpt.vocabulary)

    def steps(module: nn.Module, logits: Callable[[], Tensor]) -> Callable[[], Tensor]:
        optimizer = adamw(module, gpt.config.training)

        def run() -> Tensor:
            """Some steps in a row, as a single one would pay for its neighbours; the loss of the first."""
            losses = []
            for _ in range(STEPS):
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss = F.cross_entropy(logits().float().flatten(0, 1), codes.flatten())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            return losses[0]

        return run

    def theirs(module: GPT2LMHeadModel, call: Any) -> Callable[[], Tensor]:
        # Their cross-attention takes states of the decoder's width: ours learns the projection as well.
        states = gpt.text_in(text).detach()
        return lambda: call(input_ids=inputs, encoder_hidden_states=states).logits[..., : gpt.vocabulary]

    ours = torch.compile(gpt)
    ways = {
        "ours": steps(gpt, lambda: ours(codes, text)),
        "transformers": steps(twin, theirs(twin, twin)),
        "transformers compiled": steps(compiled_twin, theirs(compiled_twin, torch.compile(compiled_twin))),
    }
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    comparison = compare(
        ways, device, warmup=1, rounds=5, same=lambda a, b: abs(float(a) - float(b)) < tolerance
    )
    yield comparison.row(
        3,
        work,
        amount=STEPS * batch * gpt.tokens,
        unit="tokens/s",
        goals=goals,
        floor=gemm_rate(dtype, device) / gpt.flops_per_token(TEXT),
    )


# ── what both rows need ─────────────────────────────────────────────────────────────────────────────────


def random_gpt(size: Size, device: torch.device) -> GPT:
    """An `arch: gpt2` model with weights that make codes depend on codes and text."""
    depth, width, heads, vocabulary, side = size
    training = TrainingConfig(steps=1000, batch_size=8)
    config = TransformerConfig(
        arch="gpt2", depth=depth, width=width, heads=heads, mlp="gelu", positions="learned", qk_norm=False,
        training=training,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        return GPT(config, vocabulary, (side, side), 768).eval()


def hugging_face_twin(gpt: GPT, dropout: float = 0.0) -> GPT2LMHeadModel:
    """GPT2LMHeadModel with the weights of an `arch: gpt2` model, where that is; start is its last token."""
    config = GPT2Config(
        vocab_size=gpt.vocabulary + 1,
        n_positions=gpt.tokens,
        n_embd=gpt.config.width,
        n_layer=gpt.config.depth,
        n_head=gpt.config.heads,
        add_cross_attention=True,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=gpt.vocabulary,
        eos_token_id=None,
        pad_token_id=gpt.vocabulary,
    )
    with gpt.embedding.weight.device:
        twin = GPT2LMHeadModel(config).eval()

    def linear(theirs: nn.Module, ours: nn.Linear) -> None:
        theirs.weight.copy_(ours.weight.T)  # their Conv1D keeps (in, out)
        theirs.bias.copy_(ours.bias)

    def norm(theirs: nn.LayerNorm, ours: nn.LayerNorm) -> None:
        theirs.load_state_dict(ours.state_dict())

    with torch.no_grad():
        twin.transformer.wte.weight.copy_(gpt.embedding.weight)
        twin.transformer.wpe.weight.copy_(gpt.position.weight)
        norm(twin.transformer.ln_f, gpt.norm)
        for theirs, ours in zip(twin.transformer.h, gpt.blocks, strict=True):
            norm(theirs.ln_1, ours.norms[0])
            norm(theirs.ln_cross_attn, ours.norms[1])
            norm(theirs.ln_2, ours.norms[2])
            linear(theirs.attn.c_attn, ours.attention.qkv)
            linear(theirs.attn.c_proj, ours.attention.out)
            linear(theirs.crossattention.q_attn, ours.cross.q)
            linear(theirs.crossattention.c_attn, ours.cross.kv)
            linear(theirs.crossattention.c_proj, ours.cross.out)
            linear(theirs.mlp.c_fc, ours.mlp.up)
            linear(theirs.mlp.c_proj, ours.mlp.down)
    return twin


ROWS = {
    1: [
        _generation(1, TINY, 1, False, False, {"transformers": 1.4}),
        _generation(1, TINY, 1, False, True, {"transformers": 3.3, FLOOR: 0.45}),
        _generation(1, TINY, 1, True, False, {"transformers": 1.4}),
        _generation(1, TINY, 1, True, True, {"transformers": 3.3, FLOOR: 0.45}),
    ],
    2: [
        _generation(2, TINY, 16, False, False, {"transformers": 1.4}),
        _generation(2, TINY, 16, False, True, {"transformers": 1.4}),
    ],
    3: [
        _training(TINY, 8, torch.float32, {"transformers": 1.2, "transformers compiled": 1.0, FLOOR: 0.75}),
        _training(TINY, 8, torch.bfloat16, {FLOOR: 0.5}),
    ],
}
GPU_ROWS = {
    1: [
        _generation(1, SMALL, 1, False, True, {"transformers": 8.0, FLOOR: 0.25}),
        _generation(1, SMALL, 1, True, True, {"transformers": 8.0, FLOOR: 0.25}),
        _generation(1, LARGE, 1, False, True, {"transformers": 5.0, FLOOR: 0.45}),
        _generation(1, LARGE, 1, True, True, {"transformers": 5.0, FLOOR: 0.45}),
    ],
    2: [
        _generation(2, size, batch, True, True, {"transformers": 2.0, FLOOR: 0.5})
        for size in (SMALL, LARGE)
        for batch in (8, 64)
    ],
    3: [
        # Shares of the floor: 620, 209 and 101 thousand tokens/s of an H200 that multiplies at 790 TFLOP/s.
        _training(SMALL, 64, torch.bfloat16, {"transformers compiled": 1.2, FLOOR: 0.57}),
        _training(SMALL_LONG, 16, torch.bfloat16, {"transformers compiled": 1.2}),
        _training(MEDIUM, 32, torch.bfloat16, {"transformers compiled": 1.2, FLOOR: 0.63}),
        _training(LARGE, 16, torch.bfloat16, {"transformers compiled": 1.2, FLOOR: 0.69}),
    ],
}
