"""The sampler whose step is compiled: for a GPU, and for a CPU that draws many pictures.

Every step is the same program over fixed buffers, on a GPU a CUDA graph that waits for nothing. Compiling it
takes a CPU about a minute, once per batch size and number of text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.config import SamplingConfig
from model.nets.attention import StaticCache
from model.nets.gpt import GPT, Context
from model.nets.sampler import OnToken, Program, Sampler, are_finite, draw
from model.plumbing import environment

# Freezing packs the weights for the CPU's GEMM kernels; without it compilation gains nothing there.
CPU_OPTIONS: dict[str, Any] = {
    "freezing": True,
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
}
CPU_PICTURES = 15_000  # in batches of 64; measured in docs/EXPERIMENTS.md
GPU_PICTURES = 64  # any evaluation; not measured
PROGRAMS = 4  # compiled per sequence, at most; one where the weights that each reads outweigh the cache
STEPS_COMPILED = 1024  # in a process, at most: to dynamo all are one function, whose ninth program it refuses


def pays(device: torch.device, pictures: int) -> bool:
    """Whether so many pictures, side by side in batches, are worth compiling for: where drawing them step by
    step, on a GPU a hundred launches each, would take longer than compiling does. It never is where torch
    lacks what it compiles with: the pictures are no others without."""
    worth = pictures >= (GPU_PICTURES if device.type == "cuda" else CPU_PICTURES)
    return worth and not environment.lacks_to_compile()


class CompiledSampler(Sampler):
    """Draws as `Sampler` does, and keeps the programs that it has compiled.

    Args:
        gpt: the transformer, in eval mode, on the device and in the type to compute in.
    """

    def __init__(self, gpt: GPT) -> None:
        self.gpt = gpt  # inductor packs the weights itself
        self._programs: dict[Any, StaticProgram] = {}

    def program(self, context: Context, config: SamplingConfig, batch: int, guided: bool) -> Program:
        """The program of the first such batch again, or a new one; each holds a cache for its whole batch."""
        text_tokens = context.keys_values[0][0].shape[2]
        drawn_by = (config.temperature == 0, config.top_k, config.top_p)
        key = (batch, guided, text_tokens, context.mask is None, drawn_by)
        if key not in self._programs:
            self._programs[key] = StaticProgram(self.gpt, config, batch, guided)
        self._programs[key].config = config
        return self._programs[key]


class StaticProgram(Program):
    """One batch's buffers and compiled steps.

    Large batches have up to four programs, for a quarter of the sequence each, so that early steps do not
    read a cache that is still empty. The first step (start token and prefix) takes the plain path.
    """

    def __init__(self, gpt: GPT, config: SamplingConfig, batch: int, guided: bool) -> None:
        super().__init__(gpt, config, batch, guided)
        device = gpt.embedding.weight.device
        self.codes = torch.zeros(batch, gpt.tokens, dtype=torch.long, device=device)
        self.inputs = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.at = torch.zeros((), dtype=torch.long, device=device)
        self.scales = torch.ones(gpt.tokens, device=device)
        self.temperature = torch.ones((), device=device)  # of what is not greedy
        self.context: Context | None = None
        self.steps: dict[int, Callable[[], None]] = {}
        cache = sum(tensor.nbytes for tensor in [*self.cache.keys, *self.cache.values])
        programs = PROGRAMS if cache > sum(weight.nbytes for weight in gpt.parameters()) else 1
        self.part = max(-(-gpt.tokens // programs), 64)  # tokens; fewer are not worth one more

    def run(
        self,
        inputs: Int[Tensor, "B P"],
        context: Context,
        seeds: Sequence[int],
        scales: Float[Tensor, " T"],
        on_token: OnToken | None,
    ) -> Int[Tensor, "B T"]:
        """As the plain path; the loop launches work and waits for nothing."""
        tokens, first = self.gpt.tokens, inputs.shape[1] - 1
        self._refill(context)
        self.seeds.copy_(torch.tensor(list(seeds), dtype=torch.long)[:, None])
        self.scales.copy_(scales)
        self.temperature.fill_(self.config.temperature or 1.0)
        self.codes[:, :first] = inputs[:, 1:]
        self.cache.at = 0
        logits = self.logits(inputs, context, scales[first : first + 1])
        self.finite.copy_(are_finite(logits, self.config))
        self.inputs.copy_(draw(logits, self.config, self.seeds, first, self.keys))
        self.codes[:, first] = self.inputs[:, 0]
        if on_token is not None:
            on_token(first, self.codes[:, first])
        for at in range(first + 1, tokens):
            span = min((at // self.part + 1) * self.part, tokens)
            if span not in self.steps:
                self.steps[span] = self._prepare(span, at)
            if at == first + 1 or at % self.part == 0:
                self.at.fill_(at)
            self.steps[span]()
            if on_token is not None:
                on_token(at, self.codes[:, at])
        return self.codes

    def _refill(self, context: Context) -> None:
        """Programs hold addresses: later texts are copied to where the first one was."""
        if self.context is None:
            self.context = Context(
                [(k.clone(), v.clone()) for k, v in context.keys_values],
                None if context.mask is None else context.mask.clone(),
            )
            return
        for (k, v), (new_k, new_v) in zip(self.context.keys_values, context.keys_values, strict=True):
            k.copy_(new_k)
            v.copy_(new_v)
        if context.mask is not None and self.context.mask is not None:
            self.context.mask.copy_(context.mask)

    def _prepare(self, span: int, at: int) -> Callable[[], None]:
        """Compile the step for the first `span` places; on a GPU capture it."""
        cache = StaticCache(self.cache, self.at, span)
        guided, gpt, context = self.guided, self.gpt, self.context
        inputs, codes, scales, position = self.inputs, self.codes, self.scales, self.at
        temperature, greedy = self.temperature, self.config.temperature == 0
        config = self.config.model_copy(update={"temperature": 0.0 if greedy else 1.0})  # of divided logits
        seeds, keys, finite = self.seeds, self.keys, self.finite
        assert context is not None

        def step() -> None:
            rows = torch.cat([inputs, inputs]) if guided else inputs  # (R, 1)
            logits = gpt.decode(rows, context, cache=cache).float()  # (R, 1, K)
            if guided:
                with_text, without = logits.chunk(2)
                scale = scales.index_select(0, position.view(1))  # `scales[position]` breaks PyTorch 2.11
                logits = torch.lerp(without, with_text, scale)  # (B, 1, K)
            logits = logits / temperature
            finite.logical_and_(are_finite(logits, config))
            drawn = draw(logits, config, seeds, position, keys)  # (B, 1)
            codes.index_copy_(1, position.view(1), drawn)
            inputs.copy_(drawn)
            position.add_(1)

        from torch._dynamo import config as dynamo
        from torch._inductor import config as inductor

        cuda = inputs.is_cuda
        compiled = torch.compile(step, fullgraph=True, dynamic=False)
        saved = inputs.clone(), codes.clone()

        def rewind() -> None:  # compiling and capturing run the step; its effects are taken back
            inputs.copy_(saved[0])
            codes.copy_(saved[1])
            position.fill_(at)

        position.fill_(at)
        # Not as options of `compile`: already tracing must know that weights are constants.
        with inductor.patch({} if cuda else CPU_OPTIONS), dynamo.patch(recompile_limit=STEPS_COMPILED):
            compiled()
        rewind()
        if not cuda:
            return compiled
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                compiled()
                rewind()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            compiled()
        rewind()
        return graph.replay
