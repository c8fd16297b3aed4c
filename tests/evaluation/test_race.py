"""A race of two models: by turns in one process, and told apart."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from model.evaluation import race
from model.evaluation.benchmark import make_benchmark
from model.inference.bundle import make_bundle
from model.inference.generate import Generator
from tests.instances import config, ingest, make, publish_models


def test_the_slower_one_is_named(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(gate={"speed_ratio": 0.5})
    images = ingest(run.data)
    ours, theirs = (publish_models(tmp_path / str(seed), run, images, seed) for seed in (1, 2))
    given = {
        "model": make_bundle(run, ours),
        "champion": make_bundle(run, theirs),
        "benchmark": make_benchmark(run, images, ours["judge"]),
    }
    order: list[str] = []
    real, load = Generator.draw, Generator.load
    named: dict[int, str] = {}

    def loaded(folder: Path, **more: int) -> Generator:
        made = load(folder, **more)
        named[id(made)] = "ours" if str(folder).rstrip("/").endswith(given["model"].key) else "theirs"
        return made

    def draw(one: Generator, *more: object) -> object:
        order.append(named[id(one)])
        if named[id(one)] == "theirs":
            time.sleep(0.3)
        return real(one, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Generator, "load", loaded)
    monkeypatch.setattr(Generator, "draw", draw)
    speeds = make("race", run, given).info["pictures_per_second"]
    assert speeds["model"] > speeds["champion"] > 0
    assert len(order) == 2 * (race.ROUNDS + 1)
    assert order[:4] == ["theirs", "ours", "ours", "theirs"], "nobody is always the one that comes first"
