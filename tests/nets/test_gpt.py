"""The transformer: shapes, causality, conditioning, and equality with Hugging Face's GPT-2."""

from __future__ import annotations

import pytest
import torch

from model.config import TrainingConfig, TransformerConfig
from model.errors import UserError
from model.nets.attention import _attend_one, attend
from model.nets.gpt import GPT, build, load_gpt

TRAINING = TrainingConfig(steps=10, batch_size=4, warmup_steps=1)


def tiny(**changes: object) -> GPT:
    """A transformer of a few thousand random weights (the zero head would hide mistakes)."""
    torch.manual_seed(0)
    values = {"depth": 2, "width": 32, "heads": 4, "training": TRAINING} | changes
    if values.get("arch") == "gpt2":
        values |= {"mlp": "gelu", "positions": "learned", "qk_norm": False}
    gpt = GPT(TransformerConfig(**values), vocabulary=24, grid=(3, 4), text_width=20).eval()
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return gpt


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, text states and a mask with padding."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(24, (batch, 12), generator=generator)
    text = torch.randn(batch, 5, 20, generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 2, 3] * batch)[:batch, None]
    return codes, text, mask


ARCHITECTURES = pytest.mark.parametrize(
    "changes",
    [{}, {"arch": "gpt2"}, {"mlp": "gelu", "positions": "learned"}, {"qk_norm": False}],
    ids=["modern", "gpt2", "learned", "no-qk-norm"],
)


@ARCHITECTURES
def test_a_code_sees_only_codes_before_it(changes: dict[str, object]) -> None:
    gpt = tiny(**changes)
    codes, text, mask = inputs()
    logits = gpt(codes, text, mask)
    assert logits.shape == (3, 12, 24)
    for t in range(12):
        other = codes.clone()
        other[:, t:] = (other[:, t:] + 7) % 24
        changed = (gpt(other, text, mask) - logits).abs().amax(dim=(0, 2))
        assert changed[: t + 1].max() < 1e-5
        if t < 11:
            assert changed[t + 1] > 1e-4


@ARCHITECTURES
def test_padding_is_not_read_and_text_is(changes: dict[str, object]) -> None:
    gpt = tiny(**changes)
    codes, text, mask = inputs()
    logits = gpt(codes, text, mask)
    noisy = torch.where(mask[..., None], text, 9.0)
    torch.testing.assert_close(gpt(codes, noisy, mask), logits, atol=1e-5, rtol=0)
    assert (gpt(codes, text + 1.0 * torch.randn_like(text), mask) - logits).abs().max() > 1e-3
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = gpt(codes[row : row + 1], text[row : row + 1, :length])
        torch.testing.assert_close(alone, logits[row : row + 1], atol=1e-5, rtol=0)


@ARCHITECTURES
def test_null_text_is_one_thing(changes: dict[str, object]) -> None:
    """None, a dropped row and a row without a real token are the same null text."""
    gpt = tiny(**changes)
    codes, text, mask = inputs()
    null = gpt(codes)
    drop = torch.tensor([True, False, True])
    dropped = gpt(codes, text, mask, drop)
    torch.testing.assert_close(dropped[drop], null[drop], atol=1e-5, rtol=0)
    torch.testing.assert_close(dropped[1], gpt(codes, text, mask)[1], atol=1e-5, rtol=0)
    empty = gpt(codes, text, torch.zeros_like(mask))
    torch.testing.assert_close(empty, null, atol=1e-5, rtol=0)
    assert (dropped[1] - null[1]).abs().max() > 1e-3


def test_gpt2_is_hugging_face_gpt2() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt = tiny(arch="gpt2", depth=3)
    reference = hugging_face_twin(gpt)
    codes, text, mask = inputs()
    shifted = torch.cat([torch.full((3, 1), gpt.vocabulary), codes[:, :-1]], dim=1)
    with torch.no_grad():
        theirs = reference(
            input_ids=shifted,
            encoder_hidden_states=gpt.text_in(text),
            encoder_attention_mask=mask.long(),
        ).logits[..., : gpt.vocabulary]
        ours = gpt(codes, text, mask)
        null = gpt.text_in(gpt.null_text.expand(3, 1, -1))
        theirs_null = reference(input_ids=shifted, encoder_hidden_states=null).logits[..., : gpt.vocabulary]
        ours_null = gpt(codes)
    assert isinstance(reference, GPT2LMHeadModel)
    assert isinstance(reference.config, GPT2Config)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours_null, theirs_null, atol=1e-5, rtol=0)


def hugging_face_twin(gpt: GPT):
    """GPT2LMHeadModel with a `gpt2` GPT's weights; its vocabulary has the start token as last id."""
    from benchmarks.model import hugging_face_twin as twin

    return twin(gpt)


def test_rotary_knows_the_grid_and_order_changes_only_the_order() -> None:
    """Relative geometry: with neither learned positions nor a start token in sight, a shift keeps scores."""
    gpt = tiny()
    codes, text, mask = inputs()
    raster = torch.arange(12)
    torch.testing.assert_close(gpt(codes, text, mask, order=raster), gpt(codes, text, mask))
    per_row = torch.stack([torch.randperm(12) for _ in range(3)])
    mixed = gpt(codes, text, mask, order=per_row)
    for row in range(3):
        alone = gpt(codes[row : row + 1], text[row : row + 1], mask[row : row + 1], order=per_row[row])
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=0)
    # The table's start entry stands at (-1, -1); neighbours across a line's end are one row apart.
    from model.nets.attention import rotate

    def score(query: int, key: int) -> float:
        torch.manual_seed(3)
        qk = torch.randn(1, 1, 2, 1, 8)
        rope = torch.stack([gpt.rope[:, query + 1], gpt.rope[:, key + 1]], dim=1)[:, None, :, None, :]
        q, k = rotate(qk, rope)[0, 0, :, 0]
        return float(q @ k)

    assert score(5, 1) == pytest.approx(score(10, 6), abs=1e-4)  # both: one row up, same column
    assert score(5, 4) == pytest.approx(score(11, 10), abs=1e-4)  # both: one to the left
    assert score(4, 3) != pytest.approx(score(5, 4), abs=1e-3)  # a line's end is no neighbour


def test_a_new_model_knows_nothing() -> None:
    gpt = GPT(tiny().config, vocabulary=24, grid=(3, 4), text_width=20).eval()
    codes, text, mask = inputs()
    assert gpt(codes, text, mask).abs().max() == 0


def test_it_learns_what_the_text_determines() -> None:
    torch.manual_seed(0)
    gpt = GPT(tiny().config, vocabulary=24, grid=(3, 4), text_width=20)
    codes, text, mask = inputs(4)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(gpt(codes, text, mask).flatten(0, 1), codes.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_xl_is_built_without_memory() -> None:
    config = TransformerConfig(depth=36, width=1280, heads=20, training=TRAINING)
    with torch.device("meta"):
        gpt = GPT(config, vocabulary=16384, grid=(32, 32), text_width=768)
    assert gpt.embedding.weight.is_meta
    assert 0.75e9 < gpt.parameter_count() < 1.0e9
    assert gpt.flops_per_token(77) > 6 * 0.75e9


def test_folder_round_trip_and_its_refusals(tmp_path) -> None:
    import json

    from safetensors.torch import save_file

    gpt = tiny()
    codes, text, mask = inputs()
    with pytest.raises(UserError, match=r"config\.json"):
        load_gpt(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(gpt.description()))
    save_file(gpt.state_dict(), tmp_path / "model.safetensors")
    torch.testing.assert_close(load_gpt(tmp_path)(codes, text, mask), gpt(codes, text, mask))
    other = gpt.description()
    other["transformer"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"do not fit GPT: blocks\.2"):
        load_gpt(tmp_path)
    assert build(gpt.description()).parameter_count() == gpt.parameter_count()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ways_to_attend_agree(dtype: torch.dtype, masked: bool) -> None:
    """In training by products, in compiled steps of one query by sums, elsewhere PyTorch's kernel."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    mask = None
    if masked:
        mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 0]], dtype=torch.bool)[
            :, None, None, :
        ]
    exact = attend(q, k, v, mask)
    grads = torch.autograd.grad(
        torch.nn.functional.scaled_dot_product_attention(
            *(leaves := [t.clone().requires_grad_() for t in (q, k, v)]), attn_mask=mask
        ).sum(),
        leaves,
    )
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    learning = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    made = attend(*learning, mask)
    assert made.dtype == dtype
    torch.testing.assert_close(made.float(), exact, **near)
    for ours, theirs in zip(torch.autograd.grad(made.sum(), learning), grads, strict=True):
        torch.testing.assert_close(ours.float(), theirs, **near)
    one = _attend_one(q[:, :, :1].to(dtype), k.to(dtype), v.to(dtype), mask)
    torch.testing.assert_close(one.float(), exact[:, :, :1], **near)
    if mask is not None:
        added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(_attend_one(q[:, :, :1], k, v, added), exact[:, :, :1])
