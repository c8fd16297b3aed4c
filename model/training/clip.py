"""The CLIP job: train a compact open_clip model on the run's pictures and captions, or import a pretrained.

    python -m model.training.clip SPEC_URI        (by torchrun, one process per device)

Two kinds of asset, two models, so that none judges its own work:

- `text` encodes prompts for the transformer. It sees the `train` split alone, as the transformer does; its
  retrieval on held-out pictures tells what it is worth on captions it never saw.
- `judge` measures how well drawn pictures fit their prompts. It starts from another seed and sees all splits:
  it must recognise what the generator was never shown, and the generator learns nothing from it.

A pretrained model is imported once for either role, frozen.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn.functional as gathering
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.config import TrainedCLIPConfig
from model.data.image_shards import ImageBatch, image_batches, load_images
from model.data.images import augment, to_tensor
from model.nets.clip import CLIPModel, Judge, architecture, build_clip, import_pretrained, tokenize
from model.nets.metrics import retrieval_accuracy
from model.plumbing.assets import Manifest
from model.plumbing.checkpoints import (
    CONFIG,
    WEIGHTS,
    below,
    flatten,
    optimizer_state,
    restore_optimizer,
    save_model,
)
from model.plumbing.curves import HISTORY, Curves
from model.plumbing.distributed import Distributed, derive_seed, seed_all
from model.plumbing.worker import Job, run_worker
from model.training.optim import Ema, adamw, learning_rate, set_learning_rate

VALIDATION_PICTURES = 1024  # of the retrieval test, at most


def main(job: Job) -> Manifest | None:
    """Make the text encoder or the judge; its manifest on the main process, None on the others."""
    config = job.config.clip
    if config.kind == "trained":
        return train(job, config)
    if not job.processes.is_main:
        return None
    model, description = import_pretrained(config)
    return _publish(job, model.state_dict(), description, {})


def train(job: Job, config: TrainedCLIPConfig) -> Manifest | None:
    """Train a CLIP for a role; the main process writes the asset and returns its manifest."""
    role, processes, images = job.spec.kind, job.processes, job.inputs["images"]
    training, device = config.training, processes.device
    rank, world = processes.rank, processes.world
    seed = derive_seed(job.config.seed, "clip", role)
    size = images.info["image_size"]
    views, chances = job.config.data.augment, torch.Generator(device)

    # ── what learns ──────────────────────────────────────────────────────────────────────────────────────
    description: dict[str, Any] = {
        "role": role,
        "precision": training.precision,
        "architecture": architecture(config, size),
        "preprocess": {"size": size, "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    seed_all(seed)
    clip = build_clip(description).to(device)
    optimizer = adamw(clip, training)
    ema = Ema(clip, training.ema)
    lately = torch.zeros(1, device=device)  # loss since the last log line
    curves = Curves(job.tracker)

    # ── where it was ─────────────────────────────────────────────────────────────────────────────────────
    start = 0
    if saved := job.checkpoints.latest():
        start, tensors, state = saved
        clip.load_state_dict(below("clip.", tensors))
        ema.load(below("ema.", tensors), state["ema_updates"])
        restore_optimizer(optimizer, tensors, state["optimizer"])
        lately.copy_(tensors["lately"])
        curves.points = state["curves"]

    if training.compile:
        clip.compile()
    model: nn.Module = clip if world == 1 else DistributedDataParallel(clip)
    splits = ["train"] if role == "text" else sorted({name.split("-")[0] for name in images.info["shards"]})
    batches = _batches(images, splits, training.batch_size, seed, start, processes)
    progress = job.progress(training.steps, "img", training.batch_size, done=start)

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────
    for step in range(start, training.steps):
        seed_all(seed, rank, step)
        chances.manual_seed(derive_seed(seed, "views", rank, step))
        rate = learning_rate(step, training)
        set_learning_rate(optimizer, rate)
        batch = next(batches)
        pictures = augment(to_tensor(batch.images.to(device)), views, chances)  # (B, 3, H, W)
        ids = tokenize(batch.captions, config.context_length).to(device)  # (B, S)
        with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            picture_features, text_features, scale = model(pictures, ids)  # (B, E), (B, E), ()
        everywhere = [_everywhere(part, world) for part in (picture_features, text_features, ids)]
        loss = contrastive_loss(everywhere[0].float(), everywhere[1].float(), everywhere[2], scale)
        loss.backward()
        lately += loss.detach()
        nn.utils.clip_grad_norm_(clip.parameters(), training.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))  # as CLIP was trained, arXiv:2103.00020
        ema.update()

        done = step + 1
        if done % training.log_every == 0 or done == training.steps:
            mean_loss = float(lately) / ((done - 1) % training.log_every + 1)
            lately.zero_()
            curves.add(done, {"train/loss": mean_loss, "train/learning_rate": rate})
            progress.update(done, loss=mean_loss)
        if done % training.eval_every == 0 or done == training.steps:
            with ema.applied():
                accuracy = retrieval(clip, images, description, device)
            curves.add(done, {"validation/retrieval": accuracy})
        if done % training.checkpoint_every == 0 and done < training.steps and processes.is_main:
            moments, rest = optimizer_state(optimizer)
            parts = {"clip": clip.state_dict(), "ema": ema.average}
            state = {"optimizer": rest, "ema_updates": ema.updates, "curves": curves.points}
            job.checkpoints.save(done, flatten(parts) | moments | {"lately": lately}, state)

    # ── what is kept ─────────────────────────────────────────────────────────────────────────────────────
    if not processes.is_main:
        return None
    with ema.applied():
        tensors = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    job.output.add_bytes(HISTORY, curves.history())
    # A judge has seen the validation pictures: how well it knows them, not how it generalises.
    measured = {"retrieval" if role == "text" else "retrieval_seen": accuracy}
    return _publish(job, tensors, description, {"loss": mean_loss} | measured)


def contrastive_loss(pictures: Tensor, texts: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over a batch (B, E), (B, E); captions that read the same, by their ids
    (B, S), are all right answers for one another's pictures."""
    logits = scale * pictures @ texts.T  # (B, B)
    same = (ids[:, None] == ids[None]).all(dim=2).float()
    targets = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@torch.no_grad()
def retrieval(clip: CLIPModel, images: Manifest, description: dict[str, Any], device: torch.device) -> float:
    """R@1, picture to caption, among the validation pictures with their first captions."""
    pixels, captions = load_images(images, "validation", VALIDATION_PICTURES)
    first = [choices[0] for choices in captions]
    judge = Judge(clip, description["preprocess"], device)
    features = torch.cat([judge.image_features(to_tensor(part)) for part in pixels.split(256)])
    accuracy = retrieval_accuracy(features, judge.text_features(first), first)
    clip.train()
    return accuracy


def _batches(
    images: Manifest, splits: list[str], batch_size: int, seed: int, start: int, processes: Distributed
) -> Iterator[ImageBatch]:
    """Batches from each split as often as it is large; which one comes next follows from (seed, step)."""
    sizes = {
        split: sum(n for name, n in images.info["shards"].items() if name.startswith(f"{split}-"))
        for split in splits
    }
    weights = torch.tensor([float(size) for size in sizes.values()])
    generator = torch.Generator().manual_seed(seed)

    def which() -> str:
        return splits[int(torch.multinomial(weights, 1, generator=generator))]

    before = [which() for _ in range(start)]
    readers = {
        split: image_batches(
            images,
            split,
            batch_size,
            seed,
            before.count(split) * batch_size,
            processes.rank,
            processes.world,
        )
        for split in splits
    }
    while True:
        yield next(readers[which()])


def _everywhere(tensor: Tensor, world: int) -> Tensor:
    """A batch's rows from all processes; gradients find their way back."""
    if world == 1:
        return tensor
    if not tensor.is_floating_point():
        parts = [torch.empty_like(tensor) for _ in range(world)]
        torch.distributed.all_gather(parts, tensor)
        return torch.cat(parts)
    return torch.cat(gathering.all_gather(tensor))


def _publish(
    job: Job, tensors: dict[str, Tensor], description: dict[str, Any], info: dict[str, Any]
) -> Manifest:
    with tempfile.TemporaryDirectory() as scratch:
        save_model(scratch, tensors, description)
        job.output.add_file(WEIGHTS, Path(scratch) / WEIGHTS)
        job.output.add_file(CONFIG, Path(scratch) / CONFIG)
    return job.output.finish(info)


if __name__ == "__main__":
    run_worker(main)
