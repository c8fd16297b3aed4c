"""A pipeline as KFP takes it: what kfp's own compiler makes of it, and what that cannot say."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import yaml

from components.parameters import presets_of
from model.errors import UserError
from model.plumbing import environment


def compile(name: str, path: Path) -> None:
    """Write the pipeline of this name, for the image that LATENT_GPT_IMAGE names.

    Args:
        name: of a pipeline.
        path: of the YAML file.

    Raises:
        UserError: there is no such pipeline, or the file cannot be written.
    """
    from kfp import compiler

    from pipelines.dag import PIPELINES

    if name not in PIPELINES:
        raise UserError(f"there is no pipeline '{name}'; there is {' and '.join(PIPELINES)}")
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path} must end in .yaml")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        compiler.Compiler().compile(PIPELINES[name], str(path))
        text = path.read_text()
        pipeline, platform = yaml.safe_load_all(text)
        _complete(pipeline, presets_of(name))
        header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        path.write_text(header + yaml.safe_dump_all([pipeline, platform], sort_keys=True))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def _complete(pipeline: dict[str, Any], presets: list[str]) -> None:
    """Put in what kfp does not write: the choice of presets, and what is said to steps on a cluster alone."""
    from pipelines.pod import FIXED, pod_of

    parameters = pipeline["root"]["inputDefinitions"]["parameters"]
    parameters["preset"]["literals"] = presets
    for parameter in parameters.values():  # which kfp takes from a docstring as its lines are
        parameter["description"] = " ".join(parameter["description"].split())
    for component in pipeline["components"].values():
        for defined in (component.get("inputDefinitions", {}), component.get("outputDefinitions", {})):
            for one in (*defined.get("parameters", {}).values(), *defined.get("artifacts", {}).values()):
                one.pop("description", None)  # of a step, which no page shows; see `_bare`
    for name, executor in pipeline["deploymentSpec"]["executors"].items():
        container = executor["container"]
        container["command"] = [re.sub(" {2,}", " ", word) for word in container["command"][:-1]] + [
            _bare(container["command"][-1])
        ]
        container["resources"] = pod_of(name.removeprefix("exec-")).resources
        container["image"] = environment.IMAGE.get()
        told = FIXED | {environment.IMAGE.name: environment.IMAGE.get()}  # which MLflow is shown
        container["env"] = [{"name": key, "value": value} for key, value in told.items()]


def _bare(source: str) -> str:
    """A step's code without its docstring, which the specification has already.

    A run's Workflow holds all that is said of a step six times and more, and is packed away from whoever
    reads it above 1 MiB. The largest has some 1,000 KB: that of a retraining, with the config in it.
    """
    module = ast.parse(source)
    for function in module.body:
        if isinstance(function, ast.FunctionDef) and ast.get_docstring(function):
            del function.body[0]
    return ast.unparse(module)
