"""The tokenize job: codes are the tokenizer's, bytes do not depend on who makes them or how often."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from model.data.image_shards import load_images
from model.data.images import to_tensor
from model.data.token_shards import TokenReader
from model.errors import UserError
from model.nets.clip import tokenize as text_ids
from model.nets.tokenizers import load_tokenizer
from model.nets.vqvae import VQVAE
from model.plumbing import assets, cache, storage
from model.plumbing.parallel import cores
from model.steps import job
from model.training.tokenize import BATCH_PIXELS, PARTS, token_name
from tests.instances import config, ingest, make_in_rank, publish_models, run_job
from tests.ranks import two_ranks

DATA = {
    "source": {"kind": "shapes", "count": 64},
    "image_size": 16,
    "validation_share": 0.2,
    "shard_images": 20,
    "augment": {"views": 3, "flip": True, "shift": 0.2, "scale": 0.2},
}


@pytest.fixture
def spec(store, tmp_path):
    run = config(data=DATA)
    images = ingest(run.data)
    models = publish_models(tmp_path / "models", run, images)
    inputs = {"images": images, "tokenizer": models["tokenizer"], "text": models["text"]}
    return job("tokens", run, "run", inputs), inputs


def test_codes_and_captions_are_those_of_the_pictures(spec, tmp_path, monkeypatch):
    """Encoded three pictures at a time, by threads that compute alone."""
    monkeypatch.setitem(BATCH_PIXELS, "cpu", 3 * 16 * 16)
    threads = set()
    real = VQVAE.encode

    def encode(self, images):
        threads.add(threading.get_ident())
        assert torch.is_inference_mode_enabled()
        assert torch.get_num_threads() == 1
        return real(self, images)

    monkeypatch.setattr(VQVAE, "encode", encode)
    job, inputs = spec
    tokens = run_job(job)
    assert tokens.info["vocabulary"] == 16
    assert tokens.info["grid"] == [4, 4]
    assert threads
    assert cores() == 1 or threading.main_thread().ident not in threads
    monkeypatch.setattr(VQVAE, "encode", real)
    tokenizer = load_tokenizer(cache.folder(inputs["tokenizer"]))
    for split in ("train", "validation", "composition"):
        pixels, captions = load_images(inputs["images"], split)
        got = list(TokenReader(tokens, split, 8).ordered())
        assert torch.equal(torch.cat([b.codes for b in got]), tokenizer.encode(to_tensor(pixels)).flatten(1))
        expected = text_ids([c[0] for c in captions], 24)
        assert torch.equal(torch.cat([b.ids for b in got]), expected)
        assert torch.equal(torch.cat([b.mask for b in got]), expected != 0)


def test_other_views_are_other_pictures(spec):
    job, _ = spec
    tokens = run_job(job)
    reader = TokenReader(tokens, "train", tokens.info["train"])
    plain = {tuple(row) for b in reader.ordered() for row in b.codes.tolist()}
    batches = reader.batches()
    drawn = {tuple(row) for _ in range(20) for row in next(batches).codes.tolist()}
    assert plain < drawn
    assert len(drawn) > 1.5 * len(plain)


def test_repeated_it_is_found(spec, monkeypatch):
    job, _ = spec
    first = run_job(job)
    monkeypatch.setattr("model.training.tokenize.load_tokenizer", None)  # nothing is loaded again
    assert run_job(job) == first


def test_killed_between_shards_it_resumes_to_the_same_bytes(spec, monkeypatch):
    job, _ = spec
    whole = run_job(job)
    assert not storage.list_uris(storage.join(job.output, PARTS))
    storage.delete_prefix(job.output)

    import model.training.tokenize as module

    real, made = module.encode_shard, []

    def dies_at_the_third(*arguments):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(1)
        return real(*arguments)

    monkeypatch.setattr(module, "encode_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_job(job)
    assert len(storage.list_uris(storage.join(job.output, PARTS))) == 2
    made.clear()
    monkeypatch.setattr(module, "encode_shard", lambda *a: (made.append(1), real(*a))[1])
    resumed = run_job(job)
    assert len(made) == len(whole.files) - 2
    assert resumed == whole


def test_wrong_tokenizer_for_the_side(spec):
    job, inputs = spec
    odd = inputs["images"].model_copy(update={"info": {**inputs["images"].info, "image_size": 18}})
    path = Path(odd.uri, "manifest.json")
    path.write_text(odd.model_dump_json())
    with pytest.raises(UserError, match=r"image_size \(18\) must be a multiple of the tokenizer's factor"):
        run_job(job)


def test_damaged_image_shard_is_named(spec):
    job, inputs = spec
    path = Path(inputs["images"].uri, "train-000001.tar")
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-000001\.tar is damaged"):
        run_job(job)


def test_names():
    assert token_name("train-000003.tar") == "train-000003.safetensors"


@pytest.mark.slow
def test_two_workers_make_the_same_asset_as_one(spec, store):
    job, inputs = spec
    alone = run_job(job)
    storage.delete_prefix(job.output)
    uris = {name: manifest.uri for name, manifest in inputs.items()}
    two_ranks(make_in_rank, store, "tokens", job.config.model_dump_json(), uris)
    together = assets.load(job.output)
    assert together.files == alone.files
    assert together.info == alone.info
