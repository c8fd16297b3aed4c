"""The DAG compiles for a cluster, and says there what it says here."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from model.config import load_config
from model.steps import names as names_of


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from kfp import compiler

    from pipelines.dag import text_to_image

    path: Path = tmp_path_factory.mktemp("dag") / "pipeline.yaml"
    compiler.Compiler().compile(text_to_image, str(path))
    return next(yaml.safe_load_all(path.read_text()))


def tasks(dag: dict[str, Any]) -> dict[str, Any]:
    return dag["dag"]["tasks"]


def test_every_step_is_there(compiled: dict[str, Any]) -> None:
    names = {name.removeprefix("comp-") for name in compiled["components"]}
    assert {name for name in names if not name.startswith("condition")} == set(names_of(load_config("smoke")))


def test_the_person_chooses_preset_and_overrides(compiled: dict[str, Any]) -> None:
    assert set(compiled["root"]["inputDefinitions"]["parameters"]) == {"preset", "overrides"}


def test_no_step_installs_anything_when_it_starts(compiled: dict[str, Any]) -> None:
    for name, executor in compiled["deploymentSpec"]["executors"].items():
        assert "pip install" not in " ".join(executor["container"]["command"]), name


def test_no_step_is_cached_by_kfp(compiled: dict[str, Any]) -> None:
    """KFP's cache knows nothing of our code or of whether an asset is still there; assets do."""
    conditional = compiled["components"]["comp-condition-1"]
    for name, task in {**tasks(compiled["root"]), **tasks(conditional)}.items():
        if not name.startswith("condition"):
            assert not task["cachingOptions"].get("enableCache"), name


def test_the_transformer_is_reached_only_where_the_goal_says_so(compiled: dict[str, Any]) -> None:
    (condition,) = (task for name, task in tasks(compiled["root"]).items() if name.startswith("condition"))
    assert condition["triggerPolicy"]["condition"].endswith("== 'transformer'")
    # kfp.local resolves only a task's unnamed output in a condition, and skips the branch silently otherwise
    assert "'pipelinechannel--prepare-Output'" in condition["triggerPolicy"]["condition"]
