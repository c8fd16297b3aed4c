"""The tokenize job: image shards to token shards, each rank its own, resumable shard by shard.

With a GPU, all cores decode pictures while the frozen tokenizer encodes the batch before; without one, each
core decodes and encodes batches of its own. Of each picture `views` are encoded: view 0 as it is, the others
flipped, shifted and zoomed by chances that follow from the seed and the shard's name, so a shard's bytes do
not depend on which worker makes it, or when. Of captions only the token ids are kept: the text tower runs in
the training step (figures in `docs/EXPERIMENTS.md`). Token shards of image shards that were taken over are
taken over themselves, from the asset that was made of the earlier images in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

from model import steps
from model.config import Augment
from model.data.image_shards import TarEntry, decode_entries, tar_index
from model.data.images import draw_views, to_tensor, warp
from model.data.token_shards import TokenShard
from model.errors import UserError
from model.nets.clip import tokenize as text_ids
from model.nets.tokenizers import Tokenizer, load_tokenizer
from model.plumbing import cache, speech, storage
from model.plumbing.assets import AssetWriter, File, Manifest, find
from model.plumbing.distributed import derive_seed
from model.plumbing.parallel import parallel_map, single_threaded
from model.plumbing.worker import Job, run_worker

# Pixels encoded at once: on CPU so few that activations stay in its cache, and in memory that malloc keeps.
BATCH_PIXELS = {"cpu": 1 << 17, "cuda": 1 << 23}
PARTS = "parts"  # one entry per finished shard, below the asset, until it is complete


def main(job: Job) -> Manifest | None:
    """Make the tokens, on all processes; the manifest on the main one, None on the others.

    Raises:
        UserError: an input is damaged, or does not fit the others.
    """
    config, processes, output, images = job.config, job.processes, job.output, job.inputs["images"]
    tokenizer = load_tokenizer(cache.folder(job.inputs["tokenizer"]), processes.device)
    context_length = _context_length(job.inputs["text"])
    side = images.info["image_size"]
    if side % tokenizer.factor:
        raise UserError(
            f"data.image_size ({side}) must be a multiple of the tokenizer's factor ({tokenizer.factor})"
        )
    shards: dict[str, int] = dict(sorted(images.info["shards"].items()))
    names = list(shards)
    if processes.is_main:
        _take_over(job, images)
    processes.barrier()
    finished = {Path(uri).stem for uri in storage.list_uris(storage.join(output.uri, PARTS))}
    processes.barrier()  # nobody adds a part before everybody has looked
    todo = [name for name in names if token_name(name) not in finished]
    mine = todo[processes.rank :: processes.world]
    total = sum(shards[name] for name in mine) * config.data.augment.views
    progress = job.progress(total, "img", counted="view")
    encoded = 0

    def tick(pictures: int) -> None:
        nonlocal encoded
        encoded += pictures
        progress.update(encoded)

    def encoded_shard(name: str) -> tuple[np.ndarray, list[list[list[int]]]]:
        entries = tar_index(cache.path(images, name))
        views = chances(name, len(entries), config.data.augment, config.seed)
        codes = encode_shard(entries, views, tokenizer, side, processes.device, tick)
        return codes, caption_ids(entries, context_length)

    for name in mine:
        codes, captions = cache.use(images, [name], partial(encoded_shard, name))
        data = TokenShard.to_bytes(codes, captions, tokenizer.vocabulary)
        _count(output, output.add_bytes(token_name(name), data))
    processes.barrier()
    made = None
    if processes.is_main:
        made = _finish(output, images, tokenizer, context_length, config.data.augment)
    processes.barrier()
    return made


def _take_over(job: Job, images: Manifest) -> None:
    """Count as finished what tokens of the earlier images have: the same shards, encoded the same way."""
    from_earlier = {file.name for file in images.files if file.asset}
    if not from_earlier:
        return
    output = job.output
    try:
        earlier = find(steps.earlier_tokens(job.spec, images))
    except UserError:  # a part of it is gone
        earlier = None
    if not earlier:
        return
    wanted = {token_name(name) for name in images.info["shards"] if name in from_earlier}
    taken = [file for file in earlier.files if file.name in wanted]
    for file in taken:
        _count(output, earlier.lent(file))
    speech.say(job.spec.name, f"takes over {len(taken)} shards of {earlier.uri}")


def _count(output: AssetWriter, file: File) -> None:
    """Note that a shard is finished."""
    part = storage.join(output.uri, PARTS, f"{file.name}.json")
    storage.write_bytes(part, file.model_dump_json().encode())


def _context_length(text: Manifest) -> int:
    """How many tokens the text tower reads; its weights are not needed to know."""
    description = json.loads(storage.read_bytes(text.where("config.json")))
    length: int = description["architecture"]["text_cfg"]["context_length"]
    return length


def _finish(
    output: AssetWriter, images: Manifest, tokenizer: Tokenizer, context_length: int, augment: Augment
) -> Manifest:
    for uri in storage.list_uris(storage.join(output.uri, PARTS)):
        output.add(File.model_validate_json(storage.read_bytes(uri)))
    grid = images.info["image_size"] // tokenizer.factor
    return output.finish(
        {
            "vocabulary": tokenizer.vocabulary,
            "grid": [grid, grid],
            "tokens": grid * grid,
            "views": augment.views,
            "context_length": context_length,
            "shards": {token_name(name): count for name, count in images.info["shards"].items()},
            **{split: images.info[split] for split in ("train", "validation", "composition")},
        },
        scratch=PARTS,
    )


def token_name(image_shard: str) -> str:
    """The token shard of an image shard."""
    return image_shard.removesuffix(".tar") + ".safetensors"


def chances(shard: str, count: int, augment: Augment, seed: int) -> torch.Tensor:
    """The views of a shard's pictures, float (count, V, 4), for `warp`; view 0 changes nothing."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "views", shard))
    views = draw_views(count * augment.views, augment, generator).view(count, augment.views, 4)
    views[:, 0] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    return views


def encode_shard(
    entries: list[TarEntry],
    views: torch.Tensor,
    tokenizer: Tokenizer,
    side: int,
    device: torch.device,
    tick: Callable[[int], None],
) -> np.ndarray:
    """Codes (N, V, T) of a shard's pictures; `tick` is told of every view encoded."""
    per_batch = max(1, BATCH_PIXELS[device.type] // (side * side))
    parts = [slice(first, first + per_batch) for first in range(0, len(entries), per_batch)]

    def decode(part: slice) -> torch.Tensor:
        return decode_entries(entries[part])

    def encode(pixels: torch.Tensor, part: slice) -> np.ndarray:
        with torch.inference_mode():  # of this thread alone
            plain = to_tensor(pixels.to(device, non_blocking=True))
            found = [
                tokenizer.encode(warp(plain, views[part, view]) if view else plain)
                for view in range(views.shape[1])
            ]
            return torch.stack(found, dim=1).flatten(2).cpu().numpy()

    def results() -> Generator[np.ndarray, None, None]:
        if device.type == "cpu":
            with single_threaded():
                yield from parallel_map(lambda part: encode(decode(part), part), parts, threads=True)
        else:
            yield from map(encode, parallel_map(decode, parts, threads=True), parts)

    codes = np.empty((len(entries), views.shape[1], (side // tokenizer.factor) ** 2), np.int64)
    with closing(results()) as every:
        for part, found in zip(parts, every, strict=True):
            codes[part] = found
            tick(found.shape[0] * found.shape[1])
    return codes


def caption_ids(entries: list[TarEntry], context_length: int) -> list[list[list[int]]]:
    """For each picture, the token ids of each of its captions, without padding."""
    flat = [caption for entry in entries for caption in entry.captions]
    rows = iter(text_ids(flat, context_length).tolist())
    return [[_unpadded(next(rows)) for _ in entry.captions] for entry in entries]


def _unpadded(ids: list[int]) -> list[int]:
    return ids[: ids.index(max(ids)) + 1]  # the end token has the largest id


if __name__ == "__main__":
    run_worker(main)
