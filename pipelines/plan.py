"""What a run will need, computed before it starts: weights, memory per GPU, operations, hours.

Every net takes one step of its training on fake tensors: no memory is taken and nothing is computed, but each
tensor that backward would keep is seen, each operation counted, and the optimiser and the average of the
weights hold what they will hold. So the figures follow the code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
from model.plumbing.distributed import HARDWARE
from model.plumbing.speech import quantity
from model.training.clip import contrastive_loss
from model.training.losses import Lpips, PatchDiscriminator, ReconstructionLoss
from model.training.optim import Ema, adamw, muon

UTILISATION = 0.4  # share of the peak that training is expected to reach, until `benchmarks/` has measured it

# Vocabulary and factor of the published weights of each family; others are known once they are loaded.
PRETRAINED = {"janus": (16384, 16), "emu3": (32768, 8)}


@dataclass(frozen=True)
class Stage:
    """The training of one net."""

    name: str
    parameters: int
    steps: int
    samples: int  # seen in training, over all devices
    tokens: int  # image tokens seen; 0 where the net reads pictures
    flops: float  # of the whole training
    state_bytes: float  # per device: weights, gradients, optimiser's moments, EMA, low-precision copies
    activation_bytes: float  # per device: what backward keeps of one micro-batch
    hours: float

    @property
    def bytes(self) -> float:
        """Memory that one device needs."""
        return self.state_bytes + self.activation_bytes


@dataclass(frozen=True)
class Plan:
    """All stages of a run on some hardware."""

    preset: str
    hardware: str
    devices: int
    stages: list[Stage]

    def render(self) -> str:
        """A table to print."""
        room = HARDWARE[self.hardware]["memory"]
        what = "processes on one CPU" if self.hardware == "cpu" else f"x {self.hardware.upper()}"
        lines = [
            f"{self.preset} on {self.devices} {what}, {UTILISATION:.0%} of peak assumed",
            f"{'':12}{'weights':>9}{'steps':>9}{'samples':>9}{'tokens':>9}{'state':>11}{'activations':>13}"
            f"{'FLOP':>10}{'hours':>9}",
        ]
        for stage in self.stages:
            counts = (stage.parameters, stage.steps, stage.samples, stage.tokens)
            memory = (f"{part / 2**30:.2f} GiB" for part in (stage.state_bytes, stage.activation_bytes))
            lines.append(
                f"{stage.name:12}"
                + "".join(f"{quantity(count) if count else '-':>9}" for count in counts)
                + "{:>11}{:>13}".format(*memory)
                + f"{stage.flops:>10.2g}{stage.hours:>9.2f}"
            )
        total = sum(stage.hours for stage in self.stages)
        lines.append(f"{total:.2f} hours of training in all, as estimated")
        processes = self.devices if self.hardware == "cpu" else 1  # processes of one CPU share its memory
        for stage in self.stages:
            needed = stage.bytes * processes
            if needed > 0.9 * room:
                lines.append(
                    f"{stage.name} needs {needed / 2**30:.0f} GiB of {room / 2**30:.0f} GiB: raise"
                    f" accumulate, or lower batch_size"
                )
        return "\n".join(lines)


def plan(config: RunConfig, hardware: str = "a100") -> Plan:
    """What training this config takes on `jobs.workers × processes_per_worker` devices of a kind.

    Raises:
        UserError: for hardware that is not in the table, a tokenizer that must be loaded to be known, or a
            CLIP that open_clip does not know.
    """
    if hardware not in HARDWARE:
        raise UserError(f"hardware '{hardware}' is unknown; choose one of {', '.join(HARDWARE)}")
    devices = config.jobs.workers * config.jobs.processes_per_worker
    clip, tokenizer, transformer = config.clip, config.tokenizer, config.transformer
    size = config.data.image_size
    vocabulary: int
    factor: int
    stages = []
    if isinstance(clip, TrainedCLIPConfig):
        text_tokens, text_width = clip.context_length, clip.text_width
        described = {"architecture": architecture(clip, size)}

        def contrast(batch: int, net: nn.Module) -> Tensor:
            ids = torch.ones(batch, text_tokens, dtype=torch.long)
            pictures, texts, scale = net(torch.zeros(batch, 3, size, size), ids)[:3]
            return contrastive_loss(pictures.float(), texts.float(), ids, scale)

        for kind in ("text", "judge"):
            stages.append(
                _stage(kind, lambda: [build_clip(described)], contrast, clip.training, devices, hardware)
            )
    else:
        tower = pretrained_architecture(clip.name)["text_cfg"]
        text_tokens, text_width = tower["context_length"], tower["width"]

    if isinstance(tokenizer, VQVAEConfig):
        vocabulary, factor = tokenizer.vocabulary, tokenizer.factor
        losses = tokenizer.loss

        def reconstruct(batch: int, vqvae: nn.Module, criterion: nn.Module, *adversary: nn.Module) -> Tensor:
            pictures = torch.zeros(batch, 3, size, size)
            reconstruction, _, loss = vqvae(pictures)
            loss = loss + criterion(reconstruction.float(), pictures)
            for net in adversary:  # its own step, small beside this one, is left out
                loss = loss - net(reconstruction).mean()
            return loss

        def tokenizer_nets() -> list[nn.Module]:
            criterion = ReconstructionLoss(losses.model_copy(update={"perceptual_weights": ""}))
            if losses.perceptual and losses.perceptual_weights:  # which need not be at hand
                criterion.perceptual = Lpips()
            adversary = [PatchDiscriminator().requires_grad_(False)] if losses.adversarial else []
            return [VQVAE(tokenizer), criterion, *adversary]

        stages.append(_stage("tokenizer", tokenizer_nets, reconstruct, tokenizer.training, devices, hardware))
    else:
        vocabulary, factor = _published(tokenizer)

    if transformer:
        side = size // factor

        def predict(batch: int, gpt: nn.Module) -> Tensor:
            codes, drop = torch.zeros(batch, side * side, dtype=torch.long), torch.zeros(batch).bool()
            text, mask = torch.zeros(batch, text_tokens, text_width), torch.ones(batch, text_tokens).bool()
            logits = gpt(codes, text, mask, drop)
            return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())

        def gpt() -> list[nn.Module]:
            return [GPT(transformer, vocabulary, (side, side), text_width)]

        turned = transformer.optimizer == "muon"
        training = transformer.training
        stages.append(_stage("transformer", gpt, predict, training, devices, hardware, side * side, turned))
    return Plan(config.name, hardware, devices, stages)


def _stage(
    name: str,
    build: Callable[[], list[nn.Module]],
    loss: Callable[..., Tensor],
    training: TrainingConfig,
    devices: int,
    hardware: str,
    tokens: int = 0,
    turned: bool = False,
) -> Stage:
    """One step of a training, taken on fake tensors for one sample and for two.

    Args:
        build: the net that learns, and those that only judge it.
        loss: of (batch, *nets).
        tokens: image tokens of a sample.
        turned: the net's blocks learn by Muon.
    """
    with torch.device("meta"):
        nets = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for net in nets:
            net.to_empty(device="cpu")  # fake, but autocast and fused attention act as in life
        learner: Any = nets[0]
        optimizers: Collection[torch.optim.Optimizer] = (
            muon(learner, learner.blocks, training).values() if turned else [adamw(learner, training)]
        )
        average = Ema(learner, training.ema).average
        kept, flops = {}, {}
        for batch in (1, 2):
            with _kept(nets) as stored, FlopCounterMode(display=False) as counter:
                with torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bf16"):
                    total = loss(batch, *nets)
                total.backward()
            kept[batch], flops[batch] = sum(stored.values()), counter.get_total_flops()
        for optimizer in optimizers:
            optimizer.step()
    weights = list(learner.parameters())
    moments = [value for one in optimizers for state in one.state.values() for value in state.values()]
    state = [*weights, *(weight.grad for weight in weights), *moments, *average.values()]
    # What two samples keep beyond one is a sample's; the rest (copies of weights in bf16) is kept once.
    per_sample = kept[2] - kept[1]
    samples = training.steps * training.batch_size
    work = float(flops[2] - flops[1]) * samples
    speed = HARDWARE[hardware][training.precision] * UTILISATION * (1 if hardware == "cpu" else devices)
    return Stage(
        name=name,
        parameters=sum(weight.numel() for weight in weights),
        steps=training.steps,
        samples=samples,
        tokens=samples * tokens,
        flops=work,
        state_bytes=float(sum(tensor.nbytes for tensor in state)) + max(kept[1] - per_sample, 0),
        activation_bytes=float(per_sample) * max(training.batch_size // (devices * training.accumulate), 1),
        hours=work / speed / 3600,
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


def _published(tokenizer: PretrainedTokenizerConfig) -> tuple[int, int]:
    if tokenizer.family not in PRETRAINED:
        raise UserError(
            f"tokenizer.family '{tokenizer.family}': its vocabulary is unknown until {tokenizer.ref} is"
            f" loaded; plan knows {', '.join(PRETRAINED)}"
        )
    return PRETRAINED[tokenizer.family]
