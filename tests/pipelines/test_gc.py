"""`latent-gpt gc`, against the real MLflow and S3: what registered models need stays, all else goes."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.registration import register_model
from model import steps
from model.config import AssetRef, RunConfig
from model.data.image_shards import index, stored
from model.data.ingest import ingest
from model.errors import UserError
from model.plumbing import assets, registry, storage
from model.plumbing.assets import AssetWriter, Manifest
from model.plumbing.jobs import TrackingIds
from model.plumbing.tracking import deleted_runs, mlflow_client, open_pipeline_run
from pipelines import gc as module
from pipelines.embedded.servers import BUCKET
from pipelines.embedded.services import services as start
from pipelines.gc import IN_POD, gc
from tests.data.test_ingest import picture, write
from tests.instances import config, make, publish_models
from tests.kubectl import FakeKubectl
from tests.plumbing.test_registry import log_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder whose services run; the environment leads to them."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("S3_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "LATENT_GPT_STORE"):
            patch.delenv(name, raising=False)
        with start(folder):
            yield folder


def made(kind: str, seed: int, *inputs: Manifest) -> Manifest:
    """A complete asset."""
    writer = AssetWriter(kind, {"seed": seed}, {one.kind: one for one in inputs})  # type: ignore[arg-type]
    writer.add_bytes("weights", b"w" * 100)
    return writer.finish({})


def registered(name: str, seed: int) -> tuple[int, Manifest, Manifest]:
    """A version, its bundle and the images that it was made from."""
    images = made("images", seed)
    model = made("model", seed, images)
    ids = TrackingIds(experiment="e", run=f"run-{uuid.uuid4().hex[:8]}", step="register")
    tags = registry.lineage_tags([model.as_input, images.as_input])
    from model.plumbing import cache

    return registry.register(ids, cache.folder(model), log_model, tags, name), model, images


def there() -> set[str]:
    """The assets that are complete."""
    return {
        name.removesuffix(f"/{assets.NAME}")
        for name in storage.list_sizes(BUCKET)
        if name.endswith(f"/{assets.NAME}") and not name.startswith("mlflow/")
    }


def ids(*manifests: Manifest) -> set[str]:
    return {f"{one.kind}/{one.key}" for one in manifests}


def test_the_whole_way(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = made("model", 99)
    with pytest.raises(
        UserError, match="has registered none of them: is it the one that belongs to this store"
    ):
        gc(True, 0, 2, state)
    assert there() == ids(lost)
    old, second, third, newest = (registered("pictures", seed) for seed in range(4))
    registry.promote(old[0], "pictures")
    benchmark, forgotten = made("benchmark", 0), made("benchmark", 1)
    registry.pin(benchmark.as_input, "pictures")
    other = registered("others", 10)
    run = open_pipeline_run("e", "a-run")
    mlflow_client().log_image(run, Image.new("RGB", (64, 64)), artifact_file="a.png")
    mlflow_client().delete_run(run)
    capsys.readouterr()

    everything = there()
    gc(False, 0, 1, state)
    said = capsys.readouterr().out
    assert there() == everything, "only listed"
    assert "stays: what was needed for pictures version 1 (champion)" in said
    assert "registered still, but what it was made from may go: pictures version 2" in said
    assert "this would go; --delete does it:" in said
    assert run in deleted_runs()

    before = sum(storage.list_sizes(BUCKET).values())
    gc(True, 0, 2, state)
    said = capsys.readouterr().out
    stays = ids(old[1], third[1], *newest[1:], *other[1:], benchmark)
    assert there() == stays, "of pictures only those that the source was last seen with"
    assert not ids(*second[1:], lost, forgotten) & there()
    assert run not in deleted_runs(), "for good"
    freed = before - sum(storage.list_sizes(BUCKET).values())
    told = said.splitlines()[-1].split()
    assert told[:2] == ["in", "all"]
    assert abs(float(told[2]) * {"B": 1, "kB": 1000}[told[3]] - freed) < 200, "bytes; notes of runs apart"
    assert registry.resolve(f"models:/pictures/{old[0]}").is_dir()
    assert registry.resolve(f"models:/pictures/{second[0]}").is_dir(), "no version goes"


@pytest.mark.parametrize("kind", ["model", "images"])
def test_the_store_of_another_installation_is_left_alone(
    state: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("pictures", 40)
    monkeypatch.setenv("LATENT_GPT_STORE", f"{BUCKET}/another-{kind}")
    theirs = made(kind, 41)
    with pytest.raises(UserError, match="is it the one that belongs to this store"):
        gc(True, 0, 2, state)
    assert assets.find(theirs.uri) == theirs


def test_what_the_source_was_last_seen_with_stays_though_the_version_does_not_count(state: Path) -> None:
    first, second = registered("taken-back", 50), registered("taken-back", 51)
    registry.see_images(first[2].as_input, "taken-back")
    gc(True, 0, 1, state)
    assert ids(second[1], first[2]) <= there()
    assert not ids(first[1], second[2]) & there()


ANYTHING = {  # of a model with random weights
    "above_chance": False,
    "more_bits_per_token": 100.0,
    "less_psnr": 100.0,
    "less_diversity": 1.0,
    "max_near_duplicates": {"seen": 1.0, "held_out": 1.0},
}


def trained(folder: Path, run: RunConfig, before: dict[str, Manifest]) -> dict[str, Manifest]:
    """The assets of a run with random weights, all else by its own jobs; tokenizer and text are kept."""
    images = ingest(run.data, steps.writer("images", run, {}))
    parts = publish_models(folder, run, images, len(before))
    parts |= {kind: before[kind] for kind in ("tokenizer", "text") if before}
    kept = {kind: parts[kind] for kind in ("tokenizer", "text")}
    tokens = make("tokens", run, {"images": images, **kept})
    weights = parts["transformer"]
    writer = AssetWriter("transformer", weights.settings, {"tokens": tokens, **kept})
    for file in weights.files:
        writer.add_bytes(file.name, storage.read_bytes(weights.where(file.name)))
    parts["transformer"] = writer.finish({})
    model = make("model", run, parts)
    benchmark = make("benchmark", run, {"images": images, "judge": parts["judge"]})
    given = {"images": images, "model": model, "benchmark": benchmark}
    return {**parts, **given, "tokens": tokens, "evaluation": make("evaluation", run, given)}


def everywhere(data: bytes) -> set[str]:
    """The objects that hold these bytes, MLflow's among them."""
    return {uri for uri in storage.list_uris(BUCKET) if data in storage.read_bytes(uri)}


def test_a_deleted_picture_is_in_no_object_after_the_next_retraining(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was trained on and one that was held out, both pinned in the benchmark of a champion."""
    monkeypatch.setenv("LATENT_GPT_STORE", f"{BUCKET}/deleted")
    monkeypatch.setenv("LATENT_GPT_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    for n in range(30):
        write(source, {f"{n}.png": picture(n), f"{n}.txt": f"number {n}"})
    data = {"source": {"kind": "folder", "path": str(source)}, "image_size": 16, "shard_images": 5}
    same = {"data": {**data, "validation_share": 0.3}, "model_name": "deleted", "gate": ANYTHING}
    run = config(**same)
    first = trained(tmp_path / "1", run, {})
    assert register_model(run, "first", first["evaluation"]).alias == "champion"
    gone = []
    for split in ("train", "validation"):
        pinned = index(first["benchmark"], split)[0]
        gone.append(stored(first["benchmark"], pinned))
        for suffix in ("png", "txt"):
            (source / f"{pinned.captions[0].removeprefix('number ')}.{suffix}").unlink()

    images = first["images"]
    again = config(**same, origin={"images": AssetRef(key=images.key, sha256=images.sha256)})
    second = trained(tmp_path / "2", again, first)
    assert {file.asset for file in second["tokens"].files} >= {f"tokens/{first['tokens'].key}"}
    register_model(again, "second", second["evaluation"])
    for one in gone:
        assert {uri.split("/")[4] for uri in everywhere(one)} == {"images", "benchmark"}
    gc(True, 0, 5, state)
    assert [everywhere(one) for one in gone] == [set(), set()]
    for kind in ("images", "tokens", "benchmark"):
        assert assets.find(second[kind].uri) == second[kind]
        lent = {file.name for file in second[kind].files if file.asset}
        assert storage.list_sizes(first[kind].uri).keys() <= lent, "what was taken over is all that is left"
    for version in (1, 2):
        assert registry.resolve(f"models:/deleted/{version}").is_dir()
    pinned = registry.benchmark_of("deleted")
    assert pinned
    smaller = pinned.load()
    assert assets.find(smaller.uri), "versions are measured as before, but for these two"
    assert smaller.info["train"] == first["benchmark"].info["train"] - 1


def test_a_version_outlives_the_run_that_made_it(state: Path) -> None:
    number, *_ = registered("orphan", 20)
    client = mlflow_client()
    run = client.get_model_version("orphan", str(number)).run_id
    assert run
    client.delete_run(run)
    gc(True, 0, 1, state)
    assert run not in deleted_runs()
    assert registry.resolve(f"models:/orphan/{number}").is_dir()


def test_a_deleted_experiment_that_holds_a_version_is_left(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number, *_ = registered("held", 30)
    client = mlflow_client()
    experiment = client.get_run(client.get_model_version("held", str(number)).run_id or "").info.experiment_id
    client.delete_experiment(experiment)
    gc(True, 0, 1, state)
    assert "hold held version 1" in capsys.readouterr().out.replace("orphan version 1, ", "")
    client.restore_experiment(experiment)
    assert registry.resolve(f"models:/held/{number}").is_dir()


def test_mlflow_of_somebody_else_is_not_touched(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_pipeline_run("e", "another-run")
    mlflow_client().delete_run(run)
    gc(True, 0, 1, tmp_path)
    assert (
        "where that MLflow runs: mlflow gc --backend-store-uri … --older-than 0h" in capsys.readouterr().out
    )
    assert run in deleted_runs()


class Running(FakeKubectl):
    """Runs here what is to run in the pod of MLflow."""

    def __init__(self, database: Path) -> None:
        super().__init__()
        object.__setattr__(self, "database", database)

    def __call__(self, *arguments: str, stdin: str = "") -> str:
        assert arguments[:4] == ("exec", "-i", "deployment/latent-gpt-mlflow", "--container")
        assert arguments[5:9] == ("--", "sh", "-c", IN_POD)
        uri = os.environ["MLFLOW_TRACKING_URI"]
        assert arguments[9] == "http://127.0.0.1:5000"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING_")}
        kept |= {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self.database}", "PATH": f"{BIN}:{kept['PATH']}"}  # type: ignore[attr-defined]
        command = ["sh", "-c", IN_POD, uri, arguments[10]]
        subprocess.run(command, env=kept, input=stdin, text=True, check=True)
        return ""

    def objects(self, *_: str) -> list[Any]:
        return [{}]


BIN = Path(__file__).resolve().parents[2] / ".venv/bin"


def test_on_a_cluster_it_is_done_in_the_pod(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_pipeline_run("e", "run-on-a-cluster")
    mlflow_client().delete_run(run)
    found = module.database(state, os.environ["MLFLOW_TRACKING_URI"])
    assert found
    gc(True, 0, 1, tmp_path, Running(found))
    assert run not in deleted_runs(), capsys.readouterr().out


@pytest.mark.parametrize("hours", [float("nan"), float("inf")])
def test_hours_that_are_no_number_delete_nothing(hours: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--hours is {hours}; a number says"):
        gc(True, hours, 5, tmp_path)
