"""Assets: what a step leaves behind is a folder that is complete when its `manifest.json` exists.

The folder's name is the hash of what went into the step, so the same work has the same place: a repeated
step finds its asset and does nothing. The manifest is written last and only once (`If-None-Match: *`). It
names its inputs by kind, key and hash, and no place: where an asset lies follows from the store's root, so a
store that is copied elsewhere works there, with all its hashes. An asset may take files over from another
one: its manifest names them, with their hashes, and the asset that holds their bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator

from model.config import config_hash
from model.errors import UserError, reason
from model.plumbing import speech, storage

SCHEMA_VERSION = 2
NAME = "manifest.json"
LARGEST = 1 << 24  # bytes of it: some 100,000 files
PICTURES = "pictures"  # folder of an asset with what is only looked at, and is in no manifest:
RECONSTRUCTIONS = "reconstructions.png"  # by a tokenizer
REPORT = "report-"  # begins the names of an evaluation's reports with a verdict, which are in no manifest
START = "start"  # the transformer's input whose weights its training begins from, where there is one

Kind = Literal[
    "speed",
    "recipe",
    "images",
    "tokenizer",
    "text",
    "judge",
    "tokens",
    "transformer",
    "sampling",
    "model",
    "benchmark",
    "evaluation",
    "measurement",
    "race",
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class File(_Part):
    """One file of an asset."""

    name: str  # relative to the asset's URI
    size: int  # bytes
    sha256: str  # hex digits
    # <kind>/<key> of the asset that holds the bytes, if that is another one; says where, and not what.
    asset: Annotated[str, Field(pattern=r"^([a-z]+/[0-9a-f]{16})?$", exclude_if=lambda asset: not asset)] = ""

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or str(path) != name:
            raise ValueError(f"'{name}' is not a plain relative path")
        return name


class Input(_Part):
    """An asset that went into another."""

    kind: Kind
    key: str
    sha256: str  # of its manifest

    def load(self) -> Manifest:
        """The manifest of this very asset, from the store.

        Raises:
            NotFound: the store has no such asset.
            UserError: it holds other bytes than those that are meant.
        """
        manifest = load(place(self.kind, self.key))
        if manifest.sha256 != self.sha256:
            raise UserError(
                f"{manifest.uri} is not the asset that was used: its manifest's hash is"
                f" {manifest.sha256[:16]}…, not {self.sha256[:16]}…; run the pipeline again"
            )
        return manifest


class Manifest(_Part):
    """What an asset holds and what it was made from."""

    schema_version: int = SCHEMA_VERSION
    kind: Kind
    key: str  # 16 hex digits: name of the folder
    settings: dict[str, Any]  # those that decide the content
    inputs: dict[str, Input]
    files: tuple[File, ...]  # sorted by name
    info: dict[str, Any] = {}  # counts and metrics for people; no part of the hash

    _elsewhere: str = PrivateAttr("")  # where it was loaded from, if that is not its place in this store

    @property
    def uri(self) -> str:
        """The asset's folder."""
        return self._elsewhere or place(self.kind, self.key)

    @property
    def sha256(self) -> str:
        """Hash over kind, key and files: those with the same hash hold the same bytes, wherever they lie."""
        values = self.model_dump(mode="json", include={"schema_version", "kind", "key"})
        return config_hash({**values, "files": [file.model_dump(exclude={"asset"}) for file in self.files]})

    @property
    def text(self) -> bytes:
        """The content of `manifest.json`."""
        values = self.model_dump(mode="json")
        return f"{json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)}\n".encode()

    @property
    def as_input(self) -> Input:
        """How another asset names this one."""
        return Input(kind=self.kind, key=self.key, sha256=self.sha256)

    def at(self, uri: str) -> Manifest:
        """The same asset elsewhere: at its place in another store, or in a folder with all its files."""
        uri = uri.rstrip("/")
        within_a_store = uri.endswith(f"/{self.kind}/{self.key}")
        own = self.files if within_a_store else [file.model_copy(update={"asset": ""}) for file in self.files]
        copy = self.model_copy(update={"files": tuple(own)})
        copy._elsewhere = uri
        return copy

    def file(self, name: str) -> File:
        """The entry of a file.

        Raises:
            UserError: the asset has no such file.
        """
        for file in self.files:
            if file.name == name:
                return file
        raise UserError(f"{self.uri} has no file {name}; it has {', '.join(f.name for f in self.files)}")

    def where(self, name: str) -> str:
        """The URI of a file's bytes. Raises as `file`."""
        return self.where_is(self.file(name))

    def where_is(self, file: File) -> str:
        """The same of an entry."""
        return storage.join(self.holder(file), file.name)

    def holder(self, file: File) -> str:
        """The URI of the asset that holds a file's bytes: this one, or the one it was taken over from."""
        if not file.asset:
            return self.uri
        return storage.join(self.uri.removesuffix(f"/{self.kind}/{self.key}"), file.asset)

    def lent(self, file: File) -> File:
        """The entry of one of its files in the manifest of an asset that takes it over."""
        return file.model_copy(update={"asset": file.asset or f"{self.kind}/{self.key}"})

    def input(self, name: str) -> Manifest:
        """The manifest of an asset that went into this one. Raises as `Input.load`."""
        return self.inputs[name].load()


def asset_key(kind: Kind, settings: Mapping[str, Any], inputs: Mapping[str, Input], version: int = 1) -> str:
    """16 hex digits over what goes into an asset; `version` is that of the step that makes it."""
    hashes = {name: one.sha256 for name, one in inputs.items()}
    made_from = {"kind": kind, "version": version, "settings": dict(settings), "inputs": hashes}
    return config_hash({"schema": SCHEMA_VERSION, **made_from})[:16]


def place(kind: Kind, key: str) -> str:
    """Where an asset is in this store, or will be."""
    return storage.join(storage.store_root(), kind, key)


def load(uri: str) -> Manifest:
    """The manifest of the complete asset at `uri`.

    Raises:
        NotFound: there is no manifest, so the asset is not complete.
        UserError: the manifest cannot be read, or is of another schema.
    """
    where = storage.join(uri, NAME)
    try:
        data = storage.read_bytes(where, LARGEST)
    except storage.NotFound:
        raise storage.NotFound(
            f"{uri} is not a complete asset: it has no {NAME}; run the step that makes it"
        ) from None
    try:
        values = json.loads(data)
        schema = int(values["schema_version"])
        if schema == SCHEMA_VERSION:
            manifest = Manifest.model_validate(values)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{where} is damaged ({reason(error)}); delete {uri}, so that it is made again"
        ) from None
    if schema != SCHEMA_VERSION:
        way = (
            "an earlier latent-gpt made it; run the pipeline again, which makes it anew in another place"
            if schema < SCHEMA_VERSION
            else "update latent-gpt"
        )
        raise UserError(f"{where} has schema {schema}; this version reads {SCHEMA_VERSION}: {way}")
    return manifest if uri.rstrip("/") == _place(manifest) else manifest.at(uri)


def _place(manifest: Manifest) -> str:
    """Its place in this store; empty where the environment names no store."""
    try:
        return place(manifest.kind, manifest.key)
    except UserError:
        return ""


def find(uri: str) -> Manifest | None:
    """The manifest of the asset at `uri` if it is complete; every file it names is there with its size.

    Raises:
        UserError: a file of a complete asset is missing or has another size.
    """
    try:
        manifest = load(uri)
    except storage.NotFound:
        return None
    sizes = {holder: storage.list_sizes(holder) for holder in {*map(manifest.holder, manifest.files)}}
    for file in manifest.files:
        size = sizes[manifest.holder(file)].get(file.name)
        if size != file.size:
            found = "is missing" if size is None else f"has {size} bytes"
            whose = f", which took it over from {file.asset}" if file.asset else ""
            raise UserError(
                f"{manifest.where_is(file)} {found}, its manifest says {file.size} bytes;"
                f" delete {uri}{whose}, so that it is made again"
            )
    return manifest


def put_back(folder: str | Path) -> Manifest:
    """The asset of which a local folder is a whole copy, with its manifest, at its place in the store.

    It is copied there, byte for byte, unless it is there.

    Raises:
        UserError: the folder holds no asset, or another one is at its place.
    """
    manifest = load(str(folder))
    uri = place(manifest.kind, manifest.key)
    try:
        found = find(uri)
    except UserError:  # parts of it are gone
        found = None
    if found is None:
        for file in manifest.files:
            storage.upload_file(Path(folder, file.name), storage.join(uri, file.name))
        storage.write_bytes(storage.join(uri, NAME), Path(folder, NAME).read_bytes())
        found = load(uri)
    if found.sha256 != manifest.sha256:
        raise UserError(f"{uri} is another asset than the one in {folder}; delete it, and run once more")
    return found


class AssetWriter:
    """Writes an asset: files first, in any order; then the manifest.

    Repeating the same work writes the same bytes to the same names, so a writer that was killed needs no
    cleaning up after. Two that do it at once may write other bytes, as training does: who adds its
    first file when the other one has finished replaces none of them.
    """

    def __init__(
        self,
        kind: Kind,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Manifest | Input],
        version: int = 1,
    ) -> None:
        """
        Args:
            kind: of the asset.
            settings: what decides its content.
            inputs: the assets that it is made from.
            version: of the step that makes it.
        """
        self.kind, self.settings = kind, dict(settings)
        self.inputs = {
            name: one if isinstance(one, Input) else one.as_input for name, one in sorted(inputs.items())
        }
        self.key = asset_key(kind, self.settings, self.inputs, version)
        self.uri = place(kind, self.key)
        self._files: dict[str, File] = {}

    def add_bytes(self, name: str, data: bytes) -> File:
        """Store `data` as a file of the asset.

        Raises:
            UserError: another run has finished this asset, with other content; its file stays.
        """
        file = File(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        self._check(file)
        storage.write_bytes(storage.join(self.uri, name), data)
        return self.add(file)

    def add_file(self, name: str, path: str | Path) -> File:
        """Store a local file as a file of the asset. Raises as `add_bytes`."""
        file = File(name=name, size=Path(path).stat().st_size, sha256=storage.file_sha256(path))
        self._check(file)
        storage.upload_file(path, storage.join(self.uri, name))
        return self.add(file)

    def add(self, file: File) -> File:
        """Count a file in that is stored already: by another process of the job, or in another asset."""
        self._files[file.name] = file
        return file

    @cached_property
    def _finished(self) -> dict[str, str] | None:
        """SHA-256 of each file, by name, if another run had finished before our first one was stored."""
        try:
            return {file.name: file.sha256 for file in load(self.uri).files}
        except storage.NotFound:
            return None

    def _check(self, file: File) -> None:
        if self._finished is not None and self._finished.get(file.name) != file.sha256:
            raise self._too_late()

    def _too_late(self) -> UserError:
        return UserError(
            f"{self.uri} was finished by another run while this one was writing, with other content; delete"
            " it and run once more"
        )

    def finish(self, info: dict[str, Any], scratch: str = "checkpoints") -> Manifest:
        """Write the manifest, and delete what led here; returns what is now stored.

        Args:
            info: counts and metrics.
            scratch: folder of the asset that nobody needs any more. Where it cannot be deleted it stays, with
                a warning: the work is done.

        Raises:
            UserError: a metric is no finite number, or another run finished this asset meanwhile, with other
                content.
        """
        for name, value in info.items():
            if not _finite(value):
                raise UserError(f"{self.kind}: {name} is {value}; only finite numbers are kept")
        manifest = Manifest(
            kind=self.kind,
            key=self.key,
            settings=self.settings,
            inputs=self.inputs,
            files=tuple(self._files[name] for name in sorted(self._files)),
            info=info,
        )
        try:
            storage.write_bytes(storage.join(self.uri, NAME), manifest.text, if_absent=True)
        except FileExistsError:
            existing = load(self.uri)
            if existing.sha256 != manifest.sha256:
                raise self._too_late() from None
            manifest = existing
        try:
            storage.delete_prefix(storage.join(self.uri, scratch))
        except (UserError, OSError) as error:
            speech.warn(
                self.kind, f"{storage.join(self.uri, scratch)} is of no use any more and stays: {error}"
            )
        return manifest


def _finite(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)
