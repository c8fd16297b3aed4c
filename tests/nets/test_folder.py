"""Folders of models: one door for every net, and one wording where one does not hold a net."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import UserError
from model.nets import folder
from model.nets.clip import build_clip, load_judge, load_text_encoder
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
        ("transformer", {"transformer": {"depth": 0}}, "transformer.depth: Input should be greater than 0"),
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


@pytest.mark.parametrize(
    ("name", "section", "change", "says"),
    [
        ("text", "text_cfg", {"embed_cls": True}, "RuntimeError"),
        ("judge", "text_cfg", {"pool_type": "none"}, "a text is (1, 24, 16) and a picture (1, 16)"),
        ("judge", "text_cfg", {"embed_cls": True}, "RuntimeError"),
        ("judge", "vision_cfg", {"output_tokens": True}, "AttributeError"),
    ],
)
def test_a_net_that_does_not_do_its_work_is_refused_before_it_has_to(
    name: str, section: str, change: dict[str, object], says: str, folders: dict[str, Path]
) -> None:
    path = folders[name] / "config.json"
    described = json.loads(path.read_text())
    described["architecture"][section] |= change
    path.write_text(json.dumps(described))
    save_file(build_clip(described).state_dict(), folders[name] / "model.safetensors")
    said = refused(name, folders[name])
    assert said.startswith(f"/config.json is of a net that does not do its work: {says}")


# ── of strangers ────────────────────────────────────────────────────────────────────────────────────────


def header(tensors: dict[str, object]) -> bytes:
    """A safetensors file that announces tensors, and holds none of their bytes."""
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        b"\xff" * 4096,
        struct.pack("<Q", 2**40) + b"{}",
        header({}),
        header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
        header({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}) + b"1234",
        b"\x80\x04\x95pickle",
    ],
    ids=[
        "empty",
        "8 bytes",
        "noise",
        "header of a TiB",
        "no tensor",
        "tensor of 4 TiB",
        "shape",
        "type",
        "pickle",
    ],
)
def test_weights_of_a_stranger_are_refused_in_one_line(
    name: str, data: bytes, folders: dict[str, Path]
) -> None:
    (folders[name] / "model.safetensors").write_bytes(data)
    said = refused(name, folders[name])
    assert said.startswith(
        (
            ": the weights do not fit",
            "/model.safetensors does not hold readable weights",
            "/model.safetensors has",
        )
    )


@pytest.mark.parametrize("name", LOADERS)
def test_weights_of_another_type_are_refused(name: str, folders: dict[str, Path]) -> None:
    path = folders[name] / "model.safetensors"
    weights = load_file(path)
    first = next(one for one, tensor in weights.items() if tensor.is_floating_point())
    save_file(weights | {first: weights[first].to(torch.int32)}, path)
    assert f"{first} is of type torch.int32" in refused(name, folders[name])


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 10**5, "is not readable JSON"),
        ("[1]", "must be a table of settings, not list"),
        ("null", "must be a table of settings, not NoneType"),
        ('{"a": ' * 50 + "1" + "}" * 50, "8 levels"),
        ("{" + ", ".join(f'"k{i}": 1' for i in range(2000)) + "}", "1024 entries"),
        ('{"a": ' + "9" * 5000 + "}", "is not readable JSON"),
        ('{"a": NaN}', "nan is no number of a net"),
        ('{"a": "' + "x" * 2**20 + '"}', "bytes; 1048576 are read"),
        ("caf\xe9", "is not readable JSON"),
    ],
    ids=["brackets", "list", "null", "deep", "long", "digits", "NaN", "size", "Latin-1"],
)
def test_a_description_of_a_stranger_is_refused_in_one_line(
    name: str, text: str, said: str, folders: dict[str, Path]
) -> None:
    (folders[name] / "config.json").write_bytes(text.encode("latin-1"))
    assert said in refused(name, folders[name])


ELSEWHERE = "asks for what is not in the folder"
PRETRAINED = {"kind": "pretrained", "family": "janus", "architecture": {"auto_map": {"a": "b"}}}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3}


def clip(vision: dict[str, object] | None = None, **text: object) -> dict[str, object]:
    """A CLIP's description, as far as it is asked for before others."""
    return {"architecture": {"vision_cfg": vision or {}, "text_cfg": text}}


NO_PATCHES = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 0},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("text", {"architecture": {"text_cfg": {"hf_model_name": "a/b"}}}, f"hf_model_name {ELSEWHERE}"),
        ("judge", {"architecture": {"vision_cfg": {"timm_model_name": "x"}}}, f"timm_model_name {ELSEWHERE}"),
        ("text", {"architecture": {"text_cfg": {"layers": 10**6}}}, "layers is 1000000; nets of up to 256"),
        ("text", clip(context_length=10**5), "context_length: Input should be less than or equal to 4096"),
        ("text", clip(context_length=2), "context_length: Input should be greater than or equal to 3"),
        ("text", clip(vocab_size=100), "vocab_size: Input should be 49408"),
        ("judge", clip({"layers": [10**6] * 4}), "vision_cfg.layers"),
        ("judge", clip({"pos_embed_type": "sin_cos_2d"}), "pos_embed_type: Input should be 'learnable'"),
        ("judge", {"preprocess": PREPROCESS | {"size": 24}}, "preprocess.size is 24 and the tower sees"),
        ("text", {"architecture": {"text_cfg": {"width": 10**12}}}, "1000000000000 is no number of a net"),
        ("judge", {"architecture": NO_PATCHES}, "ZeroDivisionError"),
        ("judge", {"architecture": "ViT-L-14"}, "architecture: Input should be a valid dictionary"),
        ("judge", {"preprocess": {"size": 16, "mean": [0.5], "std": [0.5] * 3}}, "preprocess.mean"),
        ("judge", {"preprocess": {"size": 16, "mean": [0.5] * 3, "std": [0.0] * 3}}, "preprocess.std.0"),
        ("tokenizer", PRETRAINED, f"auto_map {ELSEWHERE}"),
        ("tokenizer", {"kind": "pretrained", "family": "odd", "architecture": {}}, "'odd' is missing"),
        ("tokenizer", {"codebook_size": 10**9}, "codebook_size: Input should be less than or equal to"),
        ("transformer", {"vocabulary": -4}, "vocabulary: Input should be greater than 0"),
        ("transformer", {"vocabulary": "many"}, "vocabulary: Input should be a valid integer"),
        ("transformer", {"grid": [4, 4, 4]}, "grid: Tuple should have at most 2 items"),
    ],
)  # fmt: skip
def test_a_description_may_not_lead_elsewhere_nor_be_absurd(
    name: str, change: dict[str, object], said: str, folders: dict[str, Path]
) -> None:
    path = folders[name] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert said in refused(name, folders[name])


def test_a_net_of_more_parameters_than_its_weights_is_not_built(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "SLACK", 0)
    many = {
        "transformer": {"depth": 200, "width": 16, "heads": 2, "training": {"steps": 200, "batch_size": 1}}
    }
    path = folders["transformer"] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | many))
    said = refused("transformer", folders["transformer"])
    assert said == (
        "/config.json: this net has more parameters than its weights, which are in model.safetensors"
    )


def test_weights_of_holes_or_beyond_the_memory_are_not_read(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folders["judge"] / "model.safetensors"
    monkeypatch.setattr(folder, "memory", lambda: 100)
    assert refused("judge", folders["judge"]).endswith("bytes, and there are 100 of memory here")
    with path.open("r+b") as file:
        file.truncate(4 << 30)
    assert refused("judge", folders["judge"]).startswith("/model.safetensors announces 4294967296 bytes, and")


def test_nets_opened_at_once_are_counted_each_by_itself(folders: dict[str, Path]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load_gpt, [folders["transformer"]] * 64))
