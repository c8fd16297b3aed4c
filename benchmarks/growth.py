"""Row 12: what a picture costs as pictures, resolution, codebook and model double, as exponents of growth."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.harness import Part, Row, compare
from model.config import DataConfig, ShapesSource, TrainingConfig, TransformerConfig, VQVAEConfig
from model.nets.gpt import GPT
from model.nets.quantize import nearest_codes
from model.nets.vqvae import VQVAE
from model.training.optim import adamw

NOISE = 0.1  # by which a fitted exponent may lie above theory: four sizes, timed on a machine in use
TRAINING = TrainingConfig(steps=1000, batch_size=8)


def growth(device: torch.device) -> Iterator[Row]:
    """One line for each thing that grows."""
    torch.manual_seed(0)
    if device.type == "cpu":
        yield _images()
    yield _resolution(device)
    yield _codebook(device)
    yield _model(device)


def exponent(costs: Mapping[float, float]) -> float:
    """Slope of log(cost) over log(size), by least squares."""
    sizes, seconds = np.log(list(costs)), np.log(list(costs.values()))
    return float(np.polyfit(sizes, seconds, 1)[0])


def _row(
    work: str,
    ways: Mapping[float, Callable[[], object]],
    pictures: Mapping[float, int],
    theory: float,
    device: torch.device,
    note: str,
    rounds: int = 5,
) -> Row:
    comparison = compare({str(size): way for size, way in ways.items()}, device, rounds=rounds)
    costs = {size: comparison.median(str(size)) / pictures[size] for size in ways}
    found = exponent(costs)
    shown = ", ".join(f"{size:g}: {1e3 * cost:.3g} ms" for size, cost in costs.items())
    return Row(
        12,
        f"cost per picture as {work} doubles",
        "(exponent)",
        {"ours": found, "theory": theory},
        goal=f"≤ {theory:g} (+ {NOISE} for noise)",
        met=found <= theory + NOISE,
        note=f"{note}; per picture {shown}",
        seconds=comparison.seconds,
    )


def _images() -> Row:
    """Ingest from the shapes source, end to end, into a local store that is new each time."""
    from benchmarks.data import ingest

    counts = (500, 1000, 2000, 4000)

    def way(count: int) -> Callable[[], object]:
        config = DataConfig(source=ShapesSource(count=count), image_size=64)

        def call() -> object:
            with (
                tempfile.TemporaryDirectory(prefix="latent-gpt-bench-") as folder,
                mock.patch.dict(os.environ, {"LATENT_GPT_STORE": str(Path(folder, "store"))}),
            ):
                os.mkdir(os.environ["LATENT_GPT_STORE"])
                return ingest(config)

        return call

    ways = {float(count): way(count) for count in counts}
    pictures = {float(count): count for count in counts}
    return _row("the number of pictures", ways, pictures, 0.0, torch.device("cpu"), "ingest of shapes", 3)


@torch.no_grad()
def _resolution(device: torch.device) -> Row:
    sides = (64, 128, 256, 512) if device.type == "cpu" else (256, 512, 1024)
    config = VQVAEConfig(
        factor=16, width=32, multipliers=[1, 1, 2, 2, 4], codebook_size=1024, training=TRAINING
    )
    net = VQVAE(config).to(device).eval()
    images = {float(side): torch.zeros(2, 3, side, side, device=device) for side in sides}
    ways = {side: (lambda picture=picture: net.encode(picture)) for side, picture in images.items()}
    return _row("the side in pixels", ways, dict.fromkeys(ways, 2), 2.0, device, "VQ-VAE encode, f16")


def _codebook(device: torch.device) -> Row:
    latents = F.normalize(torch.randn(4096 if device.type == "cpu" else 2**18, 8, device=device), dim=1)
    books = {
        float(size): F.normalize(torch.randn(size, 8, device=device), dim=1)
        for size in (2048, 4096, 8192, 16384)
    }
    ways = {size: (lambda book=book: nearest_codes(latents, book)) for size, book in books.items()}
    pictures = dict.fromkeys(ways, len(latents) // 256)
    return _row("the codebook", ways, pictures, 1.0, device, "nearest codes of 256 latents")


def _model(device: torch.device) -> Row:
    """Training steps of transformers whose parameters about double from one to the next."""
    shapes = ((4, 128), (4, 192), (4, 256), (4, 384)) if device.type == "cpu" else ((12, 768), (24, 1024))
    batch = 2 if device.type == "cpu" else 16

    def way(depth: int, width: int) -> tuple[float, Callable[[], object]]:
        config = TransformerConfig(depth=depth, width=width, heads=width // 64, training=TRAINING)
        gpt = GPT(config, 1024, (16, 16), 256).to(device)
        optimizer = adamw(gpt, TRAINING)
        codes = torch.randint(1024, (batch, 256), device=device)
        text = torch.randn(batch, 32, 256, device=device)
        mask = torch.ones(batch, 32, dtype=torch.bool, device=device)

        def call() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = gpt(codes, text, mask)
            F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return float(sum(parameter.numel() for parameter in gpt.parameters())), call

    ways = dict(way(depth, width) for depth, width in shapes)
    return _row("the model", ways, dict.fromkeys(ways, batch), 1.0, device, "training step")


ROWS = {12: [Part("growth", growth)]}
GPU_ROWS = ROWS
