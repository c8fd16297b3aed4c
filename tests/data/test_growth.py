"""A set that grows is what a full ingest would make of the source as it is now, but only news is read."""

from __future__ import annotations

import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model import steps
from model.config import AssetRef, RunConfig
from model.data import growth, images
from model.data import ingest as ingesting
from model.data.growth import Unfit, pinned
from model.data.ingest import SPLITS
from model.data.records import contents, contents_name
from model.data.token_shards import TokenReader
from model.errors import UserError
from model.nets.vqvae import VQVAE
from model.plumbing import assets, storage, uses
from model.plumbing.assets import AssetWriter, Manifest
from model.plumbing.sweeping import Needed, look, sweep
from tests.data.test_ingest import picture, sample, small, tar, write
from tests.instances import config, make, publish_models

Pictures = list[tuple[str, tuple[str, ...], str]]  # content, captions, split; sorted


def run_of(source: dict[str, Any], earlier: Manifest | None = None, **data: Any) -> RunConfig:
    """A run on a source, whose images grow from earlier ones."""
    defaults = {"image_size": 16, "max_bad_share": 1, "validation_share": 0.3, "shard_images": 5}
    origin = {"images": AssetRef(key=earlier.key, sha256=earlier.sha256)} if earlier else {}
    return config(data={"source": source, **defaults, **data}, origin=origin)


def ingest(run: RunConfig) -> Manifest:
    return ingesting.ingest(run.data, steps.writer("images", run, {}))


def members(manifest: Manifest, shard: str) -> Iterator[tuple[str, bytes]]:
    """Names and bytes within a shard, wherever it lies."""
    with storage.open_read(manifest.where(shard)) as stream, tarfile.open(fileobj=stream, mode="r|") as one:
        for member in one:
            content = one.extractfile(member)
            assert content
            yield member.name, content.read()


def pictures(manifest: Manifest) -> Pictures:
    """What an asset has, from its tars alone."""
    found = []
    for shard in manifest.info["shards"]:
        for name, data in members(manifest, shard):
            if name.endswith(".json"):
                found.append((Path(name).stem, tuple(json.loads(data)["captions"]), shard.partition("-")[0]))
    return sorted(found)


def taken(manifest: Manifest) -> set[str]:
    return {file.name for file in manifest.files if file.asset and file.name in manifest.info["shards"]}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files that were decoded, as they were found."""
    calls: list[bytes] = []
    real = images.decode
    monkeypatch.setattr(images, "decode", lambda data, config: (calls.append(data), real(data, config))[1])
    monkeypatch.setattr("model.plumbing.parallel.cores", lambda: 1)
    return calls


class Folder:
    """A folder of pictures that changes by chance."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.random = path, random.Random(seed)
        self.content: dict[str, tuple[bytes, str]] = {}  # picture and captions of each name
        self.touched: set[str] = set()  # names of files written since the last look

    def put(self, name: str, data: bytes, captions: str) -> None:
        write(self.path, {f"{name}.png": data, f"{name}.txt": captions})
        self.content[name] = data, captions
        self.touched.add(name)

    def remove(self, name: str) -> None:
        for suffix in ("png", "txt"):
            (self.path / f"{name}.{suffix}").unlink()
        del self.content[name]
        self.touched.discard(name)

    def _name(self) -> str:
        while True:
            if (name := f"{self.random.choice('abcdefgh')}{self.random.randrange(1000)}") not in self.content:
                return name

    def change(self) -> None:
        """Add, duplicate, rename, delete, or change a picture or its captions, or damage it."""
        chance, name = self.random, self.random.choice(sorted(self.content))
        data, captions = self.content[name]
        match chance.randrange(8):
            case 0 | 1:
                self.put(self._name(), picture(chance.randrange(100)), f"number {chance.randrange(100)}")
            case 2:
                self.put(self._name(), data, f"again {chance.randrange(100)}")
            case 3:
                self.put(name, data, f"changed {chance.randrange(100)}\nand more")
            case 4:
                self.put(name, picture(chance.randrange(100)), captions)
            case 5 if len(self.content) > 5:
                self.remove(name)
            case 6:
                self.remove(name)
                self.put(self._name(), data, captions)
            case _:
                self.put(name, data[: len(data) // 2], captions)


@pytest.mark.parametrize("seed", range(12))
def test_it_equals_a_full_ingest_after_any_change(store, here, decoded, seed):
    folder = Folder(here, seed)
    for number in range(folder.random.randrange(10, 30)):
        folder.put(folder._name(), picture(number % 23), f"number {number}")
    source = {"kind": "folder", "path": str(here)}
    before = ingest(run_of(source))
    for _ in range(4):
        folder.touched.clear()
        for _ in range(folder.random.choice((1, 3, 10))):
            folder.change()
        decoded.clear()
        made = ingest(run_of(source, before))
        assert len(decoded) == len(folder.touched)
        full = ingest(run_of(source))
        expected = pictures(full)
        assert pictures(made) == expected
        counted = (*SPLITS, "read", "duplicates", "quarantined")
        assert [made.info[name] for name in counted] == [full.info[name] for name in counted]
        assert made.info["sizes"]["pictures"] == full.info["sizes"]["pictures"]
        for split in SPLITS:
            assert [c.hex() for c in contents(made, split)] == in_order(made, split)
        assert taken(made) == {shard for shard in before.info["shards"] if of(before, shard) <= set(expected)}
        for file in made.files:
            if file.asset:
                assert file.sha256 == before.file(file.name).sha256
        gone = {one[0] for one in pictures(before)} - {one[0] for one in expected}
        assert not gone & {one[0] for one in everything(made)}
        grown = made.info["grown"]
        assert grown["deleted"] == len(gone)
        assert grown["new"] == len({one[0] for one in expected} - {one[0] for one in pictures(before)})
        assert grown["shards"] == len(taken(made))
        assert ingesting.is_as_it_was(run_of(source).data, before) == (expected == pictures(before))
        assert ingesting.is_as_it_was(run_of(source).data, made)
        before = made


def of(manifest: Manifest, shard: str) -> set[tuple[str, tuple[str, ...], str]]:
    """The pictures of a shard."""
    only = manifest.model_copy(update={"info": {"shards": {shard: manifest.info["shards"][shard]}}})
    return set(pictures(only))


def in_order(manifest: Manifest, split: str) -> list[str]:
    """The hashes of a split's pictures, from its tars."""
    shards = sorted(name for name in manifest.info["shards"] if name.startswith(f"{split}-"))
    names = (name for shard in shards for name, _ in members(manifest, shard))
    return [Path(name).stem for name in names if not name.endswith(".json")]


def everything(manifest: Manifest) -> Pictures:
    """The pictures of all tars that a manifest names, whether it counts them or not."""
    shards = {file.name: 0 for file in manifest.files if file.name.endswith(".tar")}
    return pictures(manifest.model_copy(update={"info": {"shards": shards}}))


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_write_it_ends_with_the_same_bytes(store, here, monkeypatch, seed):
    folder = Folder(here, seed)
    for number in range(24):
        folder.put(folder._name(), picture(number), f"number {number}")
    source = {"kind": "folder", "path": str(here)}
    before = ingest(run_of(source))
    for _ in range(8):
        folder.change()
    wanted = run_of(source, before)
    whole = ingest(wanted)
    stored = {uri: storage.read_bytes(uri) for uri in storage.list_uris(whole.uri)}
    storage.delete_prefix(whole.uri)
    chance, left = random.Random(seed), [0]

    def dies(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **others: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            real(*arguments, **others)

        return call

    for name in ("write_bytes", "upload_file"):
        monkeypatch.setattr(storage, name, dies(getattr(storage, name)))
    kills = 0
    while True:
        left[0] = chance.randrange(3, 9) + kills
        try:
            made = ingest(wanted)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 1
    assert made == whole
    assert {uri: storage.read_bytes(uri) for uri in storage.list_uris(whole.uri)} == stored


def test_an_entry_of_a_list_is_as_it_was_with_its_captions(store, here, decoded):
    def listed(*entries: tuple[str, str]) -> dict[str, Any]:
        lines = (json.dumps({"file_name": name, "text": text}) for name, text in entries)
        (here / "metadata.jsonl").write_text("\n".join(lines))
        return {"kind": "folder", "path": str(here)}

    write(here, {f"{n}.png": picture(n) for n in range(4)})
    once = [("0.png", "zero"), ("1.png", "one"), ("2.png", "two"), ("0.png", "zero"), ("gone.png", "x")]
    before = ingest(run_of(listed(*once)))
    decoded.clear()
    made = ingest(run_of(listed(*once[:2], ("2.png", "zwei"), *once[3:], ("3.png", "three")), before))
    assert len(decoded) == 2
    assert (made.info["read"], made.info["duplicates"], made.info["quarantined"]) == (6, 1, 1)
    assert {texts for _, texts, _ in pictures(made)} == {("zero",), ("one",), ("zwei",), ("three",)}


def test_names_that_are_no_text_and_files_that_cannot_be_read(store, here, decoded):
    strange = os.fsdecode(b"caf\xe9")
    write(
        here, {f"{strange}.png": picture(1), f"{strange}.txt": "strange", "a.png": picture(2), "a.txt": "a"}
    )
    write(here, {"b.png": picture(3), "b.txt": "b"})
    (here / "outside.png").symlink_to("/etc/hostname")
    source = {"kind": "folder", "path": str(here)}
    before = ingest(run_of(source))
    assert before.info["quarantined"] == 1
    write(here, {"c.png": picture(4), "c.txt": "c"})
    decoded.clear()
    made = ingest(run_of(source, before))
    assert len(decoded) == 1
    assert pictures(made) == pictures(ingest(run_of(source)))
    (here / "outside.png").unlink()
    write(here, {"outside.png": picture(5), "outside.txt": "inside"})
    assert ("inside",) in {texts for _, texts, _ in pictures(ingest(run_of(source, made)))}


def test_an_asset_that_lacks_what_it_names_is_refused(store):
    before = ingest(run_of({"kind": "shapes", "count": 20}))
    first = min(before.info["shards"])
    spoiled = AssetWriter("images", before.settings, {}, steps.STEPS["images"].version)
    for file in before.files:
        spoiled.add(file)
    storage.delete(storage.join(before.uri, assets.NAME))
    spoiled.add_bytes(contents_name(first), b"")
    made = spoiled.finish({**before.info, "shards": {**before.info["shards"], first: 0}})
    with pytest.raises(UserError, match=r"has not all pictures that its records name: \d are missing"):
        ingest(run_of({"kind": "shapes", "count": 21}, made))


Files = dict[int, list[int]]  # numbers of files, each with the numbers of its samples


def tars(path: Path, files: Files) -> None:
    """Tars of samples."""
    path.mkdir(exist_ok=True)
    for number, samples in files.items():
        tar(path / f"{number:03d}.tar", {k: v for n in samples for k, v in sample(n).items()})


def parquets(path: Path, files: Files) -> None:
    """Parquet files of samples."""
    path.mkdir(exist_ok=True)
    for number, samples in files.items():
        rows = {"image": [picture(n) for n in samples], "caption": [f"text {n}" for n in samples]}
        pq.write_table(pa.table(rows), path / f"{number:03d}.parquet", row_group_size=2)


def source_of(path: Path) -> dict[str, Any]:
    """All tars, or parquet files, of a folder."""
    if not (names := sorted(file.name for file in path.glob("*.tar"))):
        return {"kind": "parquet", "path": str(path)}
    return {"kind": "webdataset", "urls": f"{path}/{{{','.join(names)}}}"}


@pytest.mark.parametrize("write_files", [tars, parquets])
def test_files_that_are_as_they_were_are_not_opened(store, here, decoded, monkeypatch, write_files):
    opened: list[str] = []
    real = storage.open_read
    monkeypatch.setattr(storage, "open_read", lambda uri: (opened.append(uri), real(uri))[1])
    monkeypatch.setattr("model.data.sources.parquet.count", lambda config: 0)  # which looks at all footers
    path = here / "a"
    write_files(path, {0: [0, 1, 2, 3], 2: [4, 5, 6, 2], 4: [7, 8, 9]})
    before = ingest(run_of(source_of(path)))
    generations: list[tuple[Files, str]] = [  # written, and deleted
        ({1: [10, 1], 2: [4, 5, 11, 2, 12]}, "004.*"),
        ({5: [13]}, "none"),
        ({}, "000.*"),
        ({4: [7, 8, 9], 5: [7]}, "002.*"),
    ]
    for written, deleted in generations:
        write_files(path, written)
        for file in path.glob(deleted):
            file.unlink()
        decoded.clear()
        opened.clear()
        made = ingest(run_of(source_of(path), before))
        assert len(decoded) == sum(map(len, written.values()))
        assert {int(Path(uri).stem) for uri in opened if str(path) in uri} == written.keys()
        assert pictures(made) == pictures(ingest(run_of(source_of(path))))
        before = made
    assert {texts[0] for _, texts, _ in pictures(made)} == {f"text {n}" for n in (1, 7, 8, 9, 10)}


def test_drawings_grow_by_their_number(store, decoded):
    def source(count: int) -> dict[str, Any]:
        return {"kind": "shapes", "count": count}

    before = ingest(run_of(source(40)))
    decoded.clear()
    made = ingest(run_of(source(47), before))
    assert len(decoded) == 7
    assert pictures(made) == pictures(ingest(run_of(source(47))))
    less = ingest(run_of(source(12), made))
    assert len(less.info["shards"].keys() - taken(less)) <= 3
    assert pictures(less) == pictures(ingest(run_of(source(12))))


def test_emoji_that_are_known_are_not_drawn(store, decoded, monkeypatch):
    def source(limit: int) -> dict[str, Any]:
        return {"kind": "openmoji", "limit": limit}

    before = ingest(run_of(source(12)))
    decoded.clear()
    made = ingest(run_of(source(16), before))
    assert len(decoded) == 4
    assert pictures(made) == pictures(ingest(run_of(source(16))))


# ── splits ──────────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_held_out_never_moves_into_training(store, here, decoded):
    """`validation_share` and the source's own rule change to and fro."""

    def source(hold_out: bool, count: int) -> dict[str, Any]:
        return {"kind": "shapes", "count": count, "hold_out_compositions": hold_out}

    made = ingest(run_of(source(False, 60)))
    assert not made.info["composition"]
    held_out: set[bytes] = set()
    trained: set[bytes] = set(contents(made, "train"))
    for hold_out, count, share in ((True, 70, 0.05), (False, 80, 0.6), (True, 90, 0.01)):
        held_out |= set(contents(made, "validation")) | set(contents(made, "composition"))
        flagged_before = set(contents(made, "composition"))
        made = ingest(run_of(source(hold_out, count), made, validation_share=share))
        now = {split: set(contents(made, split)) for split in SPLITS}
        assert sum(map(len, now.values())) == count
        assert not now["train"] & held_out
        assert flagged_before <= now["composition"]
        if not hold_out:
            assert trained <= now["train"]  # a larger share holds out new ones alone
        full = ingest(run_of(source(hold_out, count), validation_share=share))
        assert [one[:2] for one in pictures(made)] == [one[:2] for one in pictures(full)]
        trained = now["train"]
    assert now["composition"] > flagged_before


def test_a_picture_that_moves_within_the_folder_stays_in_its_split(store, here, decoded):
    names = {f"{n:02d}.png": picture(n) for n in range(12)} | {f"{n:02d}.txt": f"{n}" for n in range(12)}
    source = {"kind": "folder", "path": str(write(here / "a", names))}
    before = ingest(run_of(source))
    assert before.info["validation"]
    (here / "a" / "train").mkdir()
    for n in range(12):
        for suffix in ("png", "txt"):
            (here / "a" / f"{n:02d}.{suffix}").rename(here / "a" / "train" / f"x{11 - n}.{suffix}")
    decoded.clear()
    made = ingest(run_of(source, before))
    assert pictures(made) == pictures(before)
    assert taken(made) == set(before.info["shards"]) == set(made.info["shards"])  # their bytes do not move


def test_whether_pictures_are_as_they_were_is_known_from_what_was_written_anew(store, here, decoded):
    names = {f"{n:02d}.png": picture(n) for n in range(12)} | {f"{n:02d}.txt": f"{n}" for n in range(12)}
    run = run_of({"kind": "folder", "path": str(write(here, names))})
    before = ingest(run)

    def same() -> bool:
        decoded.clear()
        return ingesting.is_as_it_was(run.data, before)

    assert same()
    assert not decoded
    os.utime(here / "03.png", (1, 1))
    (here / "07.png").rename(here / "99.png")
    (here / "07.txt").rename(here / "99.txt")
    write(here, {"README.md": b"no picture", "98.png": picture(5), "98.txt": "5"})
    assert same(), "a name, a time, a duplicate, a file that is no picture"
    assert len(decoded) == 3
    write(here, {"01.txt": "other words"})
    for name in ("11", "10", "09"):
        os.utime(here / f"{name}.png", (1, 1))
    assert not same()
    assert len(decoded) < 7, "all that was written anew: it ends at the chunk with other words"
    write(here, {"01.txt": "1"})
    (here / "02.png").unlink()
    assert not same(), "a deletion"
    storage.delete(before.where("records-000000.jsonl"))
    with pytest.raises(storage.Damaged):
        same()


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ("", "train", "train"), ("", "validation", "validation"), ("", "composition", "composition"),
        ("train", "train", "train"), ("train", "validation", "train"),
        ("train", "composition", "composition"),
        ("validation", "train", "validation"), ("validation", "composition", "validation"),
        ("composition", "train", "composition"), ("composition", "validation", "composition"),
    ],
)  # fmt: skip
def test_splits_are_pinned(before, now, expected):
    assert pinned(before, now) == expected


# ── which asset it is ───────────────────────────────────────────────────────────────────────────────────


def test_a_source_that_is_as_it_was_is_the_earlier_asset(store, here):
    source = {"kind": "shapes", "count": 20}
    first = ingest(run_of(source))
    assert ingest(run_of(source, first)).uri == first.uri
    second = ingest(run_of({**source, "count": 22}, first))
    assert second.settings[growth.GROWN_FROM] == first.key
    assert ingest(run_of({**source, "count": 22}, second)).uri == second.uri


def test_what_has_grown_is_found_when_the_earlier_asset_is_gone(store):
    first = ingest(run_of({"kind": "shapes", "count": 20}))
    run = run_of({"kind": "shapes", "count": 22}, first)
    second = ingest(run)
    storage.delete(storage.join(first.uri, assets.NAME))
    assert ingest(run) == second


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
        (r"data\.image_size was 32, data\.min_side was 8", None),
        ("not there any more", lambda made: storage.delete(storage.join(made.uri, assets.NAME))),
    ],
)
def test_what_cannot_be_grown_from_is_read_in_full(store, here, reason, spoil):
    other = {"image_size": 32, "min_side": 8} if spoil is None else {}
    first = ingest(run_of({"kind": "shapes", "count": 20}, **other))
    if spoil:
        spoil(first)
    run = run_of({"kind": "shapes", "count": 22}, first)
    with pytest.raises(Unfit, match=reason):
        growth.earlier(run.origin["images"], run.data, steps.STEPS["images"].version)
    assert growth.GROWN_FROM not in steps.settings("images", run)
    assert ingest(run).uri == ingest(run_of({"kind": "shapes", "count": 22})).uri


@pytest.mark.parametrize("spoil", [storage.delete, lambda uri: storage.write_bytes(uri, b"cut off")])
def test_what_took_over_bytes_that_are_gone_is_made_again_without_them(store, spoil):
    first = ingest(run_of({"kind": "shapes", "count": 20}))
    run = run_of({"kind": "shapes", "count": 24}, first)
    made = ingest(run)
    lost = min(taken(made))
    spoil(made.where(lost))
    way = rf"{lost} .*; delete {made.uri}, which took it over from images/{first.key}, so"
    with pytest.raises(UserError, match=way):
        ingest(run)
    storage.delete_prefix(made.uri)
    again = ingest(run)
    assert not taken(again)
    assert ingest(run) == again == ingest(run_of({"kind": "shapes", "count": 24}))


def test_another_release_is_not_grown_from_but_its_contents_are_known(store):
    run = run_of({"kind": "shapes", "count": 20})
    first = ingest(run)
    old = AssetWriter("images", first.settings, {}, version=1)
    for shard in first.info["shards"]:
        old.add_file(shard, storage.join(first.uri, shard))
    made = old.finish(first.info)
    with pytest.raises(Unfit, match="another release"):
        growth.earlier(AssetRef(key=made.key, sha256=made.sha256), run.data, steps.STEPS["images"].version)
    for split in SPLITS:
        assert list(contents(made, split)) == list(contents(first, split))


# ── tokens, and stores ──────────────────────────────────────────────────────────────────────────────────


def test_only_new_shards_are_tokenized(store, tmp_path, monkeypatch):
    def run(count: int, earlier: Manifest | None = None) -> RunConfig:
        return run_of({"kind": "shapes", "count": count}, earlier, augment={"views": 2, "flip": True})

    first = run(40)
    before = ingest(first)
    models = publish_models(tmp_path / "models", first, before)
    inputs = {name: models[name] for name in ("tokenizer", "text")}
    early = make("tokens", first, {"images": before, **inputs})
    second = run(46, before)
    made = ingest(second)
    shown: list[int] = []
    real = VQVAE.encode
    monkeypatch.setattr(VQVAE, "encode", lambda self, x: (shown.append(len(x)), real(self, x))[1])
    tokens = make("tokens", second, {"images": made, **inputs})
    fresh = sum(count for name, count in made.info["shards"].items() if name not in taken(made))
    assert sum(shown) == 2 * fresh
    lent = {file.name for file in tokens.files if file.asset}
    assert lent == {name.replace(".tar", ".safetensors") for name in taken(made)}
    assert {file.asset for file in tokens.files} == {"", f"tokens/{early.key}"}
    batches = [batch.codes.tolist() for batch in TokenReader(tokens, "train", 8).ordered()]
    storage.delete_prefix(tokens.uri)
    storage.delete_prefix(early.uri)
    whole = make("tokens", second, {"images": made, **inputs})
    assert whole.sha256 == tokens.sha256
    assert not any(file.asset for file in whole.files)
    assert [batch.codes.tolist() for batch in TokenReader(whole, "train", 8).ordered()] == batches


def test_a_copy_of_the_store_grows_too(store, tmp_path, monkeypatch):
    first = ingest(run_of({"kind": "shapes", "count": 20}))
    second = ingest(run_of({"kind": "shapes", "count": 24}, first))
    shutil.copytree(store, tmp_path / "copy")
    shutil.rmtree(store)
    monkeypatch.setenv("LATENT_GPT_STORE", str(tmp_path / "copy"))
    third = ingest(run_of({"kind": "shapes", "count": 28}, second))
    assert pictures(third) == pictures(ingest(run_of({"kind": "shapes", "count": 28})))


def test_after_a_sweep_the_bytes_of_deleted_pictures_are_gone(store, here):
    """Both sets are of registered models; some pictures are deleted, and one set more grows after."""
    for number in range(24):
        write(here, {f"{number:02d}.png": picture(number), f"{number:02d}.txt": f"number {number}"})
    source = {"kind": "folder", "path": str(here)}
    first = ingest(run_of(source))
    deleted = {}  # bytes within shards, by their names there
    names = {texts[0]: content for content, texts, _ in pictures(first)}
    for number in (3, 9, 10, 17):
        for suffix in ("png", "txt"):
            (here / f"{number:02d}.{suffix}").unlink()
        deleted[names[f"number {number}"]] = b""
    for shard in first.info["shards"]:
        stems = ((Path(name).stem, name, data) for name, data in members(first, shard))
        deleted |= {stem: data for stem, name, data in stems if stem in deleted and name.endswith(".png")}
    assert all(deleted.values())
    second = ingest(run_of(source, first))
    assert taken(second)

    def found() -> set[str]:
        stored = [storage.read_bytes(uri) for uri in storage.list_uris(store)]
        return {name for name, data in deleted.items() if any(data in one for one in stored)}

    assert found() == deleted.keys()
    needed = Needed(frozenset({f"images/{first.key}", f"images/{second.key}"}), current=second.sha256)
    with uses.sweep() as still_ours:
        sweep(look(lambda: [needed], spared=0), still_ours)
    assert not found()
    assert assets.find(first.uri) is None
    assert assets.find(second.uri) == second
    assert pictures(second) == pictures(ingest(run_of(source)))
    write(here, {"03.png": picture(50), "03.txt": "another"})
    third = ingest(run_of(source, second))
    assert pictures(third) == pictures(ingest(run_of(source)))


@pytest.mark.slow
def test_s3_holds_what_was_taken_over_once(services, here, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_GPT_CACHE", str(tmp_path / "cache"))
    bucket = os.environ["LATENT_GPT_STORE"]
    tars(here, {0: [0, 1, 2, 3, 4], 1: [5, 6, 7, 8, 9], 2: [10, 11, 12, 13, 14]})

    def upload(*numbers: int) -> None:
        for number in numbers:
            storage.upload_file(here / f"{number:03d}.tar", f"{bucket}/source/{number:03d}.tar")

    upload(0, 1, 2)
    source = {"kind": "webdataset", "urls": f"{bucket}/source/{{000..002}}.tar"}
    before = ingest(run_of(source))
    tars(here, {1: [5, 6, 17, 8, 9]})
    upload(1)
    made = ingest(run_of(source, before))
    assert taken(made)
    own = storage.list_sizes(made.uri)
    assert not taken(made) & own.keys()
    assert {contents_name(shard) for shard in taken(made)} & own.keys() == set()
    assert assets.find(made.uri) == made
    full = ingest(run_of(source))
    assert pictures(made) == pictures(full)
    assert sum(own.values()) < sum(storage.list_sizes(full.uri).values())


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this thread: pictures are few."""
    monkeypatch.setattr("model.plumbing.parallel.cores", lambda: 1)


def test_sizes_and_small_pictures_of_what_is_there_still_are_kept(store, here, decoded):
    tiny = {f"{n}.png": picture(n, size=(8, 8)) for n in (1, 2)} | {"1.txt": "one", "2.txt": "two"}
    good = {f"{n}.png": picture(10 + n, size=(40, 40)) for n in range(3, 9)}
    write(here, tiny | good | {f"{n}.txt": "x" for n in range(3, 9)})
    source = {"kind": "folder", "path": str(here)}
    first = ingest(run_of(source))
    write(here, {"new.png": picture(50, size=(100, 80)), "new.txt": "new"})
    for name in ("1", "3"):
        (here / f"{name}.png").unlink()
        (here / f"{name}.txt").unlink()
    decoded.clear()
    second = ingest(run_of(source, first))
    assert decoded == [(here / "new.png").read_bytes()]
    assert first.info["sizes"] == {"pictures": 6, "side 32": 6, "longer 1.0": 6}
    grown = {"pictures": 6, "side 32": 5, "side 64": 1, "longer 1.0": 5, "longer 1.1": 1}
    assert second.info["sizes"] == grown
    assert [name for name, _, _ in small(first)] == ["1.png", "2.png"]
    assert [name for name, _, _ in small(second)] == ["2.png"]


@pytest.mark.slow
def test_images_grow_with_a_folder_in_s3(services, decoded):
    root = f"{services['LATENT_GPT_STORE']}/pictures"
    source = {"kind": "folder", "path": root}
    for number in range(12):
        storage.write_bytes(f"{root}/{number:02d}.png", picture(number))
        storage.write_bytes(f"{root}/{number:02d}.txt", f"number {number}".encode())
    first = ingest(run_of(source))
    decoded.clear()
    storage.write_bytes(f"{root}/03.txt", b"number x")  # as long as it was
    storage.write_bytes(f"{root}/12.png", picture(12))
    storage.write_bytes(f"{root}/12.txt", b"number 12")
    storage.delete(f"{root}/07.png")
    grown = ingest(run_of(source, first))
    assert decoded == [picture(3), picture(12)]
    assert {key: grown.info["grown"][key] for key in ("new", "deleted", "changed")} == {
        "new": 1,
        "deleted": 1,
        "changed": 1,
    }
    captions = {text for _, texts, _ in pictures(grown) for text in texts}
    assert captions == {f"number {n}" for n in range(13) if n not in (3, 7)} | {"number x"}
