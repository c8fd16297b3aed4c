"""Verified local copies of what lies in S3, bounded in size and shared by the processes of a machine."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from model.errors import UserError
from model.plumbing import environment, storage
from model.plumbing.assets import Manifest

CACHE_GIB = 64  # of downloaded shards kept on the local disk, where the environment says nothing else


class ShardCache:
    """Verified local copies of a set's files, `limit` bytes of them at most, shared by a machine's ranks.

    Files of a local set are used where they are. A copy from S3 is checked against the manifest's SHA-256
    before it takes its name; when room is needed those go first that were not asked for the longest.
    """

    def __init__(
        self, manifest: Manifest, folder: str | Path | None = None, limit: int | None = None
    ) -> None:
        """`folder` defaults to the environment's `LATENT_GPT_CACHE`, or `~/.cache/latent-gpt`; `limit` to its
        `LATENT_GPT_CACHE_GIB`, or 64 GiB.

        Raises:
            UserError: `LATENT_GPT_CACHE_GIB` is no number above 0.
        """
        self.manifest = manifest
        self.limit = _cache_bytes() if limit is None else limit
        self.files = {file.name: file for file in manifest.files}
        self.local = not storage.is_s3(manifest.uri)
        default = os.environ.get("LATENT_GPT_CACHE") or Path.home() / ".cache" / "latent-gpt"
        self.folder = Path(manifest.uri if self.local else folder or default)
        self._verified: set[str] = set()

    def path(self, name: str) -> Path:
        """Where a verified copy lies.

        Raises:
            UserError: when its checksum is not the manifest's.
        """
        file = self.files[name]
        path = self.folder / (name if self.local else f"{file.sha256}{Path(name).suffix}")
        uri = storage.join(self.manifest.uri, name)
        if self.local and name not in self._verified and (found := storage.file_sha256(path)) != file.sha256:
            raise storage.checksum_error(uri, found, file.sha256)
        if not self.local and not (name in self._verified and path.exists()):

            def is_there() -> bool:
                return path.exists() and storage.file_sha256(path) == file.sha256

            self.folder.mkdir(parents=True, exist_ok=True)
            if not is_there():
                with _locked(
                    self.folder / "lock"
                ):  # one download a time, itself in parallel parts, per machine
                    if not is_there():
                        self._make_room(file.size)
                        storage.download_file(uri, path, file.sha256)
        if not self.local:
            with suppress(FileNotFoundError):  # gone again already; the caller asks once more
                os.utime(path)
        self._verified.add(name)
        return path

    def _make_room(self, wanted: int) -> None:
        if wanted > self.limit:
            raise UserError(f"a shard of {wanted} bytes does not fit into a cache of {self.limit} bytes")
        copies = [entry for entry in self.folder.iterdir() if entry.suffix in (".tar", ".safetensors")]
        stats = sorted((entry.stat().st_mtime_ns, entry.stat().st_size, entry) for entry in copies)
        used = sum(size for _, size, _ in stats)
        for _, size, entry in stats:
            if used + wanted <= self.limit:
                break
            entry.unlink(missing_ok=True)  # who has it open keeps it until it is done
            used -= size


def _cache_bytes() -> int:
    return int(environment.CACHE_GIB.get() * 2**30)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
