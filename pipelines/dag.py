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


@dsl.pipeline(name="text-to-image", description="Captioned pictures in, a registered model out.")
def text_to_image(preset: str = "openmoji-tiny", overrides: str = "") -> None:
    """The whole system, in order.

    Args:
        preset: Name of a shipped preset.
        overrides: Settings to change, one `section.field=value` per line.
    """
    prepared = prepare(preset=preset, overrides=overrides, job=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    prepared.set_display_name("Resolve the config, check services and source")
    config, run = prepared.outputs["config"], prepared.outputs["run"]

    images = ingest(config=config, run=run).set_display_name("Pictures and captions into shards")
    codec = tokenizer(config=config, run=run, images=images.output).set_display_name("Tokenizer")

    with dsl.If(prepared.outputs["Output"] == "transformer", name="transformer"):
        reader = clip(config=config, run=run, role="text", images=images.output)
        reader.set_display_name("CLIP that reads prompts")
        judge = clip(config=config, run=run, role="judge", images=images.output)
        judge.set_display_name("CLIP that judges pictures")
        tokens = tokenize_data(
            config=config, run=run, images=images.output, tokenizer=codec.output, clip=reader.output
        ).set_display_name("Pictures into tokens")
        gpt = train_gpt(config=config, run=run, tokens=tokens.output, clip=reader.output)
        gpt.set_display_name("Transformer")
        judged = evaluate(
            config=config,
            run=run,
            images=images.output,
            tokens=tokens.output,
            tokenizer=codec.output,
            clip=reader.output,
            judge=judge.output,
            transformer=gpt.output,
        ).set_display_name("Measure, draw, report")
        register(
            config=config,
            run=run,
            tokenizer=codec.output,
            clip=reader.output,
            judge=judge.output,
            transformer=gpt.output,
            evaluation=judged.outputs["evaluation"],
        ).set_display_name("Register the model")
