"""The pipeline, defined once: it compiles for a cluster and runs on a laptop."""

from kfp import dsl

from components.clip import clip
from components.evaluate import evaluate
from components.ingest import ingest
from components.prepare import prepare
from components.register import register
from components.tokenize_data import tokenize_data
from components.tokenizer import tokenizer
from components.train_gpt import train_gpt


def _named(task: dsl.PipelineTask, name: str) -> dsl.PipelineTask:
    """Give a task its name for people; KFP's own cache is off, as a set knows better whether it is there."""
    return task.set_display_name(name).set_caching_options(False)


@dsl.pipeline(name="text-to-image", description="Captioned pictures in, a registered model out.")
def text_to_image(preset: str = "openmoji-tiny", overrides: str = "") -> None:
    """The whole system, in order.

    Args:
        preset: Name of a shipped preset.
        overrides: Settings to change, one `section.field=value` per line.
    """
    start = prepare(preset=preset, overrides=overrides, job=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    _named(start, "Resolve the config, check services and source")
    config, run = start.outputs["config"], start.outputs["run"]

    images = _named(ingest(config=config, run=run), "Pictures and captions into shards")
    codec = _named(tokenizer(config=config, run=run, images=images.output), "Tokenizer")

    with dsl.If(start.outputs["Output"] == "transformer", name="transformer"):
        reader = _named(
            clip(config=config, run=run, role="text", images=images.output), "CLIP that reads prompts"
        )
        judge = _named(
            clip(config=config, run=run, role="judge", images=images.output), "CLIP that judges pictures"
        )
        tokens = _named(
            tokenize_data(
                config=config, run=run, images=images.output, tokenizer=codec.output, clip=reader.output
            ),
            "Pictures into tokens",
        )
        gpt = _named(
            train_gpt(config=config, run=run, tokens=tokens.output, clip=reader.output), "Transformer"
        )
        sets = {
            "images": images.output,
            "tokens": tokens.output,
            "tokenizer": codec.output,
            "clip": reader.output,
            "judge": judge.output,
            "transformer": gpt.output,
        }
        judged = _named(
            evaluate(config=config, run=run, **sets),
            "Measure, draw, report",
        )
        _named(
            register(config=config, run=run, evaluation=judged.outputs["evaluation"], **sets),
            "Register the model",
        )
