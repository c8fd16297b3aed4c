"""The compiled sampler against the plain one: the same pictures."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from model.config import SamplingConfig
from model.errors import Diverged
from model.nets.compiled import CompiledSampler
from model.nets.sampler import sample
from tests.nets.test_sampler import texts, tiny

pytestmark = [pytest.mark.slow, pytest.mark.compiles]


def test_compiled_draws_the_same_pictures() -> None:
    """Two programs (of 64 and of 72 tokens), buffers refilled by a second batch, a prefix."""
    gpt = tiny(grid=(6, 12))
    text, mask = texts()
    config = SamplingConfig(cfg_scale=2, top_k=9, top_p=0.9)
    fast = CompiledSampler(gpt)
    for seeds, rows in [([1, 2, 3], [0, 1, 2]), ([5, 6, 7], [2, 0, 1])]:
        plain = sample(gpt, text[rows], mask[rows], config, seeds)
        assert torch.equal(fast(text[rows], mask[rows], config, seeds), plain)
    again = fast(text[rows], mask[rows], config, seeds, prefix=plain[:, :66])
    assert torch.equal(again, plain)
    (program,) = fast._programs.values()
    steps = dict(program.steps)
    assert sorted(steps) == [64, 72]
    warmer = config.model_copy(update={"temperature": 1.3})
    plain = sample(gpt, text[rows], mask[rows], warmer, seeds)
    assert not torch.equal(plain, again)
    assert torch.equal(fast(text[rows], mask[rows], warmer, seeds), plain)
    assert [*fast._programs.values()] == [program], "another one would have a cache of its own"
    assert program.steps == steps


def test_a_server_may_compile_for_many_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo by itself refuses the ninth program of one function."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # tracing is what is tried
    gpt = tiny(grid=(1, 2))
    fast = CompiledSampler(gpt)
    config = SamplingConfig(cfg_scale=1)
    for batch in range(1, 11):
        seeds = list(range(batch))
        assert torch.equal(fast(None, None, config, seeds), sample(gpt, None, None, config, seeds))
    assert len(fast._programs) == 10


def test_what_is_no_number_is_found_in_a_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # its weights may change
    gpt = tiny(grid=(1, 2))
    fast = CompiledSampler(gpt)
    config = SamplingConfig(cfg_scale=1)
    codes = fast(None, None, config, [1, 2])
    second = gpt.position.weight.detach()[1]  # of the code that the compiled step draws
    before = second.clone()
    second.fill_(math.nan)
    with pytest.raises(Diverged):
        fast(None, None, config, [1, 2])
    second.copy_(before)
    assert torch.equal(fast(None, None, config, [1, 2]), codes)
