"""The transformer: a decoder over image tokens that reads the text by cross-attention in every block.

It sees token ids and text states and nothing of pixels or prompts. `arch: modern` is the recipe of today's
decoders (RMSNorm, QK-norm, 2-D rotary positions, SwiGLU, zero-init head); `arch: gpt2` is Hugging Face's
`GPT2LMHeadModel(add_cross_attention=True)` to the last operation, with the start token as id K.

Letters: B batch, T image tokens (raster order), S text tokens, D width, H heads, d = D / H, K codes, W width
of the text states, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import BaseModel
from torch import Tensor, nn

from model.config import Positive, TransformerConfig, Width
from model.nets.attention import Cache, StaticCache, attend, rotate
from model.nets.folder import load

ROPE_BASE = 100.0  # grids are 8 to 32 wide: the slowest pair still turns visibly across one


class Context(NamedTuple):
    """What cross-attention needs of the text: computed once per text, however many tokens follow."""

    keys_values: list[tuple[Tensor, Tensor]]  # per block, (B, H, S, d) each
    mask: Tensor | None  # (B, 1, 1, S) bool, True = attend, or added to the scores; None attends to all


class SelfAttention(nn.Module):
    """Causal attention over image tokens. The query turns by the position of the token it predicts, the key
    by the position of the token it holds, so that distances on the grid are exact, also across a line's
    end."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        bias = config.arch == "gpt2"
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=bias)
        self.out = nn.Linear(config.width, config.width, bias=bias)
        self.qk_scale = (
            nn.Parameter(torch.ones(2, 1, config.width // config.heads)) if config.qk_norm else None
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rope: Float[Tensor, "2 *rows T 2 1 d"] | None,
        cache: Cache | StaticCache | None = None,
        block: int = 0,
    ) -> Float[Tensor, "B T D"]:
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)  # (B, T, 3, H, d)
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        if self.qk_scale is not None:
            qk = F.rms_norm(qk, qk.shape[-1:], eps=1e-6) * self.qk_scale.to(qk.dtype)
        if rope is not None:
            qk = rotate(qk, rope)
        q, k, v = qk[:, :, 0].transpose(1, 2), qk[:, :, 1].transpose(1, 2), v.transpose(1, 2)  # (B, H, T, d)
        if cache is None:
            y = attend(q, k, v, causal=True)
        else:
            k, v, mask = cache.extend(block, k.to(cache.keys[block].dtype), v.to(cache.keys[block].dtype))
            y = attend(q.to(k.dtype), k, v, mask)
        return self.out(y.transpose(1, 2).reshape(B, T, D).to(x.dtype))


class CrossAttention(nn.Module):
    """Attention from image tokens to text states."""

    def __init__(self, config: TransformerConfig, context_width: int) -> None:
        super().__init__()
        bias = config.arch == "gpt2"
        self.heads = config.heads
        self.q = nn.Linear(config.width, config.width, bias=bias)
        self.kv = nn.Linear(context_width, 2 * config.width, bias=bias)
        self.out = nn.Linear(config.width, config.width, bias=bias)
        self.qk_scale = (
            nn.Parameter(torch.ones(2, 1, config.width // config.heads)) if config.qk_norm else None
        )

    def read(
        self, context: Float[Tensor, "B S _"]
    ) -> tuple[Float[Tensor, "B H S d"], Float[Tensor, "B H S d"]]:
        """Keys and values of the text."""
        B, S, _ = context.shape
        k, v = self.kv(context).view(B, S, 2, self.heads, -1).unbind(2)
        if self.qk_scale is not None:
            k = F.rms_norm(k, k.shape[-1:], eps=1e-6) * self.qk_scale[1].to(k.dtype)
        return k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        keys_values: tuple[Float[Tensor, "B H S d"], Float[Tensor, "B H S d"]],
        mask: Shaped[Tensor, "B 1 1 S"] | None,
    ) -> Float[Tensor, "B T D"]:
        B, T, D = x.shape
        k, v = keys_values
        q = self.q(x).view(B, T, self.heads, D // self.heads)  # (B, T, H, d)
        if self.qk_scale is not None:
            q = F.rms_norm(q, q.shape[-1:], eps=1e-6) * self.qk_scale[0].to(q.dtype)
        y = attend(q.transpose(1, 2).to(k.dtype), k, v, mask)  # (B, H, T, d)
        return self.out(y.transpose(1, 2).reshape(B, T, D).to(x.dtype))


class MLP(nn.Module):
    """GELU as GPT-2 has it (tanh form), or SwiGLU of about as many weights."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        hidden = math.ceil(config.width * 8 / 3 / 64) * 64 if self.gated else 4 * config.width
        bias = config.arch == "gpt2"
        self.up = nn.Linear(config.width, hidden * (2 if self.gated else 1), bias=bias)
        self.down = nn.Linear(hidden, config.width, bias=bias)

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        h = self.up(x)
        if self.gated:
            gate, value = h.chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(h, approximate="tanh"))


class Block(nn.Module):
    """Self-attention, cross-attention, MLP: each reads the normalised stream and adds to it."""

    def __init__(self, config: TransformerConfig, context_width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(_norm(config) for _ in range(3))
        self.attention = SelfAttention(config)
        self.cross = CrossAttention(config, context_width)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rope: Float[Tensor, "2 *rows T 2 1 d"] | None,
        keys_values: tuple[Float[Tensor, "B H S d"], Float[Tensor, "B H S d"]],
        mask: Shaped[Tensor, "B 1 1 S"] | None,
        cache: Cache | StaticCache | None = None,
        block: int = 0,
    ) -> Float[Tensor, "B T D"]:
        x = x + self.dropout(self.attention(self.norms[0](x), rope, cache, block))
        x = x + self.dropout(self.cross(self.norms[1](x), keys_values, mask))
        return x + self.dropout(self.mlp(self.norms[2](x)))


class GPT(nn.Module):
    """p(codes | text), one token after the other.

    Args:
        config: the `transformer` section.
        vocabulary: K, number of codes of the tokenizer.
        grid: (h, w), tokens per column and per row; T = h · w.
        text_width: W, width of the text encoder's states.
    """

    rope: Tensor

    def __init__(
        self, config: TransformerConfig, vocabulary: int, grid: Sequence[int], text_width: int
    ) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.grid = (int(grid[0]), int(grid[1]))
        self.text_width = text_width
        self.tokens = self.grid[0] * self.grid[1]
        gpt2 = config.arch == "gpt2"
        # Hugging Face's cross-attention takes states of the decoder's width; ours reads them as they are.
        self.text_in: nn.Module = (
            nn.Linear(text_width, config.width) if gpt2 else nn.RMSNorm(text_width, eps=1e-6)
        )
        self.null_text = nn.Parameter(torch.empty(text_width))  # stands where a caption is dropped or absent
        self.embedding = nn.Embedding(vocabulary + 1, config.width)  # the last row is the start token
        self.position = nn.Embedding(self.tokens, config.width)  # of the token to be predicted
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config, config.width if gpt2 else text_width) for _ in range(config.depth)
        )
        self.norm = _norm(config)
        self.head = None if gpt2 else nn.Linear(config.width, vocabulary, bias=False)  # gpt2: tied
        self.register_buffer("rope", self._rope_table(), persistent=False)
        self.init_weights()

    def forward(
        self,
        codes: Int[Tensor, "B T"],
        text: Float[Tensor, "B S W"] | None = None,
        text_mask: Bool[Tensor, "B S"] | None = None,
        drop: Bool[Tensor, " B"] | None = None,
        order: Int[Tensor, "*rows T"] | None = None,
    ) -> Float[Tensor, "B T K"]:
        """Logits of each code given the codes before it: `logits[:, t]` predict `codes[:, t]`.

        Args:
            codes: token ids in [0, K), in raster order, or in `order` where that is given.
            text: text states; None is the null text for the whole batch.
            text_mask: True = real token; a row without one reads as the null text. None: all are real.
            drop: rows that read the null text instead of theirs (training of classifier-free guidance).
            order: position on the grid of each code of the sequence, a permutation of T (one for all or one
                per row), as RAR trains (arXiv:2411.00776); None is raster order.
        """
        start = codes.new_full((codes.shape[0], 1), self.vocabulary)
        inputs = torch.cat([start, codes[:, :-1]], dim=1)  # (B, T)
        context = self.read(text, text_mask, drop, batch=codes.shape[0])
        return self.decode(inputs, context, order=order)  # (B, T, K)

    def read(
        self,
        text: Float[Tensor, "B S W"] | None,
        text_mask: Bool[Tensor, "B S"] | None = None,
        drop: Bool[Tensor, " B"] | None = None,
        batch: int = 1,
    ) -> Context:
        """Keys and values of the text for every block (a batch of null texts where `text` is None)."""
        if text is None:
            text, text_mask, drop = self.null_text.expand(batch, 1, -1), None, None  # (B, 1, W)
        null = drop
        if text_mask is not None:
            empty = ~text_mask.any(dim=1)
            null = empty if drop is None else drop | empty  # (B,)
            text_mask = text_mask | null[:, None]  # null text in every place reads like null text in one
        if null is not None:
            text = torch.where(null[:, None, None], self.null_text.to(text.dtype), text)  # (B, S, W)
        states = self.text_in(text.to(self.null_text.dtype))  # (B, S, W), or (B, S, D) in gpt2
        mask = None if text_mask is None else text_mask[:, None, None, :]  # (B, 1, 1, S)
        return Context([block.cross.read(states) for block in self._blocks()], mask)

    def decode(
        self,
        inputs: Int[Tensor, "B n"],
        context: Context,
        order: Int[Tensor, "*rows n"] | None = None,
        cache: Cache | StaticCache | None = None,
    ) -> Float[Tensor, "B n K"]:
        """From the tokens that stand before them (start token first) to the logits of n codes.

        With a cache the inputs continue the sequence at `cache.at`, which the caller moves on.
        """
        position, rope = self._positions(inputs.shape[1], order, cache)  # (n,) or (B, n)
        x = self.embedding(inputs) + self.position(position)  # (B, n, D)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, context.keys_values[i], context.mask, cache, i)  # (B, n, D)
        x = self.norm(x)
        if self.head is None:
            return F.linear(x, self.embedding.weight[: self.vocabulary])  # (B, n, K)
        return self.head(x)  # (B, n, K)

    def cache(self, batch: int) -> Cache:
        """An empty cache for `batch` rows, in the type that the transformer computes in."""
        heads, weight = self.config.heads, self.embedding.weight
        return Cache(self.config.depth, (batch, heads, self.tokens, self.config.width // heads), weight)

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def _positions(
        self, n: int, order: Int[Tensor, "*rows n"] | None, cache: Cache | StaticCache | None
    ) -> tuple[Int[Tensor, "*rows n"], Float[Tensor, "2 *rows n 2 1 d"] | None]:
        """Grid positions of n predicted tokens, and the rotations of their queries and keys."""
        places = torch.arange(n, device=self.rope.device)
        if cache is not None:
            places = places + cache.at
        if self.config.positions == "learned":
            return (places if order is None else order), None
        if order is None:
            return places, torch.stack([self.rope[:, places + 1], self.rope[:, places]], dim=2)[..., None, :]
        held = F.pad(order[..., :-1] + 1, (1, 0))  # the start token has row 0 of the table
        return order, torch.stack([self.rope[:, order + 1], self.rope[:, held]], dim=-2)[..., None, :]

    def _rope_table(self) -> Float[Tensor, "2 {1+self.tokens} d"]:
        """Cosine and signed sine for the start token, then for each place of the grid.

        Half of the angles turn by row, half by column; the start token stands one off the corner.
        """
        quarter = max(self.config.width // self.config.heads // 4, 1)
        rates = ROPE_BASE ** (-torch.arange(quarter) / quarter)  # radians per token
        row = torch.arange(self.grid[0]).repeat_interleave(self.grid[1])
        column = torch.arange(self.grid[1]).repeat(self.grid[0])
        places = torch.stack([F.pad(row, (1, 0), value=-1), F.pad(column, (1, 0), value=-1)], dim=1)
        angles = (places[:, :, None] * rates).flatten(1)  # (1 + T, 2 quarters)
        cosine, sine = angles.cos(), angles.sin()
        return torch.stack([torch.cat([cosine, cosine], dim=1), torch.cat([-sine, sine], dim=1)])

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's normal(0, 0.02), projections into the stream scaled by its depth, the head at zero."""
        residual = 0.02 / math.sqrt(3 * self.config.depth)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=residual if name.endswith(("out", "down")) else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.null_text, std=1.0)  # text states leave a LayerNorm, about unit size
        if self.head is not None:
            nn.init.zeros_(self.head.weight)

    def parameter_count(self) -> int:
        """Trainable weights (also on the meta device)."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, text_tokens: int) -> float:
        """Floating-point operations to train on one image token: 6 per weight it meets, and attention.

        Embedding look-ups cost none, and keys and values of the text are shared by the picture's T tokens.
        """
        width, depth = self.config.width, self.config.depth
        shared = sum(block.cross.kv.weight.numel() for block in self._blocks())
        looked_up = self.position.weight.numel() + (self.embedding.weight.numel() if self.head else 0)
        weights = self.parameter_count() - looked_up - shared + shared * text_tokens / self.tokens
        attention = 12 * depth * width * (self.tokens / 2 + text_tokens)  # causal: half of the square
        return 6 * weights + attention

    def description(self) -> dict[str, Any]:
        """What `build` needs to make this architecture again: the `config.json` of a `transformer` asset."""
        return {
            "transformer": self.config.model_dump(mode="json"),
            "vocabulary": self.vocabulary,
            "grid": list(self.grid),
            "text_width": self.text_width,
        }


class Description(BaseModel):
    """What a transformer's `config.json` has to say."""

    transformer: TransformerConfig
    vocabulary: Positive
    grid: tuple[Width, Width]
    text_width: Width


def build(description: dict[str, Any]) -> GPT:
    """A GPT with fresh weights from its `description()`. Raises ValidationError: it describes none."""
    said = Description.model_validate(description)
    return GPT(said.transformer, said.vocabulary, said.grid, said.text_width)


def load_gpt(folder: str | Path, device: str | torch.device = "cpu") -> GPT:
    """The transformer of a `transformer` asset's folder, ready to sample from. Raises UserError as `load`."""
    gpt, _ = load(folder, build)
    return gpt.to(device)


def _norm(config: TransformerConfig) -> nn.Module:
    if config.arch == "gpt2":
        return nn.LayerNorm(config.width, eps=1e-5)
    return nn.RMSNorm(config.width, eps=1e-6)
