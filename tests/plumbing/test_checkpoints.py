"""Checkpoints: what is saved comes back exactly, and a kill at any instant leaves a good one."""

from __future__ import annotations

import copy
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from model.errors import Unavailable, UserError
from model.plumbing import checkpoints, storage
from model.plumbing.checkpoints import (
    Checkpointer,
    load_model,
    save_model,
)
from tests import ROOT
from tests.proxies import Answer, Request, proxy


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


# ── beside the training ─────────────────────────────────────────────────────────────────────────────────


class Gate:
    """Holds every upload until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.uploads = threading.Event(), 0
        upload = storage.upload_file

        def held(path: str | Path, uri: str) -> None:
            self.uploads += 1
            assert self.open.wait(20)
            upload(path, uri)

        monkeypatch.setattr(storage, "upload_file", held)


def test_what_changes_while_it_is_stored_is_stored_as_it_was(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, checkpointer = Gate(monkeypatch), Checkpointer(store)
    net, points = torch.zeros(3), [[1, 0.5]]
    checkpointer.begin(1, {"net": net, "view": net[1:], "points": points})
    net += 1
    points.append([2, 0.4])
    assert not storage.list_sizes(store)
    gate.open.set()
    assert checkpointer.newest() == storage.join(store, "step-00000001")  # waits for it
    found = checkpointer.latest()
    assert found
    assert found[1]["net"].tolist() == [0, 0, 0]
    assert found[1]["view"].tolist() == [0, 0]
    assert found[1]["points"] == [[1, 0.5]]


def test_one_is_under_way_at_a_time(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, checkpointer = Gate(monkeypatch), Checkpointer(store)
    weight = torch.zeros(4)
    checkpointer.begin(1, {"weight": weight})
    second = threading.Thread(target=lambda: checkpointer.begin(2, {"weight": weight + 2}))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert gate.uploads == 1
    gate.open.set()
    second.join(20)
    checkpointer.wait()
    for step in (1, 2):  # the second copy took the memory of the first one, when that was stored
        folder = storage.join(store, f"step-{step:08d}")
        tensors = safetensors.torch.load(storage.read_bytes(storage.join(folder, "tensors.safetensors")))
        assert tensors["weight"].tolist() == [2.0 * (step - 1)] * 4


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_told_when_the_next_one_begins(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(store)
    checkpointer.save(1, tensors(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        checkpointer.begin(2, tensors(2))
        with pytest.raises(UserError, match="no space left on the disk"):
            checkpointer.begin(3, tensors(3))
    found = checkpointer.latest()
    assert found
    assert found[0] == 1


def test_a_full_disk_for_what_is_not_sent_yet_is_one_line(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        Checkpointer(store).save(1, tensors(1))


def test_at_the_end_all_are_stored_or_it_is_told(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpointer(store) as checkpointer:
        checkpointer.begin(1, tensors(1))
    assert Checkpointer(store).newest()
    monkeypatch.setattr(storage, "upload_file", full)
    with pytest.raises(OSError, match="No space"), Checkpointer(store) as checkpointer:
        checkpointer.begin(2, tensors(2))
    with pytest.raises(ZeroDivisionError):  # this matters more
        _broken(Checkpointer(store))


def _broken(checkpointer: Checkpointer) -> None:
    with checkpointer:
        checkpointer.begin(2, tensors(2))
        _ = 1 / 0


def away(monkeypatch: pytest.MonkeyPatch, times: int) -> list[None]:
    """Let the store not answer so many uploads; returns those that are left."""
    upload, left = storage.upload_file, [None] * times

    def send(path: str | Path, uri: str) -> None:
        if left:
            left.pop()
            raise Unavailable(f"{uri}: S3 cannot be reached")
        upload(path, uri)

    monkeypatch.setattr(storage, "upload_file", send)
    monkeypatch.setattr(checkpoints, "AGAIN", 0.01)
    return left


def test_a_store_that_is_away_for_a_while_delays_it(
    store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away(monkeypatch, 3)
    checkpointer = Checkpointer(store)
    checkpointer.save(4, tensors(4))
    assert caplog.text.count("the checkpoint of step 4 is not stored yet") == 3
    found = checkpointer.latest()
    assert found
    assert found[0] == 4


def test_while_the_store_is_away_no_other_one_begins_and_nobody_waits(
    store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = away(monkeypatch, 10**6)
    checkpointer = Checkpointer(store)
    checkpointer.begin(4, tensors(4))
    checkpointer.begin(5, tensors(5))
    assert "no checkpoint of step 5: the one before is not stored yet" in caplog.text
    left.clear()
    checkpointer.wait()
    checkpointer.save(6, tensors(6))
    folders = {name.partition("/")[0] for name in storage.list_sizes(store)}
    assert folders == {"step-00000004", "step-00000006"}


def test_a_store_that_stays_away_ends_it(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    away(monkeypatch, 10**6)
    monkeypatch.setattr(checkpoints, "AWAY", 0.2)
    with pytest.raises(Unavailable, match="cannot be reached"):
        Checkpointer(store).save(4, tensors(4))


@pytest.mark.slow
def test_s3_that_is_away_stops_no_training(services: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    gone = threading.Event()
    refused = 0

    def hook(_: Request, ask: Callable[[], Answer]) -> Answer:
        nonlocal refused
        refused += gone.is_set()
        return Answer.error(503, "ServiceUnavailable") if gone.is_set() else ask()

    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    monkeypatch.setattr(checkpoints, "AGAIN", 0.2)
    with proxy(services["S3_ENDPOINT_URL"], hook) as url:
        monkeypatch.setenv("S3_ENDPOINT_URL", url)
        with Checkpointer(storage.join(services["LATENT_GPT_STORE"], "checkpoints")) as checkpointer:
            checkpointer.save(1, tensors(1))
            gone.set()
            began = time.monotonic()
            checkpointer.begin(2, tensors(2))
            assert time.monotonic() - began < 0.5
            time.sleep(3)  # training
            began = time.monotonic()
            checkpointer.begin(3, tensors(3))  # is passed over
            assert time.monotonic() - began < 0.5
            assert refused > 2
            gone.clear()
            checkpointer.wait()
            checkpointer.begin(4, tensors(4))
        folders = {name.partition("/")[0] for name in storage.list_sizes(checkpointer.uri)}
        assert folders == {"step-00000002", "step-00000004"}


# ── what is restored ────────────────────────────────────────────────────────────────────────────────────


def test_a_certain_one_is_fetched_or_none(store: str, tmp_path: Path) -> None:
    checkpointer = Checkpointer(store)
    for step in (1, 2):
        checkpointer.save(step, tensors(step))
    folder = tmp_path / "fetched"
    assert checkpointer.fetch(folder) == 2
    assert checkpointer.fetch(folder, 1) == 1
    assert checkpointer.read(folder)["count"].item() == 1
    storage.delete(storage.join(store, "step-00000001", "state.json"))
    with pytest.raises(UserError, match="step-00000001 cannot be used"):
        checkpointer.fetch(folder, 1)


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
