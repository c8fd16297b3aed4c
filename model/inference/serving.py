"""The registered model: a bundle as an MLflow pyfunc. Its code is this file, its weights are safetensors.

"Models from code": MLflow stores this file beside the bundle and runs it at load time, so nothing is pickled,
and the model loads with MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false. The `model` package travels along in the
same artifact; a server needs the pinned requirements and nothing of this repository.

    {"inputs": {"prompt": ["red apple"]}, "params": {"seed": 0, "num_images": 2}}

gives, for each prompt, `num_images` PNG files in base64.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType

from model.errors import UserError
from model.plumbing import registry

if TYPE_CHECKING:
    from mlflow.models.model import ModelInfo

    from model.config import RunConfig
    from model.inference.generate import Generator

REQUIREMENTS = (
    "mlflow",
    "torch",
    "torchvision",
    "open_clip_torch",
    "transformers",
    "diffusers",
    "safetensors",
    "numpy",
    "pandas",
    "pillow",
    "pydantic",
    "pyyaml",
    "jaxtyping",
    "boto3",
)
MAX_IMAGES = 64  # drawn for one request, with those that `best_of` does not keep
NOT_GIVEN = -1.0  # of a sampling parameter: the model's own setting holds
EXAMPLE = {"prompt": ["red apple"]}


class TextToImage(PythonModel):
    """Prompts in, pictures out."""

    generator: Generator

    def load_context(self, context: Any) -> None:
        """Load the bundle, on the GPU where there is one."""
        from model.inference.generate import Generator

        self.generator = Generator.load(context.artifacts["bundle"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Pictures of each prompt.

        Args:
            context: of MLflow; not used.
            model_input: column `prompt`.
            params: `seed` of the first picture (the next ones count on), `num_images` per prompt, and
                sampling settings, -1 for the model's own.

        Returns:
            A table with a row per picture: `prompt`, `seed`, `png` (base64).

        Raises:
            MlflowException: a prompt that is empty, far too long or no text, or an impossible setting; a
                server answers with status 400 and the line that says so.
        """
        try:
            return self._predict(_prompts(model_input["prompt"]), dict(params or {}))
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None

    def _predict(self, prompts: list[str], given: dict[str, Any]) -> pd.DataFrame:
        seed, count = _whole(given, "seed", 0), _whole(given, "num_images", 1)
        from model.inference.generate import checked

        changed = {name: value for name, value in given.items() if value != NOT_GIVEN}
        sampling = checked(self.generator.sampling.model_dump() | changed)
        if not 1 <= count * len(prompts) * sampling.best_of <= MAX_IMAGES:
            best = f", each the best of {sampling.best_of}" if sampling.best_of > 1 else ""
            raise UserError(
                f"num_images {count} for {len(prompts)} prompts{best}; 1 to {MAX_IMAGES} pictures at once"
            )
        rows = [(prompt, seed + i) for prompt in prompts for i in range(count)]
        images = self.generator.generate([row[0] for row in rows], [row[1] for row in rows], sampling)
        return pd.DataFrame(
            {
                "prompt": [row[0] for row in rows],
                "seed": [row[1] for row in rows],
                "png": [_base64(image) for image in images],
            }
        )


def _prompts(column: Iterable[Any]) -> list[str]:
    """The prompts of a request. Raises UserError: one is no text."""
    # MLflow hands a request for one prompt over as one cell with a list in it
    prompts = [prompt for cell in column for prompt in (cell if isinstance(cell, list) else [cell])]
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise UserError(f"prompt is {json.dumps(prompt, default=str)}; it must be text")
    return prompts


def _whole(given: dict[str, Any], name: str, left_out: int) -> int:
    """A parameter, which is taken out. Raises UserError: it is null, which MLflow lets through."""
    value = given.pop(name, left_out)
    if value is None:
        raise UserError(f"{name} is null; it must be a whole number")
    return int(value)


def signature() -> ModelSignature:
    """What goes in and comes out."""
    return ModelSignature(
        # as a string column null and numbers would reach us as the texts 'None' and '3'
        inputs=Schema([ColSpec(AnyType(), "prompt")]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "prompt"),
                ColSpec(DataType.long, "seed"),
                ColSpec(DataType.string, "png"),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("seed", DataType.long, 0),
                ParamSpec("num_images", DataType.long, 1),
                ParamSpec("cfg_scale", DataType.double, NOT_GIVEN),
                ParamSpec("temperature", DataType.double, NOT_GIVEN),
                ParamSpec("top_k", DataType.long, int(NOT_GIVEN)),
                ParamSpec("top_p", DataType.double, NOT_GIVEN),
                ParamSpec("best_of", DataType.long, int(NOT_GIVEN)),
            ]
        ),
    )


def log_model(bundle: Path, name: str, config: RunConfig) -> ModelInfo:
    """Log a bundle as a pyfunc in the active MLflow run, after drawing its input example once.

    Args:
        bundle: local folder, with its manifest.
        name: of the model.
        config: of the run that made it, kept beside it: a retraining starts from there.
    """
    package = Path(__file__).parent.parent  # `model`, as it is imported
    with tempfile.TemporaryDirectory() as scratch, _no_bytecode():
        code, named = Path(scratch, "model"), Path(scratch, "bundle")
        shutil.copytree(package, code, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(bundle, named)  # which is what it is called among the artifacts
        return mlflow.pyfunc.log_model(
            name=name,
            python_model=str(Path(__file__)),
            artifacts={"bundle": str(named)},
            code_paths=[str(code)],
            signature=signature(),
            input_example=(pd.DataFrame(EXAMPLE), {"seed": 0, "num_images": 1}),
            metadata={registry.CONFIG: config.model_dump(mode="json")},
            pip_requirements=[f"{one}=={version(one).partition('+')[0]}" for one in REQUIREMENTS],
        )


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """MLflow imports the copy that it is about to store, which would leave Python's `__pycache__` in it."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _base64(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


set_model(TextToImage())
