"""A data set of the Hugging Face hub: what its train split has of Parquet files, tar shards or pictures.

Files come through `huggingface_hub`, whose cache and environment count as everywhere (HF_HOME, HF_TOKEN,
HF_ENDPOINT; HF_HUB_OFFLINE for what its cache already has). Which are the train split's is told by the data
set's card, or else by names. Where it has nothing that we read, there is what the hub itself converted to
Parquet. The commit is the fingerprint: a branch that moved on is news.

The package `datasets` is not used. What a script of strangers would do is not run, and the layouts without
scripts (Parquet, imagefolder, WebDataset) are read by our own readers, with their bounds.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

from model.config import ArchiveSource, HubSource, ParquetSource, Source, WebDatasetSource
from model.data import tars
from model.data.captions import decode, shown
from model.data.sources import (
    OTHER_SUFFIXES,
    SUFFIXES,
    TABLES,
    Known,
    Record,
    marked,
    nothing_known,
    suffix,
)
from model.data.sources.folder import LISTS
from model.data.sources.unpacked import SPARE, Inner, Writer, inner
from model.errors import UserError
from model.plumbing import speech, storage
from model.plumbing.cache import Room

SECONDS = 10  # to wait for one answer of the hub
AT_ONCE = 8  # files under way
CONVERTED = "refs/convert/parquet"  # the branch of what the hub converted
CARD = "README.md"
LARGEST_CARD = 1 << 18  # bytes
MOST_GLOBS = 100  # of a card
TEXTS = (*TABLES, ".caption")  # that may say what pictures show
SPLIT = re.compile(
    r"(?:^|[/._-])(?:(?P<train>train(?:ing)?)|valid(?:ation)?|val|dev|test(?:ing)?|eval(?:uation)?)(?:[/._-]|\d|$)",
    re.IGNORECASE,
)
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Files:
    """What is read of a data set."""

    commit: str
    names: tuple[str, ...]
    size: int  # bytes; 0 where nobody says

    @property
    def mark(self) -> str:
        """Of these files, whatever else the data set has."""
        return marked(self.commit, *self.names)


def iterate(config: HubSource, side: int, start: int = 0, known: Known = nothing_known) -> Iterator[Record]:
    """What the source that its files make up yields."""
    yield from _inner(config).iterate(side, start, known)


def fingerprint(config: HubSource) -> str:
    """The commit, and which of its files are read. Raises UserError: there is no such data set."""
    return _files(config).mark


def count(config: HubSource) -> int:
    """As many as the source that its files make up says."""
    return _inner(config).count()


def content(config: HubSource) -> Source:
    """The source that its files make up."""
    return _inner(config).config


def addressed(uri: str) -> dict[str, Any] | None:
    """The values of `data.source` for the address of a data set; None for all else.

    Raises:
        UserError: an address of the hub, but of no data set.
    """
    from huggingface_hub import constants

    places = ("https://huggingface.co/", "https://hf.co/", "hf://", f"{constants.ENDPOINT.rstrip('/')}/")
    place = next((place for place in places if uri.startswith(place)), "")
    if not place:
        return None
    rest = uri.removeprefix(place).partition("?")[0].rstrip("/")
    parts = rf"datasets/({REPOSITORY.pattern})(?:@([^/]+)|/tree/([^/]+)|/(?:viewer|discussions)\b.*)?"
    found = re.fullmatch(parts, rest)
    if not found:
        raise UserError(
            f"data: {uri} names no data set of the hub as a whole; give owner/name, or"
            " https://huggingface.co/datasets/owner/name, with /tree/REVISION where it is not main"
        )
    revision = unquote(found[2] or found[3] or "")
    return {"kind": "hub", "repo": found[1]} | ({"revision": revision} if revision else {})


def named(uri: str) -> dict[str, Any] | None:
    """The same for a data set's name, unless there is a folder that it may mean."""
    there = os.path.exists(uri) or os.path.isdir(uri.partition("/")[0])
    return {"kind": "hub", "repo": uri} if REPOSITORY.fullmatch(uri) and not there else None


def _inner(config: HubSource) -> Inner:
    files = _files(config)
    where = f"data.source.repo: {config.repo}"
    with _explained(config):
        paths = _downloaded(config, files)

    def fill(folder: Path, room: Room) -> dict[str, Any]:
        writer = Writer(folder, room, where)
        for name, path in paths.items():
            if suffix(name) in (*SUFFIXES, *OTHER_SUFFIXES, *TEXTS) or name.rpartition("/")[2] in LISTS:
                with path.open("rb") as file:  # links out of a folder of pictures are not followed
                    writer.write(name, iter(lambda: file.read(storage.MIB), b""), 0)
            else:
                writer.link(name, path)
        return writer.note()

    def source(root: str) -> Source:
        if suffix(first) == ".zip":
            return ArchiveSource(path=f"{root}/{first}")
        return ParquetSource(path=root) if suffix(first) == ".parquet" else WebDatasetSource(urls=root)

    first = files.names[0]
    of_files = not _pictures(files.names)
    name = marked("hub", config.repo, files.mark)
    return inner(name, where, fill, source if of_files else None)


# ── which files ─────────────────────────────────────────────────────────────────────────────────────────


def _files(config: HubSource) -> Files:
    """Those of the train split, of the revision or of what the hub made of it.

    Raises:
        UserError: there are none, or the hub cannot be asked.
    """
    if not REPOSITORY.fullmatch(config.repo):
        raise UserError(f"data.source.repo: '{shown(config.repo)}' is no name of a data set, owner/name")
    revisions = [config.revision, *([CONVERTED] if config.revision == "main" else [])]
    for revision in revisions:
        with _explained(config, revision):
            try:
                commit, sizes = _listed(config.repo, revision)
            except LookupError:
                continue  # nothing was converted
            names = _chosen(config, commit, [name for name in sizes if _is_plain(name)])
        if names:
            return Files(commit, tuple(names), sum(sizes[name] for name in names))
    raise UserError(
        f"data.source.repo: {config.repo} has no Parquet files, tar shards or pictures, and the hub made none"
        " of it; scripts that would are not run: load it elsewhere, and save it as Parquet (to_parquet)"
    )


def _is_plain(name: str) -> bool:
    parts = name.split("/")
    return not name.startswith("/") and not any(part.startswith(".") or not part for part in parts)


def _listed(repo: str, revision: str) -> tuple[str, dict[str, int]]:
    """The commit of a revision, and names and sizes of its files.

    Raises:
        LookupError: there is no such conversion.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    try:
        if not constants.HF_HUB_OFFLINE:
            found = HfApi().dataset_info(repo, revision=revision, timeout=SECONDS, files_metadata=True)
            files = {one.rfilename: one.size or 0 for one in found.siblings or []}
            return found.sha or "", dict(sorted(files.items()))
        home = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="dataset"))
        known = home / "refs" / revision
        if not COMMIT.fullmatch(revision) and not known.is_file():
            raise OfflineModeIsEnabled(f"{revision} is not in {home}")
        commit = revision if COMMIT.fullmatch(revision) else known.read_text().strip()
        if not COMMIT.fullmatch(commit):
            raise OfflineModeIsEnabled(f"{known} names no commit")
        below = home / "snapshots" / commit
        return commit, storage.list_sizes(str(below))
    except (RevisionNotFoundError, OfflineModeIsEnabled):
        if revision == CONVERTED:
            raise LookupError(revision) from None
        raise


def _chosen(config: HubSource, commit: str, names: list[str]) -> list[str]:
    """Files of one kind, of the train split, and pictures that Parquet files name."""
    from model.data.sources.parquet import names_pictures  # pyarrow

    everywhere = _pictures(names)
    told = _told(_said_by_card(config, commit), names) if CARD in names else []
    names = told or names
    pictures = _pictures(names)
    for kind in (
        [name for name in names if suffix(name) == ".parquet" and name.rpartition("/")[2] not in LISTS],
        [name for name in names if name.endswith(tars.SUFFIXES)],
        pictures,
        [name for name in names if suffix(name) == ".zip"],
    ):
        if kind:
            break
    else:
        return []
    train = kind if told else _train(config, kind)
    if kind is pictures:
        texts = [name for name in names if suffix(name) in TEXTS or name.rpartition("/")[2] in LISTS]
        return sorted({*train, *(texts if told else _but_held_out(texts))})
    if suffix(train[0]) == ".parquet" and everywhere:
        path = str(_file(config, train[0], commit))
        if names_pictures(ParquetSource(path=path), path):
            return sorted({*train, *_but_held_out(everywhere)})
    if suffix(train[0]) == ".zip" and len(train) > 1:
        raise UserError(
            f"data.source.repo: {config.repo} is of {len(train)} zips, of which one would be read; download"
            " it, unpack them into one folder, and name that"
        )
    return train


def _pictures(names: Iterable[str]) -> list[str]:
    return [name for name in names if suffix(name) in (*SUFFIXES, *OTHER_SUFFIXES)]


def _but_held_out(names: Iterable[str]) -> list[str]:
    """Those that are of no other split than the train split, as far as they tell."""
    return [name for name in names if not (split := SPLIT.search(name)) or split["train"]]


def _train(config: HubSource, names: list[str]) -> list[str]:
    """Those of a train split, or all where names tell of none; of one configuration."""
    split = {name: SPLIT.search(name) for name in names}
    train = [name for name in names if (found := split[name]) and found["train"]]
    train = train or [name for name in names if not split[name]]
    if not train:
        raise UserError(
            f"data.source.repo: {config.repo} has no train split, only files like {shown(names[0])}"
        )
    if suffix(train[0]) != ".parquet":
        return train
    folders = sorted({name.rpartition("/")[0].partition("/")[0] for name in train})
    if len(folders) > 1:
        first = "default" if "default" in folders else folders[0]
        speech.say("images", f"{config.repo} has the configurations {', '.join(folders)}; read is {first}")
        train = [name for name in train if name.rpartition("/")[0].partition("/")[0] == first]
    return train


def _said_by_card(config: HubSource, commit: str) -> list[str]:
    """Paths and globs of the train split's files in the default configuration; none where it says nothing.

    https://huggingface.co/docs/hub/datasets-manual-configuration
    """
    path = _file(config, CARD, commit)
    with path.open("rb") as file:
        head = re.match(r"---\r?\n(.*?)\n---", decode(file.read(LARGEST_CARD)), re.DOTALL)
    try:
        configs = [one for one in yaml.safe_load(head[1])["configs"] if isinstance(one, dict)] if head else []
        configs.sort(key=lambda one: (one.get("default") is not True, one.get("config_name") != "default"))
        files = configs[0].get("data_files", configs[0].get("data_dir", "") + "/**") if configs else []
    except (yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError):
        return []  # a card that says other things
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    found: list[Any] = []  # of strangers
    for one in files if isinstance(files, list) else [files]:
        if isinstance(one, dict) and one.get("split") == "train":
            found += one["path"] if isinstance(one.get("path"), list) else [one.get("path")]
        elif isinstance(one, str):
            found.append(one)
    return [one.removeprefix("./").strip("/") for one in found if isinstance(one, str)]


def _told(said: list[str], names: list[str]) -> list[str]:
    """The files that paths and globs of a card name."""
    exact = set(said)
    globs = [one.split("/") for one in said if "*" in one or "?" in one][:MOST_GLOBS]
    return [name for name in names if name in exact or any(_matches(name.split("/"), glob) for glob in globs)]


def _matches(parts: list[str], glob: list[str]) -> bool:
    """Whether a glob names a path; `**` is any number of folders. (A regular expression might never end.)"""

    def beyond(places: set[int]) -> set[int]:
        for place in sorted(places):
            while place < len(glob) and glob[place] == "**":
                place += 1
                places.add(place)
        return places

    places = beyond({0})  # how far the glob may have come
    for part in parts:
        stay = {place for place in places if glob[place : place + 1] == ["**"]}
        on = {place + 1 for place in places if place < len(glob) and fnmatchcase(part, glob[place])}
        places = beyond(stay | on)
    return len(glob) in places


# ── from the hub ────────────────────────────────────────────────────────────────────────────────────────


def _downloaded(config: HubSource, files: Files) -> dict[str, Path]:
    """The files in the hub's cache, by name."""
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    while not place.is_dir() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free

    def one(name: str) -> Path:
        return _file(config, name, files.commit)

    def missing(name: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(config.repo, name, repo_type="dataset", revision=files.commit)
        return not isinstance(found, str)

    if absent := [name for name in files.names if missing(name)]:
        if files.size > free - SPARE:
            raise UserError(
                f"data.source.repo: {config.repo} has {files.size:,} bytes of a train split, and the disk of"
                f" {place} {free:,} left; free some, or set HF_HOME to another place"
            )
        speech.say("images", f"downloading {len(absent)} files of {config.repo} ({files.size:,} bytes)")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(files.names, (path.resolve() for path in pool.map(one, files.names)), strict=True))


def _file(config: HubSource, name: str, commit: str) -> Path:
    """Where a file is in the hub's cache, to which it is downloaded if it is not there."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(config.repo, name, repo_type="dataset", revision=commit))


@contextmanager
def _explained(config: HubSource, revision: str = "") -> Iterator[None]:
    """Whatever keeps a data set from being had is one line."""
    from huggingface_hub import constants, errors

    revision = revision or config.revision
    page = f"{constants.ENDPOINT}/datasets/{config.repo}"
    try:
        yield
    except (UserError, LookupError):
        raise
    except errors.GatedRepoError:
        reason = f"is gated; ask for access at {page}, and set HF_TOKEN to a token of yours"
    except errors.RevisionNotFoundError:
        reason = f"has no revision '{shown(revision)}'"
    except errors.RepositoryNotFoundError:
        reason = (
            f"is no data set of {constants.ENDPOINT}, or a private one (set HF_TOKEN), and no folder here"
        )
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        off = constants.HF_HUB_OFFLINE
        reason = (
            f"is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to ask the hub ({_line(error)})"
            if off
            else f"cannot be had from {constants.ENDPOINT} ({_line(error)})"
        )
    except Exception as error:  # the hub's client raises many kinds; a person needs one line
        reason = (
            f"cannot be had from {constants.ENDPOINT} ({_line(error)}); where the hub is out of reach, set"
            " HF_ENDPOINT to a mirror, or HF_HOME to a cache that has it, and HF_HUB_OFFLINE=1"
        )
    else:
        return
    raise UserError(f"data.source.repo: {config.repo} {reason}")


def _line(error: Exception) -> str:
    return shown(" ".join(str(error).split())[:200] or type(error).__name__)
