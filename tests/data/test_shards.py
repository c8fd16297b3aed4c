"""Reading shards: every picture once an epoch, the same order for any number of ranks, damage noticed."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from model.config import DataConfig, ShapesSource
from model.data import image_shards
from model.data.image_shards import image_batches, load_images
from model.data.images import to_tensor
from model.data.order import share_of, shuffled
from model.data.token_shards import TokenReader, TokenShard
from model.errors import UserError
from model.plumbing import cache, storage
from model.plumbing.assets import AssetWriter
from tests.instances import ingest

TOKENS, CONTEXT = 6, 5


# ── order ───────────────────────────────────────────────────────────────────────────────────────────────


def positions(sizes, seed, count, start=0, window=10):
    """(shard, row, view chance) of `count` positions."""
    found = []
    for part in shuffled(sizes, seed, start, window):
        skip = max(0, start - part.position)
        found += list(zip(part.shard[skip:], part.row[skip:], part.chance[skip:, 0], strict=True))
        if len(found) >= count:
            return found[:count]
    return None


@pytest.mark.parametrize("window", [1, 10, 1000])
def test_an_epoch_visits_everything_once(window):
    sizes = [7, 3, 12, 1, 9]
    for epoch in range(3):
        seen = {(s, r) for s, r, _ in positions(sizes, 5, 32, start=32 * epoch, window=window)}
        assert seen == {(s, r) for s, size in enumerate(sizes) for r in range(size)}


def test_order_changes_with_seed_and_epoch_and_not_by_itself():
    sizes = [50, 50]
    first = positions(sizes, 1, 100)
    assert first == positions(sizes, 1, 100)
    assert first != positions(sizes, 2, 100)
    assert first != positions(sizes, 1, 100, start=100)


def test_resume_continues_at_any_position():
    sizes = [7, 3, 12, 1, 9]
    everything = positions(sizes, 3, 100)
    for start in (0, 1, 9, 31, 32, 33, 70):
        assert positions(sizes, 3, 100 - start, start) == everything[start:]


def test_windows_mix_across_shards():
    window = next(shuffled([1000] * 10, 0, window=100_000))
    assert len(set(window.shard[:100])) == 10
    assert abs(np.corrcoef(np.arange(10_000), window.row)[0, 1]) < 0.05


def test_ranks_share_each_batch():
    window = next(shuffled([40], 0))
    parts = [share_of(window, 8, 8, rank, 4) for rank in range(4)]
    assert sorted(np.concatenate(parts)) == list(range(8, 40))
    assert parts[1].tolist()[:4] == [10, 11, 18, 19]


# ── pictures ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENT_GPT_STORE", str(tmp_path_factory.mktemp("store")))
        yield ingest(DataConfig(source=ShapesSource(count=60), image_size=16, shard_images=25))


def test_load_images(images):
    pixels, captions = load_images(images, "train")
    assert pixels.shape == (images.info["train"], 3, 16, 16)
    assert pixels.dtype == torch.uint8
    assert all(len(c) == 2 for c in captions)
    some, _ = load_images(images, "train", limit=7)
    assert torch.equal(some, pixels[:7])
    assert to_tensor(some).min() >= -1


@pytest.mark.parametrize("resident", [0, 1 << 30])
def test_image_batches_are_the_same_streamed_and_resident(images, monkeypatch, resident):
    monkeypatch.setattr("model.data.image_shards.RESIDENT_BYTES", resident)
    pixels, captions = load_images(images, "train")
    known = {picture.numpy().tobytes(): texts for picture, texts in zip(pixels, captions, strict=True)}
    count = images.info["train"]
    got = list(islice(image_batches(images, "train", 4, seed=1), 2 * count // 4))
    for batch in got:
        for picture, caption in zip(batch.images, batch.captions, strict=True):
            assert caption in known[picture.numpy().tobytes()]
    first_epoch = {p.numpy().tobytes() for b in got for p in b.images}
    assert len(first_epoch) == count
    # two ranks, resumed: the same pictures and captions
    resumed = [image_batches(images, "train", 4, 1, start=8, rank=r, world=2) for r in range(2)]
    for whole, a, b in zip(got[2:10], *resumed, strict=False):
        assert torch.equal(whole.images, torch.cat([a.images, b.images]))
        assert whole.captions == a.captions + b.captions


def test_resident_and_streamed_agree(images, monkeypatch):
    monkeypatch.setattr("model.data.image_shards.RESIDENT_BYTES", 0)
    streamed = list(islice(image_batches(images, "train", 8, seed=3), 12))
    monkeypatch.undo()
    for a, b in zip(streamed, image_batches(images, "train", 8, seed=3), strict=False):
        assert torch.equal(a.images, b.images)
        assert a.captions == b.captions


def test_one_tiny_shard_does_not_have_all_indexes_held(images, monkeypatch):
    sizes = [size for name, size in images.info["shards"].items() if name.startswith("train-")]
    assert len(sizes) == 3
    assert 2 * min(sizes) < max(sizes)
    read = []
    index = image_shards.shard_index
    monkeypatch.setattr(image_shards, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(image_shards, "IMAGE_WINDOW", min(sizes))
    monkeypatch.setattr(image_shards, "shard_index", lambda *what: read.append(what) or index(*what))
    batches = image_batches(images, "train", 1, seed=1)
    for _ in islice(batches, sum(sizes)):
        pass
    read.clear()
    for _ in islice(batches, 8 * sum(sizes)):
        pass
    assert read


def test_empty_split_is_named(images):
    empty = images.model_copy(update={"info": {"shards": {}, "image_size": 16}})
    with pytest.raises(UserError, match="no picture of split 'validation'"):
        load_images(empty, "validation")


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────


def token_set(store, sizes=(10, 4, 17), views=3, vocabulary=2000, monkeypatch=None):
    """Codes say where they are: shard·1000 + row, then the view, then noise; captions repeat the row."""
    monkeypatch.setenv("LATENT_GPT_STORE", str(store))
    writer = AssetWriter("tokens", {"sizes": list(sizes), "vocabulary": vocabulary}, {})
    rng = np.random.default_rng(0)
    shards = {}
    for number, size in enumerate(sizes):
        codes = rng.integers(0, vocabulary, (size, views, TOKENS))
        codes[:, :, 0] = number * 100 + np.arange(size)[:, None]
        codes[:, :, 1] = np.arange(views)
        captions = [[[row + 1] * (1 + c) for c in range(1 + row % 3)] for row in range(size)]
        name = f"train-{number:06d}.safetensors"
        writer.add_bytes(name, TokenShard.to_bytes(codes, captions, vocabulary))
        shards[name] = size
    return writer.finish({"shards": shards, "tokens": TOKENS, "context_length": CONTEXT})


def test_token_epoch_captions_and_views(tmp_path, monkeypatch):
    manifest = token_set(tmp_path, monkeypatch=monkeypatch)
    got = list(islice(TokenReader(manifest, "train", 31).batches(), 40))
    assert all(sorted(b.codes[:, 0].tolist()) == sorted(got[0].codes[:, 0].tolist()) for b in got)
    assert len(set(got[0].codes[:, 0].tolist())) == 31
    views, lengths = set(), {}
    for batch in got:
        assert batch.codes.dtype == batch.ids.dtype == torch.int64
        assert batch.codes.shape == (31, TOKENS)
        views |= set(batch.codes[:, 1].tolist())
        for codes, ids, mask in zip(*batch, strict=True):
            row = codes[0].item() % 100
            assert ids[mask].unique().tolist() == [row + 1]
            assert (ids[~mask] == 0).all()
            lengths.setdefault(row % 3, set()).add(int(mask.sum()))
    assert views == {0, 1, 2}
    assert lengths == {0: {1}, 1: {1, 2}, 2: {1, 2, 3}}


@pytest.mark.parametrize("window", [1, 12, 1000])
@pytest.mark.parametrize("batch_size", [4, 6, 40])
def test_token_resume_with_other_ranks(tmp_path, monkeypatch, window, batch_size):
    manifest = token_set(tmp_path, monkeypatch=monkeypatch)
    monkeypatch.setattr("model.data.token_shards.WINDOW", window)
    monkeypatch.setattr("model.data.order.shuffled.__defaults__", (0, window))
    whole = list(islice(TokenReader(manifest, "train", batch_size, seed=7).batches(), 30))
    for step, world in ((0, 1), (0, 2), (3, 2), (11, 2), (25, 1)):
        ranks = [
            TokenReader(manifest, "train", batch_size, 7, rank, world).batches(step * batch_size)
            for rank in range(world)
        ]
        for expected, *parts in zip(whole[step:], *ranks, strict=False):
            for field in range(3):
                assert torch.equal(expected[field], torch.cat([part[field] for part in parts]))


def test_token_ordered_is_the_plain_view_once(tmp_path, monkeypatch):
    manifest = token_set(tmp_path, monkeypatch=monkeypatch)
    got = list(TokenReader(manifest, "train", 8).ordered())
    codes = torch.cat([b.codes for b in got])
    assert codes[:, 0].tolist() == [*range(10), *range(100, 104), *range(200, 217)]
    assert (codes[:, 1] == 0).all()
    assert all(b.mask.sum(1).eq(1).all() for b in got)
    assert sum(len(b.codes) for b in TokenReader(manifest, "train", 8).ordered(limit=12)) == 12
    ranks = [list(TokenReader(manifest, "train", 16, rank=r, world=2).ordered()) for r in range(2)]
    shared = [part.codes.tolist() for parts in zip(*ranks, strict=True) for part in parts if len(part.codes)]
    assert shared == [batch.codes.tolist() for batch in got]  # the same parts whatever the number of ranks


@pytest.mark.parametrize(("limit", "shards"), [(3, 1), (10, 1), (11, 2), (14, 2), (15, 3), (0, 3)])
def test_shards_beyond_the_limit_are_not_fetched(tmp_path, monkeypatch, limit, shards):
    manifest = token_set(tmp_path, monkeypatch=monkeypatch)
    fetched, use = [], cache.use
    monkeypatch.setattr(cache, "use", lambda of, names, do: fetched.extend(names) or use(of, names, do))
    got = list(TokenReader(manifest, "train", 8).ordered(limit))
    assert sum(len(batch.codes) for batch in got) == (limit or 31)
    assert fetched == [f"train-{number:06d}.safetensors" for number in range(shards)]


def test_long_captions_are_cut_to_the_context(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_GPT_STORE", str(tmp_path))
    writer = AssetWriter("tokens", {}, {})
    data = TokenShard.to_bytes(np.zeros((1, 1, TOKENS)), [[[9] * 50]], 10)
    writer.add_bytes("train-000000.safetensors", data)
    info = {"shards": {"train-000000.safetensors": 1}, "tokens": TOKENS, "context_length": CONTEXT}
    batch = next(TokenReader(writer.finish(info), "train", 1).batches())
    assert batch.ids.tolist() == [[9] * CONTEXT]
    assert batch.mask.all()


def test_large_vocabularies_are_kept(tmp_path):
    codes = np.array([[[70_000, 1, 2]]])
    path = tmp_path / "a.safetensors"
    path.write_bytes(TokenShard.to_bytes(codes, [[[70_001]]], 100_000))
    shard = TokenShard.open(path)
    assert (shard.codes == codes).all()
    assert shard.caption_ids.tolist() == [70_001]


def test_damaged_shard_is_named(tmp_path, monkeypatch):
    manifest = token_set(tmp_path, monkeypatch=monkeypatch)
    path = next(tmp_path.rglob("train-000001.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-000001\.safetensors"):
        next(TokenReader(manifest, "train", 31).batches())


def test_uneven_batch_is_refused(tmp_path, monkeypatch):
    manifest = token_set(tmp_path, monkeypatch=monkeypatch)
    with pytest.raises(UserError, match=r"batch_size \(5\) must be a multiple of the processes \(2\)"):
        TokenReader(manifest, "train", 5, world=2)


# ── cache ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A `tokens` asset that claims to be in S3, with downloads served from the local store and counted."""
    manifest = token_set(tmp_path / "store", monkeypatch=monkeypatch)
    local = manifest.uri
    monkeypatch.setenv("LATENT_GPT_CACHE", str(tmp_path / "cache"))
    calls = []
    real = storage.download_file

    def download(uri, path, sha256=None):
        calls.append(uri)
        real(uri.replace("s3://bucket", local), path, sha256)

    monkeypatch.setattr(storage, "download_file", download)
    return manifest.at("s3://bucket"), calls


def test_shards_are_downloaded_once_and_verified(remote):
    manifest, calls = remote
    for _ in range(2):
        batch = next(TokenReader(manifest, "train", 31).batches())
        assert len(batch.codes) == 31
    assert len(calls) == 3
    cache.path(manifest, manifest.files[0].name).write_bytes(b"damaged")
    next(TokenReader(manifest, "train", 31).batches())
    assert len(calls) == 4


def test_more_shards_than_the_cache_holds_are_read(remote, tmp_path, monkeypatch):
    manifest, _ = remote
    largest = max(file.size for file in manifest.files)
    monkeypatch.setenv("LATENT_GPT_CACHE_GIB", str(1.2 * largest / 2**30))
    for batch in islice(TokenReader(manifest, "train", 10).batches(), 20):
        assert len(batch.codes) == 10
        copies = (tmp_path / "cache").rglob("*.safetensors")
        assert sum(copy.stat().st_size for copy in copies) <= 1.2 * largest
