"""The transformer's job: learn p(image tokens | caption) from token shards, with the text tower frozen.

    python -m model.training.transformer SPEC_URI        (by torchrun, one process per device)

The asset holds the weights (averaged, with `training.ema`) of the validation at which a wrong caption costs
most on held-out pictures (`worth`). With `keep: last` it holds those of the last step: right where held-out
pictures are of things that no training caption names, so that no figure of theirs says anything of the
prompts that the model is for. A step draws its chances from (seed, rank, step) and its pictures from a
position in the shuffled order, and a checkpoint holds everything else, so a job that was killed at any moment
continues as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import make_grid  # type: ignore[import-untyped]

from model.config import SamplingConfig, TrainingConfig, TransformerConfig
from model.data.images import to_image
from model.data.token_shards import TokenReader
from model.errors import UserError
from model.nets.clip import TextEncoder, load_text_encoder
from model.nets.folder import fit
from model.nets.gpt import GPT
from model.nets.metrics import TEMPERATURES, tempered_nll, token_nll
from model.nets.sampler import sample
from model.nets.tokenizers import Tokenizer, load_tokenizer
from model.plumbing import cache
from model.plumbing.assets import START, Manifest
from model.plumbing.checkpoints import load_model
from model.plumbing.curves import Curves
from model.plumbing.distributed import Distributed, seed_all
from model.plumbing.worker import Job, run_worker
from model.training.optim import Ema, adamw, learning_rate, muon, set_learning_rate
from model.training.state import (
    Best,
    Clock,
    Pace,
    Patience,
    Resumable,
    RunningSums,
    explained,
    itstime,
    publish,
    synced,
)

VALIDATION_PICTURES = 4096  # measured at each validation, at most
GRID_PICTURES = 8  # drawn from held-out captions and shown in MLflow at each validation
NLL_COUNTS = 0.1  # in what a validation is worth: up to this it costs nothing in rank correlation

Watch = Callable[[GPT, int, dict[str, float]], object]  # the averaged net, its steps, its figures


def main(job: Job) -> Manifest | None:
    """Train the GPT; the main process writes the asset and returns its manifest, the others None.

    Raises:
        Diverged: a loss, a gradient, a metric or a weight is not finite.
    """
    config = job.config.transformer
    assert config is not None
    with explained(job, "transformer.training", config.training):
        return train(job, config)


def train(job: Job, config: TransformerConfig, watch: Watch | None = None) -> Manifest | None:
    """The training itself. Returns and raises as `main`; `watch` is called after each validation."""
    training, seed, tokens, processes = config.training, job.config.seed, job.inputs["tokens"], job.processes
    rank, world, device = processes.rank, processes.world, processes.device
    torch.set_float32_matmul_precision("high")

    # ── what learns ──────────────────────────────────────────────────────────────────────────────────────
    text = load_text_encoder(cache.folder(job.inputs["text"]), device)
    seed_all(seed, "gpt")
    gpt = GPT(config, tokens.info["vocabulary"], tokens.info["grid"], text.width).to(device)
    if begun := job.inputs.get(START):
        _begin_from(gpt, begun)
    optimizers: dict[str, torch.optim.Optimizer] = (
        muon(gpt, gpt.blocks, training) if config.optimizer == "muon" else {"adamw": adamw(gpt, training)}
    )
    ema, best, patience = Ema(gpt, training.ema), Best(), Patience(training.patience, processes)
    clock = Clock(training, job.config.recipe.until if job.config.recipe else 0.0, processes)
    sums, curves = RunningSums(processes, "nll", "grad_norm"), Curves(job.tracker)

    # ── where it was ─────────────────────────────────────────────────────────────────────────────────────
    state = Resumable(
        job.checkpoints, processes, sums=sums, gpt=gpt, **optimizers, ema=ema, best=best, curves=curves,
        **patience.parts, **clock.parts,
    )  # fmt: skip
    start = state.restore()
    training = clock.training
    if training.compile:
        gpt.compile()
    model: nn.Module = gpt if world == 1 else DistributedDataParallel(gpt)
    reader = TokenReader(tokens, "train", training.batch_size // training.accumulate, seed, rank, world)
    batches = reader.batches(start * training.batch_size)
    tokenizer = load_tokenizer(cache.folder(job.inputs["tokenizer"])) if processes.is_main else None
    progress = job.progress(training.steps, "tok", training.batch_size * gpt.tokens, done=start)
    work = training.batch_size * gpt.tokens * gpt.flops_per_token(reader.context_length) / world
    pace = Pace(device, "tokens", training.batch_size * gpt.tokens, start, work)

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────
    done = start
    while done < training.steps:
        step = done
        seed_all(seed, "gpt", rank, step)
        rate = learning_rate(step, training)
        for optimizer in optimizers.values():
            set_learning_rate(optimizer, rate)
        for micro in range(training.accumulate):
            batch = next(batches)
            codes = batch.codes.to(device, non_blocking=True)  # (B, T)
            states, mask = text.encode(batch.ids)  # (B, S, W), (B, S)
            drop = torch.rand(len(codes), device=device) < config.condition_dropout  # (B,)
            order = None
            if config.reorders:  # also when all is raster again: no order would be another program
                codes, order = _reorder(codes, _mixed(config, step, training))
            with (
                synced(model, last=micro + 1 == training.accumulate),
                torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"),
            ):
                logits = model(codes, states, mask, drop, order)  # (B, T, K)
                nll = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
                (nll / training.accumulate).backward()
            sums.add(training.accumulate, nll=nll)
        sums.add(grad_norm=nn.utils.clip_grad_norm_(gpt.parameters(), training.grad_clip))
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        ema.update()

        done = step + 1
        if (fitted := clock.fitted(done)) is not training:
            progress.note(
                f"{fitted.steps:,} steps for the time that is left, {training.steps:,} were foreseen"
            )
            progress.total, training = fitted.steps, fitted
        if itstime(done, training.log_every, training.steps):
            means = sums.means(done)
            curves.add(done, "train", means | {"learning_rate": rate})
            curves.show(done, "train", pace.since(done))
            progress.update(done, loss=means["nll"], **pace.mfu)
        if itstime(done, training.eval_every, training.steps):
            sums.check(done)
            with ema.applied():
                figures = validate(gpt, text, tokens, "validation", processes)
                curves.add(done, "validation", figures)
                score = done if config.keep == "last" else worth(figures)
                best.offer(score, gpt, {"step": done} | figures)
                if tokenizer:
                    _show_samples(gpt, text, tokenizer, job, done)
                if watch:
                    watch(gpt, done, figures)
            if patience.over(worth(figures)):
                progress.note(f"ends at step {done}: no better for {training.patience} validations")
                break
        job.stopping.heed(done, training.steps, state)
        if done < training.steps and itstime(done, training.checkpoint_every, training.steps):
            state.save(done)

    # ── what is kept ─────────────────────────────────────────────────────────────────────────────────────
    gpt.load_state_dict(best.weights)
    info = {
        "validation_nll": best.figures["nll"],
        "validation_nll_unconditional": best.figures["nll_unconditional"],
        "validation_nll_shuffled": best.figures["nll_shuffled"],
        "validation_text_gain": best.figures["text_gain"],
        "train_nll": validate(gpt, text, tokens, "train", processes)["nll"],
        "best_step": best.figures["step"],
        "parameters": gpt.parameter_count(),
        **({"steps": done} if clock.until else {}),
    }
    return publish(job, best.weights, gpt.description(), info, curves)


@torch.no_grad()
def validate(
    gpt: GPT, text: TextEncoder, tokens: Manifest, split: str, processes: Distributed
) -> dict[str, float]:
    """NLL in nats per token over a split's plain pictures, with their captions (`nll`), with none
    (`nll_unconditional`) and with each other's (`nll_shuffled`).

    From these: `text_gain`, what a wrong caption costs; `nll_fitted`, the NLL at the one of `TEMPERATURES`
    where it is least, and that `temperature`. A net that is too sure of itself has a high NLL and a
    temperature above 1, though what it draws may be none the worse.
    """
    device = processes.device
    sums = torch.zeros(4 + len(TEMPERATURES), dtype=torch.float64, device=device)
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
            sums[3:-1] += tempered_nll(readings[0], codes).sum(dim=1)
            sums[-1] += len(codes)
    gpt.train()
    *nats, count = processes.sum(sums).tolist()
    nll, unconditional, shuffled, *tempered = (total / count for total in nats)
    fitted, temperature = min(zip(tempered, TEMPERATURES, strict=True))
    return {
        "nll": nll,
        "nll_unconditional": unconditional,
        "nll_shuffled": shuffled,
        "text_gain": shuffled - nll,
        "nll_fitted": fitted,
        "temperature": temperature,
    }


def worth(figures: dict[str, float]) -> float:
    """By what a validation is compared with others, more being better: this alone decides which weights are
    the best, and whether patience ends the training.

    It is what a wrong caption costs, which goes with how well pictures follow captions that were held out;
    NLL goes against that, as few pictures are overfitted long before what is drawn gets worse
    (docs/EXPERIMENTS.md, "The right figure"). Of NLL it is little, which decides where captions tell nothing.
    """
    return figures["text_gain"] - NLL_COUNTS * figures["nll"]


def _begin_from(gpt: GPT, begun: Manifest) -> None:
    """Give a net the weights of an asset. Raises UserError: they are those of another architecture."""
    weights, _ = load_model(cache.folder(begun))
    try:
        fit(gpt, weights, begun.uri)
    except UserError as error:
        raise UserError(f"{error}; retrain.start=scratch begins without them") from None


def _reorder(codes: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Codes (B, T) in the order they are to be learned in, and that order: a share of the pictures in an
    order of its own each, the others in raster order."""
    B, T = codes.shape
    raster = torch.arange(T, device=codes.device)
    mixed = torch.rand(B, T, device=codes.device).argsort(dim=1)
    chosen = torch.rand(B, 1, device=codes.device) < share
    order = torch.where(chosen, mixed, raster)
    return codes.gather(1, order), order


def _mixed(config: TransformerConfig, step: int, training: TrainingConfig) -> float:
    """Share of the pictures in random order at a step.

    RAR (arXiv:2411.00776): at first all of them, annealed to none, or to those that are to be left. During
    warm-up it is all of them, whatever the number of steps, which a clock may fit then.
    """
    warmup, over = training.warmup_steps, config.random_order * training.steps
    if not over or step >= max(over, warmup):
        return config.random_order_left
    return max(config.random_order_left, 1 - max(0, step - warmup) / max(1, over - warmup))


@torch.no_grad()
def _show_samples(gpt: GPT, text: TextEncoder, tokenizer: Tokenizer, job: Job, step: int) -> None:
    """Held-out pictures as the tokenizer renders them, above what is drawn from their captions."""
    batch = next(TokenReader(job.inputs["tokens"], "validation", GRID_PICTURES).ordered(GRID_PICTURES))
    gpt.eval()
    drawn = sample(gpt, *text.encode(batch.ids), SamplingConfig(), seeds=range(len(batch.ids)))
    gpt.train()
    both = torch.cat([batch.codes, drawn.cpu()]).view(-1, *gpt.grid)
    grid = make_grid(tokenizer.decode(both), nrow=len(batch.codes))
    job.tracker.image(f"samples/step-{step:07d}.png", to_image(grid))


if __name__ == "__main__":
    run_worker(main)
