"""Folders of models: one door for every net, and one wording where one does not hold a net."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from model.errors import UserError
from model.nets.clip import load_judge, load_text_encoder
from model.nets.gpt import load_gpt
from model.nets.tokenizers import load_tokenizer
from tests.instances import config, write_models

LOADERS: dict[str, Callable[[Path], object]] = {
    "tokenizer": load_tokenizer,
    "text": load_text_encoder,
    "judge": load_judge,
    "transformer": load_gpt,
}
NETS = {"tokenizer": "VQVAE", "text": "CLIP", "judge": "CLIP", "transformer": "GPT"}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return write_models(tmp_path, config())


def refused(name: str, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        LOADERS[name](folder)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(str(folder))
    return line.removeprefix(str(folder))


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_missing_or_does_not_fit_is_named(name: str, folders: dict[str, Path]) -> None:
    folder = folders[name]
    LOADERS[name](folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    first = min(weights)
    fewer = {name: tensor for name, tensor in weights.items() if name != first}
    save_file(fewer, path)
    assert refused(name, folder) == f": the weights do not fit {NETS[name]}: {first} is missing"
    save_file(weights | {"aaa": weights[first].clone()}, path)
    assert refused(name, folder) == f": the weights do not fit {NETS[name]}: aaa is unknown"
    shape = tuple(weights[first].shape)
    save_file(weights | {first: weights[first][None]}, path)
    assert refused(name, folder) == (
        f": the weights do not fit {NETS[name]}: {first} is {(1, *shape)} instead of {shape}"
    )
    path.unlink()
    assert "model.safetensors" in refused(name, folder)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("tokenizer", {"kind": "clip"}, "kind is 'clip'; a tokenizer is 'vqvae' or 'pretrained'"),
        ("tokenizer", {"guess": "rotation"}, "guess: Extra inputs are not permitted"),
        ("transformer", {"transformer": {"depth": 0}}, "depth: Input should be greater than 0"),
        ("transformer", {"grid": None}, "'grid' is missing"),
        ("text", {"architecture": None}, "'architecture' is missing"),
    ],
)
def test_a_description_of_no_net_is_refused_in_words(
    name: str, change: dict[str, object], reason: str, folders: dict[str, Path]
) -> None:
    path = folders[name] / "config.json"
    described = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in described.items() if value is not None}))
    assert refused(name, folders[name]) == f"/config.json: {reason}"
