"""The benchmark: pinned, complete in itself, apart from what sweeps choose by, without what was deleted."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from PIL import Image

from model.config import RunConfig
from model.data.image_shards import index, load_images, stored
from model.data.records import contents
from model.evaluation import benchmark as benchmarks
from model.evaluation.benchmark import (
    count_of_training,
    for_sweeps,
    load_benchmark,
    load_benchmarks_judge,
    look,
    make_benchmark,
    moved_into_training,
    training_pictures,
    without,
)
from model.nets.clip import load_judge
from model.plumbing import storage
from model.plumbing.assets import AssetWriter, Manifest
from tests.instances import config, ingest, publish_models


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return config(evaluation={"pictures": 6})


@pytest.fixture(scope="module")
def images(root: Path, run: RunConfig) -> Manifest:
    return ingest(run.data)


@pytest.fixture(scope="module")
def judge(root: Path, tmp_path_factory: pytest.TempPathFactory, run: RunConfig, images: Manifest) -> Manifest:
    return publish_models(tmp_path_factory.mktemp("models"), run, images)["judge"]


@pytest.fixture(scope="module")
def made(run: RunConfig, images: Manifest, judge: Manifest) -> Manifest:
    return make_benchmark(run, images, judge)


def fewer(images: Manifest, gone: set[str], moved: Collection[str] = ()) -> Manifest:
    """The same pictures as an asset, but for some that were deleted, and some that are trained on now."""
    writer = AssetWriter("images", {"gone": sorted(gone), "moved": sorted(moved)}, {})
    shards: dict[str, list[tuple[str, bytes]]] = {}
    for split in ("train", "validation", "composition"):
        for entry in index(images, split):
            if entry.content not in gone:
                where = "train" if entry.content in moved else split
                members = shards.setdefault(f"{where}-000000.tar", [])
                members.append((entry.name, stored(images, entry)))
                notes = json.dumps({"captions": entry.captions}).encode()
                members.append((f"{entry.content}.json", notes))
    for name, members in shards.items():
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for member, data in members:
                about = tarfile.TarInfo(member)
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
        writer.add_bytes(name, buffer.getvalue())
    counts = {name: len(members) // 2 for name, members in shards.items()}
    return writer.finish({"image_size": images.info["image_size"], "shards": counts})


def pinned(benchmark: Manifest) -> set[str]:
    """The content hashes of its pictures."""
    splits = load_benchmark(benchmark).splits
    return {content.hex() for split in splits for content in contents(benchmark, split)}


def test_it_holds_pictures_captions_and_seeds(made: Manifest, images: Manifest) -> None:
    benchmark = load_benchmark(made)
    assert (benchmark.key, benchmark.image_size, benchmark.shapes) == (made.key, 16, True)
    seeds = [seed for chosen in benchmark.splits.values() for seed in chosen.seeds]
    assert len(set(seeds)) == len(seeds) == benchmark.count
    for split, chosen in benchmark.splits.items():
        assert chosen.images.shape[1:] == (3, 16, 16)
        assert 0 < len(chosen.captions) == len(chosen.images) <= 6
        captions = {entry.content: entry.captions for entry in index(images, split)}
        for entry, caption in zip(index(made, split), chosen.captions, strict=True):
            assert caption in captions[entry.content]


def test_it_is_pinned_by_data_judge_and_config(
    made: Manifest, run: RunConfig, images: Manifest, judge: Manifest
) -> None:
    storage.delete_prefix(made.uri)
    assert make_benchmark(run, images, judge) == made, "the same bytes again"
    other = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"seed": 1})})
    assert make_benchmark(other, images, judge).key != made.key


def test_it_is_read_without_its_data_and_its_judge(
    made: Manifest, images: Manifest, judge: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_benchmark(made)
    picture = torch.rand(2, 3, 16, 16) * 2 - 1
    seen = look(load_judge(Path(judge.uri)), picture)
    alone = tmp_path / "store" / "benchmark" / made.key
    shutil.copytree(made.uri, alone)
    monkeypatch.setenv("LATENT_GPT_STORE", str(tmp_path / "store"))
    after = load_benchmark(made)
    assert after.splits.keys() == before.splits.keys()
    assert torch.equal(after.splits["train"].images, before.splits["train"].images)
    assert torch.equal(look(load_benchmarks_judge(made), picture), seen)
    assert set(made.inputs) == {"judge"}, "so that no deleted picture is kept alive by it"


def test_captions_of_sweeps_are_not_measured_on(made: Manifest, images: Manifest) -> None:
    said = [caption for chosen in load_benchmark(made).splits.values() for caption in chosen.captions]
    assert not any(map(for_sweeps, said))
    every = [caption for entry in index(images, "train") for caption in entry.captions]
    assert 0 < sum(map(for_sweeps, every)) < len(every) / 2


def test_where_all_captions_are_of_sweeps_they_are_measured_on(root: Path, tmp_path: Path) -> None:
    """A folder of one class has one caption, which may fall to either part."""
    caption = next(
        word for word in ("apple", "pear", "plum", "fig", "kiwi", "lime", "date") if for_sweeps(word)
    )
    for number in range(40):
        Image.new("RGB", (16, 16), (number * 6, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(caption)
    source = {"source": {"kind": "folder", "path": str(tmp_path)}, "image_size": 16, "validation_share": 0.2}
    run = config(data=source, evaluation={"pictures": 3})
    pictures = ingest(run.data)
    judge = publish_models(tmp_path / "models", run, pictures)["judge"]
    benchmark = load_benchmark(make_benchmark(run, pictures, judge))
    assert {caption} == {one for chosen in benchmark.splits.values() for one in chosen.captions}


def test_deleted_pictures_leave_the_benchmark(made: Manifest, images: Manifest) -> None:
    assert without(made, images) is made
    before = load_benchmark(made)
    gone = {index(made, "validation")[0].content, index(made, "train")[1].content}
    smaller = without(made, fewer(images, gone))
    assert smaller is not None
    after = load_benchmark(smaller)
    assert smaller.key != made.key
    assert pinned(smaller) == pinned(made) - gone
    assert after.splits["validation"].seeds == before.splits["validation"].seeds[1:], "the others keep theirs"
    assert after.splits["validation"].captions == before.splits["validation"].captions[1:]
    assert torch.equal(after.splits["composition"].images, before.splits["composition"].images)
    assert without(smaller, fewer(images, gone)) is smaller
    nothing = fewer(images, pinned(made))
    assert without(made, nothing) is None


def test_held_out_pictures_that_are_trained_on_are_found(made: Manifest, images: Manifest) -> None:
    assert moved_into_training(made, images) == []
    moved = index(made, "composition")[0].content
    assert moved_into_training(made, fewer(images, set(), {moved})) == [moved]


def test_near_duplicates_are_searched_in_all_shards(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set that has grown has its newest pictures in the last ones."""
    run = config(data={"source": {"kind": "shapes", "count": 64}, "image_size": 16, "shard_images": 8})
    images = ingest(run.data)
    shards = [name for name in images.info["shards"] if name.startswith("train-")]
    pixels, _ = load_images(images, "train")
    assert torch.equal(training_pictures(images), pixels), "all, where there are no more than are looked at"
    assert count_of_training(images) == len(pixels)
    monkeypatch.setattr(benchmarks, "READ", len(shards))
    counts = [images.info["shards"][name] for name in sorted(shards)]
    first_of_each = [sum(counts[:number]) for number in range(len(counts))]
    assert torch.equal(training_pictures(images), pixels[first_of_each])
