"""Metrics against values worked out by hand, and against those of torchmetrics."""

import math

import pytest
import torch
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance  # the package shows it with torch-fidelity alone
from torchmetrics.text import Perplexity

from model.nets import metrics
from model.nets.clip import Judge, architecture, build_clip
from tests.instances import config

TINY = config()


def test_psnr_of_a_known_error() -> None:
    target = torch.zeros(2, 3, 4, 4)
    image = target.clone()
    image[0] += 0.2  # a tenth of the range: 20 dB
    assert metrics.psnr(image, target).tolist() == pytest.approx([20.0, 100.0], abs=1e-4)


def test_psnr_equals_that_of_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(256, (1, 3, 8, 8), generator=generator).float() for _ in range(2))
    expected = 10 * math.log10(255**2 / (a - b).square().mean().item())
    assert metrics.psnr(a / 127.5 - 1, b / 127.5 - 1).item() == pytest.approx(expected, abs=1e-4)


def test_codebook_use_and_perplexity() -> None:
    assert metrics.codebook_use(torch.tensor([[0, 1], [2, 3]]), 8) == pytest.approx((0.5, 4.0))
    use, perplexity = metrics.codebook_use(torch.tensor([5, 5, 5]), 8)
    assert (use, perplexity) == pytest.approx((1 / 8, 1.0))


def test_eight_even_codes_are_three_bits() -> None:
    nats = metrics.token_nll(torch.zeros(1, 2, 8), torch.tensor([[1, 2]])).item()
    assert metrics.bits(nats) == pytest.approx(3)


def test_nll_of_even_logits_is_log_k() -> None:
    codes = torch.tensor([[1, 2, 3], [0, 0, 0]])
    assert metrics.token_nll(torch.zeros(2, 3, 7), codes).tolist() == pytest.approx([math.log(7)] * 2)
    logits = torch.zeros(1, 2, 3)
    logits[0, 0, 1] = math.log(2)  # p = 2/4 of the first, 1/3 of the second
    expected = (math.log(2) + math.log(3)) / 2
    assert metrics.token_nll(logits, torch.tensor([[1, 2]])).item() == pytest.approx(expected)


def test_the_temperature_that_fits_is_by_how_much_a_net_is_too_sure() -> None:
    codes = torch.tensor([[0, 0, 0, 1]])
    p = torch.tensor([0.75, 0.25])  # as the codes are, so that nothing has a lower NLL
    entropy = -float((p * p.log()).sum())
    for i, temperature in enumerate(metrics.TEMPERATURES):
        found = metrics.tempered_nll((p.log() * temperature).expand(1, 4, 2).bfloat16(), codes)
        assert found.shape == (len(metrics.TEMPERATURES), 1)
        assert int(found.argmin()) == i
        assert float(found.min()) == pytest.approx(entropy, abs=1e-4)


def test_clip_score_and_retrieval() -> None:
    text = torch.eye(4)
    images = torch.eye(4)[[0, 1, 3, 3]]  # the third picture looks like the fourth caption
    assert metrics.clip_score(images, text).tolist() == [100, 100, 0, 100]
    assert metrics.retrieval_accuracy(images, text, ["a", "b", "c", "d"]) == 0.75
    assert metrics.retrieved(images, text, ["a", "b", "c", "d"]) == [True, True, False, True]
    assert metrics.retrieval_accuracy(images, text, ["a", "b", "d", "d"]) == 1.0


def test_chance_of_retrieval() -> None:
    """A blind judge that always names one caption is right as often as it occurs."""
    assert metrics.retrieval_chance(["a", "b", "c", "d"]) == 0.25
    assert metrics.retrieval_chance(["a", "a", "a", "b"]) == pytest.approx((9 + 1) / 16)


def test_mismatched_captions_differ() -> None:
    captions = ["a", "a", "a", "b", "c", "a", "b"]
    places = metrics.mismatched(captions)
    assert all(captions[j] != captions[i] for i, j in enumerate(places))
    assert metrics.mismatched(["a", "a"]) == [0, 1]  # nothing else to stand for


def test_nearest_picture_and_its_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    training = torch.rand(5, 3, 8, 8, generator=generator) * 2 - 1
    pictures = training[[3, 1]].clone()
    pictures[1] += 0.2  # 0.1 on [0, 1]
    distance, which = metrics.nearest_pictures(pictures, training)
    assert which.tolist() == [3, 1]
    assert distance.tolist() == pytest.approx([0, 0.1], abs=1e-3)
    assert metrics.near_duplicate_share(distance) == 0.5


def test_moved_and_mirrored_copies_are_found_when_looked_for() -> None:
    training = torch.ones(2, 3, 16, 16)
    training[0, :, 4:9, 3:7] = -1
    training[1, :, 2:4, :] = 0
    copy = torch.ones(1, 3, 16, 16)
    copy[0, :, 6:11, 10:14] = -1  # the first, mirrored and two lower
    near, which = metrics.nearest_pictures(copy, training, shift=2, flip=True)
    assert which.item() == 0
    assert near.item() == pytest.approx(0, abs=1e-3)
    far, _ = metrics.nearest_pictures(copy, training)
    assert far.item() > metrics.NEAR_DUPLICATE


# ── against torchmetrics, with our encoder as its feature ───────────────────────────────────────────────


class Encoder(torch.nn.Module):
    """The image tower of a tiny CLIP of ours, as torchmetrics wants its extractor: bytes in, features out."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        description = {"name": "tiny", "architecture": architecture(TINY.clip, 16)}  # type: ignore[arg-type]
        preprocess = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
        self.judge = Judge(build_clip(description | {"preprocess": preprocess}), preprocess)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.judge.image_features(images.float() / 127.5 - 1)


def random_pictures(count: int, seed: int, brightest: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(brightest, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("count", [100, 12])  # 12 pictures have no covariance of full rank in 16 dimensions
def test_frechet_distance_is_that_of_torchmetrics(count: int) -> None:
    encoder = Encoder()
    theirs = FrechetInceptionDistance(feature=encoder, normalize=False).set_dtype(torch.float64)
    ours, real = random_pictures(count, 1, 128), random_pictures(count, 2)
    theirs.update(real, real=True)
    theirs.update(ours, real=False)
    found = metrics.frechet_distance(encoder(ours), encoder(real))
    assert found == pytest.approx(float(theirs.compute()), rel=1e-3)
    assert found > 1e-3


def test_frechet_distance_by_hand() -> None:
    """In one dimension (μ - μ')² + (σ - σ')²; σ² are 1 and 9 here."""
    one, two = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[2.0], [5.0], [8.0]])
    assert metrics.frechet_distance(one, two) == pytest.approx(25 + 4)
    assert metrics.frechet_distance(two, two) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(one[:1], two[:1]) == pytest.approx(9), "single pictures have no spread"


def test_ssim_is_that_of_torchmetrics() -> None:
    reference = StructuralSimilarityIndexMeasure(data_range=1.0, reduction="none", return_full_image=True)
    a, b = (random_pictures(4, seed).float() / 127.5 - 1 for seed in (1, 2))
    for one in (b, (a + 0.1 * b).clamp(-1, 1)):
        _, everywhere = reference(one / 2 + 0.5, a / 2 + 0.5)
        inside = everywhere[..., 5:-5, 5:-5].flatten(1).mean(1)  # theirs reflects at the borders
        assert metrics.ssim(one, a).tolist() == pytest.approx(inside.tolist(), abs=1e-4)
    assert metrics.ssim(a, a).tolist() == pytest.approx([1.0] * 4)
    small = a[:, :, :6, :6]
    assert metrics.ssim(small, small).tolist() == pytest.approx([1.0] * 4)


def test_psnr_is_that_of_torchmetrics() -> None:
    reference = PeakSignalNoiseRatio(data_range=2.0, reduction="none", dim=(1, 2, 3))
    a, b = (random_pictures(3, seed).float() / 127.5 - 1 for seed in (1, 2))
    assert metrics.psnr(a, b).tolist() == pytest.approx(reference(a, b).tolist(), abs=1e-4)


def test_bits_per_token_are_those_of_torchmetrics_perplexity() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    codes = torch.arange(10).view(2, 5) % 7
    ours = metrics.bits(float(metrics.token_nll(logits, codes).mean()))
    assert 2**ours == pytest.approx(float(Perplexity()(logits, codes)), rel=1e-4)


def test_cmmd_is_the_papers_kernel_worked_out_by_hand() -> None:
    one, two = torch.tensor([[0.0], [10.0]]), torch.tensor([[20.0]])
    k = {d: math.exp(-(d**2) / 200) for d in (0, 10, 20)}
    expected = 1000 * ((2 * k[0] + 2 * k[10]) / 4 + k[0] - 2 * (k[20] + k[10]) / 2)
    assert metrics.cmmd(one, two) == pytest.approx(expected)
    assert metrics.cmmd(one, one) == pytest.approx(0, abs=1e-9)
    assert metrics.cmmd(two, two + 1) > 0


def test_precision_and_recall_by_hand() -> None:
    """On a line, with one neighbour: real pictures at 0, 1, 10, 11 reach 1 each; samples at 0.5, 1.5, 5."""
    real = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    samples = torch.tensor([[0.5], [1.5], [5.0]])
    precision, recall = metrics.precision_recall(samples, real, neighbours=1)
    assert precision == pytest.approx(2 / 3), "5 lies in no ball around a real picture"
    # Samples reach 1, 1 and 3.5: 0 and 1 are near the first two, 10 and 11 are out of reach of 5.
    assert recall == pytest.approx(2 / 4)
    assert metrics.precision_recall(real, real) == (1.0, 1.0)
    assert metrics.precision_recall(real[:1], real[1:2]) == (0.0, 0.0), "a single picture reaches nothing"


def test_diversity_is_a_share_of_that_of_real_pictures() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0]])  # distances 1, 1, 2
    assert metrics.diversity(real / 2, real) == pytest.approx(0.5)
    assert metrics.diversity(torch.zeros(3, 1), real) == 0, "the same picture each time"
    assert metrics.diversity(real, torch.zeros(3, 1)) == 1
    assert metrics.diversity(real[:1], real[:1]) == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_figures_of_few_pictures_are_finite(count: int) -> None:
    ours, theirs = (torch.randn(count, 32, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    found = [
        metrics.frechet_distance(ours, theirs),
        metrics.cmmd(ours, theirs),
        *metrics.precision_recall(ours, theirs),
        metrics.diversity(ours, theirs),
    ]
    assert all(map(math.isfinite, found))
