"""The losses: that each notices what it is there for, and that LPIPS computes what its paper says."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision.models import vgg16

from model.config import TokenizerLoss, TrainingConfig
from model.errors import UserError
from model.training.losses import (
    Adversary,
    Lpips,
    MultiScaleGradient,
    PatchDiscriminator,
    ReconstructionLoss,
    build_perceptual,
)

pytestmark = pytest.mark.slow  # too long for the inner loop
TRAINING = TrainingConfig(steps=200, batch_size=2, learning_rate=1e-3)


def pictures(seed: int = 0, side: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("pixel", "reference"), [("l1", F.l1_loss), ("l2", F.mse_loss)])
def test_pixel_loss(pixel: str, reference: object) -> None:
    a, b = pictures(0), pictures(1)
    assert torch.equal(ReconstructionLoss(TokenizerLoss(pixel=pixel))(a, b), reference(a, b))


def test_gradient_term_prefers_sharp_edges_at_equal_pixel_loss() -> None:
    edge = torch.full((1, 3, 16, 16), -1.0)
    edge[..., 8:] = 1.0
    blurred = edge.clone()
    blurred[..., 7], blurred[..., 8] = -0.5, 0.5  # off by half a step on both sides of the edge
    shaded = (edge - edge.sign() * 2 * 0.5 / 16).clone()  # the same total error spread evenly
    assert torch.isclose(F.l1_loss(blurred, edge), F.l1_loss(shaded, edge))
    term = MultiScaleGradient()
    assert term(blurred, edge) > 2 * term(shaded, edge)
    assert term(edge, edge) == 0


def test_perceptual_term_is_weighted() -> None:
    a, b = pictures(0), pictures(1)
    plain = ReconstructionLoss(TokenizerLoss())(a, b)
    weighted = ReconstructionLoss(TokenizerLoss(perceptual=0.5))(a, b)
    torch.testing.assert_close(weighted, plain + 0.5 * MultiScaleGradient()(a, b))


# ── LPIPS ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the original names, with layers that LPIPS does not use."""
    torch.manual_seed(0)
    weights = {f"features.{name}": t for name, t in vgg16(weights=None).features.state_dict().items()}
    for number, channels in enumerate((64, 128, 256, 512, 512)):
        weights[f"lin{number}.model.1.weight"] = torch.rand(1, channels, 1, 1)
    weights["classifier.0.bias"] = torch.zeros(3)
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(weights, path)
    return path


def test_lpips_equals_the_formula(lpips_file: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(lpips_file)
    net = build_perceptual(TokenizerLoss(perceptual=1.0, perceptual_weights=str(lpips_file)))
    a, b = pictures(0), pictures(1)

    def taps(x: torch.Tensor) -> list[torch.Tensor]:
        """VGG-16 written out: convolutions by number, pooling before each block but the first."""
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        x, found = (x - shift) / scale, []
        for block in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            x = F.max_pool2d(x, 2) if block[0] else x
            for number in block:
                weight, bias = weights[f"features.{number}.weight"], weights[f"features.{number}.bias"]
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return found

    wanted = sum(
        F.conv2d((left - right) ** 2, weights[f"lin{number}.model.1.weight"].view(1, -1, 1, 1)).mean()
        for number, (left, right) in enumerate(zip(taps(a), taps(b), strict=True))
    )
    torch.testing.assert_close(net(a, b), wanted)
    assert net(a, a) == 0


def test_lpips_is_frozen_and_passes_gradients(lpips_file: Path) -> None:
    net = Lpips.load(str(lpips_file)).train()
    a = pictures(0).requires_grad_()
    net(a, pictures(1)).backward()
    assert a.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_lpips_passes_gradients_where_nothing_is_seen() -> None:
    net = Lpips()
    net.features[0].bias.fill_(-100)  # no feature anywhere after the first ReLU
    a = pictures(0).requires_grad_()
    net(a, pictures(1)).backward()
    assert a.grad.isfinite().all()


def test_unusable_weights_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    with pytest.raises(UserError, match=r"perceptual_weights '.*bad.safetensors' is not readable"):
        Lpips.load(str(bad))
    bad.write_bytes(b"no weights")
    with pytest.raises(UserError, match="leave it empty"):
        Lpips.load(str(bad))
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, bad)
    with pytest.raises(UserError, match=r"lacks features\.0\.bias"):
        Lpips.load(str(bad))


# ── the adversary ───────────────────────────────────────────────────────────────────────────────────────


def test_discriminator_judges_patches() -> None:
    assert PatchDiscriminator(width=8)(pictures(side=32)).shape == (2, 1, 4, 4)
    assert PatchDiscriminator(width=8)(pictures(side=16)).shape == (2, 1, 2, 2)


def test_adversary_learns_to_tell_apart() -> None:
    torch.manual_seed(0)
    adversary = Adversary(TokenizerLoss(adversarial=1.0), TRAINING, torch.device("cpu"))
    real, fake = pictures(0), F.avg_pool2d(pictures(0), 3, 1, 1)
    losses = [adversary.learn(real, fake, 1e-3).item() for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]


def test_adversarial_term_pulls_as_hard_as_the_reconstruction_loss() -> None:
    torch.manual_seed(0)
    adversary = Adversary(TokenizerLoss(adversarial=0.5), TRAINING, torch.device("cpu"))
    reconstruction = pictures(1).requires_grad_()
    loss = F.l1_loss(reconstruction, pictures(0))
    term = adversary.term(reconstruction, loss)
    (ours,) = torch.autograd.grad(loss, reconstruction, retain_graph=True)
    (theirs,) = torch.autograd.grad(term, reconstruction)
    torch.testing.assert_close(theirs.norm(), 0.5 * ours.norm())
    assert all(parameter.grad is None for parameter in adversary.net.parameters())


def test_adversary_starts_late() -> None:
    config = TokenizerLoss(adversarial=1.0, adversarial_from=0.25)
    assert Adversary(config, TRAINING, torch.device("cpu")).first_step == 50
