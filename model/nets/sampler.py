"""Drawing image tokens from the transformer.

This module sees token ids and text states: never pixels, prompts or files. Whoever wants the best of several
draws hands in the reranker as a function.

Randomness is counter-based: the noise of a token is a hash of (seed, position, code), so the picture of a
seed depends neither on the batch it is drawn in nor on the device, and there is no generator state to carry.

Letters: B pictures, R rows of the forward pass (2 B under guidance: text first, null text second), T tokens,
K codes, S text tokens, W width of the text states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from model.config import SamplingConfig
from model.errors import Diverged
from model.nets.gpt import GPT, Context

OnToken = Callable[[int, Tensor], None]  # (position, codes (B,) of that position)
Rerank = Callable[[Tensor], Tensor]  # codes (B, n, T) -> scores (B, n), higher is better


PACKS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
AHEAD = 16  # codes that a pass draws of a single picture; measured in docs/EXPERIMENTS.md, on CPUs alone
PACKED_ROWS = 16  # weights are packed for; the blocks chosen for 16 rows serve 1 and 2 best as well


class Sampler:
    """Draws from one transformer; `compiled.CompiledSampler` is the same for many pictures.

    Args:
        gpt: the transformer, in eval mode, on the device and in the type to compute in.
    """

    def __init__(self, gpt: GPT) -> None:
        self.gpt = packed(gpt)

    @torch.no_grad()
    def __call__(
        self,
        text: Float[Tensor, "B S W"] | None,
        text_mask: Bool[Tensor, "B S"] | None,
        config: SamplingConfig,
        seeds: Sequence[int],
        prefix: Int[Tensor, "B P"] | None = None,
        on_token: OnToken | None = None,
        rerank: Rerank | None = None,
        at_once: int = 0,
    ) -> Int[Tensor, "B T"]:
        """Codes of one picture per seed.

        Args:
            text: text states, one row per picture; None draws without text (guidance has no effect then).
            text_mask: True = real token; None: all are real.
            config: temperature, top-k, top-p, guidance, best_of.
            seeds: one per picture, 0 ≤ seed < 2⁶³.
            prefix: the first P < T codes of each picture, kept as they are.
            on_token: called after each position, with its codes on the model's device.
            rerank: chooses among `config.best_of` draws; needed where that exceeds 1.
            at_once: so many of these draws in one pass, at most; 0: all.

        Raises:
            ValueError: where rows, seeds and prefix do not fit together.
            Diverged: some logits are no finite numbers.
        """
        gpt, n = self.gpt, config.best_of
        device = gpt.embedding.weight.device
        if text is not None and len(text) != len(seeds):
            raise ValueError(f"{len(seeds)} seeds for {len(text)} text rows; one seed per picture is needed")
        if prefix is not None and (len(prefix) != len(seeds) or prefix.shape[1] >= gpt.tokens):
            raise ValueError(f"prefix {tuple(prefix.shape)} must be ({len(seeds)}, fewer than {gpt.tokens})")
        if n > 1:
            if rerank is None:
                raise ValueError(f"best_of {n} needs a rerank function to choose")

            one = config.model_copy(update={"best_of": 1})
            candidates = [candidate_seed(seed, i) for seed in seeds for i in range(n)]
            whose = torch.arange(len(seeds)).repeat_interleave(n)
            parts = []
            for part in torch.arange(len(candidates)).split(at_once or len(candidates)):
                rows = whose[part]
                few = [None if one_each is None else one_each[rows] for one_each in (text, text_mask, prefix)]
                drawn = [candidates[place] for place in part]
                parts.append(self(few[0], few[1], one, drawn, few[2], on_token))
            codes = torch.cat(parts).view(len(seeds), n, gpt.tokens)
            best = rerank(codes).argmax(dim=1)
            return codes[torch.arange(len(seeds), device=device), best.to(device)]

        scales = guidance(config, gpt.tokens)
        guided = text is not None and any(scale != 1.0 for scale in scales)
        context = _read(gpt, text, text_mask, len(seeds), guided)
        start = torch.full((len(seeds), 1), gpt.vocabulary, device=device)
        inputs = start if prefix is None else torch.cat([start, prefix.to(device)], dim=1)  # (B, P + 1)
        program = self.program(context, config, len(seeds), guided)
        codes = program.run(inputs, context, seeds, torch.tensor(scales, device=device), on_token)
        if not program.finite:
            raise Diverged("codes would be drawn from what is no finite number; train the transformer anew")
        return codes.clone()  # the program's buffer, or a tensor of inference mode

    def program(self, context: Context, config: SamplingConfig, batch: int, guided: bool) -> Program:
        """What draws a batch of pictures from this text with these settings."""
        return Program(self.gpt, config, batch, guided)


def sample(
    gpt: GPT,
    text: Tensor | None,
    text_mask: Tensor | None,
    config: SamplingConfig,
    seeds: Sequence[int],
    prefix: Tensor | None = None,
    on_token: OnToken | None = None,
    rerank: Rerank | None = None,
) -> Tensor:
    """One call of an uncompiled `Sampler`; see there."""
    return Sampler(gpt)(text, text_mask, config, seeds, prefix, on_token, rerank)


class _PackedLinear(nn.Module):
    """A linear layer for few rows on a CPU: weights in oneDNN's blocked order, as inductor packs them.

    PyTorch's fp32 `linear` is MKL's, which on AMD reads its weights at a third of the memory's speed.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def packed(gpt: GPT) -> GPT:
    """A copy of the transformer whose products are packed for a CPU; elsewhere, and where PyTorch is built
    without oneDNN or drops its private operation (there in 2.11 and 2.14), the transformer itself."""
    weight = gpt.embedding.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not PACKS:
        return gpt
    linears = [module for module in gpt.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad(), torch.inference_mode(False):
        swap: dict[int, Any] = {id(linear): _PackedLinear(linear.weight, linear.bias) for linear in linears}
        keep: dict[int, Any] = {id(tensor): tensor for tensor in [*gpt.parameters(), *gpt.buffers()]}
        copy = deepcopy(gpt, swap | keep)  # shares all tensors but the packed ones
        if copy.head is None:
            copy.head = _PackedLinear(weight[: gpt.vocabulary], None)  # type: ignore[assignment]
    return copy


class Program:
    """The plain path: each pass of the transformer goes over exactly the keys that are filled.

    For a single picture a pass draws `AHEAD` codes, all but the first after guesses: those of the pass before
    and, where there are none yet, draws from the logits one place earlier. Codes are settled up to and
    including the first that differs from its guess. As a draw is a function of the logits, the seed and the
    position, what is settled is what drawing one by one gives, but for rounding (see `draw`): predictive
    sampling, arXiv:2002.09928; Jacobi decoding of pictures, arXiv:2410.01699.
    """

    def __init__(self, gpt: GPT, config: SamplingConfig, batch: int, guided: bool) -> None:
        self.gpt, self.config, self.guided = gpt, config, guided
        weight = gpt.embedding.weight
        self.cache = gpt.cache(batch * (1 + guided))
        self.seeds = torch.zeros(batch, 1, dtype=torch.long, device=weight.device)
        self.keys = noise_keys(gpt.vocabulary, weight.device)
        self.finite = torch.ones((), dtype=torch.bool, device=weight.device)  # all that was drawn from

    @torch.inference_mode()
    def run(
        self,
        inputs: Int[Tensor, "B P"],
        context: Context,
        seeds: Sequence[int],
        scales: Float[Tensor, " T"],
        on_token: OnToken | None,
    ) -> Int[Tensor, "B T"]:
        """All codes, from start token and prefix, and the guidance scale of each position."""
        tokens, places = self.gpt.tokens, self.cache.places
        ahead = AHEAD if len(inputs) == 1 and inputs.is_cpu else 1  # a batch would wait for its slowest row
        self.seeds.copy_(torch.tensor(list(seeds), dtype=torch.long)[:, None])
        at = inputs.shape[1] - 1  # codes that are settled
        sequence = F.pad(inputs, (0, tokens - at))  # (B, 1 + T): start token, settled codes, guesses
        self.cache.at, end = 0, at + 1
        self.finite.fill_(True)
        while at < tokens:
            fresh = sequence[:, self.cache.at : end]
            logits = self.logits(fresh, context, scales[at:end])  # (B, end - at, K)
            drawn = draw(logits, self.config, self.seeds, places[at:end], self.keys)  # (B, end - at)
            settled = at + 1
            if end > settled:
                same = (sequence[:, settled:end] == drawn[:, :-1]).all(dim=0)
                settled += int(same.cumprod(dim=0).sum())
            self.finite.logical_and_(are_finite(logits[:, : settled - at], self.config))
            sequence[:, at + 1 : end + 1] = drawn
            if on_token is not None:
                for place in range(at, settled):
                    on_token(place, drawn[:, place - at])
            at = self.cache.at = settled
            reach = min(at + ahead, tokens)
            if reach > max(end, at + 1):
                guesses = draw(logits[:, -1:], self.config, self.seeds, places[end:reach], self.keys)
                sequence[:, end + 1 : reach + 1] = guesses
            end = reach
        return sequence[:, 1:]

    def logits(
        self, inputs: Int[Tensor, "B _"], context: Context, scales: Float[Tensor, " n"]
    ) -> Float[Tensor, "B n K"]:
        """The logits of the last n codes after `inputs`, which continue the cache."""
        if self.guided:
            inputs = torch.cat([inputs, inputs])
        logits = self.gpt.decode(inputs, context, cache=self.cache)[:, -len(scales) :].float()  # (R, n, K)
        if not self.guided:
            return logits
        with_text, without = logits.chunk(2)
        return torch.lerp(without, with_text, scales[:, None])


def _read(
    gpt: GPT,
    text: Float[Tensor, "B S W"] | None,
    text_mask: Bool[Tensor, "B S"] | None,
    batch: int,
    guided: bool,
) -> Context:
    """The text's keys and values, followed by those of the null text where guidance needs both.

    The mask becomes what is added to the scores: attention would make that of it in every step again.
    """
    device, dtype = gpt.embedding.weight.device, gpt.embedding.weight.dtype
    if text is None:
        return gpt.read(None, batch=batch)
    text = text.to(device, dtype)
    mask = None if text_mask is None else text_mask.to(device)
    drop = None
    if guided:
        text = torch.cat([text, text])
        mask = None if mask is None else torch.cat([mask, mask])
        drop = torch.arange(2 * batch, device=device) >= batch
    keys_values, attended = gpt.read(text, mask, drop)
    if attended is not None:
        attended = torch.zeros(attended.shape, dtype=dtype, device=device).masked_fill(~attended, -math.inf)
    return Context(keys_values, attended)


def guidance(config: SamplingConfig, tokens: int) -> list[float]:
    """Guidance scale of each position: logits = null + scale · (text − null).

    `power-cosine` rises from 1 to `cfg_scale` along half a cosine, as MDT (arXiv:2303.14389) and RAR do: the
    first tokens, which decide the composition, stay varied.
    """
    if config.cfg_schedule == "constant":
        return [config.cfg_scale] * tokens
    rise = [(1 - math.cos(math.pi * t / max(tokens - 1, 1))) / 2 for t in range(tokens)]
    return [1 + (config.cfg_scale - 1) * share for share in rise]


def draw(
    logits: Float[Tensor, "*#rows K"],
    config: SamplingConfig,
    seeds: Int[Tensor, "*#rows"],
    at: int | Int[Tensor, "*#rows"],
    keys: Int[Tensor, " K"],
) -> Int[Tensor, "*#rows"]:
    """One code per row: temperature, then top-k, then top-p, then a draw (Gumbel-max); greedy at 0.
    Logits, seeds and positions broadcast.

    Gumbel-max rather than inverting the cumulative distribution: a rounding difference of 1e-6 in the logits
    (another batch size) changes a draw about once in a million, not once in a thousand.
    """
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if config.top_p < 1:
        ranked = logits.sort(dim=-1, descending=True).values
        p = ranked.softmax(dim=-1)
        outside = p.cumsum(dim=-1) - p >= config.top_p  # the mass before it suffices; the first never is
        least = ranked.masked_fill(outside, math.inf).amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -math.inf)
    return (logits + gumbel(seeds, at, keys)).argmax(dim=-1)


def are_finite(logits: Float[Tensor, "*rows K"], config: SamplingConfig) -> Bool[Tensor, ""]:
    """Whether what is drawn from is made of finite numbers, on the device: nobody has to wait for it."""
    return (logits / (config.temperature or 1.0)).isfinite().all()


LARGEST = 1 - 2.0**-24  # in fp32 below 1, to which half a step above the last of 24 bits is rounded


def gumbel(
    seeds: Int[Tensor, "*#rows"], at: int | Int[Tensor, "*#rows"], keys: Int[Tensor, " K"]
) -> Float[Tensor, "*#rows K"]:
    """Standard Gumbel noise as a pure function of (seed, position, code)."""
    stream = _scramble(_scramble(seeds) + at)  # (*rows)
    bits = _scramble(stream[..., None] ^ keys)  # (*rows, K)
    uniform = ((bits >> 40) & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24)  # 24 bits, never 0
    return -(-uniform.clamp_max_(LARGEST).log()).log()


def noise_keys(vocabulary: int, device: torch.device | str = "cpu") -> Int[Tensor, " K"]:
    """What tells the codes' noise apart. Made outside of the compiled step: inductor (2.14, CPU) folds a
    wrapping multiple of `arange` into its index arithmetic, where it does not wrap."""
    return torch.arange(vocabulary, device=device) * 0x2545F4914F6CDD1D


def _scramble(x: Int[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
    """SplitMix64's finalizer on wrapping int64 (Steele et al. 2014); shifts are masked to be logical."""
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def candidate_seed(seed: int, candidate: int) -> int:
    """Seed of the n-th draw for a picture; the first is the picture's own."""
    return (seed + candidate * 0x1E3779B97F4A7C15) % 2**63
