"""What a person fills in comes out as a config, or is refused with what would be right."""

from __future__ import annotations

import re

import pytest

from components.parameters import PRESET_GPUS, TEXT_TO_IMAGE, VQVAE, pipeline_of, presets_of, resolve
from model.config import PRESETS, load_config
from model.errors import UserError


def test_what_is_left_empty_is_the_presets() -> None:
    assert resolve(TEXT_TO_IMAGE, "smoke") == load_config("smoke")
    assert PRESET_GPUS == -1, "0 is a number of GPUs"


def test_overrides_win_over_the_other_parameters_and_these_over_the_preset() -> None:
    told = {"data": "openmoji", "workers": 2, "gpus_per_worker": 1, "experiment_name": "yes"}
    config = resolve(TEXT_TO_IMAGE, "smoke", **told)  # type: ignore[arg-type]
    assert config.data.source.kind == "openmoji"
    assert (config.jobs.workers, config.jobs.gpus_per_worker, config.jobs.processes_per_worker) == (2, 1, 1)
    assert config.experiment == "yes", "and no YAML"
    overrides = "data.source.groups=[heart]\n\n  # said by hand\n  jobs.workers=1\nexperiment_name=mine\n"
    config = resolve(TEXT_TO_IMAGE, "smoke", overrides=overrides, **told)  # type: ignore[arg-type]
    assert config.data.source.groups == ["heart"]  # type: ignore[union-attr]
    assert (config.jobs.workers, config.experiment) == (1, "mine")


@pytest.mark.parametrize("name", ["rockets 🚀", "Bäume: alle", 'said "so"', "null"])
def test_an_experiment_is_called_as_somebody_typed_it(name: str) -> None:
    assert resolve(TEXT_TO_IMAGE, "smoke", experiment_name=name).experiment == name


def test_without_gpus_a_pod_has_as_many_processes_as_the_preset_says() -> None:
    jobs = resolve(TEXT_TO_IMAGE, "coco256-xl-8xa100", gpus_per_worker=0).jobs
    assert (jobs.gpus_per_worker, jobs.processes_per_worker) == (0, 8)


def test_a_whole_config_wins_over_the_preset() -> None:
    text = (PRESETS / "smoke.yaml").read_text().replace("name: smoke", "name: mine")
    assert resolve(TEXT_TO_IMAGE, "openmoji", overrides="seed=3", config=text) == load_config(
        "smoke", ["name=mine", "seed=3"]
    )


def test_the_pipeline_of_the_tokenizer_leaves_the_transformer_out() -> None:
    config = resolve(VQVAE, "smoke", overrides="tokenizer.codebook_size=8")
    assert config == load_config("smoke", ["transformer=null", "tokenizer.codebook_size=8"])
    assert pipeline_of(config) == VQVAE
    assert config.experiment == "vqvae-training"


@pytest.mark.parametrize("pipeline", [TEXT_TO_IMAGE, VQVAE])
def test_a_pipeline_takes_the_presets_that_it_offers(pipeline: str) -> None:
    for preset in presets_of(pipeline):
        assert pipeline_of(resolve(pipeline, preset)) == pipeline


@pytest.mark.parametrize(
    ("pipeline", "changes", "said"),
    [
        (TEXT_TO_IMAGE, {"overrides": "transformer=null"}, f"has no transformer; choose {VQVAE} instead of"),
        (VQVAE, {"preset": "coco256-base"}, f"this tokenizer is pretrained; choose {TEXT_TO_IMAGE} instead"),
        (VQVAE, {"overrides": "transformer.depth=2"}, "transformer.depth=2': transformer is a value"),
        (
            VQVAE,
            {"overrides": "transformer={training: {steps: 3, batch_size: 8, warmup_steps: 1}}"},
            f"has a transformer; choose {TEXT_TO_IMAGE} instead of",
        ),
        (TEXT_TO_IMAGE, {"workers": -1}, "jobs.workers: "),
        (TEXT_TO_IMAGE, {"gpus_per_worker": -2}, "jobs.gpus_per_worker: "),
        (TEXT_TO_IMAGE, {"data": "ftp://x"}, "data: ftp://x"),
        (
            TEXT_TO_IMAGE,
            {"preset": "smok"},
            "preset 'smok' does not exist; choose one of auto, coco256-base, ",
        ),
        (TEXT_TO_IMAGE, {"overrides": "seed"}, "override 'seed' must read section.field=value"),
        (TEXT_TO_IMAGE, {"config": "name: [x"}, "the config: not valid YAML"),
    ],
)
def test_what_is_wrong_is_refused_with_what_would_be_right(
    pipeline: str, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        resolve(pipeline, **{"preset": "smoke", **changes})  # type: ignore[arg-type]
