"""The three pipelines, each defined once: they compile for a cluster and run on a laptop."""

from typing import Any

from kfp import dsl

from components.clip import judge, text
from components.evaluation import evaluation
from components.images import images
from components.news import news
from components.parameters import RETRAINING, TEXT_TO_IMAGE, VQVAE
from components.parameters import pipeline_of as of
from components.prepare import prepare
from components.register import register
from components.retraining import NEW
from components.tokenizer import tokenizer
from components.tokens import tokens
from components.transformer import transformer
from model.plumbing.assets import Kind
from model.steps import STEPS
from pipelines.pod import on_cluster

__all__ = ["PIPELINES", "of", "retraining", "text_to_image", "vqvae"]


def _named(task: dsl.PipelineTask, title: str = "") -> dsl.PipelineTask:
    """Give a task its name for people, and what its pod needs.

    KFP's own cache is off: an asset knows better whether it is there.
    """
    return on_cluster(task).set_display_name(title or STEPS[task.name].title).set_caching_options(False)


def _of(made: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """What a step needs of what is made."""
    return {name: made[name] for name in STEPS[kind].needs}


def _begun(pipeline: str, **parameters: Any) -> dict[str, Any]:
    """The first step, which checks everything; returns what all others get of it."""
    job = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    start = _named(prepare(pipeline=pipeline, job=job, **parameters), "Check and prepare")
    return {"config": start.outputs["config"], "run": start.outputs["run"]}


@dsl.pipeline(name=TEXT_TO_IMAGE)
def text_to_image(
    preset: str = "auto",
    data: str = "",
    workers: int = 0,
    gpus_per_worker: int = -1,
    overrides: str = "",
    experiment_name: str = "",
    config: str = "",
) -> None:
    """Captioned pictures in, a registered model that draws them out.

    Args:
        preset: What is trained, and how large: the settings of a run. auto: what fits the data, or without
            any openmoji-tiny.
        data: Your captioned pictures: a folder of them in S3, tar shards or parquet files, an archive of
            these, or a Hugging Face data set. Empty: those of the preset.
        workers: Pods of a training job. 0: as many as the preset says.
        gpus_per_worker: GPUs of such a pod, and its processes. -1: as many as the preset says.
        overrides: Settings that win over all others, one a line, e.g. transformer.depth=6; model/config.py
            describes them.
        experiment_name: In MLflow. Empty: that of the phase, latent-gpt-custom-vqvae or
            latent-gpt-pretrained-vqvae.
        config: The YAML of a whole config, used instead of the preset. Empty: none.
    """
    of = _begun(
        TEXT_TO_IMAGE,
        preset=preset,
        data=data,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        overrides=overrides,
        experiment_name=experiment_name,
        yaml=config,
    )
    made = {"images": _named(images(**of)).outputs["images"]}
    for kind, step in (("tokenizer", tokenizer), ("text", text), ("judge", judge)):  # side by side
        made[kind] = _named(step(**of, images=made["images"])).outputs[kind]
    made["tokens"] = _named(tokens(**of, **_of(made, "tokens"))).outputs["tokens"]
    made["transformer"] = _named(transformer(**of, **_of(made, "transformer"))).outputs["transformer"]
    parts = {"images": made["images"], **_of(made, "model")}
    made["evaluation"] = _named(evaluation(**of, **parts)).outputs["evaluation"]
    _named(register(**of, evaluation=made["evaluation"]), "Register")


@dsl.pipeline(name=VQVAE)
def vqvae(
    preset: str = "auto",
    data: str = "",
    workers: int = 0,
    gpus_per_worker: int = -1,
    overrides: str = "",
    experiment_name: str = "",
    config: str = "",
) -> None:
    """Pictures in, a VQ-VAE out that turns them into tokens: the tokenizer of a preset, and no more.

    Args:
        preset: Whose VQ-VAE is trained. The other pipeline finds it made, with the same preset and data,
            but for auto: that gives a VQ-VAE alone all of the time, and there a part.
        data: Your captioned pictures, as in the other pipeline. Empty: those of the preset.
        workers: Pods of a training job. 0: as many as the preset says.
        gpus_per_worker: GPUs of such a pod, and its processes. -1: as many as the preset says.
        overrides: Settings that win over all others, one a line, e.g. tokenizer.codebook_size=512;
            model/config.py describes them.
        experiment_name: In MLflow. Empty: vqvae-training.
        config: The YAML of a whole config, used instead of the preset. Empty: none.
    """
    of = _begun(
        VQVAE,
        preset=preset,
        data=data,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        overrides=overrides,
        experiment_name=experiment_name,
        yaml=config,
    )
    _named(tokenizer(**of, images=_named(images(**of)).outputs["images"]))


@dsl.pipeline(name=RETRAINING)
def retraining(
    preset: str = "auto",
    model: str = "",
    data: str = "",
    start: str = "",
    workers: int = 0,
    gpus_per_worker: int = -1,
    overrides: str = "",
    experiment_name: str = "",
    config: str = "",
) -> None:
    """A model that goes on learning: trains where source or settings are not those of a registered version.

    Args:
        preset: What is trained where there is no version yet; later ones start from the champion's settings.
        model: Name of the registered model. Empty: that of the preset.
        data: Your captioned pictures, as in the other pipelines. Empty: those of the champion.
        start: Weights that the transformer begins from: champion or scratch. Empty: as retrain.start says.
        workers: Pods of a training job. 0: as many as the champion's config says.
        gpus_per_worker: GPUs of such a pod, and its processes. -1: as many as the champion's config says.
        overrides: Settings that win over all others, one a line, e.g. transformer.training.steps=500;
            model/config.py describes them.
        experiment_name: In MLflow. Empty: that of the champion's config.
        config: The YAML of a whole config, used instead of the preset. Empty: none.
    """
    asked = {"data": data, "workers": workers, "gpus_per_worker": gpus_per_worker, "overrides": overrides}
    asked |= {"experiment_name": experiment_name, "yaml": config}
    seen = _named(news(preset=preset, model=model, start=start, **asked), "Anything new?")
    with dsl.If(seen.outputs["Output"] == NEW, name="If so"):  # kfp.local compares no other output
        whole = text_to_image(
            preset="",
            data="",
            workers=0,
            gpus_per_worker=-1,
            overrides="",
            experiment_name="",
            config=seen.outputs["config"],
        )
        whole.set_display_name("Train").set_caching_options(False)


PIPELINES = {TEXT_TO_IMAGE: text_to_image, VQVAE: vqvae, RETRAINING: retraining}
