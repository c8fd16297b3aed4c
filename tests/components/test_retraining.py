"""Whether there is anything new, and what a run starts from: the real MLflow, the real S3, empty assets."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from components import page, retraining
from components.beginning import begin
from components.parameters import TEXT_TO_IMAGE
from components.retraining import MARK_TAG, News, look, mark
from model import steps
from model.config import RunConfig, load_config
from model.data.ingest import ingest
from model.errors import UserError
from model.plumbing import environment, registry, storage
from model.plumbing.assets import AssetWriter, Kind, Manifest
from model.plumbing.jobs import TrackingIds
from model.plumbing.tracking import (
    FAILURE_TAG,
    GIVEN_UP,
    finish_pipeline_run,
    mlflow_client,
    open_pipeline_run,
)
from tests.data.test_ingest import picture, write

pytestmark = pytest.mark.slow

Version = Callable[..., dict[Kind, Manifest]]
TAKEN = ("images", "tokenizer", "text", "transformer")


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the source says of itself: its last word."""
    said = ["forty pictures"]
    monkeypatch.setattr("model.data.sources.fingerprint", lambda source: said[-1])
    return said


@pytest.fixture
def name() -> str:
    return f"model-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def version(services: dict[str, str], name: str, source: list[str], tmp_path: Path) -> Version:
    """Registers a version, as a run of a config leaves it, and returns the assets that it was made from."""
    import mlflow

    class Nothing(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined, misc]
        def predict(self, context: Any, model_input: list[str]) -> list[str]:
            return model_input

    def make(
        config: RunConfig,
        number: int,
        champion: bool = True,
        old: bool = False,
        judged: bool = True,
        images: Manifest | None = None,
    ) -> dict[Kind, Manifest]:
        made: dict[Kind, Manifest] = {}
        for kind in ("images", "tokenizer", "text", "judge", "transformer"):
            settings = steps.settings(kind, config) if kind == "images" else {"number": number, "of": name}
            made[kind] = AssetWriter(kind, settings, {}).finish({"number": number})
        made["images"] = images or made["images"]
        tags = {registry.MODEL_TAG: str(number)}
        if not old:
            parts = steps.parts(config, made["images"].settings)
            tags |= {registry.FINGERPRINT_TAG: steps.fingerprint(parts)}
            tags |= {registry.PARTS_TAG: json.dumps(parts)}
            tags |= registry.lineage_tags([one.as_input for one in made.values()])

        def log(bundle: Path, name: str) -> Any:
            metadata = {} if old else {registry.CONFIG: config.model_dump(mode="json")}
            return mlflow.pyfunc.log_model(
                name=name,
                python_model=Nothing(),
                artifacts={"bundle": str(bundle)},
                metadata=metadata,
                pip_requirements=[],
            )

        ids = TrackingIds(experiment="retraining", run=f"run-{name}-{number}", step="register")
        (bundle := tmp_path / "bundle").mkdir(exist_ok=True)
        (bundle / "weights").touch()
        assert registry.register(ids, bundle, log, tags, name) == number
        if champion:
            mlflow_client().set_registered_model_alias(name, registry.CHAMPION, str(number))
        if judged:
            registry.judged(number, name, "first" if champion else "worse")
        return made

    return make


def asked(name: str, start: str = "", **changes: str | int) -> News:
    usual: dict[str, str | int] = {"preset": "smoke", "data": "", "workers": 0, "gpus_per_worker": -1}
    return look(name, start, {**usual, "overrides": "", "experiment_name": "", "config": "", **changes})


def test_the_first_is_a_plain_training(services: dict[str, str], name: str, source: list[str]) -> None:
    seen = asked(name)
    assert (seen.new, seen.said) == (True, [f"new: {name} has no version yet"])
    assert seen.config == load_config("smoke", [f"model_name={name}"])
    assert not seen.config.origin


def test_a_run_that_would_make_the_same_is_none(name: str, version: Version, source: list[str]) -> None:
    config = load_config("smoke", [f"model_name={name}", "transformer.depth=2"])
    version(config, 1)
    seen = asked(name)
    assert (seen.new, seen.said) == (False, [f"nothing new since version 1 of {name} (champion)"])
    assert not asked(name, overrides="jobs.memory=9Gi\nretrain.start=scratch").new, "they decide no content"

    source.append("fifty pictures")
    version(config, 2, champion=False)
    seen = asked(name)
    assert (seen.new, seen.said) == (False, [f"nothing new since version 2 of {name} (not champion)"])
    assert "nothing new" in page.news(seen)


def test_what_failed_three_times_in_a_row_is_left_for_a_while(
    name: str, version: Version, source: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version(load_config("smoke", [f"model_name={name}"]), 1)
    source.append("fifty pictures")

    seen = asked(name)
    begun = begin(uuid.uuid4().hex, pipeline=TEXT_TO_IMAGE, preset="", config=settings(seen))
    finish_pipeline_run(begun.name, "FAILED", {FAILURE_TAG: "no memory"})

    def fails(status: str = "FAILED", why: str = "a loss of NaN") -> None:
        assert asked(name).new
        run = uuid.uuid4().hex
        open_pipeline_run(seen.config.experiment, run, {}, {MARK_TAG: mark(seen.config)})
        finish_pipeline_run(run, status, {FAILURE_TAG: why})

    for status in ("FAILED", "KILLED"):
        fails(status)
    fails("KILLED", GIVEN_UP)  # as by a step that was killed for its memory, without a word
    left = asked(name)
    assert not left.new
    assert re.match(r"left for (12h00m|11h59m), unless pictures, settings", left.said[0])
    assert f"3 runs of the same failed in a row, the last as {GIVEN_UP}; new since" in left.said[0]
    assert asked(name, "scratch").new, "another start may end otherwise"
    monkeypatch.setenv(environment.IMAGE.name, "registry/latent-gpt@sha256:mended")
    assert asked(name).new
    monkeypatch.delenv(environment.IMAGE.name)
    monkeypatch.setattr(retraining, "PAUSE", 0.0)
    fails()
    monkeypatch.setattr(retraining, "PAUSE", 3600.0)
    assert re.match(r"left for (2h00m|1h59m), unless", asked(name).said[0])
    source.append("sixty pictures")
    assert asked(name).new


def settings(seen: News) -> str:
    return yaml.safe_dump(seen.config.model_dump(mode="json"))


def test_a_source_that_is_as_an_older_version_had_it_is_nothing_new_and_the_next_grows_from_those(
    name: str, version: Version, source: list[str]
) -> None:
    config = load_config("smoke", [f"model_name={name}"])
    first = version(config, 1)
    source.append("fifty pictures")
    second = version(config, 2, champion=False)
    assert registry.current_images(name) == second["images"].as_input
    source.append("forty pictures")
    assert asked(name).said == [f"nothing new since version 1 of {name} (champion)"]
    assert registry.current_images(name) == first["images"].as_input, "the ten that came are gone"
    source.append("sixty pictures")
    seen = asked(name)
    assert seen.config.origin["images"].key == first["images"].key
    assert "images grow from those of version 1" in seen.said


def test_who_was_killed_before_a_verdict_is_no_reason_to_stop(
    name: str, version: Version, source: list[str]
) -> None:
    config = load_config("smoke", [f"model_name={name}"])
    version(config, 1, champion=False, judged=False)
    seen = asked(name)
    assert (seen.new, seen.said) == (True, [f"new: no version of {name} is in use"])
    registry.promote(1, name)
    assert not asked(name).new, "a person has judged it"
    source.append("fifty pictures")
    refused = version(config, 2, champion=False, judged=False)
    seen = asked(name)
    assert seen.new
    assert seen.said[0] == f"new: version 2 of {name} was made from the same, and was not judged"
    assert seen.config.origin["images"].key == refused["images"].key
    registry.judged(2, name, "worse")
    assert not asked(name).new


def test_a_champion_whose_files_are_gone_is_a_reason_to_train(
    services: dict[str, str], name: str, version: Version
) -> None:
    version(load_config("smoke", [f"model_name={name}"]), 1)
    logged = str(mlflow_client().get_model_version(name, "1").source).removeprefix("models:/")
    for uri in storage.list_uris("s3://" + storage.split(services["LATENT_GPT_STORE"])[0] + "/mlflow"):
        if f"/{logged}/" in uri:
            storage.delete(uri)
    seen = asked(name)
    assert seen.new
    assert seen.said[0] == f"new: the files of version 1 of {name}, the champion, are gone from MLflow"


def test_files_that_were_written_anew_are_no_news_where_they_hold_what_they_held(
    name: str, version: Version, source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pictures"
    for number in range(8):
        write(folder, {f"{number}.png": picture(number), f"{number}.txt": f"number {number}"})
    config = load_config("smoke", [f"model_name={name}", f"data.source={{kind: folder, path: {folder}}}"])
    images = ingest(config.data, steps.writer("images", config, {}))
    version(config, 1, images=images)
    os.utime(folder / "3.png", (1, 1))
    source.append("another time")
    assert asked(name).said == [f"nothing new since version 1 of {name} (champion)"]
    with monkeypatch.context() as patch:
        patch.setattr("model.data.ingest.is_as_it_was", None)
        assert not asked(name).new, "it is known at once the next time"
        assert asked(name, overrides="transformer.dropout=0.3").new, "other settings: it is not looked at all"

    write(folder, {"3.txt": "other words"})
    source.append("other words")
    assert asked(name).said[0] == f"new since version 1 of {name}: pictures of the source"
    write(folder, {"3.txt": "number 3"})
    storage.delete(images.where("records-000000.jsonl"))
    monkeypatch.setenv("LATENT_GPT_CACHE", str(tmp_path / "empty"))
    assert asked(name).new, "nobody can tell"


def test_new_pictures_grow_and_all_else_is_the_champions(
    name: str, version: Version, source: list[str]
) -> None:
    config = load_config("smoke", [f"model_name={name}", "transformer.depth=2"])
    first = version(config, 1)
    source.append("thirty pictures")
    refused = version(config, 2, champion=False)
    source.append("fifty pictures")
    seen = asked(name, workers=2)
    assert seen.said[0] == f"new since version 2 of {name}: pictures of the source"
    assert {kind: one.key for kind, one in seen.config.origin.items()} == {
        "images": refused["images"].key,  # of the newest, as older ones may hold what was deleted
        **{kind: first[kind].key for kind in ("tokenizer", "text", "transformer")},
    }
    assert seen.config.transformer == config.transformer, "and not the preset's"
    assert seen.config.jobs == config.jobs.model_copy(update={"workers": 2})
    assert "images grow from those of version 2" in page.news(seen)


@pytest.mark.parametrize(
    ("how", "kept", "said"),
    [
        ({"start": "scratch"}, {"images", "tokenizer"}, "from scratch, as retrain.start says"),
        ({"overrides": "retrain.tokenizer=trained"}, {"images"}, "as retrain.tokenizer says"),
        ({"overrides": "tokenizer.codebook_size=8"}, {"images"}, "settings of the tokenizer have changed"),
        (
            {"overrides": "clip.context_length=20"},
            {"images", "tokenizer"},
            "of the text encoder changed",
        ),
        (
            {"overrides": "transformer.depth=2\ndata.image_size=32"},
            {"images", "tokenizer"},
            "from scratch, as weights do not fit: data.image_size 16 -> 32, transformer.depth 1 -> 2",
        ),
        ({"overrides": "transformer.dropout=0.3"}, set(TAKEN), "whose weights the transformer begins from"),
    ],
)
def test_what_is_not_taken_over_is_said(
    name: str, version: Version, source: list[str], how: dict[str, str], kept: set[str], said: str
) -> None:
    version(load_config("smoke", [f"model_name={name}"]), 1)
    source.append("fifty pictures")
    seen = asked(name, **how)
    assert set(seen.config.origin) == kept
    assert said in " ".join(seen.said)


@pytest.mark.parametrize(
    ("gone", "kept"),
    [
        ("images", {"tokenizer", "text", "transformer"}),
        ("tokenizer", {"images"}),
        ("text", {"images", "tokenizer"}),
        ("transformer", {"images", "tokenizer"}),
    ],
)
def test_an_asset_that_is_gone_is_made_anew(
    name: str, version: Version, source: list[str], gone: Kind, kept: set[str]
) -> None:
    made = version(load_config("smoke", [f"model_name={name}"]), 1)
    storage.delete_prefix(made[gone].uri)
    source.append("fifty pictures")
    seen = asked(name)
    assert set(seen.config.origin) == kept
    assert f"{gone} of version 1 is not taken over, and made anew" in " ".join(seen.said)


def test_a_champion_of_an_earlier_release_is_begun_anew(
    name: str, version: Version, source: list[str]
) -> None:
    version(load_config("smoke", [f"model_name={name}", "transformer.depth=2"]), 1, old=True)
    seen = asked(name)
    assert seen.new
    assert seen.config == load_config("smoke", [f"model_name={name}"])
    assert seen.said == [
        f"new: version 1 of {name} does not say what it was made from",
        f"from scratch, with the preset's settings: version 1 of {name} is of an earlier release and has no"
        " config",
    ]


def test_settings_that_there_are_no_more_are_passed_over(
    name: str, version: Version, source: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("smoke", [f"model_name={name}", "transformer.depth=2"])
    stored = config.model_dump(mode="json")
    stored["transformer"]["training"]["z_loss"] = 0.1
    with monkeypatch.context() as patch:
        patch.setattr(RunConfig, "model_dump", lambda *_, **__: stored)
        version(config, 1)
    assert registry.config_of(1, name) == config


def test_a_start_that_there_is_not_is_refused(services: dict[str, str], name: str) -> None:
    with pytest.raises(UserError, match="start is 'champoin'; it is champion, scratch, or empty"):
        asked(name, "champoin")
