"""The sampler against a naive loop: same logits, same greedy tokens, same distribution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from model.config import SamplingConfig, TrainingConfig, TransformerConfig
from model.errors import Diverged
from model.nets.attention import StaticCache
from model.nets.gpt import GPT
from model.nets.sampler import AHEAD, Sampler, candidate_seed, draw, guidance, gumbel, noise_keys, sample

TRAINING = TrainingConfig(steps=10, batch_size=4, warmup_steps=1)
GREEDY = SamplingConfig(temperature=0, cfg_scale=1)


def tiny(
    arch: str = "modern", grid: tuple[int, int] = (3, 4), vocabulary: int = 24, spread: float = 0.3
) -> GPT:
    """Random weights, large enough that texts and codes matter."""
    torch.manual_seed(0)
    extra = {"mlp": "gelu", "positions": "learned", "qk_norm": False} if arch == "gpt2" else {}
    config = TransformerConfig(arch=arch, depth=2, width=32, heads=4, training=TRAINING, **extra)
    gpt = GPT(config, vocabulary=vocabulary, grid=grid, text_width=20).eval()
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return gpt


def texts(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 5, 20, generator=generator), torch.arange(5) < torch.tensor(
        [5, 2, 3, 1] * batch
    )[:batch, None]


@torch.no_grad()
def naive_greedy(gpt: GPT, text: torch.Tensor | None, mask: torch.Tensor | None, scale: float, batch: int):
    """A full forward pass per token, two per token under guidance."""
    codes = torch.zeros(batch, gpt.tokens, dtype=torch.long)
    for t in range(gpt.tokens):
        logits = gpt(codes, text, mask)[:, t]
        if scale != 1:
            null = gpt(codes)[:, t]
            logits = null + scale * (logits - null)
        codes[:, t] = logits.argmax(-1)
    return codes


@pytest.mark.parametrize("arch", ["modern", "gpt2"])
def test_cached_logits_equal_uncached(arch: str) -> None:
    gpt = tiny(arch)
    text, mask = texts()
    codes = torch.randint(24, (3, 12))
    with torch.no_grad():
        full = gpt(codes, text, mask)
        inputs = torch.cat([torch.full((3, 1), 24), codes[:, :-1]], dim=1)
        context = gpt.read(text, mask)
        cache = gpt.cache(3)
        ahead = gpt.decode(inputs[:, :5], context, cache=cache)  # a prefix in one pass
        steps = [ahead]
        for t in range(5, 12):
            cache.at = t
            steps.append(gpt.decode(inputs[:, t : t + 1], context, cache=cache))
        torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-5, rtol=0)
        static = StaticCache(gpt.cache(3), torch.tensor(0), span=12)
        masked = []
        for t in range(12):
            static.at.fill_(t)
            masked.append(gpt.decode(inputs[:, t : t + 1], context, cache=static))
        torch.testing.assert_close(torch.cat(masked, dim=1), full, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ["modern", "gpt2"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_greedy_is_the_naive_loop(arch: str, scale: float) -> None:
    gpt = tiny(arch)
    text, mask = texts()
    config = SamplingConfig(temperature=0, cfg_scale=scale)
    codes = sample(gpt, text, mask, config, seeds=[0, 1, 2])
    assert torch.equal(codes, naive_greedy(gpt, text, mask, scale, 3))
    assert len({tuple(row) for row in codes.tolist()}) > 1  # texts matter


def test_without_text_is_the_null_text_exactly() -> None:
    gpt = tiny()
    text, mask = texts()
    plain = SamplingConfig(cfg_scale=1)
    null = sample(gpt, None, None, plain, seeds=[4, 5, 6])
    assert torch.equal(null, sample(gpt, text, torch.zeros_like(mask), plain, seeds=[4, 5, 6]))
    assert torch.equal(null, sample(gpt, text, mask, SamplingConfig(cfg_scale=0), seeds=[4, 5, 6]))
    assert torch.equal(null, sample(gpt, None, None, SamplingConfig(cfg_scale=3), seeds=[4, 5, 6]))
    assert not torch.equal(null, sample(gpt, text, mask, plain, seeds=[4, 5, 6]))


def test_guidance_one_is_plain_conditional() -> None:
    """Guidance 1 through the guided path (a schedule that only ends elsewhere) and without it."""
    gpt = tiny()
    text, mask = texts()
    plain = sample(gpt, text, mask, SamplingConfig(cfg_scale=1), seeds=[1, 2, 3])
    nearly = sample(gpt, text, mask, SamplingConfig(cfg_scale=1 + 1e-7), seeds=[1, 2, 3])
    assert torch.equal(plain, nearly)
    naive = naive_greedy(gpt, text, mask, 1.0, 3)
    assert torch.equal(sample(gpt, text, mask, GREEDY, seeds=[1, 2, 3]), naive)


def test_power_cosine_rises_from_one_to_the_scale() -> None:
    schedule = guidance(SamplingConfig(cfg_scale=4, cfg_schedule="power-cosine"), 64)
    assert schedule[0] == 1
    assert schedule[-1] == 4
    assert all(a < b for a, b in itertools.pairwise(schedule))
    assert guidance(SamplingConfig(cfg_scale=4), 3) == [4, 4, 4]


def test_a_seed_is_a_picture_whatever_the_batch() -> None:
    gpt = tiny()
    text, mask = texts(4)
    config = SamplingConfig(temperature=0.9, top_k=12, top_p=0.95, cfg_scale=2)
    together = sample(gpt, text, mask, config, seeds=[7, 8, 9, 10])
    for row in range(4):
        alone = sample(gpt, text[row : row + 1], mask[row : row + 1], config, seeds=[7 + row])
        assert torch.equal(alone[0], together[row])
    swapped = sample(gpt, text.flip(0), mask.flip(0), config, seeds=[10, 9, 8, 7])
    assert torch.equal(swapped.flip(0), together)
    assert not torch.equal(sample(gpt, text, mask, config, seeds=[17, 18, 19, 20]), together)


def exact_distribution(gpt: GPT, text: torch.Tensor, mask: torch.Tensor, config: SamplingConfig):
    """Probability of every two-token picture, filtered code by code in plain Python."""

    def filtered(logits: torch.Tensor) -> list[float]:
        p = (logits.double() / config.temperature).softmax(-1).tolist()
        ranked = sorted(range(len(p)), key=lambda code: -p[code])
        if config.top_k:
            ranked = ranked[: config.top_k]
        total = sum(p[code] for code in ranked)
        kept, mass = [], 0.0
        for code in ranked:
            if mass >= config.top_p:
                break
            kept.append(code)
            mass += p[code] / total
        total = sum(p[code] for code in kept)
        return [p[code] / total if code in kept else 0.0 for code in range(len(p))]

    K = gpt.vocabulary
    with torch.no_grad():
        pairs = torch.tensor([[a, 0] for a in range(K)])
        logits = gpt(pairs, text.expand(K, -1, -1), mask.expand(K, -1))
        null = gpt(pairs)
        logits = null + config.cfg_scale * (logits - null)
    first = filtered(logits[0, 0])
    return torch.tensor([[first[a] * p for p in filtered(logits[a, 1])] for a in range(K)])


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(cfg_scale=1),
        SamplingConfig(cfg_scale=2, temperature=0.7),
        SamplingConfig(cfg_scale=1, top_k=3),
        SamplingConfig(cfg_scale=1.5, top_p=0.8, temperature=1.3),
        SamplingConfig(cfg_scale=1, top_k=5, top_p=0.7),
    ],
    ids=["plain", "guided", "top-k", "top-p", "both"],
)
def test_the_distribution_is_the_naive_one(config: SamplingConfig) -> None:
    """Chi-square over all 64 pictures of two tokens; 5 standard deviations of the statistic allowed."""
    gpt = tiny(grid=(1, 2), vocabulary=8, spread=0.2)
    text, mask = texts(1)
    n = 20_000
    expected = exact_distribution(gpt, text, mask, config).flatten() * n
    codes = sample(gpt, text.expand(n, -1, -1), mask.expand(n, -1), config, seeds=range(n))
    observed = torch.bincount(codes[:, 0] * 8 + codes[:, 1], minlength=64).double()
    assert observed[expected == 0].sum() == 0
    frequent = expected >= 5
    rest = torch.tensor([observed[~frequent].sum(), expected[~frequent].sum()])
    chi2 = ((observed - expected)[frequent] ** 2 / expected[frequent]).sum()
    if rest[1] > 0:
        chi2 += (rest[0] - rest[1]) ** 2 / rest[1]
    freedom = int(frequent.sum())
    assert freedom >= 8
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5, (float(chi2), freedom)


def test_noise_is_gumbel_and_independent_across_its_three_counters() -> None:
    keys = noise_keys(1000)
    noise = gumbel(torch.arange(200), 3, keys)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.05)
    other = gumbel(torch.arange(200), 4, keys)
    shifted = gumbel(torch.arange(1, 201), 3, keys)
    for a, b in [(noise, other), (noise, shifted), (noise[:, 1:], noise[:, :-1])]:
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01
    few = noise_keys(50)
    assert torch.equal(gumbel(torch.tensor([5]), torch.tensor(3), few), gumbel(torch.tensor([5]), 3, few))


def test_noise_is_finite_where_all_its_bits_are_set() -> None:
    """Half a step above the largest of 24 bits fp32 rounds to 1; this is a draw of seed 1234 that met it."""
    K, code = 16384, 8449
    noise = gumbel(torch.tensor([1234]), 29, noise_keys(K))
    assert noise.isfinite().all()
    assert noise[0, code] == noise.max() == pytest.approx(16.6, abs=0.1)
    logits = torch.full((1, K), -60.0)
    logits[0, :2] = 60.0
    for config in (SamplingConfig(), SamplingConfig(top_k=2), SamplingConfig(top_p=0.9)):
        assert draw(logits, config, torch.tensor([1234]), 29, noise_keys(K)) in (0, 1)


def test_a_prefix_is_kept_and_continued_as_if_drawn() -> None:
    gpt = tiny()
    text, mask = texts()
    config = SamplingConfig(cfg_scale=2)
    whole = sample(gpt, text, mask, config, seeds=[1, 2, 3])
    assert torch.equal(sample(gpt, text, mask, config, seeds=[1, 2, 3], prefix=whole[:, :5]), whole)
    other = sample(gpt, text, mask, config, seeds=[9, 9, 9], prefix=whole[:, :5])
    assert torch.equal(other[:, :5], whole[:, :5])
    with pytest.raises(ValueError, match="prefix"):
        sample(gpt, text, mask, config, seeds=[1, 2, 3], prefix=whole)


def test_tokens_are_streamed_in_order() -> None:
    gpt = tiny()
    text, mask = texts()
    seen: list[tuple[int, list[int]]] = []
    codes = sample(
        gpt, text, mask, GREEDY, [0, 0, 0], on_token=lambda t, drawn: seen.append((t, drawn.tolist()))
    )
    assert [t for t, _ in seen] == list(range(12))
    assert torch.equal(torch.tensor([drawn for _, drawn in seen]).T, codes)


@pytest.mark.parametrize("grid", [(1, 3), (5, 7), (6, 12)], ids=["below a window", "two windows", "many"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0},
        {"cfg_scale": 3, "cfg_schedule": "power-cosine"},
        {"top_k": 3, "temperature": 0.5},
        {"top_p": 0.8},
    ],
    ids=["plain", "greedy", "guided", "top-k", "top-p"],
)
def test_a_single_picture_is_drawn_ahead_and_is_the_same(
    changes: dict[str, object], grid: tuple[int, int]
) -> None:
    """Beside others a picture is drawn code by code; alone in windows that are guessed and checked."""
    gpt = tiny(grid=grid)
    text, mask = texts()
    config = SamplingConfig(**({"cfg_scale": 1} | changes))
    seen: list[tuple[int, int]] = []

    def on_token(place: int, drawn: torch.Tensor) -> None:
        seen.append((place, int(drawn)))

    for seeds in ([1, 2, 3], [40, 50, 60], [7, 7, 7]):
        together = sample(gpt, text, mask, config, seeds)
        for row, seed in enumerate(seeds):
            one = slice(row, row + 1)
            seen.clear()
            alone = sample(gpt, text[one], mask[one], config, [seed], None, on_token)
            assert torch.equal(alone, together[one])
            assert seen == list(enumerate(alone[0].tolist()))
            prefix = alone[:, : gpt.tokens // 2]
            assert torch.equal(sample(gpt, text[one], mask[one], config, [seed], prefix), alone)


@pytest.mark.parametrize("place", [0, 11], ids=["the first code", "the last code"])
@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["plain", "guided"])
@pytest.mark.parametrize("seeds", [[1], [1, 2, 3]], ids=["ahead", "code by code"])
def test_nothing_is_drawn_from_what_is_no_number(seeds: list[int], scale: float, place: int) -> None:
    gpt = tiny()
    text, mask = texts()
    sampler, config, rows = Sampler(gpt), SamplingConfig(cfg_scale=scale), slice(0, len(seeds))
    drawn = gpt.position.weight.detach()[place]
    before = drawn.clone()
    drawn.fill_(math.nan)
    with pytest.raises(Diverged, match="codes would be drawn from what is no finite number"):
        sampler(text[rows], mask[rows], config, seeds)
    drawn.copy_(before)
    sampler(text[rows], mask[rows], config, seeds)


def test_neither_great_weights_nor_extreme_settings_draw_from_infinity() -> None:
    gpt = tiny()
    text, mask = texts()
    for config in (SamplingConfig(cfg_scale=1e30), SamplingConfig(temperature=1e-30)):
        sample(gpt, text, mask, config, [1, 2, 3])
    with pytest.raises(Diverged):
        sample(gpt, text, mask, SamplingConfig(cfg_scale=1e30, temperature=1e-30), [1, 2, 3])
    torch.nn.init.constant_(gpt.head.weight, 1e38)
    torch.nn.init.constant_(gpt.norm.weight, 100)
    with pytest.raises(Diverged):
        sample(gpt, text, mask, GREEDY, [1, 2, 3])


def test_drawing_ahead_saves_passes_where_guesses_are_right() -> None:
    """A picture of one code is guessed at once: the first pass draws one code, the others a window each."""
    gpt = tiny(grid=(5, 7))
    with torch.no_grad():
        gpt.head.weight.zero_()  # all codes alike: greedy takes the first, whatever came before
    passes = []
    gpt.norm.register_forward_hook(lambda *_: passes.append(1))
    greedy = SamplingConfig(temperature=0)
    assert not sample(gpt, None, None, greedy, seeds=[0]).any()
    assert len(passes) == 1 + -(-34 // AHEAD)
    passes.clear()
    assert not sample(gpt, None, None, greedy, seeds=[0, 1]).any()
    assert len(passes) == 35


def test_best_of_keeps_what_is_preferred() -> None:
    gpt = tiny()
    text, mask = texts()
    config = SamplingConfig(cfg_scale=1, best_of=4)
    offered: list[torch.Tensor] = []

    def rerank(codes: torch.Tensor) -> torch.Tensor:
        offered.append(codes)
        return codes[:, :, 0].float()  # prefers a large first code

    best = sample(gpt, text, mask, config, seeds=[1, 2, 3], rerank=rerank)
    assert offered[0].shape == (3, 4, 12)
    assert torch.equal(best[:, 0], offered[0][:, :, 0].max(dim=1).values)
    single = config.model_copy(update={"best_of": 1})
    assert torch.equal(offered[0][:, 0], sample(gpt, text, mask, single, seeds=[1, 2, 3]))
    second = sample(gpt, text, mask, single, seeds=[candidate_seed(seed, 1) for seed in (1, 2, 3)])
    assert torch.equal(offered[0][:, 1], second)
    by_five = Sampler(gpt)(text, mask, config, seeds=[1, 2, 3], rerank=rerank, at_once=5)
    assert torch.equal(by_five, best)
    with pytest.raises(ValueError, match="rerank"):
        sample(gpt, text, mask, config, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="seeds"):
        sample(gpt, text, mask, single, seeds=[1])
