"""Rows 4 and 7: the VQ-VAE beside the plain way and diffusers' `VQModel`; the search for the nearest code.

The VQ-VAE is the preset coco256-xl-8xa100's, on CPU at a quarter of its width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import FLOOR, Part, Ratio, Row, compare, copy_bandwidth, gemm_rate, judge, peak_memory
from model.config import TrainingConfig, VQVAEConfig
from model.nets.quantize import nearest_codes
from model.nets.vqvae import VQVAE
from model.training.losses import ReconstructionLoss
from model.training.optim import adamw
from model.training.tokenize import BATCH_PIXELS

SIDE = 256  # pixels
WIDTH = {"cpu": 32, "cuda": 128}
BATCH = {"cpu": 4, "cuda": 32}  # of a training step
LATENTS = {"cpu": 4096, "cuda": 2**17}  # 16 and 512 pictures of 256 px at factor 16
DIM = 8
BF16_ROUNDING = 0.02  # in the cosine between a latent and its code


# ── row 4 ───────────────────────────────────────────────────────────────────────────────────────────────


def vqvae_config(device: torch.device) -> VQVAEConfig:
    """The preset's, see above."""
    return VQVAEConfig(
        factor=16,
        width=WIDTH[device.type],
        multipliers=[1, 1, 2, 2, 4],
        codebook_size=16384,
        code_dim=DIM,
        training=TrainingConfig(steps=1000, batch_size=BATCH[device.type], precision="bf16", compile=True),
    )


def _pictures(count: int, device: torch.device) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, device=device) * 2 - 1


def plain_codes(net: VQVAE, images: Tensor) -> Tensor:
    """As taming-transformers does it: NCHW, fp32, all distances at once. `net` is in contiguous format."""
    latents = net.encoder(images)
    flat = F.normalize(latents.permute(0, 2, 3, 1).reshape(-1, DIM), dim=1)
    codes = F.normalize(net.quantizer.codebook, dim=1)
    distances = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.t()
    return distances.argmin(1).view(len(images), *latents.shape[2:])


def vqmodel(config: VQVAEConfig) -> nn.Module:
    """diffusers' VQModel of the same widths and blocks; it has attention in the middle, as taming's has."""
    from diffusers import VQModel

    levels = len(config.multipliers)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.width * multiplier for multiplier in config.multipliers),
        layers_per_block=config.blocks,
        latent_channels=config.code_dim,
        num_vq_embeddings=config.codebook_size,
    )


@torch.no_grad()
def encoding(device: torch.device) -> Iterator[Row]:
    """Pictures to codes, as pictures are tokenized."""
    torch.manual_seed(0)
    config = vqvae_config(device)
    images = _pictures(BATCH_PIXELS[device.type] // SIDE**2, device)
    net = VQVAE(config).to(device).eval()
    latents = F.normalize(net.encoder(images), dim=1)
    net.quantizer.codebook.copy_(F.normalize(torch.randn_like(net.quantizer.codebook), dim=1))
    plain = VQVAE(config).to(device, memory_format=torch.contiguous_format).eval()
    plain.load_state_dict(net.state_dict())
    theirs = vqmodel(config).to(device).eval()
    freezing = {"freezing": device.type == "cpu"}  # packs the weights for the CPU's convolutions
    encoder = torch.compile(net.encoder, options=freezing)

    def fp32() -> Tensor:
        return net.quantizer(net.encoder(images.contiguous(memory_format=torch.channels_last)))[1]

    def compiled() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            latents = encoder(images.contiguous(memory_format=torch.channels_last))
        return net.quantizer(latents)[1]

    def diffusers() -> Tensor:
        return theirs.quantize(theirs.encode(images).latents)[2][2]

    def same(ours: Tensor, other: Tensor) -> bool:
        """As near as the nearest, to within bf16's rounding: which of two near ones is nearer may change."""
        codebook = F.normalize(net.quantizer.codebook, dim=1)
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
        distance = [(flat * codebook[codes.flatten()]).sum(1) for codes in (ours, other)]
        return bool(((distance[0] - distance[1]).abs() < BF16_ROUNDING).all())

    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: net.encode(images),
        "ours, compiled": compiled,
        "ours in fp32": fp32,
        "plain": lambda: plain_codes(plain, images),
        "diffusers": diffusers,
    }
    comparison = compare(ways, device, rounds=5, warmup=2, same=same, incomparable=["diffusers"])
    equal = {
        name: (ways[name]() == ways["plain"]()).float().mean().item() for name in ("ours", "ours in fp32")
    }
    work = {name: _flops(ways[name]) / len(images) / 1e9 for name in ("ours", "diffusers")}
    yield comparison.row(
        4,
        f"VQ-VAE encode, {SIDE} px f16, width {config.width}, batch {len(images)}",
        amount=len(images),
        unit="img/s",
        goals={FLOOR: 0.5} if device.type == "cuda" else {"plain": 2.3},
        floor=gemm_rate(torch.bfloat16, device) / work["ours"] / 1e9,
        note=f"ours: as it tokenizes, bf16 and not compiled. plain: the same weights in NCHW, fp32, all"
        f" distances at once; codes equal to its own: {equal['ours']:.2%}, in fp32"
        f" {equal['ours in fp32']:.2%}."
        f" GFLOP per image {work['ours']:.1f}, diffusers {work['diffusers']:.1f} (same widths, attention of"
        " its own, other weights: not compared). Floor: bf16 GEMM",
    )


def training(device: torch.device) -> Iterator[Row]:
    """A step without the discriminator."""
    torch.manual_seed(0)
    config = vqvae_config(device)
    images = _pictures(BATCH[device.type], device)
    criterion = ReconstructionLoss(config.loss).to(device)
    torch.manual_seed(0)
    ours = VQVAE(config).to(device)
    eager = VQVAE(config).to(device)
    plain = VQVAE(config).to(device, memory_format=torch.contiguous_format)
    for net in (eager, plain):
        net.load_state_dict(ours.state_dict())
    if device.type == "cuda":  # on CPU it loses, see docs/EXPERIMENTS.md
        ours.compile()
    theirs = vqmodel(config).to(device).train()

    def quantized(net: VQVAE) -> tuple[Tensor, Tensor]:
        reconstruction, _, commitment = net(images)
        return reconstruction, commitment

    def contiguous(net: VQVAE) -> tuple[Tensor, Tensor]:
        latents, _, commitment = net.quantizer(net.encoder(images))
        return net.decoder(latents), commitment

    def diffusers(net: nn.Module) -> tuple[Tensor, Tensor]:
        latents, commitment, _ = net.quantize(net.encode(images).latents)
        return net.decode(latents, force_not_quantize=True).sample, commitment

    def steps(
        net: nn.Module, forward: Callable[..., tuple[Tensor, Tensor]], bf16: bool
    ) -> Callable[[], Tensor]:
        optimizer = adamw(net, config.training)

        def step() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                reconstruction, commitment = forward(net)
                loss = criterion(reconstruction.float(), images) + commitment
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), config.training.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            if isinstance(net, VQVAE):
                net.quantizer.update()
            return loss.detach()

        return step

    ways = {
        "ours": steps(ours, quantized, bf16=True),
        "ours in fp32, eager": steps(eager, quantized, bf16=False),
        "plain": steps(plain, contiguous, bf16=False),
        "diffusers": steps(theirs, diffusers, bf16=False),
    }
    comparison = compare(
        ways,
        device,
        rounds=4,
        warmup=2,
        same=lambda mine, other: bool((mine - other).abs() < 0.01 * other.abs()),
        incomparable=["diffusers"],
    )
    work = {name: _flops(ways[name]) / len(images) / 1e9 for name in ("plain", "diffusers")}
    yield comparison.row(
        4,
        f"VQ-VAE training step, {SIDE} px f16, width {config.width}, batch {len(images)}",
        amount=len(images),
        unit="img/s",
        goals={FLOOR: 0.5} if device.type == "cuda" else None,
        floor=gemm_rate(torch.bfloat16, device) / work["plain"] / 1e9,
        note=f"ours: bf16, on a GPU compiled; its first loss is fp32's to within 1 %. GFLOP"
        f" per image {work['plain']:.1f}, diffusers {work['diffusers']:.1f}. Floor: bf16 GEMM",
    )


def _flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# ── row 7 ───────────────────────────────────────────────────────────────────────────────────────────────


def nearest_code(device: torch.device) -> Iterator[Row]:
    """Unit latents to the nearest of K unit codes: speed, and the memory at its height."""
    from vector_quantize_pytorch import VectorQuantize

    count = LATENTS[device.type]
    for size in (16384, 1024):
        torch.manual_seed(0)
        codebook = F.normalize(torch.randn(size, DIM, device=device), dim=1)
        latents = F.normalize(torch.randn(count, DIM, device=device), dim=1)
        theirs = VectorQuantize(dim=DIM, codebook_size=size, use_cosine_sim=True).to(device).eval()
        theirs._codebook.embed.copy_(codebook[None])

        def library(theirs: nn.Module = theirs, latents: Tensor = latents) -> Tensor:
            with torch.no_grad():
                return theirs(latents[None])[1][0]

        def same(ours: Tensor, other: Tensor, latents: Tensor = latents, codebook: Tensor = codebook) -> bool:
            """Identical, except where two codes are equally near as far as fp32 can tell."""
            apart = ours != other
            near = [
                (latents[apart].double() * codebook[codes[apart]].double()).sum(1) for codes in (ours, other)
            ]
            return bool(((near[0] - near[1]).abs() < 1e-6).all())

        ways: dict[str, Callable[[], Tensor]] = {
            "ours": lambda latents=latents, codebook=codebook: nearest_codes(latents, codebook),
            "cdist": lambda latents=latents, codebook=codebook: torch.cdist(latents, codebook).argmin(1),
            "vector-quantize-pytorch": library,
        }
        comparison = compare(ways, device, rounds=7, warmup=2, same=same)
        ours = ways["ours"]()
        apart = {name: int((way() != ours).sum()) for name, way in ways.items() if name != "ours"}
        flops = 2 * count * size * DIM
        traffic = 4 * DIM * (count + size) + 8 * count
        seconds = max(flops / gemm_rate(torch.float32, device), traffic / copy_bandwidth(device))
        work = f"nearest code, K = {size}, D = {DIM}, {count} latents"
        yield comparison.row(
            7,
            work,
            amount=count,
            unit="latents/s",
            goals={"cdist": 2.0 if device.type == "cuda" else 1.2},
            floor=count / seconds,
            note="codes that differ, all equally near in fp32: "
            + ", ".join(f"{name} {number}" for name, number in apart.items())
            + ". Floor: fp32 GEMM, which a depth of 8 cannot fill",
        )
        peaks = {name: peak_memory(way, device) / 2**20 for name, way in ways.items()}
        ratios = {name: peak / max(peaks["ours"], 2**-8) for name, peak in peaks.items() if name != "ours"}
        goal, met = judge(ratios, None, {"cdist": 4.0})
        shown = {name: Ratio(ratio, ratio, ratio) for name, ratio in ratios.items()}
        yield Row(7, f"{work}: memory at its height", "MiB", peaks, shown, goal=goal, met=met)


ROWS = {
    4: [Part("VQ-VAE encode", encoding), Part("VQ-VAE training step", training)],
    7: [Part("nearest code", nearest_code)],
}
GPU_ROWS = ROWS
