"""The pipelines are in the order of the work, those of one run flat, and have names that people can read."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from components.parameters import RETRAINING, TEXT_TO_IMAGE, VQVAE
from components.retraining import NEW
from model.config import load_config
from model.steps import names as names_of
from pipelines.dag import PIPELINES, of

LONGEST = 22  # letters of a name that a box of KFP's graph shows


@pytest.fixture(scope="module", params=PIPELINES)
def pipeline(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A pipeline's specification, as kfp has it."""
    spec: dict[str, Any] = MessageToDict(PIPELINES[request.param].pipeline_spec)
    return spec


@pytest.fixture(scope="module", params=(TEXT_TO_IMAGE, VQVAE))
def flat(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The same of those that a person starts for one run."""
    spec: dict[str, Any] = MessageToDict(PIPELINES[request.param].pipeline_spec)
    return spec


def tasks(pipeline: dict[str, Any]) -> dict[str, Any]:
    """All boxes, those within another one too."""
    found: dict[str, Any] = {}
    for component in (pipeline["root"], *pipeline["components"].values()):
        found |= component.get("dag", {}).get("tasks", {})
    return found


def test_a_config_names_its_pipeline_which_has_its_steps() -> None:
    for config in (load_config("smoke"), load_config("smoke", ["transformer=null"])):
        spec = MessageToDict(PIPELINES[of(config)].pipeline_spec)
        assert spec["pipelineInfo"]["name"] == of(config)
        assert set(tasks(spec)) == set(names_of(config))


def test_no_step_of_a_run_hides_in_a_box(flat: dict[str, Any]) -> None:
    for name, component in flat["components"].items():
        assert "executorLabel" in component, name
    for name, task in tasks(flat).items():
        assert "triggerPolicy" not in task, name


def test_a_retraining_is_one_step_and_where_it_says_so_the_whole_other_pipeline() -> None:
    spec = MessageToDict(PIPELINES[RETRAINING].pipeline_spec)
    root = spec["root"]["dag"]["tasks"]
    assert [name for name, task in root.items() if "triggerPolicy" not in task] == ["news"]
    (condition,) = (task for task in root.values() if "triggerPolicy" in task)
    assert condition["triggerPolicy"]["condition"].endswith(f"['pipelinechannel--news-Output'] == '{NEW}'")
    (within,) = spec["components"][condition["componentRef"]["name"]]["dag"]["tasks"].values()
    whole = MessageToDict(PIPELINES[TEXT_TO_IMAGE].pipeline_spec)
    inner = spec["components"][within["componentRef"]["name"]]["dag"]
    assert inner["tasks"].keys() == whole["root"]["dag"]["tasks"].keys()
    given = within["inputs"]["parameters"]
    assert given.keys() == whole["root"]["inputDefinitions"]["parameters"].keys(), "no default is relied on"
    assert given["config"] == {"componentInputParameter": "pipelinechannel--news-config"}
    assert inner["tasks"]["prepare"]["inputs"]["parameters"]["job"]["runtimeValue"], "the id of the whole run"


def test_a_box_shows_the_whole_name_of_its_step(pipeline: dict[str, Any]) -> None:
    for name, task in tasks(pipeline).items():
        assert 0 < len(task["taskInfo"]["name"]) <= LONGEST, name


def test_both_clips_need_no_tokenizer() -> None:
    needs = {
        name: set(task.get("dependentTasks", []))
        for name, task in tasks(MessageToDict(PIPELINES["latent-gpt-text-to-image"].pipeline_spec)).items()
    }
    assert needs["prepare"] == set()
    assert needs["tokenizer"] == needs["text"] == needs["judge"] == {"prepare", "images"}
    assert needs["register"] == {"prepare", "evaluation"}


def test_no_step_is_cached_by_kfp(pipeline: dict[str, Any]) -> None:
    """KFP's cache knows nothing of our code or of whether an asset is still there; assets do."""
    for name, task in tasks(pipeline).items():  # a condition is never cached
        assert not task.get("cachingOptions", {}).get("enableCache"), name


def test_no_step_installs_anything_when_it_starts(pipeline: dict[str, Any]) -> None:
    for name, executor in pipeline["deploymentSpec"]["executors"].items():
        assert "pip install" not in " ".join(executor["container"]["command"]), name


def test_the_config_is_no_parameter_that_every_step_repeats(flat: dict[str, Any]) -> None:
    for name, task in tasks(flat).items():
        if name != "prepare":
            assert "config" in task["inputs"]["artifacts"], name
            assert set(task["inputs"]["parameters"]) == {"run"}, name


def test_all_that_a_person_fills_in_works_as_it_is_and_is_described(pipeline: dict[str, Any]) -> None:
    given = pipeline["root"]["inputDefinitions"]["parameters"]
    of_retraining = {"model", "start"} if pipeline["pipelineInfo"]["name"] == RETRAINING else set()
    assert set(given) == of_retraining | {
        *("preset", "data", "workers", "gpus_per_worker", "overrides", "experiment_name", "config"),
    }
    for name, parameter in given.items():
        assert "defaultValue" in parameter, name
        assert "\n" not in str(parameter["defaultValue"]), "kfp could not read its own package"
        assert parameter["description"], name
    assert pipeline["pipelineInfo"]["description"]


def test_all_that_a_step_makes_or_takes_from_a_person_is_described(pipeline: dict[str, Any]) -> None:
    for name, component in pipeline["components"].items():
        if "dag" in component:
            continue
        made = component.get("outputDefinitions", {})
        for what, one in {**made.get("artifacts", {}), **made.get("parameters", {})}.items():
            assert one.get("description"), f"{name}: {what}"
    for first in ("comp-prepare", "comp-news"):
        given = pipeline["components"].get(first, {}).get("inputDefinitions", {}).get("parameters", {})
        for what, one in given.items():
            assert one.get("description"), what
