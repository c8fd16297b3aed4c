"""The pyfunc, through MLflow itself: logged, loaded without pickle, asked for pictures."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel, scoring_server
from PIL import Image

from model.config import load_config
from model.inference import serving
from model.inference.generate import Generator
from tests.instances import config, write_models

PROMPT = "a small red circle above a large blue square"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_models(tmp_path / "bundle", config())
    (tmp_path / "bundle" / "sampling.json").write_text('{"cfg_scale": 1.5}')
    return tmp_path / "bundle"


def pictures(answer: pd.DataFrame) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in answer["png"]]


@pytest.fixture
def model(bundle: Path) -> serving.TextToImage:
    served = serving.TextToImage()
    served.generator = Generator.load(bundle, "cpu")
    return served


def test_answers_are_the_generators_pictures(model: serving.TextToImage) -> None:
    asked = pd.DataFrame({"prompt": [PROMPT, "a large green cross"]})
    answer = model.predict(None, asked, {"seed": 7, "num_images": 2, "cfg_scale": -1.0})
    assert answer["prompt"].tolist() == [PROMPT, PROMPT, "a large green cross", "a large green cross"]
    assert answer["seed"].tolist() == [7, 8, 7, 8]
    expected = model.generator.generate([PROMPT], [8])[0]
    assert np.array_equal(pictures(answer)[1], np.asarray(expected))


def test_settings_change_the_picture(model: serving.TextToImage) -> None:
    asked = pd.DataFrame({"prompt": [PROMPT]})
    greedy = [pictures(model.predict(None, asked, {"seed": s, "temperature": 0.0}))[0] for s in (1, 2)]
    assert np.array_equal(*greedy), "without temperature a seed has no influence"
    drawn = [pictures(model.predict(None, asked, {"seed": s}))[0] for s in (1, 2)]
    assert not np.array_equal(*drawn)


def test_the_best_of_several_is_another_picture(model: serving.TextToImage) -> None:
    asked = pd.DataFrame({"prompt": [PROMPT]})
    sampling = model.generator.sampling.model_copy(update={"best_of": 16})
    expected = model.generator.generate([PROMPT], [3], sampling)[0]
    (best,) = pictures(model.predict(None, asked, {"seed": 3, "best_of": 16}))
    assert np.array_equal(best, np.asarray(expected))
    assert not np.array_equal(best, pictures(model.predict(None, asked, {"seed": 3}))[0])


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ("", {}, "empty"),
        (PROMPT, {"num_images": 65}, "1 to 64 pictures"),
        (PROMPT, {"num_images": 0}, "1 to 64 pictures"),
        (PROMPT, {"num_images": -1}, "1 to 64 pictures"),
        (PROMPT, {"num_images": 4, "best_of": 17}, "each the best of 17; 1 to 64 pictures"),
        (PROMPT, {"best_of": 0}, "best_of is 0"),
        (PROMPT, {"best_of": None}, "best_of is None"),
        (PROMPT, {"top_p": 2.0}, r"top_p is 2\.0"),
    ],
)
def test_bad_requests_are_refused(
    model: serving.TextToImage, prompt: str, params: dict[str, float], says: str
) -> None:
    with pytest.raises(MlflowException, match=says) as refused:
        model.predict(None, pd.DataFrame({"prompt": [prompt]}), params)
    assert refused.value.get_http_status_code() == 400


def answered(model: serving.TextToImage, request: dict[str, Any]) -> Any:
    """What MLflow's server answers, as far as it is no web server."""
    described = Model(flavors={"python_function": {"loader_module": "none"}}, signature=serving.signature())
    implementation = SimpleNamespace(predict=lambda data, params: model.predict(None, data, params))
    loaded = PyFuncModel(described, implementation)
    text = json.dumps(request)
    return scoring_server.invocations(text, "application/json", loaded, serving.signature().inputs)


@pytest.mark.parametrize(
    "prompts",
    [
        {"inputs": {"prompt": [PROMPT]}},
        {"inputs": {"prompt": [PROMPT, PROMPT]}},
        {"instances": [{"prompt": PROMPT}]},
        {"dataframe_split": {"columns": ["prompt"], "data": [[PROMPT]]}},
    ],
)
def test_a_request_is_answered_in_every_form_that_mlflow_has(
    model: serving.TextToImage, prompts: dict[str, Any]
) -> None:
    answer = answered(model, {**prompts, "params": {"seed": 3}})
    assert answer.status == 200
    rows = json.loads(answer.response)["predictions"]
    assert [row["prompt"] for row in rows] == [PROMPT] * len(rows)
    assert rows[0]["seed"] == 3


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ({"inputs": {"prompt": [None]}}, "null"),
        ({"inputs": {"prompt": [3]}}, "3"),
        ({"inputs": {"prompt": [PROMPT, None]}}, "(null|NaN)"),
        ({"instances": [{"prompt": 3}]}, "3"),
        ({"dataframe_records": [{"prompt": True}]}, "true"),
        ({"dataframe_split": {"columns": ["prompt"], "data": [[None]]}}, "null"),
    ],
)
def test_a_prompt_that_is_no_text_is_refused(
    model: serving.TextToImage, prompts: dict[str, Any], said: str
) -> None:
    with pytest.raises(MlflowException, match=f"prompt is {said}; it must be text") as refused:
        answered(model, prompts)
    assert refused.value.get_http_status_code() == 400


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"inputs": {"prompt": []}}, "num_images 1 for 0 prompts; 1 to 64 pictures at once"),
        (
            {"inputs": {"prompt": [PROMPT]}, "params": {"seed": None}},
            "seed is null; it must be a whole number",
        ),
        ({"inputs": {"prompt": [PROMPT]}, "params": {"num_images": None}}, "num_images is null"),
        ({"inputs": {"prompt": [PROMPT]}, "params": {"top_k": None}}, "sampling: top_k is None"),
    ],
)
def test_a_request_for_nothing_is_refused(
    model: serving.TextToImage, request_: dict[str, Any], said: str
) -> None:
    with pytest.raises(MlflowException, match=said) as refused:
        answered(model, request_)
    assert refused.value.get_http_status_code() == 400


LOAD = """
import sys, mlflow, pandas as pd
loaded = mlflow.pyfunc.load_model(sys.argv[1])
import model
assert "code" in model.__file__, f"the package beside the artifact is not used, but {model.__file__}"
answer = loaded.predict(pd.DataFrame({"prompt": [sys.argv[2]]}), params={"seed": 3, "temperature": 0.9})
print(answer["png"][0])
"""


@pytest.mark.slow
def test_logged_and_loaded_elsewhere_without_pickle(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_experiment(
        experiment_id=mlflow.create_experiment("serving", artifact_location=str(tmp_path / "artifacts"))
    )
    with mlflow.start_run():
        info = serving.log_model(bundle, "latent-gpt", load_config("smoke"))
    stored = Path(mlflow.artifacts.download_artifacts(info.model_uri))
    assert not list(stored.rglob("__pycache__"))
    names = {path.name for path in stored.rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pth"))]
    assert "model.safetensors" in names
    assert info.signature.params.to_dict()
    assert "torch==" in (stored / "requirements.txt").read_text()

    # another process, in a folder from which our package cannot be imported
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD, str(stored), PROMPT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    png = done.stdout.strip().splitlines()[-1]
    sampling = Generator.load(bundle, "cpu").sampling.model_copy(update={"temperature": 0.9})
    expected = Generator.load(bundle, "cpu").generate([PROMPT], [3], sampling)[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))), np.asarray(expected))
