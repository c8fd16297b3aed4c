"""A store is swept: what registered models, runs and jobs need stays, in a folder and on S3."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.errors import UserError
from model.plumbing import assets, leases, storage, uses
from model.plumbing.assets import AssetWriter, Kind, Manifest
from model.plumbing.jobs import JobSpec, TrackingIds, write_spec
from model.plumbing.sweeping import Found, Needed, look, sweep
from tests import ROOT
from tests.data.test_growth import ingest, members, pictures, run_of, taken
from tests.data.test_ingest import picture, write
from tests.instances import config


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest) -> str:
    """An empty store of each kind."""
    if request.param == "local":
        return str(request.getfixturevalue("store"))
    return str(request.getfixturevalue("services")["LATENT_GPT_STORE"])


def made(kind: str, seed: int, **inputs: Manifest) -> Manifest:
    """A complete asset with what led to it, and what is only looked at."""
    writer = AssetWriter(kind, {"seed": seed}, inputs)  # type: ignore[arg-type]
    writer.add_bytes("part/weights", b"w" * 100)
    for name in ("checkpoints/step-1/tensors", "attempts/1/rank-0.log", "pictures/some.png"):
        storage.write_bytes(storage.join(writer.uri, name), b"s" * 10)
    return writer.finish({}, scratch="nothing")


def needed(*manifests: Manifest, by: str = "key", current: str = "") -> Needed:
    ids = frozenset(f"{one.kind}/{one.key}" for one in manifests)
    if by == "key":
        return Needed(ids, frozenset(), current)
    return Needed(frozenset(), frozenset(one.sha256 for one in manifests), current)


def swept(by: Needed, spared: float = 0.0) -> Found:
    with uses.sweep() as still_ours:
        found = look(lambda: [by], spared)
        sweep(found, still_ours)
    return found


def there(root: str) -> set[str]:
    """What lies in the store, but for the lock of the sweep itself."""
    return {name for name in storage.list_sizes(root) if not name.startswith(f"{leases.LOCKS}/{uses.SWEEP}/")}


@pytest.mark.parametrize("by", ["key", "hash"])
def test_what_a_version_was_made_from_stays_and_the_rest_goes(root: str, by: str) -> None:
    images = made("images", 0)
    tokens, other = made("tokens", 0, images=images), made("tokens", 1, images=images)
    storage.write_bytes(storage.join(root, "mlflow/1/artifact"), b"MLflow's")
    storage.write_bytes(storage.join(root, "images/notes.txt"), b"somebody's")
    found = swept(needed(tokens, by=by))
    assert there(root) == {
        *(f"{one.kind}/{one.key}/{name}" for one in (images, tokens)
          for name in (assets.NAME, "part/weights", "pictures/some.png")),
        "mlflow/1/artifact",
        "images/notes.txt",
    }  # fmt: skip
    whole = len(other.text) + 100 + 3 * 10
    assert found.sizes() == {"tokens": (1, whole), "scratch": (2, 40)}
    assert look(lambda: [needed(tokens)], 0.0).sizes() == {}


def test_of_superseded_pictures_nothing_stays_but_what_is_pinned(root: str) -> None:
    images, newer = made("images", 0), made("images", 1)
    tokens, judge = made("tokens", 0, images=images), made("judge", 0, images=images)

    def benchmark(seed: int) -> Manifest:
        writer = AssetWriter("benchmark", {"seed": seed, "images": images.sha256}, {"judge": judge})
        writer.add_bytes("train-000000.tar", b"some of the pictures")
        return writer.finish({})

    own, pinned = benchmark(0), benchmark(1)
    model = made("model", 0, tokens=tokens, judge=judge)
    evaluation = made("evaluation", 0, images=images, model=model, benchmark=own)
    current = newer.sha256
    measured_on = Needed(
        frozenset({f"benchmark/{pinned.key}"}), current=current, pinned=f"benchmark/{pinned.key}"
    )
    with uses.sweep() as still_ours:
        found = look(lambda: [needed(evaluation, images, current=current), measured_on], 0.0)
        sweep(found, still_ours)
    left = (newer, judge, pinned, model, evaluation)
    assert {name.rsplit("/", 1)[0] for name in there(root) if name.endswith(assets.NAME)} == {
        f"{one.kind}/{one.key}" for one in left
    }


def test_recipes_stay_with_the_images_of_their_pictures(store: str) -> None:
    """By age and use alone they would go, and a run that goes on would have other steps, so other assets."""

    def of(kind: Kind, fingerprint: str) -> Manifest:
        return AssetWriter(kind, {"fingerprint": fingerprint, "by": kind}, {}).finish({})

    mine, others = of("recipe", "mine"), of("recipe", "others")
    killed = job(of("images", "mine"))
    write_spec(killed)
    storage.write_bytes(storage.join(killed.checkpoints, "step-00000001/complete.json"), b"{}")
    speed = made("speed", 0)
    with leases.Lease(killed.leases, "tokenizer"):
        swept(needed())
    assert assets.find(mine.uri) == mine
    assert not assets.find(others.uri)
    assert not assets.find(speed.uri), "what it was for, recipes say"
    newer = of("images", "newer")
    swept(needed(newer, *(one.load() for one in killed.inputs.values()), current=newer.sha256))
    assert not assets.find(mine.uri), "its pictures were superseded"


def test_weights_that_were_begun_from_and_pictures_that_were_compared_with_are_let_go(store: str) -> None:
    start, images, tokens = made("transformer", 0), made("images", 0), made("tokens", 0)
    transformer = made("transformer", 1, tokens=tokens, **{assets.START: start})
    measurement = made("measurement", 0, images=images, model=made("model", 0, transformer=transformer))
    swept(needed(measurement))
    assert {name.split("/")[1] for name in there(store) if name.endswith(assets.NAME)} == {
        one.key for one in (measurement, measurement.input("model"), transformer, tokens)
    }


def test_a_job_under_way_keeps_the_weights_that_it_begins_from(store: str) -> None:
    start = made("transformer", 0)
    spec = job(made("images", 0))
    spec = spec.model_copy(update={"inputs": {**spec.inputs, assets.START: start.as_input}})
    write_spec(spec)
    with leases.Lease(spec.leases, "transformer"):
        swept(needed())
        assert assets.find(start.uri)


def test_nothing_young_goes(root: str) -> None:
    made("tokens", 0, images=made("images", 0))
    before = there(root)
    assert swept(needed(), spared=3600).sizes() == {}
    assert there(root) == before


def test_what_a_run_uses_stays_as_long_as_it_lives(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = made("images", 0)
    tokens = made("tokens", 0, images=images)
    with leases.carried("tokens", "smoke-1"):
        uses.use("tokens", "smoke-1", tokens.uri)
        before = set(storage.list_sizes(tokens.uri))
        swept(needed())
        assert set(storage.list_sizes(tokens.uri)) == before, (
            "what led to it, too: a job may be at work there"
        )
    swept(needed())
    assert assets.find(tokens.uri), "its next step may come yet"
    assert assets.find(images.uri), "what it was made from stays with it"
    monkeypatch.setattr(leases, "LIVE", 0.0)
    monkeypatch.setattr(leases, "NEXT_STEP", 0.0)
    found = swept(needed())
    assert found.uses == [f"smoke-1/tokens-{tokens.key}"]
    assert there(root) == {"runs/smoke-1"}, "which whoever ends it in MLflow forgets"


def job(images: Manifest) -> JobSpec:
    run = config()
    return JobSpec(
        kind="tokenizer", module="model.training.vqvae", config=run, settings={},
        inputs={"images": images.as_input}, tracking=TrackingIds(experiment="e", run="r", step="tokenizer"),
    )  # fmt: skip


def test_a_job_under_way_keeps_what_it_reads_and_its_checkpoints(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = made("images", 0)
    spec = job(images)
    write_spec(spec)
    storage.write_bytes(storage.join(spec.checkpoints, "step-00000001/complete.json"), b"{}")
    with leases.Lease(spec.leases, "tokenizer"):
        before = there(root) - {name for name in there(root) if images.key in name}
        swept(needed())
        assert there(root) >= before
        assert assets.find(images.uri)
    with leases.alone("tokenizer", spec.output):
        swept(needed())
        assert assets.find(images.uri), "a lock says the same"
        assert storage.list_sizes(spec.checkpoints)
    assert len(swept(needed()).locks) == 2, "its lock, and that it was released"
    assert there(root) == set()


def test_writes_that_were_killed_are_given_up_but_for_those_of_who_lives(root: str) -> None:
    images, other = made("images", 0), made("images", 1)

    def begun(asset: Manifest) -> tuple[str, str]:
        """What a kill in the middle of a file leaves."""
        name = f"images/{asset.key}/0.tar"
        if not storage.is_s3(root):
            Path(root, "images", asset.key, f"{storage.TEMPORARY}x").write_bytes(b"p" * 100)
            return f"images/{asset.key}/{storage.TEMPORARY}x", ""
        bucket, key = storage.split(storage.join(root, name))
        upload = storage.client().create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        storage.client().upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"p" * 100)
        return name, upload

    killed, under_way = begun(images), begun(other)
    assert not swept(needed(images, other), spared=3600).unfinished
    with leases.carried("images", "smoke-1"):
        uses.use("images", "smoke-1", other.uri)
        found = swept(needed(images, other))
    assert found.unfinished.keys() == {killed}
    assert found.sizes()["unfinished"] == (1, 100)
    assert storage.unfinished(storage.join(root, "images")).keys() == {
        (under_way[0].removeprefix("images/"), under_way[1])
    }
    assert assets.find(images.uri), "what is whole stays"


def test_a_store_that_a_later_release_uses_is_left_alone(root: str) -> None:
    images = made("images", 0)
    values = json.loads(images.text) | {"schema_version": assets.SCHEMA_VERSION + 1}
    storage.write_bytes(storage.join(images.uri, assets.NAME), json.dumps(values).encode())
    with pytest.raises(UserError, match="update latent-gpt"):
        look(list, 0.0)


@pytest.mark.parametrize("manifest", [b"{}", b"no JSON", b'{"schema_version": 1}'])
def test_what_cannot_be_read_is_no_asset(store: str, manifest: bytes) -> None:
    images = made("images", 0)
    storage.write_bytes(storage.join(images.uri, assets.NAME), manifest)
    swept(needed(images))
    assert there(store) == set()


KILLED = """
import os, signal, sys
from model.plumbing import storage, uses
from model.plumbing.sweeping import look, sweep

left = int(sys.argv[1])
def counted(real):
    def delete(*arguments):
        global left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        real(*arguments)
    return delete
with uses.sweep() as still_ours:
    found = look(list, 0.0)
    storage.delete, storage.delete_all = counted(storage.delete), counted(storage.delete_all)
    sweep(found, still_ours)
"""


@pytest.mark.slow
@pytest.mark.parametrize("deletions", range(4))
def test_one_that_is_killed_leaves_a_smaller_store_and_nobody_waiting(store: str, deletions: int) -> None:
    images = made("images", 0)
    tokens = made("tokens", 0, images=images)
    before = there(store)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(deletions)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert there(store) <= before
    for one in (images, tokens):
        if storage.exists(storage.join(one.uri, assets.NAME)):
            assert assets.find(one.uri), "what has a manifest is whole"
    began = time.monotonic()
    uses.use("images", "run", images.uri)
    assert time.monotonic() - began < 5
    uses.forget(uses.said())
    swept(needed())
    assert there(store) == set()


@pytest.mark.slow
def test_a_sweep_that_stood_still_too_long_deletes_nothing_more(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("images", 0)
    before = there(store)
    with uses.sweep() as still_ours:
        found = look(list, 0.0)
        now = leases._now()
        monkeypatch.setattr(leases, "_now", lambda: now + 2 * leases.RENEWAL + 1)  # a laptop slept
        with pytest.raises(UserError, match="was not renewed in time"):
            sweep(found, still_ours)
    assert there(store) == before


def test_no_more_than_a_thousand_objects_are_deleted_at_a_time(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "AT_ONCE", 2)
    folder = Path(made("images", 0).uri)
    asked = 0

    def still_ours() -> None:
        nonlocal asked
        asked += 1

    sweep(look(list, 0.0), still_ours)
    assert asked == 4, "five objects, and what is said of uses and locks"
    assert not folder.exists()


def everywhere(store: str, data: bytes) -> set[str]:
    """The objects of a store that hold these bytes."""
    return {name for name in storage.list_sizes(store) if data in Path(store, name).read_bytes()}


@pytest.mark.slow
def test_the_bytes_of_a_deleted_picture_are_in_no_object(store: str, tmp_path: Path) -> None:
    """Even where a champion was trained on it; ingested, deleted from its folder, grown, swept."""
    source = tmp_path / "source"
    source.mkdir()
    write(source, {f"{n}.{kind}": data for n in range(20) for kind, data in files(n).items()})
    run = {"kind": "folder", "path": str(source)}
    first = ingest(run_of(run))
    shards = [name for name in first.info["shards"] if name.startswith("train")]
    shard = shards[0]
    gone = next(data for name, data in members(first, shard) if name.endswith(".png"))
    number = next(
        n for n in range(20) if f'"captions": ["number {n}"]'.encode() in captions_of(first, shard, gone)
    )
    for kind in ("png", "txt"):
        (source / f"{number}.{kind}").unlink()
    second = ingest(run_of(run, first))
    assert taken(second), "it has taken shards over"
    assert shard not in taken(second)
    tokens = made("tokens", 0, images=first)
    champion, newest = made("transformer", 0, tokens=tokens), made("transformer", 1, images=second)
    assert everywhere(store, gone)
    swept(needed(champion, newest, current=second.sha256))
    assert everywhere(store, gone) == set()
    for name in shards[1:]:
        assert everywhere(store, next(data for _, data in members(second, name))), "others are there still"
    assert assets.find(second.uri) == second
    assert pictures(second) == pictures(ingest(run_of(run)))
    assert assets.find(champion.uri), "it draws as before"


def files(number: int) -> dict[str, bytes | str]:
    return {"png": picture(number), "txt": f"number {number}"}


def captions_of(manifest: Manifest, shard: str, data: bytes) -> bytes:
    """The notes beside a picture in its shard."""
    found = list(members(manifest, shard))
    return found[[one for _, one in found].index(data) + 1][1]
