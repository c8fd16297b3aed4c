"""The registry, against the real MLflow server and S3."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from model.config import config_hash
from model.errors import UserError
from model.plumbing import assets, cache, registry, storage
from model.plumbing.assets import AssetWriter, Input, Manifest
from model.plumbing.jobs import TrackingIds
from model.plumbing.registry import Aliases
from model.plumbing.tracking import mlflow_client

WEIGHTS = "transformer/model.safetensors"
PYFUNC = """
import mlflow

class Echo(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[str]) -> list[str]:
        return model_input

mlflow.models.set_model(Echo())
"""


def made(seed: int = 0) -> Manifest:
    """An asset of kind `model`, with a little of everything."""
    writer = AssetWriter("model", {"seed": seed}, {})
    writer.add_bytes(WEIGHTS, f"weights {seed}".encode())
    writer.add_bytes("sampling.json", b"{}")
    return writer.finish({})


def old_bundle(folder: Path) -> str:
    """A bundle as earlier releases wrote it; returns the hash that its version is tagged with."""
    (folder / "transformer").mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(b"old weights")
    (folder / "lineage.json").write_text('{"transformer": {"uri": "s3://a/b", "sha256": "0"}}')
    sums = {
        path.relative_to(folder).as_posix(): storage.file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / "checksums.json").write_text(json.dumps(sums, indent=2, sort_keys=True))
    return config_hash(sums)


def log_model(bundle: Path, name: str) -> Any:
    """What `model/inference/serving.py` does, without nets."""
    import mlflow

    scratch = Path(os.environ["LATENT_GPT_CACHE"]) / "logged" / uuid.uuid4().hex
    scratch.mkdir(parents=True)
    (scratch / "pyfunc.py").write_text(PYFUNC)
    shutil.copytree(bundle, scratch / "bundle")
    return mlflow.pyfunc.log_model(
        name=name,
        python_model=str(scratch / "pyfunc.py"),
        artifacts={"bundle": str(scratch / "bundle")},
        pip_requirements=["mlflow"],
    )


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_a_flipped_bit_or_a_missing_file_of_a_folder_is_noticed(store: str, tmp_path: Path) -> None:
    """Of an asset that was copied out of its store, and of a bundle of an earlier release."""
    new, old = tmp_path / "new", tmp_path / "old"
    shutil.copytree(made().uri, new)
    old_bundle(old)
    for folder in (new, old):
        assert registry.resolve(str(folder)) == folder
        weights = folder / WEIGHTS
        weights.write_bytes(flip(weights.read_bytes()))
        with pytest.raises(storage.Damaged, match=r"transformer/model.safetensors is damaged"):
            registry.resolve(str(folder))
        weights.unlink()
        with pytest.raises(storage.Damaged, match=r"transformer/model.safetensors is missing"):
            registry.resolve(str(folder))
    (old / "checksums.json").write_text("[]")
    with pytest.raises(storage.Damaged, match=r"checksums\.json is damaged"):
        registry.resolve(str(old))


@pytest.mark.parametrize(
    ("before", "change", "after"),
    [
        (Aliases(), lambda one: one.promoted(1), Aliases(champion=1)),
        (Aliases(champion=1), lambda one: one.promoted(1), Aliases(champion=1)),
        (Aliases(champion=1), lambda one: one.promoted(2), Aliases(champion=2, previous=1)),
        (
            Aliases(champion=2, previous=1, challenger=3),
            lambda one: one.promoted(3),
            Aliases(champion=3, previous=2),
        ),
        (
            Aliases(champion=2, previous=1, challenger=4),
            lambda one: one.promoted(3),
            Aliases(champion=3, previous=2, challenger=4),
        ),
        (
            Aliases(champion=2, previous=1, challenger=3),
            lambda one: one.promoted(4),
            Aliases(champion=4, previous=2),
        ),
        (Aliases(champion=2, previous=1), lambda one: one.promoted(1), Aliases(champion=1, previous=2)),
        (Aliases(previous=1), lambda one: one.promoted(2), Aliases(champion=2, previous=1)),
        (Aliases(previous=1), lambda one: one.promoted(1), Aliases(champion=1)),
        (Aliases(champion=2, previous=1), lambda one: one.rolled_back(), Aliases(champion=1, previous=2)),
        (Aliases(previous=1), lambda one: one.rolled_back(), Aliases(champion=1)),
        (Aliases(champion=1), lambda one: one.refused(2), Aliases(champion=1, challenger=2)),
        (
            Aliases(champion=1, challenger=3),
            lambda one: one.refused(2),
            Aliases(champion=1, challenger=3),
        ),
        (Aliases(champion=2, previous=1), lambda one: one.refused(1), Aliases(champion=2, previous=1)),
        (
            Aliases(champion=3, previous=2, challenger=1),
            lambda one: one.among([1, 2]),
            Aliases(previous=2, challenger=1),
        ),
        (
            Aliases(champion=3, previous=3, challenger=3),
            lambda one: one.among([1, 2, 3]),
            Aliases(champion=3),
        ),
    ],
)
def test_who_plays_what_after_a_change(
    before: Aliases, change: Callable[[Aliases], Aliases], after: Aliases
) -> None:
    assert change(before) == after


def test_a_folder_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UserError, match=r"model ./nowhere does not exist; give models:/NAME@champion"):
        registry.resolve("./nowhere")


def test_an_asset_of_an_earlier_release_is_refused_and_the_line_says_what_to_do(
    store: str, tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/manifest.json").write_text('{"schema_version": 1, "kind": "clip", "uri": "s3://a/b"}')
    with pytest.raises(UserError, match="an earlier latent-gpt made it; run the pipeline again"):
        registry.resolve(str(tmp_path / "set"))


@pytest.fixture
def model() -> str:
    """The name of a registered model that is this test's alone."""
    return f"model-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def place(services: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, empty."""
    monkeypatch.setenv("LATENT_GPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def register(name: str, manifest: Manifest, *made_from: Input) -> int:
    ids = TrackingIds(experiment="registry", run=uuid.uuid4().hex[:8], step="register")
    lineage = registry.lineage_tags([manifest.as_input, *made_from])
    return registry.register(ids, cache.folder(manifest), log_model, lineage, name)


@pytest.mark.slow
class TestRealServers:
    """What only servers can show."""

    def test_a_version_comes_back_whole(self, services: dict[str, str], place: Path, model: str) -> None:
        bundle = made()
        assert registry.find(bundle, model) is None
        assert register(model, bundle) == 1
        assert registry.aliases(model) == Aliases(), "it plays nothing until it is judged"
        assert registry.find(bundle, model) == 1
        assert registry.promote(1, model) == Aliases()
        assert registry.aliases(model) == Aliases(champion=1)
        shutil.rmtree(place / "assets")
        for ref in (f"models:/{model}@champion", f"models:/{model}/1"):
            folder = registry.resolve(ref)
            assert assets.load(str(folder)).text == bundle.text
            assert (folder / WEIGHTS).read_bytes() == b"weights 0"
        (folder / WEIGHTS).write_bytes(b"damaged in the cache")
        assert (registry.resolve(ref) / WEIGHTS).read_bytes() == b"weights 0"

        import mlflow

        mlflow.set_tracking_uri(services["MLFLOW_TRACKING_URI"])
        loaded = mlflow.pyfunc.load_model(f"models:/{model}@champion")
        assert loaded.predict(["hello"]) == ["hello"]

    def test_a_version_of_an_earlier_release_comes_back_whole(
        self, place: Path, model: str, tmp_path: Path
    ) -> None:
        sealed = old_bundle(tmp_path / "old")
        ids = TrackingIds(experiment="registry", run=uuid.uuid4().hex[:8], step="register")
        version = registry.register(ids, tmp_path / "old", log_model, {"latent_gpt.bundle": sealed}, model)
        folder = registry.resolve(f"models:/{model}/{version}")
        assert (folder / WEIGHTS).read_bytes() == b"old weights"
        assert (folder / "lineage.json").is_file()
        registry.promote(version, model)
        assert registry.resolve(f"models:/{model}@champion") == folder
        mlflow_client().set_model_version_tag(model, str(version), "latent_gpt.bundle", "0" * 64)
        with pytest.raises(storage.Damaged, match="does not hold the model it was registered with"):
            registry.resolve(f"models:/{model}@champion")

    def test_champions_come_and_go(self, services: dict[str, str], place: Path, model: str) -> None:
        import mlflow

        mlflow.set_tracking_uri(services["MLFLOW_TRACKING_URI"])
        mlflow.set_experiment("somebody else's")  # in this process, before us
        for number in (1, 2):
            version = register(model, made(number))
            assert version == number
            registry.promote(version, model)
        assert registry.aliases(model) == Aliases(champion=2, previous=1)
        registry.promote(2, model)  # once more changes nothing
        assert registry.aliases(model) == Aliases(champion=2, previous=1)
        assert registry.rollback(model) == Aliases(champion=2, previous=1), "what was before"
        assert registry.aliases(model) == Aliases(champion=1, previous=2)

    def test_without_a_name_the_model_is_meant_that_a_run_came_to_last(
        self, place: Path, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = f"{model}-a", f"{model}-b"
        bundle = made()
        register(first, bundle)
        register(second, bundle)
        assert registry.last_registered(shared=False) == second
        assert registry.find(bundle, first) == 1
        assert registry.last_registered(shared=False) == first
        with pytest.raises(UserError, match=rf"several models .*; name one of .*{first}, {second}"):
            registry.last_registered(shared=True)

    def test_what_is_not_there_is_one_line(self, services: dict[str, str], place: Path, model: str) -> None:
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
                registry.resolve(ref)
        with pytest.raises(UserError, match="has no previous-champion to roll back to"):
            registry.rollback(model)

    def test_damage_in_s3_is_noticed(self, services: dict[str, str], place: Path, model: str) -> None:
        bundle = made(9)
        register(model, bundle)
        shutil.rmtree(place / "assets")
        bucket = storage.join("s3://" + storage.split(services["LATENT_GPT_STORE"])[0], "mlflow")
        (kept,) = [
            uri
            for uri in storage.list_uris(bucket)
            if uri.endswith(f"bundle/{WEIGHTS}") and storage.read_bytes(uri) == b"weights 9"
        ]
        here = kept.removesuffix(f"/{WEIGHTS}")
        storage.write_bytes(kept, flip(b"weights 9"))
        for ref in (f"models:/{model}/1", here):
            with pytest.raises(storage.Damaged, match=r"model.safetensors .*is damaged"):
                registry.resolve(ref)
        storage.delete(kept)
        with pytest.raises(storage.NotFound, match=r"model.safetensors of models:/.* is gone from MLflow"):
            registry.resolve(f"models:/{model}/1")
        assert registry.find(bundle, model) is None, "it is registered anew"
        storage.write_bytes(kept, b"weights 9")
        assert assets.load(str(registry.resolve(here))).text == bundle.text

    def test_an_asset_in_s3_is_fetched(self, place: Path) -> None:
        writer = AssetWriter("tokenizer", {}, {})
        writer.add_bytes("model.safetensors", b"weights")
        folder = registry.resolve(writer.finish({}).uri)
        assert (folder / "model.safetensors").read_bytes() == b"weights"


class Killed(BaseException):
    """Ends the process that is under test."""


class Dying:
    """MLflow's client, which dies before its nth change."""

    def __init__(self, changes: int) -> None:
        self._client, self.left = mlflow_client(), changes

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)
        if not name.startswith(("set_", "delete_")):
            return call

        def change(*given: Any, **named: Any) -> Any:
            if self.left == 0:
                raise Killed
            self.left -= 1
            return call(*given, **named)

        return change


def versions(name: str, count: int) -> None:
    """Versions without files, which is enough for those that only play something."""
    client = mlflow_client()
    client.create_registered_model(name)
    for _ in range(count):
        client.create_model_version(name, "s3://nowhere/model")


@pytest.mark.slow
class TestTransactions:
    """Aliases change as a whole, whoever is killed or comes at the same time."""

    BEFORE = Aliases(champion=2, previous=1, challenger=3)

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda one: one.promoted(3), id="promote"),
            pytest.param(lambda one: one.promoted(4), id="promote another"),
            pytest.param(lambda one: one.rolled_back(), id="rollback"),
            pytest.param(lambda one: one.refused(4), id="refuse"),
        ],
    )
    def test_a_kill_between_any_two_calls_is_mended(
        self,
        services: dict[str, str],
        model: str,
        monkeypatch: pytest.MonkeyPatch,
        change: Callable[[Aliases], Aliases],
    ) -> None:
        versions(model, 4)
        states = []
        for calls in range(10):
            with registry.changing(model, "test") as now:
                now.settle(self.BEFORE)
            with monkeypatch.context() as patch:
                dying = Dying(calls)
                patch.setattr(registry, "mlflow_client", lambda dying=dying: dying)
                try:
                    with registry.changing(model, "test") as now:
                        now.settle(change(now.before))
                except Killed:
                    pass
                else:
                    break
            assert registry.aliases(model).champion in (2, change(self.BEFORE).champion), "never none"
            with registry.changing(model, "test") as now:
                states.append(now.before)
            assert registry.aliases(model) == now.before
            assert not mlflow_client().get_registered_model(model).tags
        assert len(states) >= 3, "an intent, an alias or more, and the end"
        assert states == [self.BEFORE] + [change(self.BEFORE)] * (len(states) - 1)
        assert registry.aliases(model) == change(self.BEFORE)

    def test_twenty_at_once_leave_a_champion_and_its_predecessor(
        self, services: dict[str, str], model: str
    ) -> None:
        versions(model, 20)
        seen: list[tuple[int | None, int]] = []

        def promote(version: int) -> None:
            with registry.changing(model, "test") as now:
                seen.append((now.before.champion, version))
                now.settle(now.before.promoted(version))

        with ThreadPoolExecutor(20) as pool:
            list(pool.map(promote, range(1, 21)))
        order = [version for _, version in seen]
        assert [before for before, _ in seen] == [None, *order[:-1]], "each saw what the one before it left"
        assert registry.aliases(model) == Aliases(champion=order[-1], previous=order[-2])
        assert set(mlflow_client().get_registered_model(model).aliases) == {"champion", "previous-champion"}

    def test_what_people_deleted_plays_nothing(self, services: dict[str, str], model: str) -> None:
        versions(model, 3)
        with registry.changing(model, "test") as now:
            now.settle(Aliases(champion=3, previous=2, challenger=1))
        mlflow_client().delete_model_version(model, "3")
        assert registry.rollback(model) == Aliases(previous=2, challenger=1)
        assert registry.aliases(model) == Aliases(champion=2, challenger=1)
        with pytest.raises(UserError, match="has no previous-champion to roll back to; it has challenger"):
            registry.rollback(model)

    def test_somebody_elses_intent_is_passed_over(self, services: dict[str, str], model: str) -> None:
        versions(model, 1)
        mlflow_client().set_registered_model_tag(model, registry.INTENT_TAG, "{}x")
        with registry.changing(model, "test") as now:
            assert now.before == Aliases()
        assert not mlflow_client().get_registered_model(model).tags

    def test_what_is_known_of_a_version_is_noted_and_listed(
        self, services: dict[str, str], place: Path, model: str
    ) -> None:
        register(model, made(3))
        registry.note(1, model, "# card\n" + "x" * 6000, reason="no other is in use")
        registry.judged(1, model, "first")
        registry.promote(1, model)
        (one,) = registry.listed(model)
        assert (one.version, one.aliases, one.verdict) == (1, ["champion"], "first")
        assert one.reason == "no other is in use"
        assert one in registry.listed()
        assert len(mlflow_client().get_model_version(model, "1").description or "") == 5000
        with pytest.raises(UserError, match="there is no registered model nobody"):
            registry.listed("nobody")

    def test_the_pinned_benchmark_is_remembered(self, services: dict[str, str], model: str) -> None:
        versions(model, 1)
        assert registry.benchmark_of(model) is None
        benchmark = Input(kind="benchmark", key="k" * 16, sha256="s" * 64)
        registry.pin(benchmark, model)
        assert registry.benchmark_of(model) == benchmark
        assert registry.benchmark_of("nobody") is None

    def test_the_current_images_are_those_that_were_seen_last(
        self, services: dict[str, str], place: Path, model: str
    ) -> None:
        assert registry.current_images(model) is None, "nobody has registered anything"
        old, new, other = (Input(kind="images", key=one * 16, sha256=one * 64) for one in "abc")
        register(model, made(4), old)
        assert registry.current_images(model) == old
        register(model, made(5), new)
        assert registry.current_images(model) == new
        assert registry.find(made(4), model) == 1
        assert registry.current_images(model) == old, "a run came to that bundle again"
        registry.see_images(other, model)
        assert registry.current_images(model) == other
        mlflow_client().delete_registered_model_tag(model, registry.IMAGES_TAG)
        assert registry.current_images(model) == new, "an earlier release did not say"
