"""What kind of source a person names as their data: by its name, and by what is there.

A folder is what the first row of `IN_FOLDER` says that knows it. Where none does, the refusal counts what was
there and says what would do.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any

from model.data import tars
from model.data.sources import (
    DRAWN,
    HOW_TO_CAPTION,
    KNOWN,
    OTHER_SUFFIXES,
    SUFFIXES,
    TABLES,
    archive,
    hub,
    suffix,
)
from model.data.sources.folder import CAPTIONED, LISTS, best_captions, stem
from model.data.sources.tree import Tree, Unreadable, joined, open_tree
from model.errors import UserError
from model.plumbing import storage

Values = dict[str, Any]  # of `data.source`
SHOWN = 5  # kinds of files that a refusal names

BY_SUFFIX: dict[str, Callable[[str], Values]] = {
    ".parquet": lambda uri: {"kind": "parquet", "path": uri},
}


class Seen:
    """What is in a folder."""

    def __init__(self, uri: str, tree: Tree) -> None:
        self.uri = uri
        self.tree = tree
        self.kinds: Counter[str] = Counter()  # of files
        for folder in tree.folders():
            self.kinds.update(map(_kind, folder.names))

    def has(self, *kinds: str) -> bool:
        """Whether there is a file of one of these kinds."""
        return any(self.kinds[kind] for kind in kinds)

    @cached_property
    def captions(self) -> str:
        """Where captions of its pictures would come from; "" for nowhere."""
        return best_captions(self.tree) if self.has(*SUFFIXES, *OTHER_SUFFIXES) else ""

    def tables(self) -> list[str]:
        """Some files that captions may be in, neither beside a picture nor lists that are read."""
        found: list[str] = []
        for folder in self.tree.folders():
            pictures = [name for name in folder.names if suffix(name) in SUFFIXES + OTHER_SUFFIXES]
            beside = {*pictures, *map(stem, pictures)}
            found += (
                joined(folder.path, name)
                for name in folder.names
                if suffix(name) in TABLES and name.lower() not in LISTS and stem(name) not in beside
            )
            if len(found) >= SHOWN:
                break
        return found[:SHOWN]

    def __str__(self) -> str:
        said = [f"{count} {kind}" for kind, count in self.kinds.most_common(SHOWN)]
        more = self.kinds.total() - sum(count for _, count in self.kinds.most_common(SHOWN))
        return ", ".join([*said, *([f"{more} others"] if more else [])]) or "it is empty"


def _kind(name: str) -> str:
    """The suffix of a file, of a packed tar both."""
    lower = name.lower()
    if lower.endswith(tars.SUFFIXES):
        return next(kind for kind in tars.SUFFIXES if lower.endswith(kind))
    return suffix(name) or "without suffix"


def _captioned(seen: Seen) -> Values | None:
    return {"kind": "folder", "path": seen.uri} if seen.captions == "files" else None


def _parquet(seen: Seen) -> Values | None:
    return {"kind": "parquet", "path": seen.uri} if seen.has(".parquet") else None


def _shards(seen: Seen) -> Values | None:
    for folder in seen.tree.folders() if seen.has(*tars.SUFFIXES) else ():
        if name := next((name for name in folder.names if _kind(name) in tars.SUFFIXES), ""):
            try:
                with seen.tree.open(joined(folder.path, name)) as stream:
                    return {"kind": "webdataset", "urls": seen.uri} if archive.is_shard(stream) else None
            except Unreadable:
                return None
    return None


def _archives(seen: Seen) -> Values | None:
    if not seen.has(*archive.SUFFIXES_READ):
        return None
    no_shards = ", and of no shards, as no picture in the first tar has a .txt or .json of its name"
    raise UserError(
        f"data: {seen.uri} is a folder of archives ({seen}){no_shards if seen.has(*tars.SUFFIXES) else ''};"
        " name one of them, or unpack them into one folder"
    )


def _named(seen: Seen) -> Values | None:
    return {"kind": "folder", "path": seen.uri, "captions": seen.captions} if seen.captions else None


IN_FOLDER: tuple[Callable[[Seen], Values | None], ...] = (
    _captioned,  # pictures with captions in lists or files beside them
    _parquet,
    _shards,
    _named,  # pictures whose own names, or whose folders' names, say what they show
    _archives,  # refused
)


def recognise(uri: str, look: bool = True) -> Values | None:
    """As `model.data.sources.recognise`."""
    uri = uri.strip()
    if not uri:
        return None
    if any("\ud800" <= letter <= "\udfff" for letter in uri):  # no config can hold it
        raise UserError(f"data: the name {uri} is not UTF-8; rename it")
    if uri in DRAWN:
        return {"kind": uri}
    if by_name := BY_SUFFIX.get(suffix(uri)):
        return by_name(uri)
    if known := hub.addressed(uri) or archive.recognise(uri, look) or hub.named(uri):
        return known
    try:
        if storage.is_s3(uri) and not look:
            return {"kind": "folder", "path": uri}
        if not storage.is_s3(uri) and os.path.isfile(os.path.expanduser(uri)):
            raise UserError(f"{uri} is a single file; name the folder that it lies in, or {KNOWN}")
        if not storage.is_s3(uri) and not os.path.isdir(os.path.expanduser(uri)):
            raise UserError(f"there is no folder {uri} here; data is that, {KNOWN}")
        seen = Seen(uri, open_tree(uri))
    except UserError as error:
        raise type(error)(f"data: {error}") from None
    for row in IN_FOLDER:
        if found := row(seen):
            return found
    raise UserError(f"data: {_why_not(seen)}")


def _why_not(seen: Seen) -> str:
    """Why nothing of a folder can be used, and what would do."""
    if seen.has(*SUFFIXES):
        tables = ", ".join(seen.tables())
        unread = f"; lists of captions are called {', '.join(LISTS)}, and not {tables}" if tables else ""
        return (
            f"no picture in {seen.uri} has a caption ({seen}), and fewer than {CAPTIONED:.0%} of them have"
            f" names, or folders, that are words{unread}; {HOW_TO_CAPTION}"
        )
    if seen.has(*OTHER_SUFFIXES):
        return f"no picture in {seen.uri} is of a format that is read ({seen}); make them JPEG, PNG or WEBP"
    return f"{seen.uri} holds no pictures ({seen}); data is a folder of them, {KNOWN}"
