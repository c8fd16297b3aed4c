"""What of a store nobody needs any more: a graph of assets, and what is reached in it.

Models that are registered need what they were made from, runs that live what they use, and what is young is
left alone. The rest goes, and with it what led to assets that are complete since long.

Pictures that were deleted at their source are to go, too. So a set of images that another one has grown from,
which a registered model was made from, is superseded: of it, and of the tokens made from it, those files stay
that other assets took over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from model.plumbing.assets import NAME, PICTURES
from model.plumbing.storage import Stored

Id = str  # of an asset: <kind>/<key>


@dataclass(frozen=True)
class Asset:
    """An asset, or what there is of one."""

    objects: Mapping[str, Stored]  # all that lies at its place, by name there
    files: frozenset[str] = frozenset()  # of these, what its manifest names; the manifest is one
    inputs: frozenset[Id] = frozenset()  # what it was made from, or is made from by a job
    taken: frozenset[tuple[Id, str]] = frozenset()  # files of others that are its own, too
    grown_from: Id = ""

    @property
    def complete(self) -> bool:
        """Whether it has a manifest."""
        return NAME in self.files

    @property
    def age(self) -> float:
        """Seconds since something of it was written."""
        return min((one.age for one in self.objects.values()), default=0.0)


@dataclass(frozen=True)
class Garbage:
    """What goes."""

    assets: dict[Id, list[str]] = field(default_factory=dict)  # all of each, or what is left of it
    scratch: dict[Id, list[str]] = field(default_factory=dict)  # of assets that stay


def garbage(
    assets: Mapping[Id, Asset], registered: Collection[Id], used: Collection[Id], spared: float
) -> Garbage:
    """What nobody needs, in an order in which a sweep may be killed at any instant.

    Args:
        assets: all that the store has.
        registered: what registered models were made from.
        used: what runs that live use or make, and what jobs under way make.
        spared: seconds for which anything stays that was written.
    """
    young = {one for one, asset in assets.items() if asset.age < spared}
    held = _reached(assets, [*used, *young])
    reached = _reached({one: asset for one, asset in assets.items() if asset.complete}, registered)
    superseded = _superseded(assets, reached)
    whole = held | (reached - superseded)
    # That an older one is superseded is known by those between: they stay as long as that one does.
    whole |= {one for one in superseded if not whole.isdisjoint(_ancestors(assets, one))}
    taken = {file for one in whole for file in assets[one].taken}
    found = Garbage()
    for one in sorted(assets.keys() - whole, key=lambda one: _turn(assets, one)):
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


def _superseded(assets: Mapping[Id, Asset], reached: Collection[Id]) -> set[Id]:
    """What those have grown from, and what was made right from that, if it grows as well: tokens."""
    images = {older for one in reached for older in _ancestors(assets, one)}
    tokens = {one for one, asset in assets.items() if one.startswith("tokens/") and asset.inputs & images}
    return (images & assets.keys()) | tokens


def _ancestors(assets: Mapping[Id, Asset], one: Id) -> list[Id]:
    """What an asset has grown from, the youngest first."""
    found: list[Id] = []
    while one in assets and assets[one].grown_from and assets[one].grown_from not in found:
        one = assets[one].grown_from
        found.append(one)
    return found


def _turn(assets: Mapping[Id, Asset], one: Id) -> tuple[bool, int, Id]:
    """Its place in the order: the one that says that another is superseded goes after that."""
    return one.startswith("images/"), len(_ancestors(assets, one)), one


def _scratch(asset: Asset, spared: float) -> list[str]:
    """What led to a complete asset, and is old."""
    if not asset.complete:
        return []
    return [
        name
        for name, one in asset.objects.items()
        if name not in asset.files and not name.startswith(f"{PICTURES}/") and one.age >= spared
    ]
