"""Row 9: a checkpoint of 1 GB to S3 on loopback and back, beside boto3's defaults, s5cmd and obstore."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.harness import Row, compare
from model.plumbing import storage
from model.plumbing.services import services

SIZE = 10**9  # bytes
MIB = 2**20


def checkpoint(device: torch.device) -> Iterator[Row]:
    """Real files, the real SeaweedFS; every copy is compared with the original by SHA-256."""
    with tempfile.TemporaryDirectory(prefix="latent-gpt-bench-") as name, services(Path(name, "state")):
        folder = Path(name)
        original = folder / "checkpoint.bin"
        _fill(original)
        digest = storage.file_sha256(original)
        key = {way: f"bench/{way}.bin" for way in ("ours", "boto3 defaults", "s5cmd", "obstore")}
        uploads, downloads = _ways(original, folder, key)

        def arrived(*ways: object) -> bool:
            """Whether what lies at the ways' keys is the original."""
            copy = folder / "arrived.bin"
            for way in ways:
                storage.download_file(storage.join(storage.store_root(), key[str(way)]), copy, digest)
            return True

        def same(ours: object, theirs: object) -> bool:
            return all(storage.file_sha256(Path(str(path))) == digest for path in (ours, theirs))

        goals = {"boto3 defaults": 1.2, "s5cmd": 0.9, "obstore": 0.9}
        for direction, ways, check in (("upload", uploads, arrived), ("download", downloads, same)):
            comparison = compare(ways, rounds=3, warmup=1, same=check)
            yield comparison.row(
                9,
                f"{direction} of a 1 GB checkpoint, S3 on loopback",
                amount=SIZE / MIB,
                unit="MiB/s",
                goals=goals,
                note="server and client share the cores; s5cmd's figure holds the start of its process",
            )


def _ways(
    original: Path, folder: Path, key: dict[str, str]
) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    """Upload returns the way's name, download the file that it wrote."""
    import boto3
    import obstore
    from obstore.store import S3Store

    endpoint, bucket = os.environ["S3_ENDPOINT_URL"], storage.split(storage.store_root())[0]
    plain = boto3.client("s3", endpoint_url=endpoint)
    store = S3Store(
        bucket,
        endpoint=endpoint,
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        region=os.environ["AWS_DEFAULT_REGION"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    program = [str(Path(sys.executable).with_name("s5cmd")), "--endpoint-url", endpoint, "cp"]

    def uri(way: str) -> str:
        return f"s3://{bucket}/{key[way]}"

    def target(way: str) -> Path:
        return folder / f"{way}.bin"

    def s5cmd(*arguments: str) -> None:
        subprocess.run([*program, *arguments], check=True, stdout=subprocess.DEVNULL)

    def obstore_download(way: str) -> None:
        with open(target(way), "wb") as file:
            for chunk in obstore.get(store, key[way]).stream(min_chunk_size=16 * MIB):
                file.write(chunk)

    def obstore_upload(way: str) -> None:
        obstore.put(store, key[way], original, chunk_size=16 * MIB, max_concurrency=8)

    up: dict[str, Callable[[str], object]] = {
        "ours": lambda way: storage.upload_file(original, uri(way)),
        "boto3 defaults": lambda way: plain.upload_file(str(original), bucket, key[way]),
        "s5cmd": lambda way: s5cmd(str(original), uri(way)),
        "obstore": obstore_upload,
    }
    down: dict[str, Callable[[str], object]] = {
        "ours": lambda way: storage.download_file(uri(way), target(way)),
        "boto3 defaults": lambda way: plain.download_file(bucket, key[way], str(target(way))),
        "s5cmd": lambda way: s5cmd(uri(way), str(target(way))),
        "obstore": obstore_download,
    }

    def uploading(way: str) -> Callable[[], str]:
        def call() -> str:
            up[way](way)
            return way

        return call

    def downloading(way: str) -> Callable[[], Path]:
        def call() -> Path:
            down[way](way)
            return target(way)

        return call

    return {way: uploading(way) for way in up}, {way: downloading(way) for way in down}


def _fill(path: Path) -> None:
    """Bytes that no compression shrinks."""
    block = os.urandom(SIZE // 50)
    with path.open("wb") as file:
        for number in range(50):
            file.write(bytes([number]) + block[1:])


ROWS = {9: checkpoint}
