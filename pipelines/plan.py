"""What a run will need, computed before it starts: weights, memory per GPU, operations, hours.

Nets are built and run forward on fake tensors: no memory is taken and nothing is computed, but every tensor
that backward would keep is seen, and every operation counted. So the figures follow the code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from model.training.losses import Lpips, PatchDiscriminator, ReconstructionLoss

# Dense peak of one device in FLOP/s (vendors' data sheets; for the CPU what two server cores reached) and
# its memory in bytes.
HARDWARE = {
    "cpu": {"bf16": 0.4e12, "fp32": 0.18e12, "memory": 6 * 2**30},
    "l4": {"bf16": 121e12, "fp32": 30e12, "memory": 24 * 2**30},
    "a100": {"bf16": 312e12, "fp32": 19.5e12, "memory": 80 * 2**30},
    "h100": {"bf16": 989e12, "fp32": 67e12, "memory": 80 * 2**30},
    "h200": {"bf16": 989e12, "fp32": 67e12, "memory": 141 * 2**30},
}
UTILISATION = (
    0.4  # share of the peak that training is expected to reach; what `benchmarks/` measures replaces it
)

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
    state_bytes: float  # per device: weights, gradients, both moments of AdamW, EMA, low-precision copies
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
                + "".join(f"{_short(count) if count else '-':>9}" for count in counts)
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
    size = config.data.image_size
    stages = []
    if isinstance(config.clip, TrainedCLIPConfig):
        clip = config.clip
        text_tokens, text_width = clip.context_length, clip.text_width

        def clip_step(model: nn.Module, batch: int) -> Tensor:
            images, ids = torch.zeros(batch, 3, size, size), torch.ones(batch, text_tokens, dtype=torch.long)
            image, text, scale = model(images, ids)[:3]
            return F.cross_entropy(scale * image @ text.T, torch.arange(batch))

        built = _Net(lambda: build_clip({"architecture": architecture(clip, size)}), clip_step)
        stages += [
            _stage(f"clip {role}", built, clip.training, devices, hardware) for role in ("text", "judge")
        ]
    else:
        text = pretrained_architecture(config.clip.name)["text_cfg"]
        text_tokens, text_width = text["context_length"], text["width"]

    tokenizer = config.tokenizer
    vocabulary: int
    factor: int
    if isinstance(tokenizer, VQVAEConfig):
        vocabulary, factor = tokenizer.vocabulary, tokenizer.factor

        def vqvae_step(nets: nn.ModuleList, batch: int) -> Tensor:
            vqvae, criterion, *adversary = nets
            images = torch.zeros(batch, 3, size, size)
            reconstruction, _, loss = vqvae(images)
            loss = loss + criterion(reconstruction.float(), images)
            for net in adversary:
                loss = loss - net(reconstruction).mean()
            return loss

        built = _Net(lambda: _tokenizer_nets(tokenizer), vqvae_step)
        stages.append(_stage("tokenizer", built, tokenizer.training, devices, hardware))
    else:
        vocabulary, factor = _published(tokenizer)

    if config.transformer:
        transformer, side = config.transformer, size // factor

        def gpt_step(model: nn.Module, batch: int) -> Tensor:
            codes = torch.zeros(batch, side * side, dtype=torch.long)
            text, mask = (
                torch.zeros(batch, text_tokens, text_width),
                torch.ones(batch, text_tokens, dtype=torch.bool),
            )
            logits = model(codes, text, mask, torch.zeros(batch, dtype=torch.bool))
            return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())

        built = _Net(lambda: GPT(transformer, vocabulary, (side, side), text_width), gpt_step)
        training = transformer.training
        stages.append(_stage("transformer", built, training, devices, hardware, tokens=side * side))
    return Plan(config.name, hardware, devices, stages)


def _tokenizer_nets(config: VQVAEConfig) -> nn.ModuleList:
    """What a step of the tokenizer's training runs through; LPIPS' weights need not be at hand."""
    loss = config.loss
    criterion = ReconstructionLoss(loss.model_copy(update={"perceptual_weights": ""}))
    if loss.perceptual and loss.perceptual_weights:
        criterion.perceptual = Lpips()
    # The discriminator's own step, small beside this one, is left out.
    adversary = [PatchDiscriminator().requires_grad_(False)] if loss.adversarial else []
    return nn.ModuleList([VQVAE(config), criterion, *adversary])


@dataclass(frozen=True)
class _Net:
    build: Callable[[], nn.Module]
    step: Callable[[Any, int], Tensor]  # (net, batch) -> loss


def _stage(
    name: str, net: _Net, training: TrainingConfig, devices: int, hardware: str, tokens: int = 0
) -> Stage:
    micro_batch = max(training.batch_size // (devices * training.accumulate), 1)
    with torch.device("meta"):
        model = net.build()
    with FakeTensorMode():
        _to_fake_cpu(model)
        parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        kept = [_cost(net, model, batch, training.precision) for batch in (1, 2)]
    # What two samples keep beyond one is a sample's; the rest (copies of weights in bf16) is kept once.
    per_sample = kept[1][0] - kept[0][0]
    fixed = max(kept[0][0] - per_sample, 0)
    flops_per_sample = 3 * (kept[1][1] - kept[0][1])  # backward costs about twice the forward pass
    samples = training.steps * training.batch_size
    flops = float(flops_per_sample) * samples
    speed = HARDWARE[hardware][training.precision] * UTILISATION * (1 if hardware == "cpu" else devices)
    copies = 4 + (training.ema > 0)  # weights, gradients, two moments, EMA: fp32 each
    return Stage(
        name=name,
        parameters=parameters,
        steps=training.steps,
        samples=samples,
        tokens=samples * tokens,
        flops=flops,
        state_bytes=4.0 * copies * parameters + fixed,
        activation_bytes=float(per_sample) * micro_batch,
        hours=flops / speed / 3600,
    )


def _to_fake_cpu(model: nn.Module) -> None:
    """Give a net on the meta device fake CPU tensors: autocast and fused attention then act as in life."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(fake, weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype)


def _cost(net: _Net, model: nn.Module, batch: int, precision: str) -> tuple[int, int]:
    """Bytes that backward keeps of a forward pass over `batch` samples, and its floating-point operations."""
    with (
        _kept(model) as kept,
        FlopCounterMode(display=False) as counter,
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        net.step(model, batch)
    return sum(kept.values()), counter.get_total_flops()


@contextmanager
def _kept(model: nn.Module) -> Iterator[dict[Any, int]]:
    """Sizes of the storages saved for backward, weights left out; each counted once."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
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


def _short(value: float) -> str:
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"
