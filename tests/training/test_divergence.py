"""A training that diverges ends in one line that says what to do, on every rank, and leaves nothing."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.config import RunConfig
from model.errors import Diverged, UserError
from model.plumbing.assets import Kind, Manifest, find
from model.plumbing.checkpoints import Checkpointer, leaves
from model.steps import job
from model.training import transformer
from model.training.state import RunningSums, publish
from tests.instances import config, ingest, make, make_in_rank
from tests.ranks import two_ranks
from tests.training.test_transformer import publish as tokens_and_text
from tests.training.test_transformer import run_config

FIELDS: dict[Kind, str] = {"transformer": "transformer", "tokenizer": "tokenizer", "text": "clip"}
TOO_FAST = {
    "steps": 12, "batch_size": 8, "warmup_steps": 1, "learning_rate": 1e12, "grad_clip": 1e12,
    "checkpoint_every": 1, "log_every": 5,
}  # fmt: skip


def diverging(kind: Kind) -> tuple[RunConfig, dict[str, Manifest]]:
    """A run whose learning rate is far too high, and the inputs of the step."""
    run = config()
    section = getattr(run, FIELDS[kind]).model_dump() | {"training": TOO_FAST}
    run = config(**{FIELDS[kind]: section})
    return run, tokens_and_text(run) if kind == "transformer" else {"images": ingest(run.data)}


@pytest.mark.parametrize("kind", FIELDS)
def test_it_stops_with_advice_and_keeps_nothing_that_is_not_finite(kind: Kind, store: str) -> None:
    run, inputs = diverging(kind)
    spec = job(kind, run, "test", inputs)
    with pytest.raises(Diverged) as caught:
        make(kind, run, inputs)
    said = str(caught.value)
    assert said.startswith(f"{kind} diverged: ")
    assert f"at step {caught.value.step} with learning rate 1e+12; the last good checkpoint is " in said
    assert f"lower {FIELDS[kind]}.training.learning_rate or" in said
    assert "\n" not in said
    assert find(spec.output) is None
    step, state = Checkpointer(spec.checkpoints).latest() or (0, {})
    assert 0 < step < caught.value.step <= 12
    assert f"{spec.checkpoints}/step-{step:08d};" in said
    tensors = [leaf for leaf in leaves(state).values() if isinstance(leaf, Tensor)]
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_without_a_checkpoint_it_says_so(store: str) -> None:
    run, inputs = diverging("transformer")
    assert run.transformer
    rare = run.transformer.training.model_copy(update={"checkpoint_every": 100})
    run = run.model_copy(update={"transformer": run.transformer.model_copy(update={"training": rare})})
    with pytest.raises(Diverged, match="there is no good checkpoint"):
        make("transformer", run, inputs)


def test_a_metric_that_is_not_finite_stops_it(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"nll": 1.0, "nll_unconditional": math.inf, "nll_shuffled": 1.0}
    monkeypatch.setattr(transformer, "validate", lambda *_: figures)
    run = run_config()
    inputs = tokens_and_text(run)
    with pytest.raises(Diverged, match="validation/nll_unconditional is inf at step 12 with learning rate"):
        make("transformer", run, inputs)
    assert find(job("transformer", run, "test", inputs).output) is None


def test_nothing_is_validated_after_a_bad_step(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log line is due later than the validation: the sums are looked at before it."""
    spoil(monkeypatch, step=2)
    monkeypatch.setattr(transformer, "validate", lambda *_: pytest.fail("validated"))
    run = run_config(log_every=20, eval_every=4)
    with pytest.raises(Diverged, match="train/nll is nan at step 4"):
        make("transformer", run, tokens_and_text(run))


def spoil(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the NLL of a micro-batch be no number, once."""
    add, calls = RunningSums.add, iter(range(10**6))

    def bad(self: RunningSums, parts: int = 1, /, **values: Tensor) -> None:
        if "nll" in values and next(calls) == step:
            values["nll"] = values["nll"] * math.nan
        add(self, parts, **values)

    monkeypatch.setattr(RunningSums, "add", bad)


def _in_rank(kind: Kind, run: str, inputs: dict[str, str], only: int) -> None:
    """Where `only` is a rank, nothing but one figure of this rank is no number."""
    with pytest.MonkeyPatch.context() as patch:
        if str(only) == os.environ["RANK"]:
            spoil(patch, step=2)
        with pytest.raises(Diverged, match="with learning rate"):
            make_in_rank(kind, run, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "only"),
    [("transformer", -1), ("transformer", 0), ("transformer", 1), ("tokenizer", -1), ("text", -1)],
)
def test_all_ranks_stop_together(kind: Kind, only: int, store: str) -> None:
    run, inputs = diverging(kind) if only < 0 else ((healthy := run_config()), tokens_and_text(healthy))
    uris = {name: manifest.uri for name, manifest in inputs.items()}
    two_ranks(_in_rank, store, kind, run.model_dump_json(), uris, only)
    assert find(job(kind, run, "test", inputs).output) is None


def test_no_asset_has_a_weight_that_is_not_finite(store: str, tmp_path: Path) -> None:
    from model.plumbing.worker import open_job

    run = run_config()
    spec = job("transformer", run, "test", tokens_and_text(run))
    weights = {"good": torch.ones(2), "bad": torch.tensor([1.0, -math.inf])}
    with open_job(spec, track=False) as opened:
        with pytest.raises(UserError, match="weight bad is not finite"):
            publish(opened, weights, {}, {})
        with pytest.raises(UserError, match="psnr"):
            publish(opened, {"good": torch.ones(2)}, {}, {"psnr": math.nan})
    assert find(spec.output) is None
