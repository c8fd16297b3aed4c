"""One training step of each net of a config, without data: to foresee its memory, or to time it.

`pipelines/plan.py` takes it on fake tensors, `speed.py` on the hardware that will train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from model.config import (
    PretrainedTokenizerConfig,
    RunConfig,
    TrainedCLIPConfig,
    TrainingConfig,
    VQVAEConfig,
)
from model.errors import UserError
from model.nets.clip import architecture, build_clip, pretrained_architecture
from model.nets.gpt import GPT
from model.nets.vqvae import VQVAE
from model.recipe import HARDWARE, UTILISATION
from model.training.clip import contrastive_loss
from model.training.losses import Lpips, PatchDiscriminator, ReconstructionLoss
from model.training.optim import Ema, adamw, muon

# Vocabulary and factor of the published weights of each family; others are known once they are loaded.
PRETRAINED = {"janus": (16384, 16), "emu3": (32768, 8)}

Net = Literal["text", "judge", "tokenizer", "transformer"]


@dataclass(frozen=True)
class Rehearsal:
    """What a training step of a net takes."""

    name: Net
    training: TrainingConfig
    build: Callable[[], list[nn.Module]]  # the net that learns, and those that only judge it
    loss: Callable[..., Tensor]  # of (batch, *nets)
    tokens: int = 0  # image tokens of a sample; 0 where the net reads pictures
    turned: bool = False  # the net's blocks learn by Muon

    def optimizers(self, net: Any) -> list[torch.optim.Optimizer]:
        """Those of the training."""
        if self.turned:
            return list(muon(net, net.blocks, self.training).values())
        return [adamw(net, self.training)]

    def autocast(self, device: str) -> torch.autocast:
        """The precision of the training."""
        return torch.autocast(device, torch.bfloat16, enabled=self.training.precision == "bf16")


@dataclass(frozen=True)
class Cost:
    """What the training of a net takes, by one step on fake tensors."""

    parameters: int
    flops: float  # of a sample, forwards and backwards
    state_bytes: float  # per device: weights, gradients, optimiser's moments, EMA, low-precision copies
    sample_bytes: float  # per device: what backward keeps of a sample

    def step_seconds(self, training: TrainingConfig, hardware: str, devices: int) -> float:
        """An optimiser step on hardware of the table; processes of one CPU share it."""
        speed = HARDWARE[hardware][training.precision] * UTILISATION * (1 if hardware == "cpu" else devices)
        return self.flops * training.batch_size / speed


def foresee(rehearsal: Rehearsal) -> Cost:
    """The cost of a training, from a step for one sample and one for two.

    No memory is taken and nothing is computed, but each tensor that backward would keep is seen, each
    operation counted, and the optimiser and the average of the weights hold what they will hold.
    """
    with torch.device("meta"):
        nets = rehearsal.build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for net in nets:
            net.to_empty(device="cpu")  # fake, but autocast and fused attention act as in life
        learner: Any = nets[0]
        optimizers = rehearsal.optimizers(learner)
        average = Ema(learner, rehearsal.training.ema).average
        kept, flops = {}, {}
        for batch in (1, 2):
            with _kept(nets) as stored, FlopCounterMode(display=False) as counter:
                with rehearsal.autocast("cpu"):
                    total = rehearsal.loss(batch, *nets)
                total.backward()
            kept[batch], flops[batch] = sum(stored.values()), counter.get_total_flops()
        for optimizer in optimizers:
            optimizer.step()
    weights = list(learner.parameters())
    moments = [value for one in optimizers for state in one.state.values() for value in state.values()]
    state = [*weights, *(weight.grad for weight in weights), *moments, *average.values()]
    # What two samples keep beyond one is a sample's; the rest (copies of weights in bf16) is kept once.
    per_sample = kept[2] - kept[1]
    return Cost(
        parameters=sum(weight.numel() for weight in weights),
        flops=float(flops[2] - flops[1]),
        state_bytes=float(sum(tensor.nbytes for tensor in state)) + max(kept[1] - per_sample, 0),
        sample_bytes=float(per_sample),
    )


@contextmanager
def _kept(nets: list[nn.Module]) -> Iterator[dict[Any, int]]:
    """Sizes of the storages saved for backward, weights left out; each counted once."""
    own = {weight.untyped_storage()._cdata for net in nets for weight in net.parameters()}
    kept: dict[Any, int] = {}
    alive = []  # a freed storage's address could be taken again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def rehearsals(config: RunConfig) -> list[Rehearsal]:
    """A rehearsal for each net that a run trains.

    Raises:
        UserError: for a tokenizer that must be loaded to be known, or a CLIP that open_clip does not know.
    """
    found = []
    clip, tokenizer = config.clip, config.tokenizer
    if isinstance(clip, TrainedCLIPConfig) and config.transformer:
        found += [_clip("text", clip, config.data.image_size), _clip("judge", clip, config.data.image_size)]
    if isinstance(tokenizer, VQVAEConfig):
        found.append(_tokenizer(tokenizer, config.data.image_size))
    if config.transformer:
        found.append(_transformer(config))
    return found


def codes_of(config: RunConfig) -> tuple[int, int]:
    """Size of the vocabulary, and picture's side / grid's side. Raises as `rehearsals`."""
    tokenizer = config.tokenizer
    if isinstance(tokenizer, PretrainedTokenizerConfig):
        if tokenizer.family not in PRETRAINED:
            raise UserError(
                f"tokenizer.family '{tokenizer.family}': its vocabulary is unknown until {tokenizer.ref} is"
                f" loaded; plan knows {', '.join(PRETRAINED)}"
            )
        return PRETRAINED[tokenizer.family]
    return tokenizer.vocabulary, tokenizer.factor


def _clip(name: Net, clip: TrainedCLIPConfig, size: int) -> Rehearsal:
    described = {"architecture": architecture(clip, size)}

    def contrast(batch: int, net: nn.Module) -> Tensor:
        ids = torch.ones(batch, clip.context_length, dtype=torch.long)
        pictures, texts, scale = net(torch.zeros(batch, 3, size, size), ids)[:3]
        return contrastive_loss(pictures.float(), texts.float(), ids, scale)

    return Rehearsal(name, clip.training, lambda: [build_clip(described)], contrast)


def _tokenizer(tokenizer: VQVAEConfig, size: int) -> Rehearsal:
    losses = tokenizer.loss

    def reconstruct(batch: int, vqvae: nn.Module, criterion: nn.Module, *adversary: nn.Module) -> Tensor:
        pictures = torch.zeros(batch, 3, size, size)
        reconstruction, _, loss = vqvae(pictures)
        loss = loss + criterion(reconstruction.float(), pictures)
        for net in adversary:  # its own step, small beside this one, is left out
            loss = loss - net(reconstruction).mean()
        return loss

    def nets() -> list[nn.Module]:
        criterion = ReconstructionLoss(losses.model_copy(update={"perceptual_weights": ""}))
        if losses.perceptual and losses.perceptual_weights:  # which need not be at hand
            criterion.perceptual = Lpips()
        adversary = [PatchDiscriminator().requires_grad_(False)] if losses.adversarial else []
        return [VQVAE(tokenizer), criterion, *adversary]

    return Rehearsal("tokenizer", tokenizer.training, nets, reconstruct)


def _transformer(config: RunConfig) -> Rehearsal:
    transformer, clip = config.transformer, config.clip
    assert transformer
    if isinstance(clip, TrainedCLIPConfig):
        text_tokens, text_width = clip.context_length, clip.text_width
    else:
        tower = pretrained_architecture(clip.name)["text_cfg"]
        text_tokens, text_width = tower["context_length"], tower["width"]
    vocabulary, factor = codes_of(config)
    side = config.data.image_size // factor

    def predict(batch: int, gpt: nn.Module) -> Tensor:
        codes, drop = torch.zeros(batch, side * side, dtype=torch.long), torch.zeros(batch).bool()
        text, mask = torch.zeros(batch, text_tokens, text_width), torch.ones(batch, text_tokens).bool()
        order = torch.arange(side * side).expand(batch, -1) if transformer.reorders else None
        logits = gpt(codes, text, mask, drop, order)
        return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())

    return Rehearsal(
        "transformer",
        transformer.training,
        lambda: [GPT(transformer, vocabulary, (side, side), text_width)],
        predict,
        side * side,
        transformer.optimizer == "muon",
    )
