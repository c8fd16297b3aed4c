"""A training ends early where it has not become better for as many validations as its config says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.config import RunConfig
from model.plumbing.assets import Kind, Manifest
from model.training import clip, transformer, vqvae
from tests.instances import config, ingest, make
from tests.training.test_transformer import publish

TRAINING = {"steps": 12, "batch_size": 8, "warmup_steps": 1, "eval_every": 2, "log_every": 12, "patience": 2}
SCORES = (0.1, 0.3, 0.2, 0.3, 0.4, 0.5)  # of the validations; the two after the second are not better


def run(section: str, **settings: Any) -> RunConfig:
    return config(**{section: {**getattr(config(), section).model_dump(), **settings, "training": TRAINING}})


def nlls() -> Callable[..., dict[str, float]]:
    scores = iter(SCORES)

    def validate(_: object, __: object, ___: object, split: str, *____: object) -> dict[str, float]:
        nll = -next(scores) if split == "validation" else 0.0
        return {"nll": nll, "nll_unconditional": 0.0, "nll_shuffled": 0.0, "text_gain": 0.0}

    return validate


def psnrs() -> Callable[..., dict[str, float]]:
    scores = iter(SCORES)
    return lambda *_: {"psnr": next(scores), "codebook_use": 1.0}


def accuracies() -> Callable[..., float]:
    scores = iter(SCORES)
    return lambda *_: next(scores)


@pytest.mark.parametrize(
    ("kind", "module", "name", "figures", "made", "best"),
    [
        ("tokenizer", vqvae, "validate", psnrs, run("tokenizer"), 4),
        ("transformer", transformer, "validate", nlls, run("transformer"), 4),
        ("transformer", transformer, "validate", nlls, run("transformer", keep="last"), 8),
        ("text", clip, "retrieval", accuracies, run("clip"), None),
    ],
    ids=["tokenizer", "transformer", "transformer-last", "text"],
)
def test_it_ends_after_so_many_validations_without_a_better_one(
    kind: Kind,
    module: Any,
    name: str,
    figures: Callable[[], Any],
    made: RunConfig,
    best: int | None,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, name, figures())
    inputs = publish(made) if kind == "transformer" else {"images": ingest(made.data)}
    asset: Manifest = make(kind, made, inputs)
    curves = json.loads((Path(asset.uri) / "history.json").read_text())
    validations = next(points for name, points in curves.items() if name.startswith("validation/"))
    assert [step for step, _ in validations] == [2, 4, 6, 8]
    assert f"{kind} | ends at step 8: no better for 2 validations" in capsys.readouterr().out
    assert asset.info.get("best_step") == best
    assert asset.info.get("steps") == (8 if kind == "tokenizer" else None)
