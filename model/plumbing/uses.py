"""Who uses which assets, and the sweep that takes away what nobody does: neither is in the other's way.

A step says what it is about to look for, waits while a sweep is under way, and looks then. A sweep begins,
and then reads what steps have said. So whoever comes first, either the sweep knows of the use, or the step
finds what the sweep has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from model.plumbing import leases, storage

FOLDER = "uses"  # of the store: <run>/<kind>-<key>
SWEEP = "gc"  # what a sweep holds alone
NOBODY = "no-run"  # whose uses count while they are young


def use(name: str, run: str, *uris: str) -> None:
    """Say that a step uses these assets from now on, be they there or not; return when no sweep is under way.

    They stay as long as the pipeline run lives, and for the hours that a sweep spares what is young.

    Args:
        name: of the step, for what is said.
        run: of the pipeline.
        uris: of assets, at their places in the store.

    Raises:
        UserError: the store does not answer.
    """
    root = storage.store_root()
    for uri in uris:
        kind, key = uri.rstrip("/").split("/")[-2:]
        storage.write_bytes(storage.join(root, FOLDER, run or NOBODY, f"{kind}-{key}"), name.encode())
    if uris:
        leases.wait_for(name, SWEEP, "waits for `latent-gpt gc`, which is at work")


def said() -> dict[str, float]:
    """Who uses what, as `<run>/<kind>-<key>`, and for how many seconds it has been said.

    Raises:
        UserError: the store does not answer.
    """
    return storage.ages(storage.join(storage.store_root(), FOLDER))


def forget(names: Iterable[str]) -> None:
    """Say nothing of these uses any more."""
    storage.delete_all(storage.join(storage.store_root(), FOLDER), names)


@contextmanager
def sweep() -> Iterator[Callable[[], None]]:
    """Wait until no other sweep is under way, then keep steps from looking for assets.

    Yields:
        What is to be called before each deletion: raises a UserError where steps may look again.
    """
    with leases.alone("gc", SWEEP) as still_ours:
        yield still_ours
