"""Evaluation on tiny random models over drawn shapes: pinned, repeatable, and honest about both."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sized
from pathlib import Path

import pytest
import torch

from model.config import RunConfig
from model.errors import UserError
from model.evaluation import evaluate as evaluation
from model.evaluation.benchmark import Benchmark, Drawn, load_benchmark
from model.evaluation.evaluate import Verdict, compare, remeasure
from model.inference.bundle import make_bundle
from model.inference.generate import Generator, Unfit
from model.nets.vqvae import VQVAE
from model.plumbing import assets, storage
from model.plumbing.assets import Manifest
from model.plumbing.speech import Progress
from tests.instances import config, ingest, make, publish_models


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return config(evaluation={"samples_per_prompt": 2, "pictures": 6, "cfg_sweep": [1.0, 2.0]})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store that this module's tests share; they leave its assets as they are."""
    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENT_GPT_STORE", str(root))
        yield root


@pytest.fixture(scope="module")
def inputs(root: Path, tmp_path_factory: pytest.TempPathFactory, run: RunConfig) -> dict[str, Manifest]:
    """Shapes ingested for real, and a model with random weights."""
    images = ingest(run.data)
    parts = publish_models(tmp_path_factory.mktemp("models"), run, images)
    return {"images": images, "model": make_bundle(run, parts)}


@pytest.fixture(scope="module")
def made(inputs: dict[str, Manifest], run: RunConfig) -> Manifest:
    """The evaluation of this model."""
    return make("evaluation", run, inputs)


def benchmark_of(run: RunConfig, inputs: dict[str, Manifest]) -> Benchmark:
    return load_benchmark(run, inputs["images"], inputs["model"].inputs["judge"].sha256)


@pytest.fixture
def drawn(run: RunConfig, inputs: dict[str, Manifest]) -> Drawn:
    """What the model makes of the benchmark, nothing of it computed yet."""
    generator = Generator.load(inputs["model"].uri)
    assert generator.judge
    progress = Progress("test", 0, "img", enabled=False)
    return Drawn(generator, generator.judge, benchmark_of(run, inputs), progress)


def test_an_evaluation_holds_report_pictures_and_metrics(made: Manifest) -> None:
    names = {file.name for file in made.files}
    assert {"report.html", "metrics.json", "samples-train.png", "samples-composition.png"} <= names
    assert {"reconstructions.png", "unconditional.png", "curves.png"} <= names
    figures = made.info["figures"]
    for split in ("train", "validation", "composition"):
        assert figures[f"{split}/bits_per_token"] > 0
        assert figures[f"{split}/bits_per_token_text_gain"] == pytest.approx(
            figures[f"{split}/bits_per_token_shuffled"] - figures[f"{split}/bits_per_token"]
        )
        assert 0 < figures[f"{split}/nearest_distance"] < 1
        for name, scores in made.info["scores"].items():
            figure = "oracle_all_right" if name == "oracle" else name
            assert len(scores[split]) == 6
            assert sum(scores[split]) / 6 == pytest.approx(figures[f"{split}/{figure}"], abs=1e-4)
        assert made.info["chance"]["retrieval"][split] == figures[f"{split}/retrieval_chance"] == 1 / 6
        assert figures[f"{split}/oracle_all_right_real"] >= 0.5  # of real pictures; 16 px is little
        assert figures[f"{split}/oracle_all_right"] == 0  # of noise
    assert made.info["scores"].keys() == {"retrieval", "clip_score", "oracle"}
    assert figures["bundle_bytes"] == sum(file.size for file in made.input("model").files)
    assert figures["train/near_duplicates_reconstructed"] < 1  # a random tokenizer leaves nothing
    assert json.loads(storage.read_bytes(f"{made.uri}/metrics.json"))["guidance"]["CLIP score"][0][0] == 1.0


def test_a_finished_evaluation_is_found(
    made: Manifest, inputs: dict[str, Manifest], run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Generator, "draw", lambda *_: pytest.fail("drew pictures although all was done"))
    assert make("evaluation", run, inputs) == made


@pytest.mark.slow
def test_evaluating_twice_gives_the_same_bytes(
    made: Manifest, inputs: dict[str, Manifest], run: RunConfig
) -> None:
    storage.delete_prefix(made.uri)
    assert make("evaluation", run, inputs).sha256 == made.sha256


def test_the_benchmark_is_pinned_by_data_judge_and_config(
    inputs: dict[str, Manifest], run: RunConfig
) -> None:
    one, two = benchmark_of(run, inputs), benchmark_of(run, inputs)
    assert one.key == two.key
    for split, chosen in one.splits.items():
        assert chosen.captions == two.splits[split].captions
        assert torch.equal(chosen.images, two.splits[split].images)
        assert len(chosen.captions) == len(chosen.images) == 6
    seeds = [seed for split in one.splits for seed in one.seeds(split)]
    assert len(set(seeds)) == len(seeds)
    other = run.evaluation.model_copy(update={"seed": 1})
    assert benchmark_of(run.model_copy(update={"evaluation": other}), inputs).key != one.key


def test_remeasuring_the_same_model_gives_its_own_scores(
    made: Manifest, inputs: dict[str, Manifest], run: RunConfig, drawn: Drawn
) -> None:
    champion = remeasure(run, made, drawn.generator)
    assert champion["benchmark"] == made.info["benchmark"]
    assert champion["scores"] == made.info["scores"]
    judged = evaluation.judgement(drawn)
    assert judged["validation/clip_score"] == made.info["figures"]["validation/clip_score"]
    assert not compare(made.info, champion).better, "a model cannot beat itself"


def test_likelihoods_are_those_of_the_codes(drawn: Drawn) -> None:
    figures = evaluation.likelihoods(drawn)
    codes = drawn.codes["validation"]
    with torch.no_grad():
        logits = drawn.generator.gpt(codes).log_softmax(-1)
    expected = -logits.gather(2, codes[..., None]).mean()
    assert figures["validation/bits_per_token_unconditional"] == pytest.approx(
        expected.item() / math.log(2), abs=1e-4
    )
    assert figures["bits_per_token_gap"] == pytest.approx(
        figures["validation/bits_per_token"] - figures["train/bits_per_token"]
    )


class Counted:
    """Calls of a method, by how many pictures each was given."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.pictures, real = 0, getattr(owner, name)

        def call(one: object, given: Sized, *more: object, **named: object) -> object:
            self.pictures += len(given)
            return real(one, given, *more, **named)

        patch.setattr(owner, name, call)


def test_every_picture_is_encoded_decoded_and_drawn_once(
    inputs: dict[str, Manifest], run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six pictures of each of three splits; the sweep does not draw anew at the model's own scale."""
    again = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"seed": 7})})
    assert run.sampling.cfg_scale in run.evaluation.cfg_sweep
    encoded, decoded = (Counted(monkeypatch, VQVAE, name) for name in ("encode", "decode"))
    asked = Counted(monkeypatch, Generator, "draw")
    make("evaluation", again, inputs)
    grids, unconditional = 3 * 6 * run.evaluation.samples_per_prompt, evaluation.UNCONDITIONAL
    assert encoded.pictures == 3 * 6
    assert asked.pictures == 3 * 6 + 6 + grids + unconditional
    assert decoded.pictures == encoded.pictures + asked.pictures


def test_at_its_own_scale_the_sweep_says_what_was_scored(drawn: Drawn) -> None:
    figures = evaluation.judgement(drawn)
    curves = evaluation.guidance_sweep(drawn, [1.0, drawn.generator.sampling.cfg_scale])
    assert curves["CLIP score"][1][1] == figures["composition/clip_score"]
    assert curves["CLIP score"][0][1] != figures["composition/clip_score"]


def test_a_model_whose_figures_are_no_numbers_is_not_published(
    inputs: dict[str, Manifest], run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"seed": 8})})
    monkeypatch.setattr(evaluation, "MEASURES", (lambda _: {"train/bits_per_token": float("nan")},))
    with pytest.raises(Unfit, match="train/bits_per_token is nan; the training of this model has diverged"):
        make("evaluation", again, inputs)


def measured(scores: list[float], benchmark: str = "k") -> dict[str, object]:
    return {"scores": {"oracle": {"train": scores}}, "benchmark": benchmark}


def test_only_a_difference_beyond_chance_makes_a_champion() -> None:
    champion = measured([0.0, 1.0, 0.0, 1.0] * 8)
    assert compare(measured([1.0, 1.0, 0.0, 1.0] * 8), champion).better
    assert not compare(champion, champion).better
    assert not compare(measured([0.0, 1.0, 0.0, 0.0] * 8), champion).better
    luck = compare(measured([0.0, 1.0, 1.0, 0.0] * 7 + [1.0, 1.0, 0.0, 1.0]), champion)
    assert not luck.better
    assert "standard error" in luck.reason
    assert compare(measured([float("nan")] * 32), champion) == Verdict(
        False, "the challenger's scores are not finite"
    )
    broken = measured([float("nan")] + [0.0] * 31)
    assert compare(measured([0.0] * 32), broken) == Verdict(True, "the champion's scores are not finite")
    assert not compare(broken, broken).better
    with pytest.raises(UserError, match="different prompts"):
        compare(measured([1.0]), measured([0.0], "other"))


def test_nothing_is_left_where_parts_do_not_belong_together(
    inputs: dict[str, Manifest], run: RunConfig, tmp_path: Path
) -> None:
    other = config(tokenizer=run.tokenizer.model_dump() | {"codebook_size": 32})
    strange = publish_models(tmp_path / "other", other, inputs["images"], seed=1)
    parts = {name: one.load() for name, one in inputs["model"].inputs.items()}
    model = make_bundle(run, parts | {"tokenizer": strange["tokenizer"]})

    def left() -> list[str]:
        return [uri for uri in storage.list_uris(storage.store_root()) if "/evaluation/" in uri]

    before = left()
    with pytest.raises(UserError, match="do not belong together"):
        make("evaluation", run, inputs | {"model": model})
    assert left() == before


@pytest.mark.slow
def test_as_a_job_with_real_services(services: dict[str, str], run: RunConfig, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from model.plumbing import worker
    from model.plumbing.jobs import JobSpec, TrackingIds
    from model.steps import job

    images = ingest(run.data)
    model = make_bundle(run, publish_models(tmp_path / "models", run, images))
    spec: JobSpec = job("evaluation", run, "run-1", {"images": images, "model": model})
    assert spec.tracking == TrackingIds(experiment=run.experiment, run="run-1", step="evaluation")
    made = worker.run(spec, evaluation.main)
    assert made
    assert made == assets.load(spec.output)
    client = MlflowClient(services["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(run.experiment)
    assert experiment
    (found,) = client.search_runs([experiment.experiment_id], "tags.`latent_gpt.step` = 'evaluation'")
    measured = made.info["figures"]["validation/bits_per_token"]
    assert found.data.metrics["validation/bits_per_token"] == pytest.approx(measured)
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["report.html"]
