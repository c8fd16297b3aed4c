"""Evaluation on tiny random models over drawn shapes: pinned, repeatable, and honest about both."""

from __future__ import annotations

import json
from collections.abc import Sized
from pathlib import Path

import pytest

from model.config import RunConfig
from model.errors import Diverged, UserError
from model.evaluation import evaluate as evaluation
from model.evaluation import measure
from model.evaluation.benchmark import make_benchmark
from model.evaluation.measure import SHARES
from model.inference.bundle import make_bundle
from model.inference.generate import Generator
from model.nets.vqvae import VQVAE
from model.plumbing import assets, storage
from model.plumbing.assets import Manifest
from tests.instances import config, ingest, make, publish_models


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return config(evaluation={"samples_per_prompt": 2, "pictures": 4})


@pytest.fixture(scope="module")
def inputs(root: Path, tmp_path_factory: pytest.TempPathFactory, run: RunConfig) -> dict[str, Manifest]:
    """Shapes ingested for real, and a model with random weights."""
    images = ingest(run.data)
    parts = publish_models(tmp_path_factory.mktemp("models"), run, images)
    benchmark = make_benchmark(run, images, parts["judge"])
    return {"images": images, "model": make_bundle(run, parts), "benchmark": benchmark}


@pytest.fixture(scope="module")
def made(inputs: dict[str, Manifest], run: RunConfig) -> Manifest:
    """The evaluation of this model."""
    return make("evaluation", run, inputs)


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
            assert len(scores[split]) == 4
            assert sum(scores[split]) / 4 == pytest.approx(figures[f"{split}/{figure}"], abs=1e-4)
        assert made.info["chance"]["retrieval"][split] == figures[f"{split}/retrieval_chance"] == 1 / 4
        assert figures[f"{split}/oracle_all_right_real"] >= 0.5  # of real pictures; 16 px is little
        assert figures[f"{split}/oracle_all_right"] == 0  # of noise
    assert made.info["scores"].keys() == {"retrieval", "clip_score", "oracle"}
    assert figures["bundle_bytes"] == sum(file.size for file in made.input("model").files)
    assert figures["train/near_duplicates_reconstructed"] < 1  # a random tokenizer leaves nothing
    assert json.loads(storage.read_bytes(f"{made.uri}/metrics.json"))["figures"] == figures
    assert made.info["benchmark"] == made.inputs["benchmark"].key


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
    """Four pictures of each of three splits; held-out ones are decoded again with codes replaced."""
    once = run.evaluation.model_copy(update={"samples_per_prompt": 1})
    again = run.model_copy(update={"evaluation": once})
    encoded, decoded = (Counted(monkeypatch, VQVAE, name) for name in ("encode", "decode"))
    asked = Counted(monkeypatch, Generator, "draw")
    make("evaluation", again, inputs)
    assert encoded.pictures == 3 * 4
    assert asked.pictures == 3 * 4 + 3 * 4 + evaluation.UNCONDITIONAL
    assert decoded.pictures == encoded.pictures + asked.pictures + 4 * len(SHARES)


def test_a_model_whose_figures_are_no_numbers_is_not_published(
    inputs: dict[str, Manifest], run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    thrice = run.evaluation.model_copy(update={"samples_per_prompt": 3})
    again = run.model_copy(update={"evaluation": thrice})
    monkeypatch.setattr(measure, "MEASURES", (lambda _: {"train/bits_per_token": float("nan")},))
    with pytest.raises(
        Diverged, match="train/bits_per_token is nan; the training of this model has diverged"
    ):
        make("evaluation", again, inputs)


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
    parts = publish_models(tmp_path / "models", run, images)
    benchmark = make_benchmark(run, images, parts["judge"])
    given = {"images": images, "model": make_bundle(run, parts), "benchmark": benchmark}
    spec: JobSpec = job("evaluation", run, "run-1", given)
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
