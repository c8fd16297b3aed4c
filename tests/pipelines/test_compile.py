"""A compiled pipeline says all that KFP has to know, and nothing that is secret or of one machine."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.parameters import TEXT_TO_IMAGE, VQVAE
from model.errors import UserError
from model.plumbing import environment
from pipelines.compile import compile
from pipelines.dag import PIPELINES
from pipelines.pod import CACHE_GIB

IMAGE = "registry.example:5000/latent-gpt@sha256:" + "0" * 64


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each pipeline as a file, compiled for an image by digest."""
    folder = tmp_path_factory.mktemp("compiled")
    paths = {name: folder / "new" / f"{name}.yaml" for name in PIPELINES}
    secrets = {"AWS_SECRET_ACCESS_KEY": "very-secret", "HF_TOKEN": "hf_very-secret"}
    with environment.within({environment.IMAGE.name: IMAGE, **secrets}):
        for name, path in paths.items():
            compile(name, path)
    return paths


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Executors by step, and what Kubernetes is told of each."""
    pipeline, platform = yaml.safe_load_all(path.read_text())
    told = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    executors = pipeline["deploymentSpec"]["executors"]
    assert executors.keys() == told.keys()
    return {name.removeprefix("exec-"): one["container"] for name, one in executors.items()}, {
        name.removeprefix("exec-"): one for name, one in told.items()
    }


def parameters(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = next(yaml.safe_load_all(path.read_text()))["root"]["inputDefinitions"]
    return found["parameters"]  # type: ignore[no-any-return]


def test_kfp_reads_what_it_did_not_write_itself(compiled: dict[str, Path]) -> None:
    from kfp import components

    for name, path in compiled.items():
        loaded = components.load_component_from_file(str(path))
        (preset,) = (
            one
            for key, one in loaded.pipeline_spec.root.input_definitions.parameters.items()
            if key == "preset"
        )
        assert preset.default_value.string_value in [one.string_value for one in preset.literals], name


def test_a_person_chooses_among_the_presets_that_the_pipeline_takes(compiled: dict[str, Path]) -> None:
    draws, tokenizes = (
        set(parameters(compiled[name])["preset"]["literals"]) for name in (TEXT_TO_IMAGE, VQVAE)
    )
    assert {"openmoji-tiny", "coco256-base"} <= draws
    assert "openmoji-tiny" in tokenizes
    assert "coco256-base" not in tokenizes, "its tokenizer is pretrained"


def test_descriptions_are_one_line_each(compiled: dict[str, Path]) -> None:
    for path in compiled.values():
        for name, parameter in parameters(path).items():
            assert "\n" not in parameter["description"], name
            assert len(parameter["description"]) <= 1024, name


def test_every_step_runs_the_image_that_the_environment_names(compiled: dict[str, Path]) -> None:
    for path in compiled.values():
        assert {executor["image"] for executor in read(path)[0].values()} == {IMAGE}


def test_steps_know_their_services_from_a_config_map_and_a_secret(compiled: dict[str, Path]) -> None:
    for path in compiled.values():
        for step, told in read(path)[1].items():
            (config,), (secret,) = told["configMapAsEnv"], told["secretAsEnv"]
            assert (config["optional"], secret["optional"]) == (True, True), step
            assert config["configMapName"] == secret["secretName"] == environment.ON_CLUSTER
            names = {one["envVar"] for one in config["keyToEnv"]}
            assert {"LATENT_GPT_STORE", "MLFLOW_TRACKING_URI", "LATENT_GPT_LAUNCHER"} <= names
            kept = {one["envVar"] for one in secret["keyToEnv"]}
            assert kept | {"HF_TOKEN"} == {one.name for one in environment.IN_SECRET}
            of_hub = {"HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"}
            reads = step in ("news", "prepare", "images")
            assert of_hub & (names | kept) == (of_hub if reads else set()), step
        assert "very-secret" not in path.read_text()


def test_a_step_writes_to_folders_that_are_mounted_and_no_larger_than_they_may_be(
    compiled: dict[str, Path],
) -> None:
    for path in compiled.values():
        executors, told = read(path)
        for step, container in executors.items():
            says = {one["name"]: one["value"] for one in container["env"]}
            mounts = {one["mountPath"]: one["sizeLimit"] for one in told[step]["emptyDirMounts"]}
            assert says["HOME"] in mounts, step
            size = re.fullmatch(r"(\d+)Gi", mounts[says["LATENT_GPT_CACHE"]])
            assert size, step
            assert float(says["LATENT_GPT_CACHE_GIB"]) == CACHE_GIB < int(size[1])
            config = {one["envVar"] for one in told[step]["configMapAsEnv"][0]["keyToEnv"]}
            assert not config & says.keys(), "the ConfigMap's would win"


def test_a_step_is_no_root_has_labels_and_comes_to_an_end(compiled: dict[str, Path]) -> None:
    for path in compiled.values():
        for step, told in read(path)[1].items():
            user = told["securityContext"]
            assert (user["runAsNonRoot"], user["runAsUser"]) == (True, "10001"), step
            labels = told["podMetadata"]["labels"]
            assert labels["app.kubernetes.io/part-of"] == "latent-gpt"
            assert labels["app.kubernetes.io/name"] == step
            assert int(told["activeDeadlineSeconds"]) > 0


def test_a_step_asks_for_what_it_needs_and_two_cores_hold_all_that_run_side_by_side(
    compiled: dict[str, Path],
) -> None:
    for path in compiled.values():
        for step, container in read(path)[0].items():
            resources = container["resources"]
            assert re.fullmatch(r"\d+m", resources["resourceCpuRequest"]), step
            assert int(resources["resourceCpuRequest"][:-1]) <= 200, step
            assert resources["resourceMemoryRequest"], step
            assert resources["resourceMemoryLimit"], step


def test_a_steps_code_is_whole_and_holds_no_prose(compiled: dict[str, Path]) -> None:
    """What KFP starts is `<last of command>` as a module, and in it the function of the step's name."""
    for path in compiled.values():
        for step, container in read(path)[0].items():
            module = ast.parse(container["command"][-1])
            (function,) = (one for one in module.body if isinstance(one, ast.FunctionDef))
            assert function.name == step == container["args"][-1]
            assert ast.get_docstring(function) is None
            assert any(isinstance(one, ast.With) for one in function.body), step


def test_what_a_run_repeats_is_short(compiled: dict[str, Path]) -> None:
    """A Workflow is packed away above 1 MiB. What it holds of each step and part was counted on real ones."""
    for path in compiled.values():
        pipeline, platform = yaml.safe_load_all(path.read_text())
        steps = [one for one in pipeline["components"].values() if "executorLabel" in one]
        said = json.dumps([steps, pipeline["deploymentSpec"], platform])
        parts = len(pipeline["components"]) - len(steps)
        size = 11 * len(said) + 45_000 * len(steps) + 15_000 * parts
        assert size < 1_020_000, f"{len(said)} characters for {len(steps)} steps"
        assert '"description"' not in said
        assert "   --component_module_path" not in said


def test_nobodys_error_is_tried_again(compiled: dict[str, Path]) -> None:
    """KFP's retry acts on whatever failed: a wrong override would fail three times."""
    for path in compiled.values():
        pipeline = next(yaml.safe_load_all(path.read_text()))
        for one in (pipeline["root"], *pipeline["components"].values()):
            tasks = one.get("dag", {}).get("tasks", {})
            assert not [name for name, task in tasks.items() if "retryPolicy" in task]


def test_the_same_pipeline_has_the_same_file(compiled: dict[str, Path], tmp_path: Path) -> None:
    with environment.within({environment.IMAGE.name: IMAGE}):
        compile(VQVAE, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == compiled[VQVAE].read_text()


@pytest.mark.parametrize(
    ("name", "file", "said"),
    [
        (
            "text-to-image",
            "a.yaml",
            "there is no pipeline 'text-to-image'; there is latent-gpt-text-to-image and",
        ),
        (VQVAE, "a.tar", "a.tar must end in .yaml"),
        (VQVAE, "file/a.yaml", "cannot be written: "),
    ],
)
def test_what_cannot_be_compiled_is_refused(name: str, file: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=re.escape(said)):
        compile(name, tmp_path / file)
