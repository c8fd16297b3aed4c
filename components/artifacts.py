"""What KFP passes from step to step: the config, and artifacts whose file is the manifest of an asset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from model.config import RunConfig
    from model.plumbing.assets import Kind, Manifest

MLFLOW = "mlflow"  # metadata of a config: where people open the run


class Made(NamedTuple):
    """An asset that a step was asked for."""

    manifest: Manifest
    reused: bool  # it was there before


def config_of(artifact: Any) -> RunConfig:
    """The config that `prepare` left."""
    from model.config import parse_config

    return parse_config(Path(artifact.path).read_text())


def make(kind: Kind, config: Any, run: str, **inputs: Any) -> Made:
    """Make the asset of a kind from the artifacts of others, by a job; or find it made."""
    return launched(kind, config_of(config), run, {name: read(one) for name, one in inputs.items()})


def launched(kind: Kind, config: RunConfig, run: str, inputs: dict[str, Manifest]) -> Made:
    """The same from assets. What a retraining takes over is found, whatever it would be made from."""
    from components.launch import launch
    from model import steps
    from model.plumbing import speech

    use(kind, config, run)
    if found := steps.taken_over(kind, config):
        speech.reused(kind, found.uri)
        return noted(run, Made(found, True), inputs.values())
    spec = steps.job(kind, config, run, inputs)
    looked_for = [spec.output, *(one.uri for one in inputs.values())]
    if kind == "tokens" and (earlier := steps.earlier_tokens(spec, inputs["images"])):
        looked_for.append(earlier)
    use(kind, config, run, *looked_for)
    reused = is_made(spec.output)
    return noted(run, Made(launch(spec), reused), inputs.values())


def noted(run: str, made: Made, made_from: Iterable[Manifest], seconds: float = 0) -> Made:
    """Have MLflow show what a step made below the pipeline's run; that is book-keeping, and fails nothing."""
    from components import page
    from model import steps
    from model.errors import UserError
    from model.plumbing import environment, speech, tracking

    if run and environment.MLFLOW_TRACKING_URI.get():
        try:
            figures = page.headline(made.manifest)
            step = steps.run_name(made.manifest.kind, made.manifest.inputs)
            tracking.note_made(run, made.manifest, made.reused, figures, made_from, seconds, step)
        except UserError as error:
            speech.warn(made.manifest.kind, str(error))
    return made


def use(name: str, config: RunConfig, run: str, *uris: str) -> None:
    """Say that a step uses these assets from now on, and what a retraining starts from: see `uses.use`."""
    from model.plumbing import assets, uses

    uses.use(name, run, *uris, *(assets.place(kind, ref.key) for kind, ref in config.origin.items()))


def is_made(uri: str) -> bool:
    """Whether the asset at `uri` is complete."""
    from model.plumbing import assets, storage

    return storage.exists(storage.join(uri, assets.NAME))


def write(made: Made, artifact: Any, config: Any, metrics: Any) -> list[str]:
    """Make an artifact stand for an asset, and log the figures that are named first.

    Args:
        made: the asset.
        artifact: stands for it; its metadata is shown beside it.
        config: the artifact of the config.
        metrics: the artifact of the figures.

    Returns:
        What a page says of the asset.
    """
    from components import page

    manifest = made.manifest
    Path(artifact.path).write_text(manifest.model_dump_json(indent=2))
    first = page.headline(manifest)  # no more: KFP repeats metadata for each step that takes an artifact
    artifact.metadata |= {"asset": manifest.uri, "reused": "yes" if made.reused else "no", **first}
    for name, value in first.items():
        metrics.log_metric(name, value)
    return [page.about(manifest, made.reused), page.link(config.metadata.get(MLFLOW, ""))]


def read(artifact: Any) -> Manifest:
    """The asset that an artifact stands for."""
    from model.plumbing.assets import Manifest

    return Manifest.model_validate_json(Path(artifact.path).read_text())
