"""Which version is in use: fake evaluations of real tiny models, the real MLflow, the real S3."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.registration import Registered, register_model
from model import steps
from model.config import RunConfig
from model.errors import UserError
from model.evaluation.benchmark import load_benchmark, make_benchmark
from model.inference.bundle import make_bundle
from model.inference.generate import Generator
from model.plumbing import cache, registry, storage
from model.plumbing.assets import AssetWriter, Manifest
from model.plumbing.jobs import TrackingIds
from model.plumbing.tracking import mlflow_client
from tests.instances import config, ingest, publish_models
from tests.plumbing.test_registry import log_model as log_echo

pytestmark = pytest.mark.slow

Evaluated = Callable[..., tuple[RunConfig, Manifest]]


@pytest.fixture
def evaluated(services: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluated:
    """Makes evaluations that say what the test wants of models with random weights."""
    monkeypatch.setenv("LATENT_GPT_CACHE", str(tmp_path / "cache"))
    name = f"model-{uuid.uuid4().hex[:8]}"

    def make(seed: int, score: float, **changes: object) -> tuple[RunConfig, Manifest]:
        run = config(**{"model_name": name, **changes})
        images = ingest(run.data)
        parts = publish_models(tmp_path / str(seed), run, images, seed)
        model = make_bundle(run, parts)
        benchmark = make_benchmark(run, images, parts["judge"])
        count = load_benchmark(benchmark).count
        given = {"images": images, "model": model, "benchmark": benchmark}
        writer = AssetWriter("evaluation", {"score": score}, given)
        writer.add_bytes("report.html", b"<html>")
        info = {
            "scores": {"oracle": {"train": [score] * count}},
            "benchmark": benchmark.key,
            "headline": [["90.0 %", "retrieval accuracy", "3.1 % by chance"]],
            "headline_of": "captions held out",
        }
        return run, writer.finish(info)

    return make


def register(run: RunConfig, evaluation: Manifest) -> Registered:
    return register_model(run, uuid.uuid4().hex[:8], evaluation)


def aliases(run: RunConfig) -> dict[str, str]:
    found: dict[str, str] = mlflow_client().get_registered_model(run.registered_model).aliases
    return found


def test_a_better_challenger_becomes_champion_and_a_worse_one_does_not(evaluated: Evaluated) -> None:
    run, first = evaluated(1, 0.0)
    made = register(run, first)
    assert (made.version, made.alias, made.reason) == (1, "champion", "no other is in use")
    assert made.headline == [("90.0 %", "retrieval accuracy", "3.1 % by chance")]
    assert aliases(run) == {"champion": "1"}

    _, better = evaluated(2, 1.0)  # the champion, measured anew, draws nothing that is right
    made = register(run, better)
    assert (made.version, made.alias) == (2, "champion")
    assert "score 1.000 against 0.000 over 18 prompts" in made.reason
    assert aliases(run) == {"champion": "2", "previous-champion": "1"}

    _, worse = evaluated(3, 0.0)
    made = register(run, worse)
    assert (made.version, made.alias) == (3, "challenger")
    assert aliases(run) == {"champion": "2", "previous-champion": "1", "challenger": "3"}

    again = register(run, better)
    assert (again.version, again.alias, again.reason) == (2, "champion", "it was before")


def test_the_registered_version_is_the_asset_with_its_lineage_and_draws(
    evaluated: Evaluated, tmp_path: Path
) -> None:
    run, evaluation = evaluated(1, 0.0)
    register(run, evaluation)
    model = evaluation.input("model")
    tags = registry.tags_of(1, run.registered_model)
    for name, one in {**model.inputs, **evaluation.inputs}.items():
        assert tags[f"latent_gpt.{name}"] == one.sha256
    assert tags["latent_gpt.evaluation"] == evaluation.sha256
    assert registry.lineage(1, run.registered_model) == {
        **model.inputs,
        **evaluation.inputs,
        "evaluation": evaluation.as_input,
    }
    assert registry.config_of(1, run.registered_model) == run
    assert tags[registry.FINGERPRINT_TAG] == steps.fingerprint(steps.parts(run))
    shutil.rmtree(tmp_path / "cache")
    folder = registry.resolve(f"models:/{run.registered_model}@champion")
    assert (folder / "manifest.json").read_bytes() == model.text
    assert Generator.load(folder).generate(["red circle"], [0])


def test_a_model_that_is_no_numbers_never_becomes_champion(evaluated: Evaluated) -> None:
    run, evaluation = evaluated(1, 1.0)
    nothing = {"scores": {"oracle": {"train": [float("nan")] * 18}}}
    broken = evaluation.model_copy(update={"info": {**evaluation.info, **nothing}})
    made = register(run, broken)
    assert (made.alias, made.reason) == ("challenger", "its scores are not finite")
    assert aliases(run) == {"challenger": "1"}, "not even as the first"


def test_a_champion_that_is_no_numbers_is_replaced_by_any_healthy_model(
    evaluated: Evaluated, tmp_path: Path
) -> None:
    run, first = evaluated(1, 0.0)
    weights = tmp_path / "nan/model.safetensors"
    shutil.copytree(tmp_path / "1/transformer", weights.parent)
    save_file({name: torch.full_like(one, torch.nan) for name, one in load_file(weights).items()}, weights)
    writer = AssetWriter("transformer", {"broken": True}, {})
    for path in weights.parent.iterdir():
        writer.add_file(path.name, path)
    model = first.input("model")
    parts = {name: one.load() for name, one in model.inputs.items()} | {"transformer": writer.finish({})}
    broken = make_bundle(run, parts)
    # As an earlier release registered it, which did not look.
    ids, lineage = TrackingIds(experiment="e", run="r", step="register"), {registry.MODEL_TAG: broken.sha256}
    version = registry.register(ids, cache.folder(broken), log_echo, lineage, run.registered_model)
    registry.promote(version, run.registered_model)
    assert aliases(run) == {"champion": "1"}
    with pytest.raises(UserError, match="holds what is no finite number"):
        Generator.load(registry.resolve(f"models:/{run.registered_model}@champion"))
    made = register(run, first)
    assert (made.version, made.alias) == (2, "champion")
    assert "cannot be used" in made.reason


def test_what_was_made_from_other_pictures_is_not_compared(evaluated: Evaluated) -> None:
    run, first = evaluated(1, 0.0)
    register(run, first)
    other, better = evaluated(
        2, 1.0, data={**run.data.model_dump(), "source": {"kind": "shapes", "count": 80}}
    )
    made = register(other, better)
    assert (made.version, made.alias) == (2, "challenger")
    assert "not compared with the champion, version 1, which was made from other pictures" in made.reason
    named, _ = evaluated(2, 1.0, model_name="")
    assert named.registered_model == "latent-gpt-tiny"


class TestDeletedByHand:
    """What people delete in MLflow's pages never ends a run, and nothing but a line comes of it."""

    def test_the_champions_version(self, evaluated: Evaluated) -> None:
        run, first = evaluated(1, 0.0)
        register(run, first)
        register(*evaluated(2, 1.0))
        mlflow_client().delete_model_version(run.registered_model, "2")
        assert registry.rollback(run.registered_model).previous == 1
        assert aliases(run) == {"champion": "1"}
        with pytest.raises(UserError, match="has no previous-champion to roll back to; it has champion"):
            registry.rollback(run.registered_model)

    def test_the_champions_files(
        self, services: dict[str, str], evaluated: Evaluated, tmp_path: Path
    ) -> None:
        run, first = evaluated(1, 0.0)
        register(run, first)
        bucket = storage.join("s3://" + storage.split(services["LATENT_GPT_STORE"])[0], "mlflow")
        for uri in storage.list_uris(bucket):
            if "/bundle/" in uri:
                storage.delete(uri)
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(storage.NotFound, match="are gone from MLflow; run the pipeline again"):
            registry.resolve(f"models:/{run.registered_model}@champion")
        made = register(*evaluated(2, 0.0))
        assert (made.version, made.alias) == (2, "champion")
        assert "the champion is lost: the files of models:/" in made.reason
        assert register(run, first).version == 3, "what is lost is registered anew"

    def test_the_registered_model_and_its_experiment(self, evaluated: Evaluated) -> None:
        run, first = evaluated(1, 0.0)
        register(run, first)
        client = mlflow_client()
        client.delete_registered_model(run.registered_model)
        with pytest.raises(UserError, match=r"has no alias champion; it has none\. Run the pipeline first"):
            registry.resolve(f"models:/{run.registered_model}@champion")
        with pytest.raises(UserError, match="has no previous-champion to roll back to; it has none"):
            registry.rollback(run.registered_model)
        experiment = client.get_experiment_by_name(run.experiment)
        assert experiment
        client.delete_experiment(experiment.experiment_id)
        made = register(run, first)
        assert (made.version, made.alias) == (1, "champion")
