"""The tokenizer's job: train the VQ-VAE that the config describes, or import the pretrained one it names.

    python -m model.training.vqvae SPEC_URI        (by torchrun, one process per device)

The asset holds the averaged weights (`training.ema`) of the validation with the highest PSNR. A step draws
its chances from (seed, rank, step) and its pictures from a position in the shuffled order, and a checkpoint
holds everything else, so a job that was killed at any moment continues as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import make_grid  # type: ignore[import-untyped]

from model.config import VQVAEConfig
from model.data.image_shards import ImageBatch, image_batches, load_images
from model.data.images import augment, to_pixels, to_tensor
from model.nets.metrics import codebook_use, psnr
from model.nets.tokenizers import import_pretrained
from model.nets.vqvae import VQVAE
from model.plumbing.assets import RECONSTRUCTIONS, Manifest
from model.plumbing.curves import Curves
from model.plumbing.distributed import Distributed, derive_seed, seed_all
from model.plumbing.worker import Job, run_worker
from model.training.losses import Adversary, ReconstructionLoss
from model.training.optim import Ema, adamw, learning_rate, set_learning_rate
from model.training.state import (
    Best,
    Pace,
    Part,
    Patience,
    Resumable,
    RunningSums,
    explained,
    itstime,
    publish,
    show,
    synced,
)

KMEANS_VECTORS = 16  # latents per code from which the codebook is initialised
VALIDATION_PICTURES = 2048  # measured at each validation, at most
VALIDATION_BATCH = 64
GRID_PICTURES, GRID_COLUMNS = 16, 8  # pairs of original and reconstruction shown in MLflow


def main(job: Job) -> Manifest | None:
    """Make the tokenizer; its manifest on the main process, None on the others.

    Raises:
        Diverged: a loss, a gradient, a metric or a weight is not finite.
        UserError: the pretrained tokenizer cannot be had.
    """
    config = job.config.tokenizer
    if config.kind == "vqvae":
        with explained(job, "tokenizer.training", config.training):
            return train(job, config)
    return import_pretrained(config, job.output) if job.processes.is_main else None


def train(job: Job, config: VQVAEConfig) -> Manifest | None:
    """Train the VQ-VAE. Returns and raises as `main`."""
    training, seed, images, processes = config.training, job.config.seed, job.inputs["images"], job.processes
    rank, world, device = processes.rank, processes.world, processes.device
    views, chances = job.config.data.augment, torch.Generator(device)
    torch.backends.cudnn.benchmark = True

    # ── what learns ──────────────────────────────────────────────────────────────────────────────────────
    seed_all(seed, "vqvae")
    net = VQVAE(config).to(device)
    criterion = ReconstructionLoss(config.loss).to(device)
    adversary = Adversary(config.loss, training, device) if config.loss.adversarial else None
    optimizer = adamw(net, training)
    ema, best, patience = Ema(net, training.ema), Best(), Patience(training.patience, processes)
    sums, curves = RunningSums(processes, "loss", "commitment", "grad_norm"), Curves(job.tracker)

    # ── where it was ─────────────────────────────────────────────────────────────────────────────────────
    parts: dict[str, Part] = {"net": net, "adamw": optimizer, **(adversary.parts if adversary else {})}
    parts |= patience.parts
    state = Resumable(job.checkpoints, processes, sums=sums, **parts, ema=ema, best=best, curves=curves)
    start = state.restore()
    share = training.batch_size // training.accumulate
    if start == 0:
        net.quantizer.initialise(_first_latents(net, image_batches(images, "train", share, seed)))
    model: nn.Module = net
    if world > 1:  # every rank updates the codebook alike; copying rank 0's at each step would only cost time
        model = DistributedDataParallel(net, broadcast_buffers=False)
    if training.compile:
        net.compile()
    batches = image_batches(images, "train", share, seed, start * training.batch_size, rank, world)
    held_out, _ = load_images(images, "validation", VALIDATION_PICTURES)  # uint8 (N, 3, H, W)
    progress = job.progress(training.steps, "img", training.batch_size, done=start)
    pace = Pace(device, "pictures", training.batch_size, start)

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────
    for step in range(start, training.steps):
        seed_all(seed, "vqvae", rank, step)
        chances.manual_seed(derive_seed(seed, "views", rank, step))
        rate = learning_rate(step, training)
        set_learning_rate(optimizer, rate)
        playing = adversary if adversary and step >= adversary.first_step else None
        for micro in range(training.accumulate):
            pictures = augment(to_tensor(next(batches).images.to(device)), views, chances)
            with (
                synced(model, last=micro + 1 == training.accumulate),
                torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"),
            ):
                reconstruction, codes, commitment = model(pictures)  # (B, 3, H, W), (B, h, w), ()
                loss = criterion(reconstruction.float(), pictures)
                total = loss + commitment
                if playing:
                    total = total + playing.term(reconstruction, loss)
                (total / training.accumulate).backward()
            sums.add(training.accumulate, loss=loss, commitment=commitment)
        sums.add(grad_norm=nn.utils.clip_grad_norm_(net.parameters(), training.grad_clip))
        optimizer.step()
        optimizer.zero_grad()
        net.quantizer.update()
        ema.update()
        if playing:
            playing.learn(pictures, reconstruction, rate)

        done = step + 1
        if itstime(done, training.log_every, training.steps):
            means = sums.means(done)
            curves.add(done, "train", means | {"learning_rate": rate})
            _, perplexity = codebook_use(processes.gather(codes), net.vocabulary)  # of one micro-batch
            curves.show(done, "train", pace.since(done) | {"codebook_perplexity": perplexity})
            progress.update(done, loss=means["loss"])
        if itstime(done, training.eval_every, training.steps):
            sums.check(done)
            with ema.applied():
                figures = validate(net, held_out, processes)
                curves.add(done, "validation", figures)
                best.offer(figures["psnr"], net, {"step": done} | figures)
                if processes.is_main:
                    job.tracker.image(f"reconstructions/step-{done:07d}.png", _pairs(net, held_out))
            if patience.over(figures["psnr"]):
                progress.note(f"ends at step {done}: no better for {training.patience} validations")
                break
        job.stopping.heed(done, training.steps, state)
        if done < training.steps and itstime(done, training.checkpoint_every, training.steps):
            state.save(done)

    # ── what is kept ─────────────────────────────────────────────────────────────────────────────────────
    info = {
        "best_step": best.figures["step"],
        "psnr": best.figures["psnr"],
        "codebook_use": best.figures["codebook_use"],
        "vocabulary": net.vocabulary,
        "factor": net.factor,
        "steps": done,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
    }
    if processes.is_main:
        net.load_state_dict(best.weights)
        show(job, RECONSTRUCTIONS, _pairs(net, held_out))
    return publish(job, best.weights, config.model_dump(mode="json"), info, curves)


@torch.no_grad()
def validate(net: VQVAE, held_out: Tensor, processes: Distributed) -> dict[str, float]:
    """Mean PSNR of pictures, uint8 (N, 3, H, W), in dB, and the share of the codebook that they use."""
    device = processes.device
    decibels = torch.zeros((), dtype=torch.float64, device=device)
    counts = torch.zeros(net.vocabulary, device=device)
    net.eval()
    for pictures in held_out[processes.rank :: processes.world].split(VALIDATION_BATCH):
        if not len(pictures):  # there may be fewer than ranks
            continue
        originals = to_tensor(pictures.to(device))
        codes = net.encode(originals)
        decibels += psnr(net.decode(codes), originals).sum()
        counts += torch.bincount(codes.flatten(), minlength=net.vocabulary)
    net.train()
    used = (processes.sum(counts) > 0).float().mean()
    return {"psnr": processes.sum(decibels).item() / len(held_out), "codebook_use": used.item()}


@torch.no_grad()
def _first_latents(net: VQVAE, batches: Iterator[ImageBatch]) -> Tensor:
    """Latents (B, D, h, w) of enough pictures to find a codebook in."""
    device = next(net.parameters()).device
    found, count = [], 0
    while count < KMEANS_VECTORS * net.vocabulary:
        found.append(net.latents(to_tensor(next(batches).images.to(device))))
        count += found[-1][:, 0].numel()
    return torch.cat(found)


@torch.no_grad()
def _pairs(net: VQVAE, held_out: Tensor) -> Image.Image:
    """The first held-out pictures, each with its reconstruction to the right."""
    originals = held_out[:GRID_PICTURES]
    device = next(net.parameters()).device
    net.eval()
    reconstructions = to_pixels(net.reconstruct(to_tensor(originals.to(device)))).cpu()
    net.train()
    tiles = torch.stack([originals, reconstructions], dim=1).flatten(0, 1)
    grid = make_grid(tiles, nrow=GRID_COLUMNS, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


if __name__ == "__main__":
    run_worker(main)
