"""Metrics against values worked out by hand."""

import math

import pytest
import torch

from model.nets import metrics


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


def test_paired_difference() -> None:
    mean, error = metrics.paired_difference([1.0, 2.0, 3.0], [0.0, 2.0, 1.0])
    assert mean == pytest.approx(1.0)
    assert error == pytest.approx(1 / math.sqrt(3))
    with pytest.raises(ValueError, match="cannot be paired"):
        metrics.paired_difference([1.0], [])
