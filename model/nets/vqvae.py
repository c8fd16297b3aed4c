"""The VQ-VAE: a convolutional encoder and decoder around a quantizer.

Letters: B batch, H W pixels, h w token grid (H / factor, W / factor), C channels, D code dimension, K codes.
Images are float (B, 3, H, W) in [-1, 1], which the convolutions see in the config's `value_range`; codes are
int64 (B, h, w). Convolutions alone, so any picture whose sides are multiples of the factor passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from model.config import VQVAEConfig
from model.errors import UserError
from model.nets.quantize import build_quantizer

GROUP = 16  # channels that share a mean and a variance


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), the second convolution zero at the start."""

    def __init__(self, channels_in: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)
        self.dropout = dropout
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C H W"]:
        y = self.conv1(F.silu(self.norm1(x)))
        y = F.dropout(F.silu(self.norm2(y)), self.dropout, self.training)
        return self.skip(x) + self.conv2(y)


class Encoder(nn.Sequential):
    """(B, 3, H, W) -> (B, D, h, w)."""

    def __init__(self, config: VQVAEConfig, dim: int) -> None:
        channels = [config.width * multiplier for multiplier in config.multipliers]
        layers: list[nn.Module] = [
            nn.PixelUnshuffle(config.stem),
            nn.Conv2d(3 * config.stem**2, channels[0], 3, padding=1),
        ]
        here = channels[0]
        for level, there in enumerate(channels):
            if level:
                layers.append(nn.Conv2d(here, there, 4, stride=2, padding=1))
                here = there
            layers += [ResidualBlock(here, there, config.dropout) for _ in range(config.blocks)]
        super().__init__(*layers, norm(here), nn.SiLU(), nn.Conv2d(here, dim, 1))


class Decoder(nn.Sequential):
    """(B, D, h, w) -> (B, 3, H, W): the encoder's levels in reverse."""

    def __init__(self, config: VQVAEConfig, dim: int) -> None:
        channels = [config.width * multiplier for multiplier in reversed(config.multipliers)]
        here = channels[0]
        layers: list[nn.Module] = [nn.Conv2d(dim, here, 3, padding=1)]
        for level, there in enumerate(channels):
            if (
                level
            ):  # a convolution and a shuffle: no checkerboard, and cheaper than convolving the larger map
                layers += [nn.Conv2d(here, 4 * there, 3, padding=1), nn.PixelShuffle(2)]
                here = there
            layers += [ResidualBlock(here, there, config.dropout) for _ in range(config.blocks)]
        super().__init__(
            *layers,
            norm(here),
            nn.SiLU(),
            nn.Conv2d(here, 3 * config.stem**2, 3, padding=1),
            nn.PixelShuffle(config.stem),
        )


class VQVAE(nn.Module):
    """Encoder, quantizer, decoder."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = config.factor
        self.vocabulary = config.vocabulary
        low, high = config.value_range
        self._value_range = (high - low) / 2, (high + low) / 2  # half its width, and its middle
        dim = config.code_dim if config.quantizer == "vq" else len(config.fsq_levels)
        self.encoder = Encoder(config, dim)
        self.quantizer = build_quantizer(config)
        self.decoder = Decoder(config, dim)
        self.to(memory_format=torch.channels_last)

    def forward(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B 3 H W"], Int[Tensor, "B h w"], Float[Tensor, ""]]:
        """Reconstructions, not clamped; codes; the quantizer's loss."""
        quantized, codes, loss = self.quantizer(self.latents(images))
        return self._pictures(quantized), codes, loss

    def latents(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """What the quantizer gets of images."""
        half, middle = self._value_range
        seen = images if (half, middle) == (1, 0) else images * half + middle
        return self.encoder(seen.contiguous(memory_format=torch.channels_last))

    def _pictures(self, quantized: Float[Tensor, "B D h w"]) -> Float[Tensor, "B 3 H W"]:
        half, middle = self._value_range
        decoded = self.decoder(quantized)
        return decoded if (half, middle) == (1, 0) else (decoded - middle) / half

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        """Codes of images, in the precision that the net was trained in.

        Raises:
            UserError: when a side is not a multiple of the factor.
        """
        check_sides(images, self.factor)
        bf16 = self.config.training.precision == "bf16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            latents = self.latents(images)
        return self.quantizer(latents)[1]

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images in [-1, 1] of codes."""
        return self._pictures(self.quantizer.lookup(codes)).clamp(-1, 1)

    def reconstruct(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """What is left of the images after `encode` and `decode`."""
        return self.decode(self.encode(images))


def norm(channels: int) -> nn.GroupNorm:
    """Group normalisation over 16 channels a group, or over all where they do not divide."""
    groups = channels // GROUP if channels % GROUP == 0 else 1
    return nn.GroupNorm(groups, channels, eps=1e-6)


def check_sides(images: Float[Tensor, "B 3 H W"], factor: int) -> None:
    """Refuse pictures that do not fill a whole grid of tokens."""
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise UserError(f"image size {width} x {height}: both sides must be multiples of the factor {factor}")
