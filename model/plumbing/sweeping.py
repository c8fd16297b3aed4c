"""The store as `garbage` sees it, and the deletion of what nobody needs.

What is looked at are the folders of assets, of locks, of uses; whatever else lies in the store is somebody
else's. An asset's manifest goes before its files: half an asset is no asset, and is made anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import get_args

from model.errors import UserError
from model.plumbing import leases, speech, storage, uses
from model.plumbing.assets import NAME, SCHEMA_VERSION, START, Kind, Manifest
from model.plumbing.garbage import Asset, Garbage, Id, Registered, garbage
from model.plumbing.storage import Stored

ID = re.compile(r"([a-z]+/[0-9a-f]{16})/(.+)")
SPEC = re.compile(r"job-[0-9a-f]+\.json")
LEASES = "leases/"
# What complete assets were made from and need no more: weights that were only begun from, and pictures that a
# model was compared with, else each champion that is measured anew would keep those it was trained on.
NEEDED_NO_MORE = (("transformer", START), ("measurement", "images"))


@dataclass(frozen=True)
class Needed:
    """What a version of a registered model was made from, or what its versions are measured on.

    Assets are named by kind and key, or by the hashes of their manifests.
    """

    ids: frozenset[Id] = frozenset()
    hashes: frozenset[str] = frozenset()
    current: str = ""  # hash of the images that stand for the model's source, if it is known
    pinned: Id = ""  # the benchmark, where that is what is needed


@dataclass(frozen=True)
class Found:
    """What of a store goes."""

    assets: Mapping[Id, Asset]  # all there are
    needed: frozenset[Id]  # of them, by registered models, directly
    garbage: Garbage
    uses: list[str]  # that have run out
    locks: list[str]  # likewise
    unfinished: Mapping[tuple[str, str], Stored]  # writes to places of assets, by name in the store and id

    def sizes(self) -> dict[str, tuple[int, int]]:
        """By kind how many assets go, or what is left of them, and bytes; "scratch" is of those that stay.

        "unfinished" are writes that were killed.
        """
        found: dict[str, tuple[int, int]] = {}
        parts = [(one.partition("/")[0], one, names) for one, names in self.garbage.assets.items()]
        parts += [("scratch", one, names) for one, names in self.garbage.scratch.items()]
        for kind, one, names in parts:
            count, size = found.get(kind, (0, 0))
            freed = sum(self.assets[one].objects[name].size for name in names)
            found[kind] = count + 1, size + freed
        if self.unfinished:
            found["unfinished"] = len(self.unfinished), sum(one.size for one in self.unfinished.values())
        return found


def look(needed: Callable[[], Iterable[Needed]], spared: float) -> Found:
    """Find what of the store nobody needs.

    Args:
        needed: asks for what registered models need, when runs' uses are known: what is registered meanwhile
            is a living run's.
        spared: seconds for which anything stays that was written.

    Raises:
        UserError: the store cannot be read, or a later latent-gpt writes there, too.
    """
    living = set(leases.living())
    said = uses.said()
    counts = {name for name, age in said.items() if age < spared or name.partition("/")[0] in living}
    used = {name.rpartition("/")[2].replace("-", "/", 1) for name in counts}
    locks = leases.locks()
    used |= {work for work, lock in locks.items() if lock.held}
    objects = _objects()
    used |= {one for one, names in objects.items() if any(map(_wants, names.items()))}
    manifests = _read(objects)
    recipes = _recipes(manifests)
    assets = {one: _asset(found, manifests[one], recipes) for one, found in objects.items()}
    by_hash = {made.sha256: one for one, made in manifests.items() if isinstance(made, Manifest)}
    registered = [_registered(one, assets, by_hash) for one in needed()]
    return Found(
        assets,
        frozenset().union(*(one.made_from for one in registered)),
        garbage(assets, registered, used, spared),
        [name for name in said if name not in counts],
        [
            name
            for work, lock in locks.items()
            # The numbers of a lock begin anew where it is deleted: nobody may be about to take it.
            if work.partition("/")[0] in get_args(Kind) and work not in used and lock.age >= spared
            for name in lock.names
        ],
        _unfinished(used, spared),
    )


def sweep(found: Found, still_ours: Callable[[], None]) -> None:
    """Delete what was found, within `uses.sweep`.

    Args:
        found: in the same sweep.
        still_ours: what the sweep yields.

    Raises:
        UserError: the store cannot be written, or the sweep is over. What was not deleted is found again.
    """
    root = storage.store_root()
    for part in (found.garbage.assets, found.garbage.scratch):
        for one, names in part.items():
            for start in range(0, len(names), storage.AT_ONCE):
                still_ours()
                if start == 0 and names[0] == NAME:
                    storage.delete(storage.join(root, one, NAME))
                storage.delete_all(storage.join(root, one), names[start : start + storage.AT_ONCE])
    for name, upload in found.unfinished:
        still_ours()
        storage.give_up(root, name, upload)
    still_ours()
    uses.forget(found.uses)
    storage.delete_all(storage.join(root, leases.LOCKS), found.locks)


def _registered(one: Needed, assets: Mapping[Id, Asset], by_hash: Mapping[str, Id]) -> Registered:
    """What of a store is needed."""
    made_from = {by_hash[sha256] for sha256 in one.hashes & by_hash.keys()} | (one.ids & assets.keys())
    return Registered(frozenset(made_from), by_hash.get(one.current, ""), one.pinned)


def _objects() -> dict[Id, dict[str, Stored]]:
    """All that lies at the places of assets."""
    found: dict[Id, dict[str, Stored]] = {}
    for kind in get_args(Kind):
        for path, one in storage.listing(storage.join(storage.store_root(), kind)).items():
            if match := ID.fullmatch(f"{kind}/{path}"):
                found.setdefault(match[1], {})[match[2]] = one
    return found


def _unfinished(used: Collection[Id], spared: float) -> dict[tuple[str, str], Stored]:
    """Writes to assets that nobody uses and that were begun long ago: whoever did was killed."""
    found: dict[tuple[str, str], Stored] = {}
    try:
        for kind in get_args(Kind):
            for (path, upload), one in storage.unfinished(storage.join(storage.store_root(), kind)).items():
                match = ID.fullmatch(f"{kind}/{path}")
                if match and match[1] not in used and one.age >= spared:
                    found[f"{kind}/{path}", upload] = one
    except UserError as error:  # a right of its own, which not everybody has, and not every store can
        speech.warn("gc", f"unfinished uploads stay, as they cannot be listed: {error}")
    return found


def _read(objects: Mapping[Id, Collection[str]]) -> dict[Id, Manifest | frozenset[Id]]:
    """The manifest of each complete asset; of others, what the jobs are to read that make them."""

    def read(one: Id) -> Manifest | frozenset[Id]:
        place = storage.join(storage.store_root(), one)
        try:
            if NAME in objects[one]:
                return _manifest(storage.read_bytes(storage.join(place, NAME)), place)
            specs = [
                storage.read_bytes(storage.join(place, name)) for name in filter(SPEC.fullmatch, objects[one])
            ]
            inputs = [other for spec in specs for other in json.loads(spec)["inputs"].values()]
            return frozenset(f"{other['kind']}/{other['key']}" for other in inputs)
        except (storage.NotFound, ValueError, KeyError, TypeError):  # gone meanwhile, or of no use to anybody
            return frozenset()

    with ThreadPoolExecutor(storage.THREADS) as pool:
        return dict(zip(objects, pool.map(read, objects), strict=True))


def _manifest(data: bytes, place: str) -> Manifest:
    """Raises ValueError, KeyError or TypeError: it is damaged, or an earlier release's."""
    values = json.loads(data)
    if (schema := int(values["schema_version"])) > SCHEMA_VERSION:
        raise UserError(
            f"{place} has schema {schema} and this version reads {SCHEMA_VERSION}: update latent-gpt, which"
            " does not know what those need who use this store"
        )
    return Manifest.model_validate(values).at(place)


def _recipes(manifests: Mapping[Id, Manifest | frozenset[Id]]) -> dict[str, set[Id]]:
    """The recipes that were derived from a source, by its fingerprint, which images of it have, too."""
    found: dict[str, set[Id]] = {}
    for one, made in manifests.items():
        if isinstance(made, Manifest) and made.kind == "recipe":
            found.setdefault(str(made.settings.get("fingerprint")), set()).add(one)
    return found


def _asset(
    objects: Mapping[str, Stored], read: Manifest | frozenset[Id], recipes: Mapping[str, set[Id]]
) -> Asset:
    if not isinstance(read, Manifest):
        return Asset(objects, inputs=read)
    inputs = {
        f"{other.kind}/{other.key}"
        for name, other in read.inputs.items()
        if (read.kind, name) not in NEEDED_NO_MORE
    }
    if read.kind == "images":  # a run of these pictures that goes on has its sizes and steps from there
        inputs |= recipes.get(str(read.settings.get("fingerprint")), set())
    pictures = {one.sha256 for one in read.inputs.values() if one.kind == "images"}
    held = {
        "images": {read.sha256},
        "tokens": pictures,
        "benchmark": {read.settings["images"]} if "images" in read.settings else set(),
    }
    return Asset(
        objects,
        files=frozenset({NAME, *(file.name for file in read.files)}),
        inputs=frozenset(inputs),
        taken=frozenset((file.asset, file.name) for file in read.files if file.asset),
        pictures=frozenset(held.get(read.kind, ())),
    )


def _wants(one: tuple[str, Stored]) -> bool:
    """Whether an object at an asset's place is the lease of somebody who wants it."""
    return one[0].startswith(LEASES) and one[1].age < leases.LIVE
