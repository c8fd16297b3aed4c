"""The table of steps: what is reused when a setting changes, said for every setting and every step."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from model import steps
from model.config import (
    AssetRef,
    PretrainedCLIPConfig,
    PretrainedTokenizerConfig,
    RecipeConfig,
    RunConfig,
    TrainingConfig,
    load_config,
    parse_config,
)
from model.errors import UserError
from model.plumbing.assets import START, AssetWriter, Kind, Manifest
from model.steps import STEPS, job, settings

# Which steps' own settings a section or setting decides; the longest name that fits holds. Steps further
# down follow by the hashes of their inputs. A new setting that fits nothing fails the test.
DECIDES: dict[str, set[str]] = {
    "name": set(),  # of the preset: for people
    "model_name": set(),  # under which it is registered
    "experiment_name": set(),  # of MLflow
    "seed": {"tokenizer", "text", "judge", "tokens", "transformer"},
    "data": {"images"},
    "data.max_bad_share": set(),  # whether ingest goes on, not what it makes
    "data.augment": {"tokenizer", "text", "judge", "tokens", "benchmark"},
    "data.augment.views": {"tokens"},
    "tokenizer": {"tokenizer"},
    "tokenizer.training.log_every": set(),
    "tokenizer.training.checkpoint_every": set(),
    "clip": {"text", "judge"},
    "clip.training.log_every": set(),
    "clip.training.checkpoint_every": set(),
    "transformer": {"transformer"},
    "transformer.training.log_every": set(),
    "transformer.training.checkpoint_every": set(),
    "sampling": {"sampling", "model"},
    "sweep": {"sampling"},
    "evaluation": {"evaluation"},
    "evaluation.seed": {"benchmark", "sampling"},
    "evaluation.pictures": {"benchmark"},
    "jobs": set(),  # where a job runs, not what it makes
    "gate": set(),  # which version is in use, not what it is
    "retrain": set(),  # what the next run starts from
    "origin": set(),
    "recipe": set(),  # what others were derived from
}
BEFOREHAND = {"speed", "recipe"}  # how a config came about, which no run is made from
OF_SPEED = {  # sections whose settings decide how long a step takes, without what makes none longer
    "data.image_size": True,
    "clip": True,
    "tokenizer": True,
    "transformer": True,
    **{
        f"{net}.training.{field}": field in ("batch_size", "accumulate", "precision", "compile")
        for net in ("clip", "tokenizer", "transformer")
        for field in TrainingConfig.model_fields
    },
    **{f"jobs.{field}": True for field in ("gpu", "workers", "processes_per_worker", "gpus_per_worker")},
    **{f"jobs.{field}": True for field in ("cpu", "cpu_limit")},
}
PRETRAINED = {
    "tokenizer": PretrainedTokenizerConfig(ref="owner/name").model_dump(),
    "clip": PretrainedCLIPConfig().model_dump(),
}


def configs() -> list[RunConfig]:
    """Between them every member of the unions of models: trained here, and pretrained."""
    ours = load_config("smoke", ["tokenizer.loss.perceptual=0.1"])
    return [ours, parse_config(ours.model_dump() | PRETRAINED)]


def leaves(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings below a section."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name == "kind" and prefix:
            continue  # of a union: it is another section then
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def with_another(config: RunConfig, path: str) -> RunConfig:
    """The config with another value of a setting, whether it makes sense or not."""
    *parents, leaf = path.split(".")
    sections: list[BaseModel] = [config]
    for name in parents:
        sections.append(getattr(sections[-1], name))
    changed: Any = another(getattr(sections[-1], leaf))
    for section, name in zip(reversed(sections), [leaf, *reversed(parents)], strict=True):
        changed = section.model_copy(update={name: changed})
    assert isinstance(changed, RunConfig)
    return changed


def another(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value}x"
        case tuple():
            return value[::-1] if value != value[::-1] else (*value[:-1], 7)
        case list():
            return [*value, 1]
        case dict():
            return {**value, "a": "b"}
        case None:
            return RecipeConfig()
    raise TypeError(value)


FIELDS = sorted({(which, path) for which, config in enumerate(configs()) for path in leaves(config)})


def test_who_never_stops_early_has_the_keys_of_before_there_was_patience() -> None:
    config = load_config("smoke", ["clip.training.patience=0", "transformer.training.patience=2"])
    assert "patience" not in settings("text", config)["clip"]["training"]
    assert settings("transformer", config)["transformer"]["training"]["patience"] == 2
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # another value need not make sense
@pytest.mark.parametrize(("which", "path"), FIELDS)
def test_every_setting_moves_the_assets_that_it_decides_and_no_others(
    which: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.data.sources.fingerprint", lambda source: source.model_dump_json())
    before = configs()[which]
    after = with_another(before, path)
    names = [name for name in DECIDES if path == name or path.startswith(f"{name}.")]
    assert names, f"{path} is new: say in DECIDES which steps it decides"
    expected = DECIDES[max(names, key=len)]
    if which == 1:  # what is pretrained does not depend on the run
        trained_here = {"tokenizer", "text", "judge"}
        expected = expected - trained_here if path.startswith(("seed", "data.augment")) else expected
    moved = {kind for kind in STEPS if settings(kind, before) != settings(kind, after)}
    assert moved - BEFOREHAND == expected
    assert "recipe" in moved
    names = [name for name in OF_SPEED if path == name or path.startswith(f"{name}.")]
    assert ("speed" in moved) == bool(names and OF_SPEED[max(names, key=len)])


def test_every_name_that_decides_is_a_setting() -> None:
    """So that a renamed setting does not leave its row behind."""
    known = {path for _, path in FIELDS}
    for name in DECIDES:
        assert any(path == name or path.startswith(f"{name}.") for path in known), name


def test_steps_follow_those_that_they_need() -> None:
    kinds = list(STEPS)
    for kind, step in STEPS.items():
        assert all(kinds.index(needed) < kinds.index(kind) for needed in step.needs), kind
        if step.module:
            assert find_spec(step.module), step.module
    assert set(kinds) <= set(get_args(Kind))


def test_a_run_ends_with_the_tokenizer_where_there_is_no_transformer() -> None:
    assert steps.names(load_config("smoke"))[-1] == "register"
    assert steps.names(load_config("smoke", ["transformer=null"])) == ["prepare", "images", "tokenizer"]


def published(store: str, kind: Kind, **settings: Any) -> Manifest:
    writer = AssetWriter(kind, settings, {})
    writer.add_bytes("a", b"a")
    return writer.finish({})


def test_a_job_says_all_that_its_worker_needs(store: str) -> None:
    config = load_config("smoke")
    inputs = {kind: published(store, kind) for kind in ("tokens", "text", "tokenizer")}
    spec = job("transformer", config, "run", inputs)  # type: ignore[arg-type]
    assert spec.module == "model.training.transformer"
    assert spec.settings == settings("transformer", config)
    assert spec.inputs == {name: made.as_input for name, made in inputs.items()}
    assert spec.output == steps.writer("transformer", config, inputs).uri  # type: ignore[arg-type]
    assert (spec.tracking.run, spec.tracking.step) == ("run", "transformer")
    assert spec.jobs == config.jobs


def test_other_inputs_than_a_step_needs_are_a_defect(store: str) -> None:
    with pytest.raises(AssertionError, match="tokens needs"):
        job("tokens", load_config("smoke"), "run", {"images": published(store, "images")})


def test_text_encoder_and_judge_are_different_assets(store: str) -> None:
    images = {"images": published(store, "images")}
    config = load_config("smoke")
    assert job("text", config, "r", images).output != job("judge", config, "r", images).output


def test_the_evaluation_runs_in_one_process(store: str) -> None:
    config = load_config("smoke", ["jobs.workers=2"])
    inputs = {kind: published(store, kind) for kind in STEPS["evaluation"].needs}
    spec = job("evaluation", config, "r", inputs)  # type: ignore[arg-type]
    assert (spec.jobs.workers, spec.jobs.processes_per_worker) == (1, 1)


@pytest.mark.parametrize(
    ("kind", "override"),
    [
        ("tokenizer", "tokenizer={{kind: pretrained, family: latent-gpt, ref: {}}}"),
        ("tokenizer", "tokenizer.loss.perceptual_weights={}/model.safetensors"),
        ("text", "clip={{kind: pretrained, weights: {}/model.safetensors}}"),
    ],
)
def test_weights_made_elsewhere_are_known_by_their_content(kind: Kind, override: str, tmp_path: Any) -> None:
    config = load_config("smoke", [override.format(tmp_path)])
    with pytest.raises(UserError, match=r"^(tokenizer\.(ref|loss\.perceptual_weights)|clip\.weights): "):
        settings(kind, config)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    before = settings(kind, config)
    assert settings(kind, config) == before
    weights.write_bytes(b"two")
    assert settings(kind, config) != before


def test_weights_of_a_hub_are_known_by_name() -> None:
    config = load_config("coco256-base")
    assert "content" not in settings("tokenizer", config) | settings("text", config)


def test_finding_out_that_there_is_nothing_to_do_needs_no_torch() -> None:
    code = "import model.steps, components.launch, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_vqvae_is_tracked_in_the_experiment_of_its_phase(store: str) -> None:
    images = {"images": published(store, "images")}
    config = load_config("smoke")
    assert job("tokenizer", config, "r", images).tracking.experiment == "vqvae-training"
    assert job("text", config, "r", images).tracking.experiment == "latent-gpt-custom-vqvae"
    alone = load_config("smoke", ["transformer=null"])
    assert job("tokenizer", alone, "r", images).tracking.experiment == alone.experiment


def test_what_is_new_is_said_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.data.sources.fingerprint", lambda source: "as it was")
    before = load_config("smoke")
    parts = steps.parts(before)
    assert steps.changes(parts, steps.parts(before)) == []
    assert steps.changes(json.loads(json.dumps(parts)), steps.parts(before)) == [], "as a tag has them"
    after = load_config(
        "smoke", ["transformer.depth=3", "seed=7", "jobs.memory=1Gi", "retrain.start=scratch"]
    )
    said = steps.changes(parts, steps.parts(after))
    assert said == ["setting seed 0 -> 7", "setting transformer.depth 1 -> 3"]
    monkeypatch.setattr("model.data.sources.fingerprint", lambda source: "as it is")
    assert steps.changes(parts, steps.parts(before)) == ["pictures of the source"]
    monkeypatch.setitem(STEPS, "tokens", replace(STEPS["tokens"], version=9))
    assert steps.changes(parts, steps.parts(before))[0] == "step tokens: version 1 -> 9"
    without = {kind: one for kind, one in parts.items() if kind != "judge"}
    assert "step judge is new" in steps.changes(without, parts)
    assert "step judge is gone" in steps.changes(parts, without)


def test_a_run_is_known_by_the_pictures_that_it_had_and_not_by_what_came_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("model.data.sources.fingerprint", lambda source: "as it was")
    run = load_config("smoke")
    had, then = settings("images", run), steps.fingerprint(steps.parts(run))
    monkeypatch.setattr("model.data.sources.fingerprint", lambda source: "more came")
    assert steps.fingerprint(steps.parts(run)) != then
    assert steps.fingerprint(steps.parts(run, had)) == then
    assert steps.fingerprint(steps.parts(run, {**had, "grown_from": "0123"})) == then


def test_what_a_retraining_starts_from_is_no_part_of_what_it_is_known_by(store: str) -> None:
    run = load_config("smoke")
    inputs = {kind: AssetWriter(kind, {"of": "test"}, {}).finish({}) for kind in STEPS["transformer"].needs}
    champion = AssetWriter("transformer", {"of": "test"}, {}).finish({})
    ref = AssetRef(key=champion.key, sha256=champion.sha256)
    again = run.model_copy(update={"origin": {"transformer": ref}})
    assert steps.parts(again) == steps.parts(run)
    plain, started = (job("transformer", one, "run", inputs) for one in (run, again))
    assert started.inputs == {**plain.inputs, START: champion.as_input}
    assert started.output != plain.output
    assert steps.taken_over("transformer", again) is None, "it is trained"
    frozen = run.model_copy(update={"origin": {"text": AssetRef(key=inputs["text"].key, sha256="00")}})
    with pytest.raises(UserError, match="is not the asset that was used"):
        steps.taken_over("text", frozen)
    frozen = run.model_copy(
        update={"origin": {"text": AssetRef(key=inputs["text"].key, sha256=inputs["text"].sha256)}}
    )
    assert steps.taken_over("text", frozen) == inputs["text"]
    assert steps.taken_over("judge", frozen) is None
