"""The pipeline, defined once: it compiles for a cluster and runs on a laptop."""

from typing import Any

from kfp import dsl

from components.clip import judge, text
from components.evaluation import evaluation
from components.images import images
from components.prepare import prepare
from components.register import register
from components.tokenizer import tokenizer
from components.tokens import tokens
from components.transformer import transformer
from model.plumbing.assets import Kind
from model.steps import STEPS


def _named(task: dsl.PipelineTask, title: str = "") -> dsl.PipelineTask:
    """Give a task its name for people; KFP's own cache is off: an asset knows better whether it is there."""
    return task.set_display_name(title or STEPS[task.name].title).set_caching_options(False)


def _of(made: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """What a step needs of what is made."""
    return {name: made[name] for name in STEPS[kind].needs}


@dsl.pipeline(name="text-to-image", description="Captioned pictures in, a registered model out.")
def text_to_image(preset: str = "openmoji-tiny", overrides: str = "") -> None:
    """The whole system, in order.

    Args:
        preset: Name of a shipped preset.
        overrides: Settings to change, one `section.field=value` per line.
    """
    start = _named(
        prepare(preset=preset, overrides=overrides, job=dsl.PIPELINE_JOB_ID_PLACEHOLDER), "Check and prepare"
    )
    of = {"config": start.outputs["config"], "run": start.outputs["run"]}
    made = {"images": _named(images(**of)).output}
    made["tokenizer"] = _named(tokenizer(**of, images=made["images"])).output

    with dsl.If(start.outputs["Output"] == "transformer", name="transformer"):
        made["text"] = _named(text(**of, images=made["images"])).output
        made["judge"] = _named(judge(**of, images=made["images"])).output
        made["tokens"] = _named(tokens(**of, **_of(made, "tokens"))).output
        made["transformer"] = _named(transformer(**of, **_of(made, "transformer"))).output
        parts = {"images": made["images"], **_of(made, "model")}
        judged = _named(evaluation(**of, **parts)).outputs["evaluation"]
        _named(register(**of, evaluation=judged), "Register")
