"""The sampling sweep: on captions of its own, by one figure, and the model draws by what it chose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.config import RunConfig, SamplingConfig
from model.evaluation import sweep
from model.evaluation.benchmark import for_sweeps, load_benchmark, make_benchmark
from model.evaluation.sweep import ORACLE, RETRIEVAL, SCORE, Tried, sweep_prompts
from model.inference.bundle import make_bundle
from model.inference.generate import Generator
from model.plumbing import storage
from model.plumbing.assets import Manifest
from tests.instances import config, ingest, make, publish_models


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return config(
        sweep={"cfg_scale": [1.0, 4.0], "temperature": [0.5, 1.0], "prompts": 5},
        sampling={"cfg_scale": 2.0, "temperature": 1.0},
    )


@pytest.fixture(scope="module")
def inputs(root: Path, tmp_path_factory: pytest.TempPathFactory, run: RunConfig) -> dict[str, Manifest]:
    images = ingest(run.data)
    return {"images": images, **publish_models(tmp_path_factory.mktemp("models"), run, images)}


FOUND = {  # by guidance and temperature: all right, retrieval, CLIP score
    (1.0, 1.0): (0.2, 0.9, 30.0),
    (2.0, 1.0): (0.4, 0.1, 10.0),
    (4.0, 1.0): (0.4, 0.1, 20.0),
    (4.0, 0.5): (0.6, 0.1, 10.0),
}


def found(sampling: SamplingConfig) -> dict[str, float]:
    return dict(zip((ORACLE, RETRIEVAL, SCORE), FOUND[sampling.cfg_scale, sampling.temperature], strict=True))


def test_the_deciding_figure_chooses_and_of_equals_the_clip_score(
    run: RunConfig, inputs: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tried, "figures", lambda self, sampling: found(sampling))
    made = make("sampling", run, inputs)
    assert (made.info["cfg_scale"], made.info["temperature"]) == (4.0, 0.5)
    assert made.info["decided_by"] == "all attributes right"
    assert made.info["curves"]["cfg_scale"][ORACLE] == [[1.0, 0.2], [2.0, 0.4], [4.0, 0.4]]
    assert made.info["curves"]["temperature"][SCORE] == [[0.5, 10.0], [1.0, 20.0]]
    model = make_bundle(
        run, {name: one for name, one in inputs.items() if name != "images"} | {"sampling": made}
    )
    chosen = json.loads(storage.read_bytes(f"{model.uri}/sampling.json"))
    assert chosen == run.sampling.model_copy(update={"cfg_scale": 4.0, "temperature": 0.5}).model_dump()
    assert model.inputs["sampling"] == made.as_input
    assert model.info["sampling"] == made.info
    assert Generator.load(model.uri).sampling.temperature == 0.5


def test_every_setting_is_drawn_once_over_the_same_prompts_and_seeds(
    run: RunConfig, inputs: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[SamplingConfig, list[str], list[int]]] = []
    draw = Generator.draw

    def watched(
        self: Generator, prompts: list[str], seeds: range, sampling: SamplingConfig, **more: object
    ) -> object:
        asked.append((sampling, list(prompts), list(seeds)))
        return draw(self, prompts, seeds, sampling, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Generator, "draw", watched)
    again = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"seed": 7})})
    made = make("sampling", again, inputs)
    assert len({sampling for sampling, _, _ in asked}) == len(asked) == 3 + 1
    assert len({(tuple(prompts), tuple(seeds)) for _, prompts, seeds in asked}) == 1
    assert made.info["prompts"] == len(asked[0][1]) == 5


def test_prompts_are_no_captions_that_are_measured_on_and_held_out_ones_come_first(
    run: RunConfig, inputs: dict[str, Manifest]
) -> None:
    benchmark = load_benchmark(make_benchmark(run, inputs["images"], inputs["judge"]))
    measured_on = {caption for chosen in benchmark.splits.values() for caption in chosen.captions}
    prompts = sweep_prompts(inputs["images"], 1000)
    assert len(set(prompts)) == len(prompts) >= 5
    assert all(map(for_sweeps, prompts))
    assert not measured_on & set(prompts)
    held_out = [
        one for split in ("composition", "validation") for one in sweep._set_apart(inputs["images"], split)
    ]
    assert held_out
    assert prompts[: len(set(held_out))] == list(dict.fromkeys(held_out))
    assert sweep_prompts(inputs["images"], 3) == sweep_prompts(inputs["images"], 3)
    assert len(sweep_prompts(inputs["images"], 3)) == 3


def test_with_too_few_captions_nothing_is_tried_and_that_is_said(
    run: RunConfig, inputs: dict[str, Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    many = run.model_copy(update={"sweep": run.sweep.model_copy(update={"prompts": 500})})
    made = make("sampling", many, inputs)
    assert "captions are set apart for the sweep, which wants 500" in made.info["kept"]
    assert json.loads(storage.read_bytes(f"{made.uri}/sampling.json")) == run.sampling.model_dump()
    assert "sampling stays as configured" in "".join(capsys.readouterr())
