"""The transformer's job: learn p(image tokens | caption) from token shards, with the text tower frozen.

    python -m model.training.transformer SPEC_URI        (by torchrun, one process per device)

The set holds the weights (averaged, with `training.ema`) of the validation with the lowest NLL on held-out
pictures, as small sets overfit long before the last step. With `keep: last` it holds those of the last step:
right where held-out pictures are of things that no training caption names, so that their NLL says nothing of
the prompts that the model is for. A step draws its chances from (seed, rank, step) and
its pictures from a position in the shuffled order, and a checkpoint holds everything else, so a job that was
killed at any moment continues as if nothing had happened.
"""

from __future__ import annotations

import math
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import make_grid  # type: ignore[import-untyped]

from model.config import SamplingConfig, TransformerConfig
from model.data.images import to_image
from model.data.token_shards import TokenReader
from model.nets.clip import TextEncoder, load_text_encoder
from model.nets.gpt import GPT
from model.nets.metrics import token_nll
from model.nets.sampler import sample
from model.nets.tokenizers import load_tokenizer
from model.plumbing import cache
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
from model.plumbing.distributed import Distributed, seed_all
from model.plumbing.worker import Job, run_worker
from model.training.optim import Ema, adamw, learning_rate, muon, set_learning_rate

VALIDATION_PICTURES = 4096  # measured at each validation, at most
GRID_PICTURES = 8  # drawn from held-out captions and shown in MLflow at each validation
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, by the device's name


def main(job: Job) -> Manifest | None:
    """Train the GPT; the main process writes the asset and returns its manifest, the others None."""
    config, processes, inputs = job.config.transformer, job.processes, job.inputs
    assert config is not None
    training, seed, device = config.training, job.config.seed, processes.device
    rank, world, tokens = processes.rank, processes.world, inputs["tokens"]
    torch.set_float32_matmul_precision("high")

    # ── what learns ──────────────────────────────────────────────────────────────────────────────────────
    text = _frozen_text(inputs["text"], device)
    seed_all(seed, "gpt")
    gpt = GPT(config, tokens.info["vocabulary"], tokens.info["grid"], text.width).to(device)
    optimizers: dict[str, torch.optim.Optimizer] = (
        muon(gpt, gpt.blocks, training) if config.optimizer == "muon" else {"adamw": adamw(gpt, training)}
    )
    ema = Ema(gpt, training.ema)
    best = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}  # what `keep` chooses
    best_figures = {"step": 0.0, "nll": math.inf}
    lately = torch.zeros(2, device=device)  # loss and NLL since the last log line
    curves = Curves(job.tracker)

    # ── where it was ─────────────────────────────────────────────────────────────────────────────────────
    start = 0
    if saved := job.checkpoints.latest():
        start, tensors, state = saved
        gpt.load_state_dict(below("gpt.", tensors))
        ema.load(below("ema.", tensors), state["ema_updates"])
        for name, optimizer in optimizers.items():
            restore_optimizer(optimizer, below(f"{name}.", tensors), state["optimizers"][name])
        best, best_figures = below("best.", tensors), state["best"]
        lately.copy_(tensors["lately"])
        curves.points = state["curves"]

    if training.compile:
        gpt.compile()
    model: nn.Module = gpt if world == 1 else DistributedDataParallel(gpt)
    reader = TokenReader(tokens, "train", training.batch_size // training.accumulate, seed, rank, world)
    batches = reader.batches(start * training.batch_size)
    progress = job.progress(training.steps, "tok", training.batch_size * gpt.tokens, done=start)

    flops, peak = gpt.flops_per_token(reader.context_length), _peak_flops(device)
    since_step, since = start, time.monotonic()

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────
    for step in range(start, training.steps):
        seed_all(seed, "gpt", rank, step)
        rate = learning_rate(step, training)
        for optimizer in optimizers.values():
            set_learning_rate(optimizer, rate)
        for micro in range(training.accumulate):
            batch = next(batches)
            codes = batch.codes.to(device, non_blocking=True)  # (B, T)
            states, mask = text.encode(batch.ids)  # (B, S, W), (B, S)
            drop = torch.rand(len(codes), device=device) < config.condition_dropout  # (B,)
            codes, order = _reorder(codes, config, step)
            more = micro + 1 < training.accumulate
            with (
                model.no_sync() if more and world > 1 else nullcontext(),  # type: ignore[operator]
                torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"),
            ):
                logits = model(codes, states, mask, drop, order)  # (B, T, K)
                nll = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
                loss = nll
                if config.z_loss:
                    loss = loss + config.z_loss * logits.float().logsumexp(dim=-1).square().mean()
                (loss / training.accumulate).backward()
            lately += torch.stack([loss, nll]).detach() / training.accumulate
        nn.utils.clip_grad_norm_(gpt.parameters(), training.grad_clip)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        ema.update()

        done = step + 1
        if done % training.log_every == 0 or done == training.steps:
            count = (done - 1) % training.log_every + 1
            mean_loss, mean_nll = (processes.mean(lately) / count).tolist()
            lately.zero_()
            curves.add(done, {"train/loss": mean_loss, "train/nll": mean_nll, "train/learning_rate": rate})
            rate_of_tokens = (
                (done - since_step) * training.batch_size * gpt.tokens / (time.monotonic() - since)
            )
            since_step, since = done, time.monotonic()
            mfu = {"mfu": rate_of_tokens * flops / (world * peak)} if peak else {}
            progress.update(done, loss=mean_loss, **mfu)
        if done % training.eval_every == 0 or done == training.steps:
            with ema.applied():
                figures = validate(gpt, text, tokens, "validation", processes)
                if config.keep == "last" or figures["nll"] < best_figures["nll"]:
                    best = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
                    best_figures = {"step": done} | figures
                if processes.is_main:
                    _show_samples(gpt, text, job, done)
            curves.add(done, {f"validation/{name}": value for name, value in figures.items()})
        if done % training.checkpoint_every == 0 and done < training.steps and processes.is_main:
            moments = {name: optimizer_state(optimizer) for name, optimizer in optimizers.items()}
            parts = {"gpt": gpt.state_dict(), "ema": ema.average, "best": best}
            parts |= {name: tensors for name, (tensors, _) in moments.items()}
            state = {
                "optimizers": {name: rest for name, (_, rest) in moments.items()},
                "ema_updates": ema.updates,
                "best": best_figures,
                "curves": curves.points,
            }
            job.checkpoints.save(done, flatten(parts) | {"lately": lately}, state)

    # ── what is kept ─────────────────────────────────────────────────────────────────────────────────────
    gpt.load_state_dict(best)
    seen = validate(gpt, text, tokens, "train", processes)
    info = {
        "validation_nll": best_figures["nll"],
        "validation_nll_unconditional": best_figures["nll_unconditional"],
        "validation_nll_shuffled": best_figures["nll_shuffled"],
        "train_nll": seen["nll"],
        "best_step": best_figures["step"],
        "parameters": gpt.parameter_count(),
    }
    if not processes.is_main:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        save_model(scratch, best, gpt.description())
        job.output.add_file(WEIGHTS, Path(scratch) / WEIGHTS)
        job.output.add_file(CONFIG, Path(scratch) / CONFIG)
    job.output.add_bytes(HISTORY, curves.history())
    return job.output.finish(info)


@torch.no_grad()
def validate(
    gpt: GPT, text: TextEncoder, tokens: Manifest, split: str, processes: Distributed
) -> dict[str, float]:
    """NLL in nats per token over a split's plain pictures, with their captions (`nll`), with none
    (`nll_unconditional`) and with each other's (`nll_shuffled`): how much the text is worth."""
    device = processes.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    gpt.eval()
    bf16 = gpt.config.training.precision == "bf16"
    reader = TokenReader(tokens, split, 64 * processes.world, rank=processes.rank, world=processes.world)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch in reader.ordered(VALIDATION_PICTURES):
            if not len(batch.codes):  # the last batch may leave nothing to some ranks
                continue
            codes = batch.codes.to(device)
            states, mask = text.encode(batch.ids)
            none = torch.ones(len(codes), dtype=torch.bool, device=device)
            readings = [  # `forward`: a compiled net would be compiled anew for these shapes
                gpt.forward(codes, states, mask),
                gpt.forward(codes, states, mask, none),
                gpt.forward(codes, states.roll(1, dims=0), mask.roll(1, dims=0)),
            ]
            sums[:3] += torch.stack([token_nll(logits, codes).sum() for logits in readings])
            sums[3] += len(codes)
    gpt.train()
    *nats, count = processes.sum(sums).tolist()
    names = ("nll", "nll_unconditional", "nll_shuffled")
    return {name: value / count for name, value in zip(names, nats, strict=True)}


def _reorder(codes: Tensor, config: TransformerConfig, step: int) -> tuple[Tensor, Tensor | None]:
    """Codes (B, T) in the order they are to be learned in, and that order.

    RAR (arXiv:2411.00776): at first every picture in an order of its own, annealed to all in raster order.
    """
    steps = config.random_order * config.training.steps
    if step >= steps:
        return codes, None
    B, T = codes.shape
    raster = torch.arange(T, device=codes.device)
    mixed = torch.rand(B, T, device=codes.device).argsort(dim=1)
    chosen = torch.rand(B, 1, device=codes.device) < 1 - step / steps
    order = torch.where(chosen, mixed, raster)
    return codes.gather(1, order), order


def _frozen_text(clip: Manifest, device: torch.device) -> TextEncoder:
    return load_text_encoder(cache.folder(clip), device)


@torch.no_grad()
def _show_samples(gpt: GPT, text: TextEncoder, job: Job, step: int) -> None:
    """Held-out pictures as the tokenizer renders them, above what is drawn from their captions."""
    batch = next(TokenReader(job.inputs["tokens"], "validation", GRID_PICTURES).ordered(GRID_PICTURES))
    gpt.eval()
    drawn = sample(gpt, *text.encode(batch.ids), SamplingConfig(), seeds=range(len(batch.ids)))
    gpt.train()
    tokenizer = load_tokenizer(cache.folder(job.inputs["tokenizer"]))
    both = torch.cat([batch.codes, drawn.cpu()]).view(-1, *gpt.grid)
    grid = make_grid(tokenizer.decode(both), nrow=len(batch.codes))
    job.tracker.image(f"samples/step-{step:07d}.png", to_image(grid))


def _peak_flops(device: torch.device) -> float:
    """Of the device in operations per second; 0 where it is not in the table (then no MFU is shown)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), 0.0)


if __name__ == "__main__":
    run_worker(main)
