"""A folder of pictures, captioned by `metadata.jsonl`, `captions.csv` or `.txt` sidecars, in this order.

- `metadata.jsonl` (Hugging Face imagefolder): one object per line with `file_name` and `text` (or `caption`,
  or a list `captions`).
- `captions.csv`: a header with `file_name` (or `file`, `image`) and `caption` (or `text`).
- Sidecars: `cat.txt` beside `cat.jpg`, one caption per line; pictures are found in all subfolders.

Neighbouring lines that name the same picture give it several captions.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from model.config import FolderSource
from model.data.sources import SUFFIXES, Record
from model.errors import UserError

FILE_FIELDS = ("file_name", "file", "image")
CAPTION_FIELDS = ("caption", "text", "captions")


def iterate(config: FolderSource, side: int, start: int = 0) -> Iterator[Record]:
    """Pictures in the order of the list, or of their paths where there is none."""
    root = _root(config)
    for name, captions in islice(_listed(root), start, None):
        path = root / name
        if not path.resolve().is_relative_to(root.resolve()):
            yield Record(name, b"", captions, problem="lies outside the folder")
            continue
        try:
            yield Record(name, path.read_bytes(), captions)
        except OSError as error:
            yield Record(name, b"", captions, problem=f"cannot be read: {error.strerror}")


def fingerprint(config: FolderSource) -> str:
    """A hash over names, sizes and times of change of every file; contents are not read."""
    root = _root(config)
    digest = hashlib.sha256()
    pictures = 0
    for name in _walk(root):
        stat = (root / name).stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        pictures += name.lower().endswith(SUFFIXES)
    if not pictures:
        raise UserError(f"data.source.path: {root} holds no picture ({', '.join(SUFFIXES)})")
    return digest.hexdigest()


def count(config: FolderSource) -> int:
    """Pictures in the list, or in the folder where there is none."""
    root = _root(config)
    return sum(1 for _ in _listed(root, captions=False))


def _root(config: FolderSource) -> Path:
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise UserError(f"data.source.path: {root} is not a folder")
    return root


def _walk(root: Path) -> Iterator[str]:
    """Relative paths of all files but hidden ones, a folder's own before its subfolders', each sorted."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            yield os.path.relpath(os.path.join(folder, name), root)


def _listed(root: Path, captions: bool = True) -> Iterator[tuple[str, list[str]]]:
    if (root / "metadata.jsonl").is_file():
        pairs = _jsonl(root / "metadata.jsonl")
    elif (root / "captions.csv").is_file():
        pairs = _csv(root / "captions.csv")
    else:
        pictures = (name for name in _walk(root) if name.lower().endswith(SUFFIXES))
        yield from ((name, _sidecar(root / name) if captions else []) for name in pictures)
        return
    for name, group in groupby(pairs, key=itemgetter(0)):
        yield name, [caption for _, captions in group for caption in captions]


def _sidecar(picture: Path) -> list[str]:
    try:
        return picture.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []  # no caption; quarantined as that


def _jsonl(path: Path) -> Iterator[tuple[str, list[str]]]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not valid JSON: {error}") from None
            if not isinstance(entry, dict):
                raise UserError(f"{path}, line {number}: an object with file_name and text is needed")
            yield _pair(entry, f"{path}, line {number}")


def _csv(path: Path) -> Iterator[tuple[str, list[str]]]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                yield _pair(row, f"{path}, line {rows.line_num}")
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}: {error}") from None


def _pair(entry: dict[str, Any], where: str) -> tuple[str, list[str]]:
    file = next((field for field in FILE_FIELDS if field in entry), None)
    caption = next((field for field in CAPTION_FIELDS if field in entry), None)
    if not file or not caption:
        raise UserError(
            f"{where}: fields {', '.join(map(str, entry))}; needed are one of {', '.join(FILE_FIELDS)}"
            f" and one of {', '.join(CAPTION_FIELDS)}"
        )
    value = entry[caption]
    return str(entry[file]), value if isinstance(value, list) else [value]
