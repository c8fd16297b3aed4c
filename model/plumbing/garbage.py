"""What of a store nobody needs any more: a graph of assets, and what is reached in it.

Models that are registered need what they were made from, runs that live what they use, and what is young is
left alone. The rest goes, and with it what led to assets that are complete since long.

Pictures that were deleted at their source are to go, too. So of all images that the versions of a registered
model were made from, only those are wanted that stand for its source as it was last seen. The others are
superseded, and so are tokens made from them, and benchmarks that hold some of them: of these, those files
stay that other assets took over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from model.plumbing.assets import NAME, PICTURES, REPORT
from model.plumbing.storage import Stored

Id = str  # of an asset: <kind>/<key>
LOOKED_AT = (f"{PICTURES}/", REPORT)  # begin the names of what is part of an asset, and in no manifest


@dataclass(frozen=True)
class Asset:
    """An asset, or what there is of one."""

    objects: Mapping[str, Stored]  # all that lies at its place, by name there
    files: frozenset[str] = frozenset()  # of these, what its manifest names; the manifest is one
    inputs: frozenset[Id] = frozenset()  # what it was made from and needs still, or is made from by a job
    taken: frozenset[tuple[Id, str]] = frozenset()  # files of others that are its own, too
    pictures: frozenset[str] = frozenset()  # of which images it holds some, by the hashes of their manifests

    @property
    def complete(self) -> bool:
        """Whether it has a manifest."""
        return NAME in self.files

    @property
    def age(self) -> float:
        """Seconds since something of it was written."""
        return min((one.age for one in self.objects.values()), default=0.0)


@dataclass(frozen=True)
class Registered:
    """What a version of a registered model needs, or what its versions are measured on."""

    made_from: frozenset[Id]  # directly
    current: Id = ""  # the images that stand for its source; where they are not there, none are superseded
    pinned: Id = ""  # a benchmark that stays whatever it holds


@dataclass(frozen=True)
class Garbage:
    """What goes."""

    assets: dict[Id, list[str]] = field(default_factory=dict)  # all of each, or what is left of it
    scratch: dict[Id, list[str]] = field(default_factory=dict)  # of assets that stay


def garbage(
    assets: Mapping[Id, Asset], registered: Iterable[Registered], used: Collection[Id], spared: float
) -> Garbage:
    """What nobody needs, in an order in which a sweep may be killed at any instant.

    Args:
        assets: all that the store has.
        registered: who needs what.
        used: what runs that live use or make, and what jobs under way make.
        spared: seconds for which anything stays that was written.
    """
    young = {one for one, asset in assets.items() if asset.age < spared}
    complete = {one: asset for one, asset in assets.items() if asset.complete}
    whole = _reached(assets, [*used, *young])
    whole = whole.union(*(_needed(complete, one) for one in registered))
    taken = {file for one in whole for file in assets[one].taken}
    found = Garbage()
    for one in sorted(assets.keys() - whole):
        if names := [name for name in assets[one].objects if (one, name) not in taken]:
            found.assets[one] = sorted(names, key=lambda name: (name != NAME, name))
    for one in sorted(whole - set(used)):
        if names := [name for name in _scratch(assets[one], spared) if (one, name) not in taken]:
            found.scratch[one] = names
    return found


def _reached(assets: Mapping[Id, Asset], roots: Iterable[Id]) -> set[Id]:
    """These, and what went into them, as far as it is there."""
    found: set[Id] = set()
    waiting = list(roots)
    while waiting:
        one = waiting.pop()
        if one in assets and one not in found:
            found.add(one)
            waiting += assets[one].inputs
    return found


def _needed(complete: Mapping[Id, Asset], by: Registered) -> set[Id]:
    """What somebody registered needs, but for what is superseded: that leads no further, as it goes."""
    roots = [*by.made_from, by.current, by.pinned]
    if by.current not in complete:
        return _reached(complete, roots)
    current = complete[by.current].pictures
    wanted = {one: asset for one, asset in complete.items() if asset.pictures <= current or one == by.pinned}
    return _reached(wanted, roots)


def _scratch(asset: Asset, spared: float) -> list[str]:
    """What led to a complete asset, and is old."""
    if not asset.complete:
        return []
    return [
        name
        for name, one in asset.objects.items()
        if name not in asset.files and not name.startswith(LOOKED_AT) and one.age >= spared
    ]
