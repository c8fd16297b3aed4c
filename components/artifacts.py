"""What KFP passes from step to step: the config, and artifacts whose file is the manifest of an asset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.config import RunConfig
    from model.plumbing.assets import Kind, Manifest


def config_of(artifact: Any) -> RunConfig:
    """The config that `prepare` left."""
    from model.config import parse_config

    return parse_config(Path(artifact.path).read_text())


def make(kind: Kind, config: Any, run: str, **inputs: Any) -> Manifest:
    """Make the asset of a kind from the artifacts of others, by a job; or find it made."""
    from components.launch import launch
    from model import steps

    found = {name: read(artifact) for name, artifact in inputs.items()}
    return launch(steps.job(kind, config_of(config), run, found))


def write(manifest: Manifest, artifact: Any) -> None:
    """Make an artifact stand for an asset; its metadata is what the UI shows."""
    Path(artifact.path).write_text(manifest.model_dump_json(indent=2))
    artifact.metadata["asset"] = manifest.uri
    for name, value in manifest.info.items():
        if isinstance(value, int | float | str):
            artifact.metadata[name] = value


def read(artifact: Any) -> Manifest:
    """The asset that an artifact stands for."""
    from model.plumbing.assets import Manifest

    return Manifest.model_validate_json(Path(artifact.path).read_text())
