"""What is measured, as pure functions: tensors in, numbers out; no model is loaded and no file read.

Letters: N pictures, M others (of training, or real ones), B batch, T tokens, K codes, E width of the judge's
embedding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

TEMPERATURES = tuple(2 ** (sixth / 6) for sixth in range(-2, 7))  # at which an NLL is fitted: 0.79 to 2
NEAR_DUPLICATE = 0.05  # RMS difference of two pictures on [0, 1] up to which they are near-duplicates


# ── tokenizer ───────────────────────────────────────────────────────────────────────────────────────────


def psnr(images: Float[Tensor, "N 3 H W"], targets: Float[Tensor, "N 3 H W"]) -> Float[Tensor, " N"]:
    """Peak signal-to-noise ratio of each picture in dB, both in [-1, 1]; 100 dB where they are equal."""
    mse = (images.float() - targets.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(4e-10))


def ssim(images: Float[Tensor, "N 3 H W"], targets: Float[Tensor, "N 3 H W"]) -> Float[Tensor, " N"]:
    """Structural similarity of each picture, both in [-1, 1]; 1 where they are equal. Wang et al. 2004
    (doi:10.1109/TIP.2003.819861): within Gaussian windows of 11 × 11 pixels, σ 1.5, that lie in the picture;
    of smaller pictures in the largest odd window there is."""
    side = min(11, *images.shape[-2:])
    side -= 1 - side % 2
    place = torch.arange(side, dtype=torch.float32, device=images.device) - side // 2
    line = (-place.square() / (2 * 1.5**2)).exp()
    window = (torch.outer(line, line) / line.sum() ** 2).expand(3, 1, side, side)

    def blurred(pixels: Tensor) -> Tensor:
        return F.conv2d(pixels, window, groups=3)

    x, y = images.float() / 2 + 0.5, targets.float() / 2 + 0.5  # means count from black
    mx, my = blurred(x), blurred(y)
    vx, vy = blurred(x * x) - mx * mx, blurred(y * y) - my * my
    covariance = blurred(x * y) - mx * my
    luminance, contrast = 0.01**2, 0.03**2
    alike = (2 * mx * my + luminance) * (2 * covariance + contrast)
    alike = alike / ((mx * mx + my * my + luminance) * (vx + vy + contrast))
    return alike.flatten(1).mean(1)


def codebook_use(codes: Int[Tensor, "*shape"], vocabulary: int) -> tuple[float, float]:
    """Share of codes that occur, and perplexity: to how many equally frequent codes the usage amounts."""
    counts = torch.bincount(codes.flatten().cpu(), minlength=vocabulary).double()
    p = counts / counts.sum()
    entropy = -(p[p > 0] * p[p > 0].log()).sum()
    return float((counts > 0).double().mean()), float(entropy.exp())


# ── transformer ─────────────────────────────────────────────────────────────────────────────────────────


def token_nll(logits: Float[Tensor, "B T K"], codes: Int[Tensor, "*shape"]) -> Float[Tensor, " B"]:
    """Negative log-likelihood of each picture's codes, nats per token."""
    return F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none").mean(1)


def tempered_nll(logits: Float[Tensor, "B T K"], codes: Int[Tensor, "*shape"]) -> Float[Tensor, "n B"]:
    """`token_nll` at each of `TEMPERATURES`: the least one is that of a net that knows how sure it may be
    (temperature scaling, Guo et al. 2017, arXiv:1706.04599)."""
    return torch.stack([token_nll(logits.float() / temperature, codes) for temperature in TEMPERATURES])


def bits(nats: float) -> float:
    """What an NLL in nats is in bits."""
    return nats / math.log(2)


# ── pictures and captions, by a judge ───────────────────────────────────────────────────────────────────


def clip_score(
    image_features: Float[Tensor, "N E"], text_features: Float[Tensor, "N E"]
) -> Float[Tensor, " N"]:
    """100 × cosine similarity of each picture and its caption (CLIPScore, arXiv:2104.08718, unscaled and
    not cut at 0). Features are unit vectors. Comparable only under one judge."""
    return 100 * (image_features * text_features).sum(1)


def retrieved(
    image_features: Float[Tensor, "N E"], text_features: Float[Tensor, "N E"], captions: Sequence[str]
) -> list[bool]:
    """R@1, picture to text: for each picture whether its own caption fits best among all N.

    Captions that read the same count as one another. Chance is about 1 / N, see `retrieval_chance`.
    """
    best = (image_features @ text_features.T).argmax(1).tolist()
    return [captions[j] == captions[i] for i, j in enumerate(best)]


def retrieval_accuracy(
    image_features: Float[Tensor, "N E"], text_features: Float[Tensor, "N E"], captions: Sequence[str]
) -> float:
    """Share of pictures that are `retrieved`."""
    return sum(retrieved(image_features, text_features, captions)) / len(captions)


def retrieval_chance(captions: Sequence[str]) -> float:
    """Retrieval accuracy of a blind judge."""
    return sum(count * count for count in Counter(captions).values()) / len(captions) ** 2


def mismatched(captions: Sequence[str]) -> list[int]:
    """For each place another place with another caption: the floor against which captions are measured.

    Half the list further on, or the next after it that reads differently; the same in every run. With only
    one distinct caption there is none, and each place stands for itself.
    """
    n = len(captions)
    places = []
    for i in range(n):
        others = ((i + n // 2 + step) % n for step in range(n))
        places.append(next((j for j in others if captions[j] != captions[i]), i))
    return places


# ── sets of pictures, by a judge ────────────────────────────────────────────────────────────────────────


def frechet_distance(ours: Float[Tensor, "N E"], theirs: Float[Tensor, "M E"]) -> float:
    """Fréchet distance of two sets of features, each taken for a Gaussian: |μ - μ'|² + tr(Σ + Σ' - 2 (ΣΣ')^½)
    (arXiv:1706.08500, there on Inception's features). 0 for equal sets; comparable only under one judge and
    for equal numbers of pictures, as few make it large.

    In float64, by eigenvalues of a symmetric product: with fewer samples than dimensions the covariances have
    no full rank, which the usual square root of ΣΣ' does not survive.
    """
    one, two = (features.double().cpu() for features in (ours, theirs))
    shift = (one.mean(0) - two.mean(0)).square().sum()
    first, second = _covariance(one), _covariance(two)
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    common = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    return float((shift + first.trace() + second.trace() - 2 * common).clamp_min(0))


def _covariance(features: Float[Tensor, "N E"]) -> Float[Tensor, "E E"]:
    """Unbiased; nothing varies in a single picture."""
    centred = features - features.mean(0)
    return centred.T @ centred / max(len(features) - 1, 1)


def cmmd(ours: Float[Tensor, "N E"], theirs: Float[Tensor, "M E"]) -> float:
    """CMMD: 1000 × squared maximum mean discrepancy of two sets of CLIP features under a Gaussian kernel of
    width 10 (arXiv:2401.09603), by the biased estimate as in the paper's code: never negative, and defined
    for single pictures. Assumes no distribution, and needs fewer pictures than Fréchet's distance."""
    one, two = (features.double().cpu() for features in (ours, theirs))

    def alike(a: Tensor, b: Tensor) -> Tensor:
        return (-_distances(a, b).square() / (2 * 10**2)).exp().mean()

    return float(1000 * (alike(one, one) + alike(two, two) - 2 * alike(one, two)).clamp_min(0))


def precision_recall(
    ours: Float[Tensor, "N E"], theirs: Float[Tensor, "M E"], neighbours: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (arXiv:1904.06991): the share of `ours` that lie within the manifold of
    `theirs`, and the reverse. A set's manifold is the union of balls around its features, each as far as its
    k-th nearest neighbour; of k or fewer pictures, as far as the farthest one."""
    one, two = (features.double().cpu() for features in (ours, theirs))
    across = _distances(one, two)
    within_theirs = (across <= _reach(two, neighbours)).any(1)
    within_ours = (across <= _reach(one, neighbours)[:, None]).any(0)
    return float(within_theirs.double().mean()), float(within_ours.double().mean())


def _reach(features: Float[Tensor, "N E"], neighbours: int) -> Float[Tensor, " N"]:
    """The distance of each one's k-th nearest neighbour among the others."""
    k = min(neighbours, len(features) - 1)
    return _distances(features, features).kthvalue(k + 1, dim=1).values  # the nearest is itself


def _distances(one: Float[Tensor, "N E"], two: Float[Tensor, "M E"]) -> Float[Tensor, "N M"]:
    return torch.cdist(one, two, compute_mode="donot_use_mm_for_euclid_dist")


def diversity(ours: Float[Tensor, "N E"], theirs: Float[Tensor, "N E"]) -> float:
    """Mean distance of two of `ours`, as a share of that of two of `theirs`: 1 is as varied as real pictures,
    0 the same picture each time. 1 where the real ones do not vary at all."""
    one, two = (_mean_distance(features.double().cpu()) for features in (ours, theirs))
    return one / two if two > 0 else 1.0


def _mean_distance(features: Float[Tensor, "N E"]) -> float:
    n = len(features)
    return float(_distances(features, features).sum()) / (n * (n - 1)) if n > 1 else 0.0


# ── originality ─────────────────────────────────────────────────────────────────────────────────────────


def nearest_pictures(
    pictures: Float[Tensor, "N 3 H W"],
    training: Float[Tensor, "M 3 H W"],
    shift: int = 0,
    flip: bool = False,
) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
    """The nearest training picture of each picture: RMS difference on [0, 1], and which one it is.

    A copy that was moved by up to `shift` pixels each way, or mirrored, is as near as one that was not
    (training augments so); what a shift uncovers repeats the edge.

    Args:
        pictures: in [-1, 1].
        training: in [-1, 1], of the same size.
    """
    n, _, height, width = pictures.shape
    best = pictures.new_full((n,), math.inf)
    which = torch.zeros(n, dtype=torch.long, device=pictures.device)
    rows = training.flatten(1)
    norms = rows.square().sum(1)
    moves = range(-shift, shift + 1)
    padded = F.pad(pictures, (shift,) * 4, mode="replicate") if shift else pictures
    for dy in moves:
        for dx in moves:
            moved = padded[:, :, shift + dy : shift + dy + height, shift + dx : shift + dx + width]
            for view in (moved, moved.flip(-1)) if flip else (moved,):
                flat = view.flatten(1)
                distance = flat.square().sum(1, keepdim=True) + norms - 2 * flat @ rows.T  # (N, M)
                least, index = distance.min(1)
                which = torch.where(least < best, index, which)
                best = torch.minimum(best, least)
    return (best.clamp_min(0) / (3 * height * width)).sqrt() / 2, which


def near_duplicate_share(distances: Float[Tensor, " N"]) -> float:
    """Share of pictures that are near-duplicates of a training picture."""
    return float((distances <= NEAR_DUPLICATE).double().mean())
