"""The registry, against the real MLflow server and S3."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from model.plumbing import registry, storage
from model.plumbing.assets import AssetWriter
from model.plumbing.jobs import TrackingIds

PYFUNC = """
import mlflow

class Echo(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[str]) -> list[str]:
        return model_input

mlflow.models.set_model(Echo())
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder as `model/inference/generate.py` writes it, with a little of everything."""
    folder = tmp_path / "bundle"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer/model.safetensors").write_bytes(os.urandom(100))
    (folder / "lineage.json").write_text("{}")
    return folder


@pytest.fixture
def model() -> str:
    """The name of a registered model that is this test's alone."""
    return f"model-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def ids() -> TrackingIds:
    return TrackingIds(experiment="registry", run=uuid.uuid4().hex[:8], step="register")


def log_model(bundle: Path, name: str) -> Any:
    """What `model/inference/serving.py` does, without nets."""
    import mlflow

    code = bundle.parent / "pyfunc.py"
    code.write_text(PYFUNC)
    return mlflow.pyfunc.log_model(
        name=name, python_model=str(code), artifacts={"bundle": str(bundle)}, pip_requirements=["mlflow"]
    )


def test_a_flipped_bit_or_a_missing_file_is_noticed(bundle: Path) -> None:
    sealed = registry.seal(bundle)
    assert registry.verify(bundle) == sealed
    assert registry.seal(bundle) == sealed
    assert registry.resolve(str(bundle)) == bundle
    weights = bundle / "transformer/model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(storage.Damaged, match=r"transformer/model.safetensors is damaged"):
        registry.resolve(str(bundle))
    weights.unlink()
    with pytest.raises(storage.Damaged, match=r"transformer/model.safetensors is missing"):
        registry.resolve(str(bundle))


def test_a_folder_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UserError, match=r"model ./nowhere does not exist; give models:/latent-gpt@champion"):
        registry.resolve("./nowhere")


@pytest.mark.slow
class TestRealServers:
    """What only servers can show."""

    def test_a_version_comes_back_whole(
        self, services: dict[str, str], bundle: Path, model: str, ids: TrackingIds, tmp_path: Path
    ) -> None:
        version, new = registry.register(ids, bundle, log_model, {"latent_gpt.tokenizer": "s3://t"}, model)
        assert (version, new) == (1, True)
        assert registry.version_of("challenger", model) == 1
        assert registry.register(ids, bundle, log_model, {}, model) == (1, False)
        registry.promote(1, model)
        assert registry.version_of("champion", model) == 1
        assert registry.version_of("challenger", model) is None
        cache = tmp_path / "cache"
        for ref in (f"models:/{model}@champion", f"models:/{model}/1"):
            folder = registry.resolve(ref, cache)
            assert registry.verify(folder) == registry.verify(bundle)
        (folder / "transformer/model.safetensors").write_bytes(b"damaged in the cache")
        assert registry.verify(registry.resolve(ref, cache)) == registry.verify(bundle)
        assert [path.name for path in (cache / "models").iterdir()] == [registry.verify(bundle)]

        import mlflow

        mlflow.set_tracking_uri(services["MLFLOW_TRACKING_URI"])
        loaded = mlflow.pyfunc.load_model(f"models:/{model}@champion")
        assert loaded.predict(["hello"]) == ["hello"]

    def test_champions_come_and_go(
        self, services: dict[str, str], bundle: Path, model: str, ids: TrackingIds
    ) -> None:
        for number in (1, 2):
            (bundle / "sampling.json").write_text(json.dumps(number))
            version, new = registry.register(ids, bundle, log_model, {}, model)
            assert (version, new) == (number, True)
            registry.promote(version, model)
        assert registry.version_of("previous-champion", model) == 1
        registry.promote(2, model)  # once more changes nothing
        assert registry.version_of("previous-champion", model) == 1
        assert registry.rollback(model) == 1
        assert registry.version_of("champion", model) == 1
        assert registry.version_of("previous-champion", model) == 2

    def test_what_is_not_there_is_one_line(
        self, services: dict[str, str], model: str, tmp_path: Path
    ) -> None:
        for ref, line in (
            (f"models:/{model}@champion", f"model {model} has no alias champion; it has none"),
            (f"models:/{model}/3", f"model {model} has no version 3; it has none"),
            (f"models:/{model}", "must read models:/NAME@ALIAS or models:/NAME/VERSION"),
            (
                storage.join(services["LATENT_GPT_STORE"], "nothing"),
                "has neither manifest.json nor checksums",
            ),
        ):
            with pytest.raises(UserError, match=line):
                registry.resolve(ref, tmp_path)
        with pytest.raises(UserError, match="has no previous-champion to roll back to"):
            registry.rollback(model)

    def test_damage_in_s3_is_noticed(
        self, services: dict[str, str], bundle: Path, model: str, ids: TrackingIds, tmp_path: Path
    ) -> None:
        registry.register(ids, bundle, log_model, {}, model)
        bucket = storage.join("s3://" + storage.split(services["LATENT_GPT_STORE"])[0], "mlflow")
        weights = (bundle / "transformer/model.safetensors").read_bytes()
        (kept,) = [
            uri
            for uri in storage.list_uris(bucket)
            if uri.endswith("transformer/model.safetensors") and storage.read_bytes(uri) == weights
        ]
        storage.write_bytes(kept, weights[:-1] + bytes([weights[-1] ^ 1]))
        with pytest.raises(storage.Damaged, match=r"model.safetensors is damaged"):
            registry.resolve(f"models:/{model}/1", tmp_path / "cache")
        with pytest.raises(storage.Damaged, match=r"model.safetensors is damaged"):
            registry.resolve(kept.removesuffix("/transformer/model.safetensors"), tmp_path / "cache")
        storage.write_bytes(kept, weights)
        folder = registry.resolve(kept.removesuffix("/transformer/model.safetensors"), tmp_path / "cache")
        assert registry.verify(folder) == registry.verify(bundle)

    def test_a_set_in_s3_is_fetched(self, services: dict[str, str], tmp_path: Path) -> None:
        writer = AssetWriter("tokenizer", {}, {})
        writer.add_bytes("model.safetensors", b"weights")
        made = writer.finish({})
        folder = registry.resolve(made.uri, tmp_path)
        assert (folder / "model.safetensors").read_bytes() == b"weights"
