"""The bundle as an asset: the same everywhere, whole, and as useful as those of earlier releases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import UserError
from model.inference.bundle import FILES, PARTS, make_bundle
from model.inference.generate import Generator
from model.plumbing import assets, registry, storage
from model.plumbing.assets import Kind, Manifest
from model.steps import STEPS
from tests.instances import config, ingest, make, publish_models, write_models

PROMPT = "a small red circle above a large blue square"


def picture(folder: Path) -> np.ndarray:
    return np.asarray(Generator.load(folder, "cpu").generate([PROMPT], [3])[0])


def whole_run() -> dict[Kind, Manifest]:
    """Every asset of a tiny run, in the store at hand."""
    run = config()
    made: dict[Kind, Manifest] = {"images": ingest(run.data)}
    for kind, step in STEPS.items():
        if kind not in made and step.taken(run):
            made[kind] = make(kind, run, {name: made[name] for name in step.needs})
    return made


def test_a_bundle_holds_its_parts_and_how_they_draw(store: str, tmp_path: Path) -> None:
    run = config(sampling={"cfg_scale": 1.5})
    parts = publish_models(tmp_path, run, ingest(run.data))
    made = make_bundle(run, parts)
    assert make_bundle(run, parts) == made
    names = {f"{part}/{name}" for part in PARTS for name in (*FILES, "history.json")}
    assert {file.name for file in made.files} == names | {"sampling.json"}
    assert made.inputs == {part: manifest.as_input for part, manifest in parts.items()}
    for part in PARTS:
        manifest = parts[part]
        for file in manifest.files:
            assert made.file(f"{part}/{file.name}").sha256 == file.sha256
    assert Generator.load(registry.resolve(made.uri)).sampling.cfg_scale == 1.5
    other = make_bundle(config(sampling={"cfg_scale": 2.5}), parts)
    assert other.key != made.key


def test_no_bundle_is_made_of_a_damaged_part(store: str, tmp_path: Path) -> None:
    run = config()
    parts = publish_models(tmp_path, run, ingest(run.data))
    weights = storage.join(parts["text"].uri, "model.safetensors")
    data = storage.read_bytes(weights)
    storage.write_bytes(weights, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(storage.Damaged, match=rf"{weights} is damaged"):
        make_bundle(run, parts)
    assert not list(Path(store, "model").glob("*/manifest.json"))


@pytest.mark.slow
def test_the_same_run_has_the_same_hashes_in_every_store_and_in_a_copy_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, copied = (tmp_path / name for name in ("first", "second", "copied"))
    monkeypatch.setenv("LATENT_GPT_STORE", str(first))
    there = whole_run()
    monkeypatch.setenv("LATENT_GPT_STORE", str(second))
    here = whole_run()
    assert {kind: one.sha256 for kind, one in here.items()} == {
        kind: one.sha256 for kind, one in there.items()
    }

    shutil.copytree(first, copied)
    shutil.rmtree(first)
    monkeypatch.setenv("LATENT_GPT_STORE", str(copied))
    moved = {kind: assets.load(assets.place(kind, one.key)) for kind, one in there.items()}
    assert all(one.uri.startswith(str(copied)) for one in moved.values())
    storage.delete_prefix(moved["transformer"].uri)
    trained = make("transformer", config(), {name: moved[name] for name in STEPS["transformer"].needs})
    assert trained.sha256 == there["transformer"].sha256, "trained on where it was copied to"
    lineage = moved["evaluation"].input("model")
    assert lineage.input("transformer") == trained
    assert np.array_equal(picture(registry.resolve(lineage.uri)), picture(Path(here["model"].uri)))


def old_format(folder: Path) -> Path:
    """A bundle as releases up to commit 9cbfb22 wrote it: its texts, with weights of `write_models`."""
    write_models(folder, config())
    texts = json.loads((Path(__file__).parent / "bundle_9cbfb22.json").read_text())
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value, indent=2))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): storage.file_sha256(path) for path in files}
    (folder / "checksums.json").write_text(json.dumps(sums, indent=2, sort_keys=True))
    return folder


def test_a_bundle_of_an_earlier_release_draws_what_it_drew(store: str, tmp_path: Path) -> None:
    run = config()
    old = registry.resolve(str(old_format(tmp_path / "old")))
    new = make_bundle(run, publish_models(tmp_path / "new", run, ingest(run.data)))
    assert np.array_equal(picture(old), picture(Path(new.uri)))


def test_weights_that_are_no_numbers_draw_nothing(tmp_path: Path) -> None:
    folder = write_models(tmp_path / "bundle", config())["transformer"]
    (tmp_path / "bundle/sampling.json").write_text("{}")
    weights = load_file(folder / "model.safetensors")
    weights[min(weights)][0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"transformer: {min(weights)} holds what is no finite number"):
        Generator.load(tmp_path / "bundle")


@pytest.mark.parametrize("wrong", ["[]", "{", '{"warmth": 1}', '{"top_p": 2}'])
def test_settings_that_are_none_are_one_line(wrong: str, tmp_path: Path) -> None:
    write_models(tmp_path / "bundle", config())
    (tmp_path / "bundle/sampling.json").write_text(wrong)
    with pytest.raises(UserError, match=r"sampling\.json"):
        Generator.load(tmp_path / "bundle")
