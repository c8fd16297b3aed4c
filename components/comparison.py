"""Two models that somebody names, side by side: measured on one benchmark, and what the gate would say."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from components.registration import counts, measure, measured, raced, there
from components.step import record
from model.config import RunConfig
from model.errors import UserError
from model.evaluation import gate
from model.evaluation.gate import Measured, Verdict
from model.plumbing import assets, outcome, registry
from model.plumbing.assets import Input, Kind, Manifest
from model.plumbing.tracking import finish_pipeline_run


class Side(NamedTuple):
    """One of the two."""

    ref: str
    model: Manifest
    name: str  # of the registered model; "" of a folder
    version: int | None
    config: RunConfig | None
    lineage: dict[Kind, Input]


def compare(model: str, against: str) -> Verdict:
    """What the gate says of one model against another; nothing is promoted.

    Args:
        model: as `registry.resolve` takes it.
        against: the same; one of the two is to be registered, as its benchmark is what both are measured on.

    Raises:
        UserError: one of them is not there, or they cannot be measured on the same.
    """
    ours, theirs = _side(model), _side(against)
    benchmark = _benchmark(theirs) or _benchmark(ours)
    config = theirs.config or ours.config
    if benchmark is None or config is None:
        raise UserError(
            f"neither {model} nor {against} is a registered version whose benchmark is there still"
        )
    pictures = [there(side.lineage.get("images")) for side in (ours, theirs)]
    run = f"evaluate-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    with _ended(run):
        sides = _sides(config, run, (ours, theirs), pictures, benchmark)
    verdict = gate.decide(config.gate, *sides)
    judge = benchmark.inputs["judge"].key
    return verdict.model_copy(
        update={"against": theirs.version, "benchmark": benchmark.key, "judge": f"{judge}, pinned with it"}
    )


@contextmanager
def _ended(run: str) -> Iterator[None]:
    """Say how a run ended, below which jobs may have logged in MLflow."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        record("evaluate", run, "KILLED", "told to end")
        raise
    except Exception as error:
        record("evaluate", run, "FAILED", outcome.of(error).reason)
        raise
    finish_pipeline_run(run)


def _sides(
    config: RunConfig,
    run: str,
    both: tuple[Side, Side],
    pictures: list[Manifest | None],
    benchmark: Manifest,
) -> list[Measured]:
    """Both models, measured on one benchmark."""
    from model.evaluation.benchmark import moved_into_training

    ours, theirs = both
    sides = []
    for side, own, other in zip((ours, theirs), pictures, reversed(pictures), strict=True):
        if own and (moved := moved_into_training(benchmark, own)):
            raise UserError(f"{side.ref} was trained on {len(moved)} of the pictures that are held out")
        images = own or other
        if images is None:
            raise UserError(f"the pictures of neither {ours.ref} nor {theirs.ref} are in the store any more")
        sides.append(_measured(config, run, side, images, benchmark))
    if config.gate.speed_ratio:
        sides = list(raced(config, run, ours.model, theirs.model, benchmark, *sides))
    return sides


def _side(ref: str) -> Side:
    folder = registry.resolve(ref)
    if not (folder / assets.NAME).is_file():
        raise UserError(f"{ref} has no {assets.NAME}: it is of an earlier release, and cannot be measured")
    model = assets.put_back(folder)
    if model.kind != "model":
        raise UserError(f"{ref} is no model, it is of kind {model.kind}")
    if not ref.startswith("models:/"):
        return Side(ref, model, "", None, None, {})
    name, version = registry.named(ref)
    return Side(ref, model, name, version, registry.config_of(version, name), registry.lineage(version, name))


def _benchmark(side: Side) -> Manifest | None:
    """What is pinned for the registered model, or else what the version was evaluated on."""
    pinned = registry.benchmark_of(side.name) if side.name else None
    if found := there(pinned):
        return found
    return there(side.lineage.get("benchmark"))


def _measured(config: RunConfig, run: str, side: Side, images: Manifest, benchmark: Manifest) -> Measured:
    before = there(side.lineage.get("evaluation"))
    if before and counts(before, benchmark):
        return measured(before.info, side.model)
    found = measure(config, run, side.model, images, benchmark)
    if isinstance(found, str):
        raise UserError(f"{side.ref} cannot be measured: {found}")
    return found
