"""What KFP passes from step to step stands for an asset, and says of it what people want to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from components.artifacts import MLFLOW, Made, config_of, is_made, make, read, write
from model.config import load_config
from model.plumbing import storage, uses
from model.plumbing.assets import NAME, Manifest
from tests.instances import config, ingest


@pytest.fixture
def settings(tmp_path: Path) -> dsl.Artifact:
    """The config's artifact, as `prepare` leaves it."""
    artifact = dsl.Artifact(uri=str(tmp_path / "config"), metadata={MLFLOW: "http://mlflow/#/1"})
    Path(artifact.path).write_text(load_config("smoke").model_dump_json(indent=2))
    return artifact


def test_every_step_reads_the_config_that_was_resolved(settings: dsl.Artifact) -> None:
    assert config_of(settings) == load_config("smoke")


def test_an_artifact_leads_to_its_asset(store: str, settings: dsl.Artifact, tmp_path: Path) -> None:
    made = ingest(config().data)
    artifact, metrics = dsl.Dataset(uri=str(tmp_path / "images")), dsl.Metrics(uri=str(tmp_path / "metrics"))
    about = write(Made(made, reused=True), artifact, settings, metrics)
    assert read(artifact) == made
    first = ("train", "validation", "composition", "duplicates", "quarantined")
    assert metrics.metadata == {name: made.info[name] for name in first}
    assert artifact.metadata == {"asset": made.uri, "reused": "yes", **metrics.metadata}
    assert "http://mlflow/#/1" in "".join(about)


def test_what_is_there_already_is_said_to_be_reused(
    store: str, settings: dsl.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ingest(config().data)
    artifact = dsl.Dataset(uri=str(tmp_path / "images"))
    Path(artifact.path).write_text(images.model_dump_json())

    def launch(spec: Any) -> Manifest:
        made = Manifest(kind="tokenizer", key=spec.output[-16:], settings={}, inputs={}, files=())
        storage.write_bytes(storage.join(spec.output, NAME), made.text)
        return made

    monkeypatch.setattr("components.launch.launch", launch)
    first = make("tokenizer", settings, "run", images=artifact)
    assert not first.reused
    assert is_made(first.manifest.uri)
    assert make("tokenizer", settings, "run", images=artifact) == Made(first.manifest, reused=True)
    assert set(uses.said()) == {f"run/images-{images.key}", f"run/tokenizer-{first.manifest.key}"}
