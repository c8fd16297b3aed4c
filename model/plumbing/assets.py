"""Sets: what a step leaves behind is a folder that is complete when its `manifest.json` exists.

The folder's name is the hash of what went into the step, so the same work has the same place: a repeated
step finds its set and does nothing. The manifest is written last and only once (`If-None-Match: *`); what
makes a set what it is are its key and its files, so `Manifest.sha256` covers these and no URI: a store that
is copied elsewhere keeps all its hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from model.config import config_hash
from model.errors import UserError
from model.plumbing import storage

SCHEMA_VERSION = 1
NAME = "manifest.json"
SIDE_BY_SIDE = 4  # files downloaded at once; each large one is itself in parts

Kind = Literal["images", "clip", "tokenizer", "tokens", "transformer", "evaluation"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class File(_Part):
    """One file of a set."""

    name: str  # relative to the set's URI
    size: int  # bytes
    sha256: str  # hex digits

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or str(path) != name:
            raise ValueError(f"'{name}' is not a plain relative path")
        return name


class Input(_Part):
    """A set that went into another."""

    uri: str
    sha256: str  # of its manifest


class Manifest(_Part):
    """What a set holds and what it was made from."""

    schema_version: int = SCHEMA_VERSION
    kind: Kind
    uri: str  # folder of the set
    key: str  # 16 hex digits: name of the folder
    config: dict[str, Any]  # config sections that matter to the content
    inputs: dict[str, Input]
    files: tuple[File, ...]  # sorted by name
    info: dict[str, Any] = {}  # counts and metrics for people; no part of the hash

    @property
    def sha256(self) -> str:
        """Hash over kind, key and files: two sets with the same hash hold the same bytes."""
        return config_hash(self.model_dump(mode="json", include={"schema_version", "kind", "key", "files"}))

    def file(self, name: str) -> File:
        """The entry of a file.

        Raises:
            UserError: the set has no such file.
        """
        for file in self.files:
            if file.name == name:
                return file
        raise UserError(f"{self.uri} has no file {name}; it has {', '.join(f.name for f in self.files)}")


def set_key(kind: Kind, config: dict[str, Any], inputs: dict[str, Manifest]) -> str:
    """16 hex digits over what goes into a set."""
    hashes = {name: manifest.sha256 for name, manifest in inputs.items()}
    return config_hash({"schema": SCHEMA_VERSION, "kind": kind, "config": config, "inputs": hashes})[:16]


def set_uri(kind: Kind, config: dict[str, Any], inputs: dict[str, Manifest]) -> str:
    """Where the set made from `config` and `inputs` is, or will be."""
    return storage.join(storage.store_root(), kind, set_key(kind, config, inputs))


def load(uri: str) -> Manifest:
    """The manifest of the complete set at `uri`.

    Raises:
        NotFound: there is no manifest, so the set is not complete.
        UserError: the manifest cannot be read, or is of a newer schema.
    """
    where = storage.join(uri, NAME)
    try:
        data = storage.read_bytes(where)
    except storage.NotFound:
        raise storage.NotFound(
            f"{uri} is not a complete set: it has no {NAME}; run the step that makes it"
        ) from None
    try:
        values = json.loads(data)
        if values["schema_version"] > SCHEMA_VERSION:
            raise UserError(
                f"{where} has schema {values['schema_version']}; this version reads up to"
                f" {SCHEMA_VERSION}: update latent-gpt"
            )
        return Manifest.model_validate(values | {"uri": uri.rstrip("/")})  # the store may have been moved
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{where} is damaged ({what}); delete {uri}, so that it is made again") from None


def find(uri: str) -> Manifest | None:
    """The manifest of the set at `uri` if it is complete; every file it names is there with its size.

    Raises:
        UserError: a file of a complete set is missing or has another size.
    """
    try:
        manifest = load(uri)
    except storage.NotFound:
        return None
    sizes = storage.list_sizes(uri)
    for file in manifest.files:
        if sizes.get(file.name) != file.size:
            found = f"has {sizes[file.name]} bytes" if file.name in sizes else "is missing"
            raise UserError(
                f"{storage.join(uri, file.name)} {found}, its manifest says {file.size} bytes;"
                f" delete {uri}, so that it is made again"
            )
    return manifest


def fetch(manifest: Manifest, folder: str | Path, names: Iterable[str] | None = None) -> Path:
    """Download a set, or the named files of it, into `folder`; every file's SHA-256 is verified.

    A file that is there already, and is right, is kept.

    Raises:
        UserError: a file does not have the SHA-256 that the manifest names.
    """
    folder = Path(folder)
    files = manifest.files if names is None else [manifest.file(name) for name in names]

    def one(file: File) -> None:
        path = folder / file.name
        if not (path.is_file() and storage.file_sha256(path) == file.sha256):
            storage.download_file(storage.join(manifest.uri, file.name), path, file.sha256)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        list(pool.map(one, files))
    return folder


class SetWriter:
    """Writes a set: files first, in any order; then the manifest.

    Repeating the same work writes the same bytes to the same names, so a writer that was killed needs no
    cleaning up after.
    """

    def __init__(self, kind: Kind, config: dict[str, Any], inputs: dict[str, Manifest]) -> None:
        self.kind = kind
        self.config = config
        self.inputs = inputs
        self.uri = set_uri(kind, config, inputs)
        self._files: dict[str, File] = {}

    def add_bytes(self, name: str, data: bytes) -> File:
        """Store `data` as a file of the set."""
        file = File(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        storage.write_bytes(storage.join(self.uri, name), data)
        return self.add(file)

    def add_file(self, name: str, path: str | Path) -> File:
        """Store a local file as a file of the set."""
        file = File(name=name, size=Path(path).stat().st_size, sha256=storage.file_sha256(path))
        storage.upload_file(path, storage.join(self.uri, name))
        return self.add(file)

    def add(self, file: File) -> File:
        """Count a file in that is stored already, e.g. by another process of the job."""
        self._files[file.name] = file
        return file

    def finish(self, info: dict[str, Any]) -> Manifest:
        """Write the manifest, and delete the checkpoints that led here; returns what is now stored.

        Raises:
            UserError: another run finished this set meanwhile, with other content.
        """
        manifest = Manifest(
            kind=self.kind,
            uri=self.uri,
            key=set_key(self.kind, self.config, self.inputs),
            config=self.config,
            inputs={n: Input(uri=m.uri, sha256=m.sha256) for n, m in sorted(self.inputs.items())},
            files=tuple(self._files[name] for name in sorted(self._files)),
            info=info,
        )
        text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
        try:
            storage.write_bytes(storage.join(self.uri, NAME), f"{text}\n".encode(), if_absent=True)
        except FileExistsError:
            existing = load(self.uri)
            if existing.sha256 != manifest.sha256:
                raise UserError(
                    f"{self.uri} was finished by another run while this one was writing, with"
                    " other content; delete it and run once more"
                ) from None
            manifest = existing
        storage.delete_prefix(storage.join(self.uri, "checkpoints"))
        return manifest
