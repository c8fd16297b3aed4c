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
from collections.abc import Iterator
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
from model.plumbing.curves import Curves
from model.plumbing.distributed import Distributed, derive_seed, seed_all
from model.plumbing.worker import Job, run_worker
from model.training.optim import Ema, adamw, learning_rate, set_learning_rate
from model.training.state import Pace, Patience, Resumable, RunningSums, explained, itstime, publish

VALIDATION_PICTURES = 1024  # of the retrieval test, at most


def main(job: Job) -> Manifest | None:
    """Make the text encoder or the judge; its manifest on the main process, None on the others.

    Raises:
        Diverged: a loss, a gradient, a metric or a weight is not finite.
        UserError: the pretrained model cannot be had.
    """
    config = job.config.clip
    if config.kind == "trained":
        with explained(job, "clip.training", config.training):
            return train(job, config)
    if not job.processes.is_main:
        return None
    model, description = import_pretrained(config)
    return publish(job, dict(model.state_dict()), description, {})


def train(job: Job, config: TrainedCLIPConfig) -> Manifest | None:
    """Train a CLIP for its role. Returns and raises as `main`."""
    training, role, images, processes = config.training, job.spec.kind, job.inputs["images"], job.processes
    rank, world, device = processes.rank, processes.world, processes.device
    seed, size = derive_seed(job.config.seed, "clip", role), images.info["image_size"]
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
    ema, patience = Ema(clip, training.ema), Patience(training.patience, processes)
    sums, curves = RunningSums(processes, "loss", "grad_norm"), Curves(job.tracker)

    # ── where it was ─────────────────────────────────────────────────────────────────────────────────────
    state = Resumable(
        job.checkpoints, processes, sums=sums, clip=clip, adamw=optimizer, ema=ema, curves=curves,
        **patience.parts,
    )  # fmt: skip
    start = state.restore()
    if training.compile:
        clip.compile()
    model: nn.Module = clip if world == 1 else DistributedDataParallel(clip)
    splits = ["train"] if role == "text" else sorted({name.split("-")[0] for name in images.info["shards"]})
    batches = _batches(images, splits, training.batch_size, seed, start, processes)
    progress = job.progress(training.steps, "img", training.batch_size, done=start)
    pace = Pace(device, "pictures", training.batch_size, start)

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
        grad_norm = nn.utils.clip_grad_norm_(clip.parameters(), training.grad_clip)
        sums.add(loss=loss, grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))  # as CLIP was trained, arXiv:2103.00020
        ema.update()

        done = step + 1
        if itstime(done, training.log_every, training.steps):
            means = sums.means(done)
            curves.add(done, "train", means | {"learning_rate": rate})
            curves.show(done, "train", pace.since(done))
            progress.update(done, loss=means["loss"])
        if itstime(done, training.eval_every, training.steps):
            sums.check(done)
            with ema.applied():
                accuracy = retrieval(clip, images, description, device)
            curves.add(done, "validation", {"retrieval": accuracy})
            if patience.over(accuracy):
                means = sums.means(done) if sums.since < done else means
                progress.note(f"ends at step {done}: no better for {training.patience} validations")
                break
        job.stopping.heed(done, training.steps, state)
        if done < training.steps and itstime(done, training.checkpoint_every, training.steps):
            state.save(done)

    # ── what is kept ─────────────────────────────────────────────────────────────────────────────────────
    # A judge has seen the validation pictures: how well it knows them, not how it generalises.
    measured = {"retrieval" if role == "text" else "retrieval_seen": accuracy}
    with ema.applied():
        return publish(job, dict(clip.state_dict()), description, {"loss": means["loss"]} | measured, curves)


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


if __name__ == "__main__":
    run_worker(main)
