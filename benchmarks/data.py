"""Rows 5, 6 and 8: picture files to pixels, to token shards, token shards to batches; memory as data grows.

mosaicml-streaming is measured where `build/peers` has it (see `peers.txt`).
"""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import FLOOR, Part, Row, compare, copy_bandwidth
from benchmarks.tokenizer import plain_codes
from model.config import DataConfig, FolderSource, RunConfig, ShapesSource, VQVAEConfig, parse_config
from model.data import ingest as ingesting
from model.data.growth import GROWN_FROM
from model.data.image_shards import decode_entries, tar_index
from model.data.images import decode, encode, to_tensor
from model.data.packing import SPLITS
from model.data.token_shards import TokenReader, TokenShard
from model.nets.tokenizers import Tokenizer, load_tokenizer
from model.nets.vqvae import VQVAE
from model.plumbing import cache, storage, worker
from model.plumbing.assets import AssetWriter, Manifest
from model.plumbing.checkpoints import save_model
from model.plumbing.parallel import cores, parallel_map, single_threaded
from model.steps import STEPS, image_settings, job
from model.training import tokenize
from model.training.tokenize import BATCH_PIXELS

SIDE = 256  # pixels
WIDTH, HEIGHT = 320, 288  # of the files of row 6
ALIKE = 0.9  # share of codes that fp32 and Pillow's last bit leave equal; other pictures share few
PEERS = Path(__file__).parents[1] / "build" / "peers"


@contextmanager
def store() -> Iterator[Path]:
    """An empty local store, named by the environment, gone afterwards."""
    before = os.environ.get("LATENT_GPT_STORE")
    with tempfile.TemporaryDirectory(prefix="latent-gpt-bench-") as folder:
        os.environ["LATENT_GPT_STORE"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop("LATENT_GPT_STORE")
            if before is not None:
                os.environ["LATENT_GPT_STORE"] = before


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours with grain: compresses as photographs do."""
    rng = np.random.default_rng(seed)
    cell = width // 32
    coarse = Image.fromarray(rng.integers(0, 256, (height // cell, 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.normal(0, 6, (height, width, 3)).astype(np.int16)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


# ── row 5 ───────────────────────────────────────────────────────────────────────────────────────────────


def pixels(device: torch.device) -> Iterator[Row]:
    """JPEG files to 256 px, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for width, height, count in ((500, 375, 24), (2000, 1500, 6)):
            yield _pixels(width, height, count)
    finally:
        torch.set_num_threads(threads)


def _pixels(width: int, height: int, count: int) -> Row:
    from torchvision import transforms

    files = []
    for seed in range(count):
        buffer = io.BytesIO()
        photo(seed, width, height).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    config = DataConfig(source=ShapesSource(), image_size=SIDE)

    def plain(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))

    cut = transforms.Compose([transforms.Resize(SIDE, antialias=True), transforms.CenterCrop(SIDE)])

    def near(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
        """Another filter gives other pixels; the picture must be the same."""
        return all(_psnr(a, b) > 30 for a, b in zip(ours, theirs, strict=True))

    comparison = compare(
        {
            "ours": lambda: [decode(data, config) for data in files],
            "PIL, Lanczos": lambda: [plain(data) for data in files],
            "torchvision": lambda: [np.asarray(cut(Image.open(io.BytesIO(d)).convert("RGB"))) for d in files],
        },
        rounds=9,
        same=near,
    )
    return comparison.row(
        5,
        f"JPEG {width}x{height} to {SIDE} px, one core",
        amount=count,
        unit="img/s",
        goals={"PIL, Lanczos": 2},
        note="Ours checks format, size and EXIF too.",
    )


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.square(a.astype(float) - b).mean())))


# ── row 6 ───────────────────────────────────────────────────────────────────────────────────────────────


def files_to_tokens(device: torch.device) -> Iterator[Row]:
    """A folder of pictures and captions to token shards, end to end."""
    count = 128 if device.type == "cpu" else 512
    with tempfile.TemporaryDirectory() as scratch, store() as root:
        folder = Path(scratch)
        for number in range(count):
            photo(number, WIDTH, HEIGHT).save(folder / f"{number:05d}.png", compress_level=1)
            (folder / f"{number:05d}.txt").write_text(f"picture number {number}")
        yield from _files_to_tokens(folder, root, count, device)


def _files_to_tokens(folder: Path, root: Path, count: int, device: torch.device) -> Iterator[Row]:
    run = _run(folder)
    models = _models(run)
    tokenizer = load_tokenizer(cache.folder(models["tokenizer"]), device)
    turn = iter(range(10**6))

    plain_net = copy.deepcopy(tokenizer).to(memory_format=torch.contiguous_format)

    def ours() -> np.ndarray:
        # another seed, another asset: nothing is found again
        fresh = run.model_copy(update={"seed": next(turn)})
        os.environ["LATENT_GPT_STORE"] = str(root / f"run{fresh.seed}")
        images = ingest(fresh.data)
        tokens = worker.run(
            job("tokens", fresh, "bench", {"images": images, **models}), tokenize.main, track=False
        )
        assert tokens
        return np.concatenate([batch.codes.numpy() for batch in TokenReader(tokens, "train", 64).ordered()])

    def one_by_one(
        data: Dataset[torch.Tensor], net: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[], np.ndarray]:
        def extract() -> np.ndarray:
            target = root / f"npy{next(turn)}"
            target.mkdir()
            with torch.inference_mode():
                for number, image in enumerate(DataLoader(data, batch_size=1, num_workers=cores())):
                    codes = net(to_tensor(image.to(device)))
                    np.save(target / f"{number:05d}.npy", codes.flatten(1).cpu().numpy())
            return np.concatenate([np.load(path) for path in sorted(target.iterdir())])

        return extract

    ways = {
        "ours": ours,
        "plain": one_by_one(Plain(folder), lambda image: plain_codes(plain_net, image)),
        "per sample": one_by_one(Pictures(folder, run.data), tokenizer.encode),
    }
    comparison = compare(ways, device, rounds=5, same=lambda a, b: float((a == b).mean()) > ALIKE)
    equal = {name: float((ways["ours"]() == ways[name]()).mean()) for name in ("plain", "per sample")}
    stages, rates = _stages(folder, root, run, tokenizer, device)
    yield comparison.row(
        6,
        f"{count} PNG files to token shards, {SIDE} px",
        amount=count,
        unit="img/s",
        goals={"plain": 10, FLOOR: 0.5},
        floor=rates["model"],
        note=f"Floor: the tokenizer alone: {stages['model'] / sum(stages.values()):.0%} of all. Plain: PIL,"
        " torchvision, DataLoader, the net in NCHW and fp32, one npy a picture; per sample: this loop with"
        f" our decoder and net. Codes equal to ours: {equal['plain']:.1%} and {equal['per sample']:.1%}. Ours"
        " also validates, removes duplicates, splits, shards and hashes.",
    )
    yield Row(
        6,
        "the same, stage by stage",
        "img/s",
        rates,
        note="One stage after the other, in one thread but for the model. The first five are ingest, the"
        " others tokens. "
        + (
            "Written to and fetched from S3 on loopback, checksums verified."
            if device.type == "cpu"
            else "Written to a local folder; to fetch is to verify."
        ),
    )
    yield _files_to_shards(folder, root, run, count)


def _stages(
    folder: Path, root: Path, run: RunConfig, tokenizer: Tokenizer, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds per picture of each stage of the way from files to token shards, and the rates."""
    if device.type == "cuda":  # the GPU machine has no S3
        os.environ["LATENT_GPT_STORE"] = str(root / "stages")
        return _stage_by_stage(folder, root, run, tokenizer, device)
    from pipelines.embedded.services import services

    os.environ.pop("LATENT_GPT_STORE")
    with services(root / "state"):
        return _stage_by_stage(folder, root, run, tokenizer, device)


def _stage_by_stage(
    folder: Path, root: Path, run: RunConfig, tokenizer: Tokenizer, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    paths = sorted(folder.glob("*.png"))[:32]
    files = [path.read_bytes() for path in paths]
    pixels = [decode(data, run.data) for data in files]
    encoded = [encode(picture, lossless=True)[1] for picture in pixels]
    batch = to_tensor(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()).to(device)
    images = ingest(run.data)
    shards = [cache.path(images, name) for name in images.info["shards"]]
    entries = [entry for shard in shards for entry in tar_index(shard)][: len(paths)]
    pictures = sum(images.info["shards"].values())
    codes = np.zeros((len(paths), 1, (SIDE // tokenizer.factor) ** 2), np.int64)
    data = b"".join(encoded)
    writer = AssetWriter("tokens", {"bench": "stages"}, {})

    parts = batch.split(max(1, BATCH_PIXELS[device.type] // SIDE**2))

    def codes_of(part: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return tokenizer.encode(part)

    def model() -> None:
        if device.type == "cuda":
            list(map(codes_of, parts))
            return
        with single_threaded():  # as `tokenize` does
            list(parallel_map(codes_of, parts, threads=True))

    def fetch_shards() -> None:
        cache._right.clear()  # each file is verified once per process
        for name in images.info["shards"]:
            cache.path(images, name)

    def unpacked(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data)))

    ways: dict[str, Callable[[], object]] = {
        "read": lambda: [path.read_bytes() for path in paths],
        "decode": lambda: [unpacked(data) for data in files],
        "decode and resize": lambda: [decode(data, run.data) for data in files],
        "encode": lambda: [encode(picture, lossless=True) for picture in pixels],
        "write": lambda: writer.add_bytes("train-000000.tar", data),
        "fetch": fetch_shards,
        "decode again": lambda: decode_entries(entries),
        "model": model,
        "write tokens": lambda: writer.add_bytes(
            "train-000000.safetensors", TokenShard.to_bytes(codes, [[[1]]] * len(paths), tokenizer.vocabulary)
        ),
    }
    with torch.inference_mode():
        comparison = compare(ways, device, rounds=5)
    amounts = dict.fromkeys(ways, len(paths)) | {"fetch": pictures}
    stages = {name: comparison.median(name) / amount for name, amount in amounts.items()}
    stages["decode and resize"] -= stages["decode"]
    stages = {name.replace("decode and resize", "resize"): max(took, 1e-9) for name, took in stages.items()}
    return stages, {name: 1 / took for name, took in stages.items()}


def _files_to_shards(folder: Path, root: Path, run: RunConfig, count: int) -> Row:
    """The half of the way without the model."""
    turn = iter(range(10**6))

    def ours() -> int:
        os.environ["LATENT_GPT_STORE"] = str(root / f"pixels{next(turn)}")
        return int(ingest(run.data).info["train"])

    def one_npy_each() -> int:
        target = root / f"npy-pixels{next(turn)}"
        target.mkdir()
        for number, image in enumerate(DataLoader(Plain(folder), batch_size=1, num_workers=cores())):
            np.save(target / f"{number}.npy", image[0].numpy())
        return len(list(target.iterdir()))

    def png_in_a_tar() -> int:
        with tarfile.open(root / f"png{next(turn)}.tar", "w") as tar:
            for data in DataLoader(Encoded(folder), batch_size=None, num_workers=cores()):
                info = tarfile.TarInfo(f"{len(tar.members)}.png")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            return len(tar.members)

    ways = {"ours": ours, "PNG in a tar": png_in_a_tar, "raw npy": one_npy_each}
    return compare(ways, rounds=5, same=lambda a, b: a == b).row(
        6,
        f"{count} PNG files to shards of {SIDE} px, without the model",
        amount=count,
        unit="img/s",
        goals={"PNG in a tar": 1},
        note="Plain: PIL, torchvision's CenterCrop and Resize, DataLoader, and what Pillow makes of PNG, or"
        " one npy per picture, which is half as large again. Ours also validates, removes duplicates, splits"
        " and hashes.",
    )


class Plain(Dataset[torch.Tensor]):
    """One file a time through torchvision's transforms."""

    def __init__(self, folder: Path) -> None:
        from torchvision import transforms

        self.paths = sorted(folder.glob("*.png"))
        bicubic = transforms.InterpolationMode.BICUBIC  # as ours: another filter gives other codes
        self.cut = transforms.Compose([transforms.CenterCrop(HEIGHT), transforms.Resize(SIDE, bicubic)])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels = np.array(self.cut(Image.open(self.paths[index]).convert("RGB")))
        return torch.from_numpy(pixels).permute(2, 0, 1)


class Encoded(Dataset[bytes]):
    """The same as PNG, as Pillow writes it."""

    def __init__(self, folder: Path) -> None:
        self.plain = Plain(folder)

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, index: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.plain[index].permute(1, 2, 0).numpy()).save(buffer, "PNG")
        return buffer.getvalue()


class Pictures(Dataset[torch.Tensor]):
    """One file a time, as a plain extraction script reads them."""

    def __init__(self, folder: Path, config: DataConfig) -> None:
        self.paths = sorted(folder.glob("*.png"))
        self.config = config

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(decode(self.paths[index].read_bytes(), self.config)).permute(2, 0, 1)


def _run(folder: Path) -> RunConfig:
    training = {"steps": 1, "batch_size": 1, "warmup_steps": 0}
    return parse_config(
        {
            "name": "bench",
            "data": {
                "source": FolderSource(path=str(folder)).model_dump(),
                "image_size": SIDE,
                "validation_share": 1e-9,
            },
            "clip": {"kind": "trained", "training": training},
            "tokenizer": {
                "kind": "vqvae", "factor": 16, "width": 16, "multipliers": [1, 1, 2, 2, 4], "blocks": 1,
                "codebook_size": 1024, "training": training | {"precision": "bf16"},
            },
            "transformer": None,
        }
    )  # fmt: skip


def ingest(data: DataConfig) -> Manifest:
    """The images of a config, at their place in the store."""
    return ingesting.ingest(data, AssetWriter("images", image_settings(data), {}, STEPS["images"].version))


def _models(run: RunConfig) -> dict[str, Manifest]:
    """A tokenizer with random weights, and a CLIP of which only the context length is read."""
    assert isinstance(run.tokenizer, VQVAEConfig)
    torch.manual_seed(0)
    sets = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_model(folder, VQVAE(run.tokenizer).state_dict(), run.tokenizer.model_dump(mode="json"))
        writer = AssetWriter("tokenizer", {"bench": 1}, {})
        for path in sorted(folder.iterdir()):
            writer.add_file(path.name, path)
        sets["tokenizer"] = writer.finish({})
    writer = AssetWriter("text", {"bench": 1}, {})
    writer.add_bytes("config.json", b'{"architecture": {"text_cfg": {"context_length": 77}}}')
    sets["text"] = writer.finish({})
    return sets


def ingest_memory(device: torch.device, counts: tuple[int, ...] = (10_000, 100_000)) -> Iterator[Row]:
    """Highest resident memory of an ingest of so many tiny pictures, each in a process of its own."""
    program = (
        "import sys; from benchmarks.harness import highest_memory;"
        " from model.config import DataConfig, ParquetSource;"
        " from model.data.ingest import ingest; from model.plumbing.assets import AssetWriter;"
        " from model.steps import image_settings;"
        " data = DataConfig(source=ParquetSource(path=sys.argv[1]), image_size=16);"
        " ingest(data, AssetWriter('images', image_settings(data), {}));"
        " print(highest_memory())"
    )
    figures = {}
    for count in counts:
        with store(), tempfile.TemporaryDirectory() as folder:
            tiny_pictures(Path(folder), count)
            done = subprocess.run(
                [sys.executable, "-c", program, folder],
                capture_output=True,
                text=True,
                check=True,
                cwd=Path(__file__).parents[1],
            )
        figures[f"{count:,} pictures"] = int(done.stdout.splitlines()[-1]) / 2**20
    grown = max(figures.values()) / min(figures.values()) - 1
    yield Row(
        6, "ingest: highest memory", "MiB", figures, goal="flat within 10 %", met=grown < 0.1,
        note=f"{grown:+.1%} from least to most, torch's import included.",
    )  # fmt: skip


def grown(device: torch.device, count: int = 1000, new: int = 10) -> Iterator[Row]:
    """Some pictures more in a folder: only they are read, or all of them."""
    with tempfile.TemporaryDirectory() as scratch, store():
        folder = Path(scratch)

        def add(numbers: range) -> None:
            for number in numbers:
                photo(number, WIDTH, HEIGHT).save(folder / f"{number:05d}.png", compress_level=1)
                (folder / f"{number:05d}.txt").write_text(f"picture number {number}")

        data = _run(folder).data
        add(range(count))
        earlier = ingest(data)
        add(range(count, count + new))

        def made(settings: dict[str, Any]) -> list[int]:
            writer = AssetWriter("images", settings, {}, STEPS["images"].version)
            storage.delete_prefix(writer.uri)
            manifest = ingesting.ingest(data, writer)
            return [manifest.info[split] for split in SPLITS]

        settings = image_settings(data)
        ways = {
            "grown": lambda: made({**settings, GROWN_FROM: earlier.key}),
            "in full": lambda: made(settings),
        }
        yield compare(ways, rounds=3, same=lambda a, b: a == b).row(
            6,
            f"{new} pictures more in a folder of {count}",
            amount=count + new,
            unit="img/s",
            goals={"in full": 10},
            note="Without the model. What is as it was is neither read nor decoded, and its shards stay.",
        )


def tiny_pictures(folder: Path, count: int) -> None:
    """Parquet files of so many pictures of 16 px, no two alike."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for first in range(0, count, SHARD):
        pictures, captions = [], []
        for number in range(first, min(first + SHARD, count)):
            buffer = io.BytesIO()
            Image.frombytes("RGB", (16, 16), number.to_bytes(8, "big") * 96).save(
                buffer, "PNG", compress_level=1
            )
            pictures.append(buffer.getvalue())
            captions.append(f"picture number {number}")
        table = pa.table({"image": pictures, "caption": captions})
        pq.write_table(table, folder / f"{first:08d}.parquet", row_group_size=1024)


# ── row 8 ───────────────────────────────────────────────────────────────────────────────────────────────

PICTURES, TOKENS, BATCH, SHARD = 32_768, 256, 256, 4096
NEEDED = 101_000  # tokens per second that training of 36 x 1280 takes on one H200


def batches(device: torch.device) -> Iterator[Row]:
    """An epoch of token shards as shuffled batches of int64 codes."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16384, (PICTURES, TOKENS)).astype(np.uint16)
    with store() as root:
        manifest = token_set(codes)
        ways: dict[str, Callable[[], tuple[int, int]]] = {
            "ours": lambda: drain(b.codes for b in islice(_reader(manifest), PICTURES // BATCH)),
            "DataLoader": _per_sample(codes, root / "codes.npy"),
            "DataLoader, npy": _per_file(codes, root / "npy"),
            "webdataset": _webdataset(codes, root / "wds"),
        }
        if PEERS.exists():
            sys.path.insert(0, str(PEERS))
            ways["mosaicml-streaming"] = _mosaic(codes, root / "mds")
            sys.path.remove(str(PEERS))
        comparison = compare(ways, rounds=3, same=lambda a, b: a == b)
        yield comparison.row(
            8,
            f"token shards to shuffled batches, {PICTURES:,} pictures of {TOKENS} tokens",
            amount=PICTURES * TOKENS,
            unit="tok/s",
            goals={
                "DataLoader": 10, "webdataset": 200, **({"mosaicml-streaming": 1} if PEERS.exists() else {}),
            },
            floor=copy_bandwidth() / 10,
            note="A whole epoch, opening included, and without verification, which no peer has (next line)."
            " Floor: 2 bytes read and 8 written per token. DataLoader: one memory map, no workers (its best"
            " here); npy: a file per picture, a worker per core. Ours also gives caption ids and masks"
            + ("." if PEERS.exists() else "; mosaicml-streaming is not installed."),
        )  # fmt: skip
        yield reader_alone(manifest)


def reader_alone(manifest: Manifest) -> Row:
    """What an epoch costs beside the batches themselves, and how it compares to what training needs."""
    batches = _reader(manifest)
    next(batches)

    def first_epoch() -> tuple[int, int]:
        cache._right.clear()  # each file is verified once per process
        return drain(batch.codes for batch in islice(_reader(manifest), PICTURES // BATCH))

    def sums() -> list[Path]:
        cache._right.clear()
        return [cache.path(manifest, file.name) for file in manifest.files]

    comparison = compare(
        {
            "first epoch": first_epoch,
            "later epochs": lambda: drain(b.codes for b in islice(batches, PICTURES // BATCH)),
            "SHA-256 of the shards": sums,
        },
        rounds=9,
    )
    figures = {name: PICTURES * TOKENS / comparison.median(name) for name in comparison.seconds}
    return Row(
        8,
        "token reader alone, beside what training needs",
        "tok/s",
        figures,
        goal=f"≥ 20 x {NEEDED:,} tok/s",
        met=figures["first epoch"] >= 20 * NEEDED,
        note="Needed: the largest preset's rate of training on one H200 (row 3's goal). A shard is verified"
        " once per process, in its first epoch.",
        seconds=comparison.seconds,
    )


def token_set(codes: np.ndarray, name: str = "bench", pictures: int = 0) -> Manifest:
    """A tokens set of these codes; `pictures` repeats them until there are so many."""
    pictures = pictures or len(codes)
    writer = AssetWriter("tokens", {"bench": name, "pictures": pictures}, {})
    shards = {}
    caption = [[49406, *range(1000, 1010), 49407]]
    for number, first in enumerate(range(0, pictures, SHARD)):
        begin = first % len(codes)
        part = codes[begin : begin + min(SHARD, pictures - first)]
        file = f"train-{number:06d}.safetensors"
        writer.add_bytes(file, TokenShard.to_bytes(part[:, None], [caption] * len(part), 16384))
        shards[file] = len(part)
    return writer.finish({"shards": shards, "tokens": codes.shape[1], "context_length": 77})


def _reader(manifest: Manifest) -> Iterator[Any]:
    return TokenReader(manifest, "train", BATCH, seed=0).batches()


def drain(found: Iterator[torch.Tensor]) -> tuple[int, int]:
    """Touch every batch: pictures, and the sum of their first and last codes."""
    count = total = 0
    for codes in found:
        count += len(codes)
        total += int(codes[:, 0].sum()) + int(codes[:, -1].sum())
    return count, total


class Rows(Dataset[torch.Tensor]):
    """One row of a memory map per picture."""

    def __init__(self, path: Path) -> None:
        self.codes = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.codes[index].astype(np.int64))


def _per_sample(codes: np.ndarray, path: Path) -> Callable[[], tuple[int, int]]:
    np.save(path, codes)
    return _loader(Rows(path), 0)


class Files(Dataset[torch.Tensor]):
    """One npy per picture."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.load(self.paths[index]).astype(np.int64))


def _per_file(codes: np.ndarray, folder: Path) -> Callable[[], tuple[int, int]]:
    folder.mkdir()
    for number, row in enumerate(codes):
        np.save(folder / f"{number:06d}.npy", row)
    return _loader(Files(folder), cores())


def _loader(data: Dataset[torch.Tensor], workers: int) -> Callable[[], tuple[int, int]]:
    return lambda: drain(iter(DataLoader(data, BATCH, shuffle=True, num_workers=workers)))


def _webdataset(codes: np.ndarray, folder: Path) -> Callable[[], tuple[int, int]]:
    import webdataset as wds

    folder.mkdir()
    for number, first in enumerate(range(0, len(codes), SHARD)):
        with wds.TarWriter(str(folder / f"{number:03d}.tar")) as sink:
            for row, code in enumerate(codes[first : first + SHARD], first):
                sink.write({"__key__": f"{row:06d}", "codes.npy": code})
    urls = [str(path) for path in sorted(folder.iterdir())]

    def epoch() -> tuple[int, int]:
        data = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(SHARD).decode()
        parts = data.to_tuple("codes.npy").batched(BATCH)
        found = DataLoader(parts, batch_size=None, num_workers=cores(), persistent_workers=False)
        return drain(torch.as_tensor(np.asarray(batch).astype(np.int64)) for (batch,) in found)

    return epoch


def _mosaic(codes: np.ndarray, folder: Path) -> Callable[[], tuple[int, int]]:
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"codes": f"ndarray:uint16:{TOKENS}"}) as sink:
        for row in codes:
            sink.write({"codes": row})

    class Codes(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.from_numpy(super().__getitem__(index)["codes"].astype(np.int64))

    data = Codes(local=str(folder), shuffle=True, batch_size=BATCH)
    return lambda: drain(iter(DataLoader(data, BATCH, num_workers=cores())))


def reader_memory(
    device: torch.device, counts: tuple[int, ...] = (10_000, 300_000, 1_000_000)
) -> Iterator[Row]:
    """Highest resident memory of a process that reads 200 batches of sets of so many pictures."""
    program = (
        "import sys; from itertools import islice; from benchmarks.harness import highest_memory;"
        " from model.plumbing.assets import load;"
        " from model.data.token_shards import TokenReader;"
        " list(1 for _ in islice(TokenReader(load(sys.argv[1]), 'train', 256).batches(), 200));"
        " print(highest_memory())"
    )
    codes = np.random.default_rng(0).integers(0, 16384, (SHARD, 64)).astype(np.uint16)
    figures = {}
    for count in counts:
        with store():
            manifest = token_set(codes, "memory", count)
            done = subprocess.run(
                [sys.executable, "-c", program, manifest.uri],
                capture_output=True,
                text=True,
                check=True,
                cwd=Path(__file__).parents[1],
            )
        figures[f"{count:,} pictures"] = int(done.stdout.splitlines()[-1]) / 2**20
    _, windows, most = figures.values()
    yield Row(
        8, "token reader: highest memory", "MiB", figures,
        goal="flat within 10 % beyond a window", met=most < 1.1 * windows,
        note="Bounded by two windows of 262,144 pictures, which the first set does not fill; mapped shards"
        " count while their pages are in memory.",
    )  # fmt: skip


PIXELS = Part("JPEG to pixels", pixels)
FILES = Part("PNG files to token shards", files_to_tokens)
BATCHES = Part("token shards to shuffled batches", batches)
ROWS = {
    5: [PIXELS],
    6: [FILES, Part("ingest: highest memory", ingest_memory), Part("ingest: a set that grows", grown)],
    8: [BATCHES, Part("token reader: highest memory", reader_memory)],
}
GPU_ROWS = {5: [PIXELS], 6: [FILES], 8: [BATCHES]}  # memory of processes without a GPU is measured above
