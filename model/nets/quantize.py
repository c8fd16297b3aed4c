"""Quantizers: from a grid of latents to a grid of codes, with gradients for the encoder.

`VectorQuantizer` learns a codebook on the unit sphere; `FiniteScalarQuantizer` has a fixed one. Both offer

    forward(latents) -> (quantized, codes, loss)
    lookup(codes)    -> quantized

Letters: B batch, h w token grid, N latents in a batch (B·h·w), D dimension of a latent, K codes.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from model.config import VQVAEConfig

# Scores held at once by the nearest-code search: on CPU what two cores find enough work in and a cache still
# holds, on CUDA enough work for one launch. Measured in docs/EXPERIMENTS.md.
SCORES_CPU, SCORES_CUDA = 2**19, 2**26
BLOCK = 64  # codes that share a maximum in the search on CPU

NEAR = 8  # codes of a learned codebook that count as neighbours of one
CODEBOOK_DECAY = 0.95  # share of a used code that stays in one update; 0.99 lags behind short trainings
KMEANS_ITERATIONS = 10


def nearest_codes(latents: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
    """Index of the row of `codebook` with the largest dot product, for each of `latents`.

    With unit rows that is the nearest code. Ties go to the lowest index. Never holds N × K scores: works
    through the latents in pieces.
    """
    rows = max(1, (SCORES_CUDA if latents.is_cuda else SCORES_CPU) // len(codebook))
    scores = latents.new_empty(min(rows, len(latents)), len(codebook))  # one for all: fresh pages cost more
    codes = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    for piece, found in zip(latents.split(rows), codes.split(rows), strict=True):
        found.copy_(_argmax(torch.mm(piece, codebook.t(), out=scores[: len(piece)])))
    return codes


def nearest_others(
    rows: Float[Tensor, "M D"], codebook: Float[Tensor, "K D"], own: Int[Tensor, " M"]
) -> Int[Tensor, "M _"]:
    """Indices of the `NEAR` rows of `codebook` nearest to each of `rows`, its own left out."""
    found = []
    for some, mine in zip(rows.split(1024), own.split(1024), strict=True):
        distances = torch.cdist(some, codebook).scatter(1, mine[:, None], torch.inf)
        found.append(distances.topk(min(NEAR, len(codebook) - 1), largest=False).indices)
    return torch.cat(found)


def _argmax(scores: Float[Tensor, "N K"]) -> Int[Tensor, " N"]:
    """Index of the first maximum of each row.

    A CPU vectorises maxima and not their indices, so there the best block of a row is found by the maxima of
    its blocks, and the index sought among few numbers.
    """
    if scores.is_cuda or scores.shape[1] % BLOCK or scores.shape[1] < 8 * BLOCK:
        return scores.argmax(1)
    blocks = scores.unflatten(1, (-1, BLOCK))
    best = blocks.amax(2).argmax(1)
    return best * BLOCK + blocks[torch.arange(len(best)), best].argmax(1)


def rotate(latents: Float[Tensor, "N D"], targets: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """`targets`, with the gradient that flows through the rotation of each latent onto its target.

    Both are unit vectors. The rotation is held constant, so that the angle between gradient and target
    survives on the way back to the latent (Fifty et al. 2024, arXiv:2410.06424, section 4.2).
    """
    with torch.no_grad():
        source = latents.clone()
        middle = F.normalize(source + targets, dim=1)
    along_middle = (latents * middle).sum(1, keepdim=True)
    along_source = (latents * source).sum(1, keepdim=True)
    return latents - 2 * along_middle * middle + 2 * along_source * targets


class VectorQuantizer(nn.Module):
    """A codebook of K unit vectors, looked up after l2 normalisation (Yu et al. 2021, arXiv:2110.04627).

    In training `forward` only gathers what it saw; `update`, called once per optimiser step, moves each used
    code towards the mean direction of its latents and replaces codes that no rank has used for `reset_after`
    steps by latents of the batch. All ranks' gatherings are summed first, so every rank computes the same
    update from the same numbers: the codebooks stay equal bit for bit.
    """

    codebook: Tensor  # (K, D)
    unused: Tensor  # (K,) steps since a code was last used
    _gathered: Tensor  # (K, 2D + 1) what forward saw since the last update

    def __init__(self, size: int, dim: int, beta: float, reset_after: int) -> None:
        super().__init__()
        self.vocabulary = size
        self.beta = beta
        self.reset_after = reset_after
        self.register_buffer("codebook", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("unused", torch.zeros(size, dtype=torch.int64))
        # Per code: sum of its latents, their number, and a candidate to replace the code.
        self.register_buffer("_gathered", torch.zeros(size, 2 * dim + 1), persistent=False)

    def forward(
        self, latents: Float[Tensor, "B D h w"]
    ) -> tuple[Float[Tensor, "B D h w"], Int[Tensor, "B h w"], Float[Tensor, ""]]:
        """Quantize; the loss is β times the squared distance of latents to their codes."""
        batch, _, height, width = latents.shape
        with torch.autocast(latents.device.type, enabled=False):  # bf16 would change which code is nearest
            flat = F.normalize(latents.permute(0, 2, 3, 1).flatten(0, 2).float(), dim=1)
            codebook = F.normalize(self.codebook, dim=1)  # an average of codebooks is not of unit length
            codes = nearest_codes(flat.detach(), codebook)
            quantized = codebook[codes]
            loss = self.beta * F.mse_loss(flat, quantized)
            if self.training:
                self._gather(flat.detach(), codes)
            quantized = rotate(flat, quantized)
        return _to_grid(quantized, batch, height, width), codes.view(batch, height, width), loss

    def lookup(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B D h w"]:
        """The codebook's vectors at `codes`, as a grid."""
        return _to_grid(F.normalize(self.codebook, dim=1)[codes.flatten()], *codes.shape)

    def neighbours(self, codes: Int[Tensor, " M"]) -> Int[Tensor, "M _"]:
        """The (up to `NEAR`) other codes that are most like each of `codes`."""
        codebook = F.normalize(self.codebook, dim=1)
        return nearest_others(codebook[codes], codebook, codes)

    @torch.no_grad()
    def _gather(self, latents: Float[Tensor, "N D"], codes: Int[Tensor, " N"]) -> None:
        dim = latents.shape[1]
        ones = torch.ones_like(latents[:, :1])
        self._gathered[:, : dim + 1].index_add_(0, codes, torch.cat([latents, ones], dim=1))
        # Each rank proposes candidates for its share of the codes: the sum over ranks is one per code.
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        chosen = torch.randint(len(latents), (self.vocabulary,), device=latents.device)
        mine = torch.arange(self.vocabulary, device=latents.device) % world == rank
        self._gathered[:, dim + 1 :] = latents[chosen] * mine[:, None]

    @torch.no_grad()
    def update(self) -> None:
        """Move the codebook by what `forward` gathered on all ranks since the last call; no GPU sync."""
        if dist.is_initialized():
            dist.all_reduce(self._gathered)
        dim = self.codebook.shape[1]
        sums, counts, candidates = self._gathered.split([dim, 1, dim], dim=1)
        used = counts > 0
        means = F.normalize(sums, dim=1)
        moved = F.normalize(torch.lerp(means, self.codebook, CODEBOOK_DECAY), dim=1)
        self.codebook.copy_(torch.where(used, moved, self.codebook))
        self.unused.add_(1).mul_(~used[:, 0])
        if self.reset_after:
            dead = self.unused >= self.reset_after
            self.codebook.copy_(torch.where(dead[:, None], candidates, self.codebook))
            self.unused.mul_(~dead)
        self._gathered.zero_()

    @torch.no_grad()
    def initialise(self, latents: Float[Tensor, "B D h w"]) -> None:
        """Set the codebook to the spherical k-means centres of `latents`, equal on every rank.

        Rank 0 clusters its own latents and sends the result: a sample of one rank is one of all.
        """
        flat = F.normalize(latents.movedim(1, -1).flatten(0, 2).float(), dim=1)
        order = torch.randperm(len(flat), device=flat.device)
        centres = flat[order[torch.arange(self.vocabulary, device=flat.device) % len(flat)]]
        for _ in range(KMEANS_ITERATIONS):
            codes = nearest_codes(flat, centres)
            sums = torch.zeros_like(centres).index_add_(0, codes, flat)
            used = torch.bincount(codes, minlength=self.vocabulary) > 0
            centres = torch.where(used[:, None], F.normalize(sums, dim=1), centres)
        if dist.is_initialized():
            dist.broadcast(centres, src=0)
        self.codebook.copy_(centres)


class FiniteScalarQuantizer(nn.Module):
    """Each dimension rounded to one of a few levels: no codebook to learn (Mentzer et al. 2023,
    arXiv:2309.15505)."""

    levels: Tensor  # (D,)
    basis: Tensor  # (D,) weight of a dimension's level in the code

    def __init__(self, levels: list[int]) -> None:
        super().__init__()
        self.vocabulary = math.prod(levels)
        basis = [math.prod(levels[:place]) for place in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def forward(
        self, latents: Float[Tensor, "B D h w"]
    ) -> tuple[Float[Tensor, "B D h w"], Int[Tensor, "B h w"], Float[Tensor, ""]]:
        """Quantize; there is no loss of its own."""
        with torch.autocast(latents.device.type, enabled=False):
            bounded = self._bound(latents.permute(0, 2, 3, 1).float())
            rounded = bounded + (bounded.round() - bounded).detach()
            half = self.levels // 2
            codes = ((rounded.detach() + half).round().long() * self.basis).sum(-1)
            quantized = (rounded / half).movedim(-1, 1)
        return quantized, codes, quantized.new_zeros(())

    def lookup(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B D h w"]:
        """The vectors at `codes`, each coordinate in [-1, 1], as a grid."""
        half = self.levels // 2
        places = (codes[..., None] // self.basis) % self.levels
        return ((places - half) / half).movedim(-1, 1)

    def neighbours(self, codes: Int[Tensor, " M"]) -> Int[Tensor, "M _"]:
        """The codes one level off in one dimension; at an edge the one inwards counts twice."""
        places = (codes[:, None] // self.basis) % self.levels  # (M, D)
        up, down = places + 1 < self.levels, places > 0
        higher = torch.where(up, 1, -1) * self.basis
        lower = torch.where(down, -1, 1) * self.basis
        moves = torch.stack([higher, lower], dim=2)[:, self.levels > 1].flatten(1)
        return codes[:, None] + moves

    def update(self) -> None:
        """Nothing to learn."""

    def initialise(self, latents: Float[Tensor, "B D h w"]) -> None:
        """Nothing to initialise."""

    def _bound(self, latents: Float[Tensor, "B h w D"]) -> Float[Tensor, "B h w D"]:
        # tanh scaled so that rounding yields exactly `levels` integers; even counts are shifted by a half.
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return (latents + torch.atanh(offset / half)).tanh() * half - offset


def build_quantizer(config: VQVAEConfig) -> VectorQuantizer | FiniteScalarQuantizer:
    """The quantizer that the config names."""
    if config.quantizer == "fsq":
        return FiniteScalarQuantizer(config.fsq_levels)
    return VectorQuantizer(config.codebook_size, config.code_dim, config.beta, config.reset_after)


def _to_grid(flat: Float[Tensor, "N D"], batch: int, height: int, width: int) -> Float[Tensor, "B D h w"]:
    return flat.view(batch, height, width, -1).permute(0, 3, 1, 2)
