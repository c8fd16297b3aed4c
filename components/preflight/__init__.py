"""What can be known to be wrong before anything expensive starts: each thing that a run will need is tried.

`PROBES` is the list; whoever brings a new need adds a line.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from components.preflight import cluster, kfp, room, services
from model.config import RunConfig
from model.errors import Unavailable, UserError
from model.plumbing import environment

FREE_BYTES = 2 * 2**30  # a run of a small preset with its services, checkpoints and logs fits
FREE_SHARE = 0.01  # of a disk: with less left, SeaweedFS takes no more writes (its -minFreeSpace)


class Probe(NamedTuple):
    """One thing that is tried. `check` returns what to tell people, or raises UserError: what is lacking."""

    section: str
    name: str
    check: Callable[[RunConfig], str | None]
    first: bool = False  # where it fails, the rest of its section would say the same


class Finding(NamedTuple):
    """What came of a probe."""

    section: str
    said: str
    error: UserError | None = None  # it stops a run

    def __str__(self) -> str:
        """A line for people."""
        said = self.said.removeprefix(f"{self.section}: ")
        return f"{self.section:10}{f'STOPS A RUN: {said}' if self.error else said}"


def preflight(config: RunConfig) -> list[str]:
    """Try everything that a run of `config` will need; return what was found, in lines.

    Raises:
        UserError: all that is wrong, and what would be right.
    """
    found = findings(config, PROBES)
    if errors := [one.error for one in found if one.error]:
        if len(errors) == 1:
            raise errors[0]
        passing = all(isinstance(one, Unavailable) for one in errors)
        raise (Unavailable if passing else UserError)("; and ".join(map(str, errors)))
    return [str(one) for one in found]


def findings(config: RunConfig, probes: Sequence[Probe]) -> list[Finding]:
    """What each of the probes says that says anything; sections are looked at side by side."""
    sections: dict[str, list[Probe]] = {}
    for probe in probes:
        sections.setdefault(probe.section, []).append(probe)
    with ThreadPoolExecutor(len(sections)) as pool:
        found = pool.map(lambda section: _tried(config, section), sections.values())
        return [one for section in found for one in section]


def _tried(config: RunConfig, section: Sequence[Probe]) -> list[Finding]:
    found = []
    for probe in section:
        try:
            if said := probe.check(config):
                found.append(Finding(probe.section, said))
        except UserError as error:
            found.append(Finding(probe.section, str(error), error))
            if probe.first or isinstance(error, Unavailable):
                break
    return found


def check_disk(folder: Path, needed: int = FREE_BYTES, share: float = 0.0) -> None:
    """Check that `folder`, or the nearest parent that exists, has room.

    Args:
        folder: where something will be written.
        needed: bytes.
        share: of the whole disk, which has to stay free beside them.

    Raises:
        UserError: less is free.
    """
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    needed += int(share * disk.total)
    if disk.free < needed:
        raise UserError(
            f"disk: {folder} has {disk.free / 2**30:.1f} GiB free and a run needs {needed / 2**30:.0f} GiB;"
            " free some, or set LATENT_GPT_STATE to a folder on a larger disk"
        )


def check_writable(folder: Path) -> None:
    """Check that this user may write into the state folder, or make it.

    Raises:
        UserError: not so.
    """
    there = folder
    while not os.path.exists(there):  # as far as this user may look
        there = there.parent
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK, effective_ids=True)):
        raise UserError(
            f"{folder} cannot be written: permission denied at {there}; set LATENT_GPT_STATE to a folder of"
            " this user's"
        )


def check_compiler(config: RunConfig) -> None:
    """Check that torch can compile here, where a training wants that.

    Raises:
        UserError: what it lacks for that.
    """
    compiled = [f"{name}.training.compile" for name, one in config.trainings.items() if one.compile]
    if compiled and (lacking := environment.lacks_to_compile()):
        raise UserError(
            f"{compiled[0]}: torch cannot compile here without {lacking}; install it (on Debian g++ and"
            f" python3-dev), or set {' and '.join(f'{one}=false' for one in compiled)}"
        )


def check_state(folder: Path) -> None:
    """Check that the state folder may be written, and has room for a run, with S3 if that is started there.

    Raises:
        UserError: it may not, or has not.
    """
    check_writable(folder)
    check_disk(folder, share=0.0 if environment.S3_ENDPOINT_URL.get() else FREE_SHARE)


# ── probes ──────────────────────────────────────────────────────────────────────────────────────────────


def _temporary(config: RunConfig) -> None:
    check_disk(Path(tempfile.gettempdir()))


def _source(config: RunConfig) -> str:
    from model.steps import STEPS

    return str(STEPS["images"].settings(config)["fingerprint"])


def _weights(config: RunConfig) -> None:
    from model.steps import STEPS

    for kind, step in STEPS.items():
        if step.taken(config) and kind != "images":
            step.settings(config)  # looks at the weights that the config names by path or URI


PROBES = [
    Probe("disk", "has room", _temporary),
    Probe("compiler", "is there", check_compiler),
    Probe("source", "can be read", _source),
    Probe("storage", "is written to and read from", services.writes, first=True),
    Probe("storage", "lists", services.lists),
    Probe("storage", "writes only what is absent", services.writes_once),
    Probe("storage", "deletes many at once", services.deletes_many),
    Probe("storage", "takes uploads in parts", services.takes_parts),
    Probe("storage", "is read from the middle on", services.reads_on),
    Probe("weights", "are where the config says", _weights),
    Probe("cluster", "answers", cluster.answers, first=True),
    Probe("cluster", "has training jobs", cluster.has_jobs),
    Probe("cluster", "allows what a step does", cluster.allows),
    Probe("cluster", "tells workers their services", cluster.tells_workers),
    Probe("cluster", "has the image", cluster.has_image),
    Probe("cluster", "lets workers in", room.admits),
    Probe("cluster", "has a node for them", room.has_nodes),
    Probe("cluster", "has quota left", room.has_quota),
    Probe("cluster", "keeps time", cluster.keeps_time),
    Probe("KFP", "has drop-downs", kfp.knows_drop_downs),
    Probe("KFP", "restricts its containers", kfp.is_restricted),
    Probe("KFP", "looks again soon", kfp.looks_again),
    Probe("tracking", "answers", services.tracks, first=True),
    Probe("tracking", "is called by any name", services.takes_any_name),
    Probe("tracking", "is no Service named mlflow", services.is_no_service),
    Probe("tracking", "keeps models", services.keeps_models),
    Probe("tracking", "keeps artifacts", services.keeps_artifacts),
]

# What an operator's kubeconfig may look at and a step's account often may not.
FROM_OUTSIDE = [
    probe
    for probe in PROBES
    if probe.check
    in (
        *(cluster.answers, cluster.has_jobs, room.admits, room.has_nodes, room.has_quota),
        *(kfp.knows_drop_downs, kfp.is_restricted, kfp.looks_again),
    )
]
