"""Row 9: a checkpoint of 1 GB to S3 on loopback and back, and token shards from there into batches.

Beside boto3's defaults, s5cmd and obstore, all against the SeaweedFS that a run starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

from benchmarks.data import BATCH, TOKENS, drain, token_set
from benchmarks.harness import Part, Row, compare
from model.data.token_shards import TokenReader
from model.plumbing import environment, storage
from model.plumbing.assets import Manifest
from pipelines.embedded.services import services

SIZE = 10**9  # bytes of the checkpoint
PICTURES = 131_072  # whose tokens are read
MIB = 2**20
GOALS = {"boto3 defaults": 1.2, "s5cmd": 0.9, "obstore": 0.9}


def from_and_to_s3(device: torch.device) -> Iterator[Row]:
    """Real files, the real SeaweedFS."""
    with tempfile.TemporaryDirectory(prefix="latent-gpt-bench-") as name, services(Path(name, "state")):
        peers = Peers()
        yield from _checkpoint(Path(name), peers)
        yield _shards(Path(name), peers)


class Peers:
    """Their clients, all at the store that the environment names."""

    def __init__(self) -> None:
        import boto3
        from obstore.store import S3Store

        endpoint, self.bucket = os.environ["S3_ENDPOINT_URL"], storage.split(storage.store_root())[0]
        self.boto3 = boto3.client("s3", endpoint_url=endpoint)
        self.obstore = S3Store(
            self.bucket,
            endpoint=endpoint,
            access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
            secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
            region=os.environ["AWS_DEFAULT_REGION"],
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )
        self.program = [str(Path(sys.executable).with_name("s5cmd")), "--endpoint-url", endpoint, "cp"]

    def s5cmd(self, *arguments: str) -> None:
        """Copy, in a process of its own."""
        subprocess.run([*self.program, *arguments], check=True, stdout=subprocess.DEVNULL)

    def boto3_download(self, key: str, path: Path) -> None:
        """As its defaults do it."""
        self.boto3.download_file(self.bucket, key, str(path))

    def obstore_download(self, key: str, path: Path) -> None:
        """Stream an object into a file."""
        import obstore

        with open(path, "wb") as file:
            for chunk in obstore.get(self.obstore, key).stream(min_chunk_size=16 * MIB):
                file.write(chunk)

    def obstore_upload(self, path: Path, key: str) -> None:
        """In parts of our size."""
        import obstore

        obstore.put(self.obstore, key, path, chunk_size=16 * MIB, max_concurrency=8)


def _checkpoint(folder: Path, peers: Peers) -> Iterator[Row]:
    """Each way uploads to a key of its own; all download one object, as a server lays out what came in other
    parts differently. Every copy is compared with the original by SHA-256."""
    original = folder / "checkpoint.bin"
    _fill(original)
    digest = storage.file_sha256(original)

    def key(way: str) -> str:
        return f"bench/{way}.bin"

    def uri(way: str) -> str:
        return f"s3://{peers.bucket}/{key(way)}"

    def copy(way: str) -> Path:
        return folder / f"{way}.bin"

    up: dict[str, Callable[[str], None]] = {
        "ours": lambda way: storage.upload_file(original, uri(way)),
        "boto3 defaults": lambda way: peers.boto3.upload_file(str(original), peers.bucket, key(way)),
        "s5cmd": lambda way: peers.s5cmd(str(original), uri(way)),
        "obstore": lambda way: peers.obstore_upload(original, key(way)),
    }
    down: dict[str, Callable[[str], None]] = {
        "ours": lambda way: storage.download_file(uri("ours"), copy(way)),
        "boto3 defaults": lambda way: peers.boto3_download(key("ours"), copy(way)),
        "s5cmd": lambda way: peers.s5cmd(uri("ours"), str(copy(way))),
        "obstore": lambda way: peers.obstore_download(key("ours"), copy(way)),
        "ours, SHA-256 verified": lambda way: storage.download_file(uri("ours"), copy(way), digest),
    }

    def arrived(*ways: str) -> bool:
        """Whether what lies at the ways' keys is the original."""
        for way in ways:
            storage.download_file(uri(way), folder / "arrived.bin", digest)
        return True

    def same(*ways: str) -> bool:
        return all(storage.file_sha256(copy(way)) == digest for way in ways)

    def naming(way: str, call: Callable[[str], None]) -> Callable[[], str]:
        def run() -> str:
            call(way)
            return way

        return run

    for direction, calls, check in (("upload", up, arrived), ("download", down, same)):
        ways = {way: naming(way, call) for way, call in calls.items()}
        yield compare(ways, rounds=3, same=check).row(
            9,
            f"{direction} of a checkpoint of {SIZE / 10**6:,.0f} MB, S3 on loopback",
            amount=SIZE / MIB,
            unit="MiB/s",
            goals=GOALS,
            note="server and client share the cores; s5cmd's figure holds the start of its process",
        )


def _shards(folder: Path, peers: Peers) -> Row:
    """An epoch from shards in S3; the peers download them all, then our reader reads them as local ones."""
    codes = np.random.default_rng(0).integers(0, 16384, (4096, TOKENS)).astype(np.uint16)
    manifest = token_set(codes, pictures=PICTURES)
    prefix = storage.split(manifest.uri)[1]
    turn = count()

    def epoch(manifest: Manifest) -> tuple[int, int]:
        batches = TokenReader(manifest, "train", BATCH, seed=0).batches()
        return drain(batch.codes for batch in islice(batches, PICTURES // BATCH))

    def ours() -> tuple[int, int]:
        with environment.within({"LATENT_GPT_CACHE": str(folder / f"cache-{next(turn)}")}):
            return epoch(manifest)

    def after(download: Callable[[Path], None]) -> Callable[[], tuple[int, int]]:
        def call() -> tuple[int, int]:
            target = folder / f"copy-{next(turn)}"
            target.mkdir()
            download(target)
            return epoch(manifest.at(str(target)))

        return call

    def each(download: Callable[[str, Path], None]) -> Callable[[Path], None]:
        def call(target: Path) -> None:
            for file in manifest.files:
                download(f"{prefix}/{file.name}", target / file.name)

        return call

    ways = {
        "ours": ours,
        "boto3 defaults": after(each(peers.boto3_download)),
        "s5cmd": after(lambda target: peers.s5cmd(f"{manifest.uri}/*", f"{target}/")),
        "obstore": after(each(peers.obstore_download)),
    }
    return compare(ways, rounds=3, same=lambda a, b: a == b).row(
        9,
        f"token shards from S3 on loopback to shuffled batches, {PICTURES:,} pictures of {TOKENS} tokens",
        amount=PICTURES * TOKENS,
        unit="tok/s",
        goals=GOALS,
        note="all verify SHA-256; the peers download every shard, then our reader reads the copies",
    )


def _fill(path: Path) -> None:
    """Bytes that no compression shrinks."""
    block = os.urandom(SIZE // 50)
    with path.open("wb") as file:
        for number in range(50):
            file.write(bytes([number]) + block[1:])


ROWS = {9: [Part("from and to S3", from_and_to_s3)]}
