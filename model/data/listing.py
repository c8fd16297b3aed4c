"""The files that a path or URI names."""

from __future__ import annotations

import os
from fnmatch import fnmatch

from model.errors import UserError
from model.plumbing import storage


def files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The file itself, or those of a folder (all levels) or glob (of names in one folder), sorted by path.

    Args:
        path: of a file, folder or glob, local or in S3.
        suffixes: of the files of a folder, in lower case; hidden ones are left out.

    Raises:
        UserError: a folder cannot be read.
    """
    folder, _, pattern = path.rstrip("/").rpartition("/")
    if "*" in pattern:
        found = [name for name in _below(folder, deep=False) if "/" not in name and fnmatch(name, pattern)]
    elif storage.exists(path):
        return [path]
    else:
        folder = path
        found = [name for name in _below(folder) if name.lower().endswith(suffixes)]
    visible = [name for name in sorted(found) if not any(part.startswith(".") for part in name.split("/"))]
    return [storage.join(folder, name) for name in visible]


def _below(folder: str, deep: bool = True) -> list[str]:
    """Names of all files below a folder; unless `deep`, of a local one those that lie in it itself."""
    if storage.is_s3(folder):
        return list(storage.list_sizes(folder))

    def closed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # somebody deletes it meanwhile
            raise UserError(f"{error.filename}: {error.strerror}") from None

    found = []
    for path, folders, names in storage.walk(folder, closed) if os.path.isdir(folder) else ():
        found += [os.path.relpath(os.path.join(path, name), folder) for name in names]
        if not deep:
            folders.clear()
    return found
