"""What a reconstruction is judged by in training: pixels, perception, and an adversary.

Images are float (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.config import TokenizerLoss, TrainingConfig
from model.errors import UserError
from model.plumbing import storage
from model.training.optim import adamw, set_learning_rate
from model.training.state import Part

GRADIENT_SCALES = 3  # full, half and quarter resolution


class ReconstructionLoss(nn.Module):
    """Pixel loss plus the weighted perceptual term."""

    def __init__(self, config: TokenizerLoss) -> None:
        super().__init__()
        self.pixel = F.l1_loss if config.pixel == "l1" else F.mse_loss
        self.weight = config.perceptual
        self.perceptual = build_perceptual(config) if config.perceptual else None

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """The mean over the batch."""
        loss = self.pixel(reconstruction, images)
        if self.perceptual is not None:
            loss = loss + self.weight * self.perceptual(reconstruction, images)
        return loss


# ── perception ──────────────────────────────────────────────────────────────────────────────────────────


def build_perceptual(config: TokenizerLoss) -> nn.Module:
    """LPIPS where its weights are given, else the gradient term."""
    if not config.perceptual_weights:
        return MultiScaleGradient()
    return Lpips.load(config.perceptual_weights)


class MultiScaleGradient(nn.Module):
    """L1 between the pictures' differences to the right and downwards, at several resolutions.

    The alternative where LPIPS' weights cannot be had: it asks for edges where the picture has edges, and
    for flat areas where it is flat, which the pixel loss of a blurred edge hardly notices.
    """

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        error = reconstruction - images  # all that follows is linear up to the absolute value
        total = error.new_zeros(())
        for scale in range(GRADIENT_SCALES):
            if scale:
                error = F.avg_pool2d(error, 2)
            total = total + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return total / GRADIENT_SCALES


class Lpips(nn.Module):
    """LPIPS over VGG-16 (Zhang et al. 2018, arXiv:1801.03924), frozen.

    The weights file is safetensors with torchvision's `features.*` of VGG-16 and LPIPS' `lin0.model.1.weight`
    … `lin4.model.1.weight` (1, C, 1, 1), names as in the original files. Made from them once, on a machine
    where they are trusted:

        weights = vgg16(weights="IMAGENET1K_V1").state_dict()
        weights |= torch.load("lpips/weights/v0.1/vgg.pth", weights_only=True)
        wanted = {name: t for name, t in weights.items() if name.startswith(("features", "lin"))}
        save_file(wanted, "lpips.safetensors")
    """

    LAYERS = (3, 8, 15, 22, 29)  # the ReLU at each block's end
    CHANNELS = (64, 128, 256, 512, 512)

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import vgg16  # type: ignore[import-untyped]

        self.features = vgg16(weights=None).features[: self.LAYERS[-1] + 1]
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.heads = nn.ParameterList(torch.ones(1, channels, 1, 1) for channels in self.CHANNELS)
        # ImageNet's statistics, for images in [-1, 1] instead of [0, 1].
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, ref: str) -> Lpips:
        """Read the weights from a local path or an s3:// URI.

        Raises:
            UserError: when the file is missing or holds something else.
        """
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(ref).expanduser()
            if "://" in ref:
                path = Path(scratch) / "lpips.safetensors"
                storage.download_file(ref, path)
            try:
                weights = load_file(path)
            except Exception as error:  # safetensors raises several kinds, and none names the field
                raise UserError(
                    f"tokenizer.loss.perceptual_weights '{ref}' is not readable as safetensors ({error});"
                    " leave it empty for the gradient term, which needs no weights"
                ) from None
        net = cls()
        names = {f"lin{i}.model.1.weight": f"heads.{i}" for i in range(len(cls.CHANNELS))}
        found = {names.get(name, name): tensor for name, tensor in weights.items()}
        own = net.state_dict()
        if missing := sorted(own.keys() - found.keys()):
            raise UserError(f"tokenizer.loss.perceptual_weights '{ref}' lacks {missing[0]}")
        net.load_state_dict({name: found[name] for name in own})
        return net

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self._normalised_features(images)
        total = reconstruction.new_zeros(())
        for head, ours, theirs in zip(
            self.heads, self._normalised_features(reconstruction), wanted, strict=True
        ):
            total = total + ((ours - theirs).square() * head).sum(1).mean()
        return total

    def train(self, mode: bool = True) -> Lpips:
        """Stays in evaluation mode, whatever the module around it does."""
        return super().train(False)

    def _normalised_features(self, images: Tensor) -> list[Tensor]:
        x, found = (images - self.mean) / self.std, []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.LAYERS:
                # The original adds 1e-10 to the root, whose gradient is NaN where a pixel has no feature.
                found.append(x / (x.square().sum(1, keepdim=True) + 1e-20).sqrt())
        return found


# ── the adversary ───────────────────────────────────────────────────────────────────────────────────────


class PatchDiscriminator(nn.Sequential):
    """Judges overlapping patches, (B, 3, H, W) -> (B, 1, H/8, W/8) (PatchGAN; Isola et al. 2017,
    arXiv:1611.07004).

    Group instead of batch normalisation: what is said of a picture does not depend on its neighbours, and
    processes need not synchronise statistics. Kernels of 3 after the last reduction, for small pictures too.
    """

    def __init__(self, width: int = 64) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for here, there, kernel, stride in ((1, 2, 4, 2), (2, 4, 4, 2), (4, 8, 3, 1)):
            layers += [
                nn.Conv2d(here * width, there * width, kernel, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, there * width),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, nn.Conv2d(8 * width, 1, 3, padding=1))


class Adversary:
    """The discriminator with its optimiser; it plays along from `loss.adversarial_from` on."""

    def __init__(self, config: TokenizerLoss, training: TrainingConfig, device: torch.device) -> None:
        self.weight = config.adversarial
        self.first_step = round(config.adversarial_from * training.steps)
        self.grad_clip = training.grad_clip
        self.net = PatchDiscriminator().to(device)
        # Averages gradients over processes; the net itself judges where no gradient is to reach it.
        self.reducer = DistributedDataParallel(self.net) if dist.is_initialized() else self.net
        self.optimizer = adamw(self.net, training)

    @property
    def parts(self) -> dict[str, Part]:
        """What a checkpoint has to hold."""
        return {"adversary": self.net, "adversary_adamw": self.optimizer}

    def term(self, reconstruction: Tensor, loss: Tensor) -> Tensor:
        """What the decoder minimises beside the reconstruction's `loss`, weighted so that both pull alike.

        The weight is the ratio of the two gradients' norms, as in VQGAN (Esser et al. 2021,
        arXiv:2012.09841), but at the reconstruction instead of at the decoder's last layer: no second pass
        through the decoder, and nothing that a compiled or distributed module would have to allow for.
        """
        self.net.requires_grad_(False)
        adversarial = -self.net(reconstruction).mean()
        self.net.requires_grad_(True)
        (ours,) = torch.autograd.grad(loss, reconstruction, retain_graph=True)
        (theirs,) = torch.autograd.grad(adversarial, reconstruction, retain_graph=True)
        ratio = (ours.norm() / theirs.norm().clamp_min(1e-8)).clamp_max(1e4)
        return self.weight * ratio.detach() * adversarial

    def learn(self, images: Tensor, reconstruction: Tensor, rate: float) -> Tensor:
        """One optimiser step on the hinge loss at learning rate `rate`; returns the loss."""
        set_learning_rate(self.optimizer, rate)
        real, fake = self.reducer(torch.cat([images, reconstruction.detach()])).float().chunk(2)
        loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()
