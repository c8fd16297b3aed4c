"""Checkpoints: what is saved comes back exactly, and a kill at any instant leaves a good one."""

from __future__ import annotations

import copy
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.errors import UserError
from model.plumbing import storage
from model.plumbing.checkpoints import (
    Checkpointer,
    load_model,
    save_model,
)
from tests import ROOT


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest) -> str:
    """An empty store of each kind."""
    if request.param == "local":
        return request.getfixturevalue("store")
    return request.getfixturevalue("services")["LATENT_GPT_STORE"]


def tensors(step: int) -> dict[str, Tensor]:
    return {"weight": torch.full((3, 4), float(step)), "count": torch.tensor(step)}


def test_the_newest_comes_back(root: str) -> None:
    checkpointer = Checkpointer(root)
    assert checkpointer.latest() is None
    assert checkpointer.newest() is None
    for step in (2, 10, 9):
        deep = {"losses": {"train/loss": [[1, 0.5]]}, "none yet": {}, 7: {"weight": torch.tensor(7)}}
        checkpointer.save(step, {"net": tensors(step), "epoch": step, **deep})
    assert checkpointer.newest() == storage.join(root, "step-00000010")
    found = checkpointer.latest()
    assert found
    step, state = found
    assert step == state["epoch"] == 10
    assert torch.equal(state["net"]["weight"], tensors(10)["weight"])
    assert state["net"]["count"].dtype == torch.int64
    assert state["losses"] == {"train/loss": [[1, 0.5]]}
    assert state["none yet"] == {}
    assert state["7"]["weight"].item() == 7  # as JSON has it


def test_only_the_newest_are_kept(root: str) -> None:
    checkpointer = Checkpointer(root, keep=2)
    for step in range(4):
        checkpointer.save(step, tensors(step))
    folders = {name.partition("/")[0] for name in storage.list_sizes(root)}
    assert folders == {"step-00000002", "step-00000003"}


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "complete.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_newest_falls_back_and_says_so(
    root: str, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(root)
    for step in (1, 2):
        checkpointer.save(step, tensors(step))
    uri = storage.join(root, "step-00000002", name)
    data = storage.read_bytes(uri)
    if damage == "flip":
        storage.write_bytes(uri, data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    elif damage == "cut":
        storage.write_bytes(uri, data[: len(data) // 2])
    else:
        storage.delete(uri)
    with caplog.at_level(logging.WARNING):
        found = checkpointer.latest()
    assert found
    assert found[0] == 1
    if (name, damage) != ("complete.json", "delete"):  # that one looks as if it had never been finished
        assert "step-00000002 cannot be used, trying the one before" in caplog.text
    checkpointer.save(2, tensors(2))  # the resumed job gets there again
    found = checkpointer.latest()
    assert found
    assert found[0] == 2


def test_an_unreachable_store_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    monkeypatch.setattr(storage.client, "__defaults__", (None, 1))
    with pytest.raises(UserError, match="cannot be reached"):
        Checkpointer("s3://bucket/checkpoints").latest()


@pytest.mark.slow
def test_a_kill_at_any_instant_leaves_a_good_one(store: str) -> None:
    code = (
        "import sys, torch\n"
        "from model.plumbing.checkpoints import Checkpointer\n"
        "checkpointer = Checkpointer(sys.argv[1])\n"
        "found = checkpointer.latest()\n"
        "step = found[0] if found else 0\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    step += 1\n"
        "    checkpointer.save(step, {'x': torch.full((200_000,), float(step)), 'step': step})\n"
    )
    newest = 0
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", code, store], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2 + 0.037 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = Checkpointer(store).latest()
        assert found
        step, state = found
        assert step >= newest
        assert step == state["step"]
        assert torch.equal(state["x"], torch.full((200_000,), float(step)))
        newest = step
    assert newest > 6


def test_a_full_disk_leaves_the_one_before(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(store)
    checkpointer.save(1, tensors(1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left"):
        checkpointer.save(2, tensors(2))
    monkeypatch.undo()
    found = checkpointer.latest()
    assert found
    assert found[0] == 1


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    save_model(tmp_path, net.state_dict() | {"view": net[0].weight.T}, {"width": 4})
    values, config = load_model(tmp_path)
    assert config == {"width": 4}
    assert torch.equal(values["0.weight"], values["1.weight"])
    assert torch.equal(values["view"], values["0.weight"].T)


def test_a_model_folder_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.safetensors does not exist; a model is a folder with"):
        load_model(tmp_path)
    save_model(tmp_path, tensors(1), {})
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match="does not hold a readable model"):
        load_model(tmp_path)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, tensors(1), {})
    torch.save(copy.deepcopy(tensors(1)), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="does not hold a readable model"):
        load_model(tmp_path)


def test_state_must_be_plain(store: str) -> None:
    with pytest.raises(TypeError):
        Checkpointer(store).save(1, {"weight": torch.ones(1), "object": object()})
    assert Checkpointer(store).latest() is None
