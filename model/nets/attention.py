"""Attention as the transformer needs it: the same product in the form that is quickest for each place, the
turning of queries and keys, and the memory of what was attended to before.

Letters: B batch, H heads, n queries, N keys, T image tokens of a picture, d width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def attend(
    q: Float[Tensor, "B H n d"],
    k: Float[Tensor, "B H N d"],
    v: Float[Tensor, "B H N d"],
    mask: Shaped[Tensor, "#B #H #n N"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "B H n d"]:
    """Attention of n queries over N keys and values; a mask is True where to attend, or added to the scores.

    To train on a CPU, cross-attention is made of products (in bf16 with scores in bf16, shares in fp32) and
    causal attention computed in fp32: PyTorch's kernels take up to twice as long for the one, and in bf16
    three to five times for the other's backward pass (figures in `docs/EXPERIMENTS.md`).
    """
    if q.is_cpu and q.requires_grad:
        if not causal:
            return _attend_by_products(q, k, v, mask)
        if q.dtype == torch.bfloat16:
            with torch.autocast("cpu", enabled=False):
                q, k, v = q.float(), k.float(), v.float()
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    if q.is_cpu and q.shape[2] == 1 and torch.compiler.is_compiling():
        return _attend_one(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _attend_one(
    q: Float[Tensor, "B H 1 d"],
    k: Float[Tensor, "B H N d"],
    v: Float[Tensor, "B H N d"],
    mask: Shaped[Tensor, "#B #H 1 N"] | None,
) -> Float[Tensor, "B H 1 d"]:
    """Attention of one query in a form that inductor fuses on a CPU: one pass over the keys, one over the
    values. PyTorch's kernel, made for many queries, takes a fifth to a half longer."""
    scores = (q.float() * k.float()).sum(-1) / math.sqrt(q.shape[-1])  # (B, H, N)
    shares = _masked(scores, None if mask is None else mask.squeeze(-2)).softmax(-1)
    return (shares[..., None] * v.float()).sum(-2, keepdim=True).to(v.dtype)


def _attend_by_products(
    q: Float[Tensor, "B H n d"],
    k: Float[Tensor, "B H N d"],
    v: Float[Tensor, "B H N d"],
    mask: Shaped[Tensor, "#B #H #n N"] | None,
) -> Float[Tensor, "B H n d"]:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, n, N)
    return _masked(scores, mask).softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _masked(
    scores: Float[Tensor, "*scores"], mask: Shaped[Tensor, "*#scores"] | None
) -> Float[Tensor, "*scores"]:
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def rotate(
    qk: Float[Tensor, "B n 2 H d"], rope: Float[Tensor, "2 *rows n 2 1 d"]
) -> Float[Tensor, "B n 2 H d"]:
    """Turn pairs (i, i + d/2) of queries and keys by the cosines and signed sines of their positions."""
    cosine, sine = rope.to(qk.dtype)
    return torch.addcmul(qk * cosine, qk.roll(qk.shape[-1] // 2, dims=-1), sine)


class Cache:
    """Keys and values of the image tokens so far, allocated once for the whole picture.

    Args:
        depth: blocks of the transformer.
        shape: (B, H, T, d) of the keys of a block, T being all tokens that there will be.
        like: a tensor of the type and on the device to be used.
    """

    def __init__(self, depth: int, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.keys = [like.new_zeros(shape) for _ in range(depth)]
        self.values = [like.new_zeros(shape) for _ in range(depth)]
        self.places = torch.arange(shape[2], device=like.device)
        self.at = 0  # where the next token goes

    def extend(
        self, block: int, k: Float[Tensor, "B H n d"], v: Float[Tensor, "B H n d"]
    ) -> tuple[Float[Tensor, "B H N d"], Float[Tensor, "B H N d"], Bool[Tensor, "1 1 n N"] | None]:
        """Put keys and values at `at`; returns what is filled then, and its mask."""
        keys, values = self.keys[block], self.values[block]
        end = self.at + k.shape[2]
        keys[:, :, self.at : end] = k
        values[:, :, self.at : end] = v
        one = k.shape[2] == 1  # which may see all that is there
        mask = None if one else (self.places[:end] <= self.places[self.at : end, None])[None, None]
        return keys[:, :, :end], values[:, :, :end], mask


class StaticCache:
    """A cache's buffers as a program sees them that is the same for every token (compiled, a CUDA graph).

    Args:
        cache: whose buffers these are.
        at: where the next token goes, on the device.
        span: how many places are attended to, under a mask.
    """

    def __init__(self, cache: Cache, at: Int[Tensor, ""], span: int) -> None:
        self.keys, self.values = cache.keys, cache.values
        self.places = cache.places[:span]
        self.at, self.span = at, span

    def extend(
        self, block: int, k: Float[Tensor, "B H 1 d"], v: Float[Tensor, "B H 1 d"]
    ) -> tuple[Float[Tensor, "B H N d"], Float[Tensor, "B H N d"], Bool[Tensor, "1 1 1 N"]]:
        """Put a key and a value at `at`; returns the first `span` places, and which of them are filled."""
        keys, values = self.keys[block], self.values[block]
        keys.index_copy_(2, self.at.view(1), k)
        values.index_copy_(2, self.at.view(1), v)
        mask = (self.places <= self.at).view(1, 1, 1, -1)
        return keys[:, :, : self.span], values[:, :, : self.span], mask
