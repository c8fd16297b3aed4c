"""Steps: the CLIP model that reads prompts, and the one that judges pictures: trained here or pretrained.

Two models from separate seeds and splits, so that none judges itself.
"""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def text(
    config: dsl.Input[dsl.Artifact],
    run: str,
    images: dsl.Input[dsl.Dataset],
    text: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    curves: dsl.Output[dsl.HTML],
) -> None:
    """The text encoder: it sees the training pictures alone.

    Returns:
        text: The CLIP that turns prompts into what the transformer listens to.
        metrics: Its loss, and how often it finds the caption of a held-out picture among others.
        curves: A page with the curves of its training.
    """
    from pathlib import Path

    from components.artifacts import make, write
    from components.step import step

    with step("text", run):
        from components.page import training

        made = make("text", config, run, images=images)
        Path(curves.path).write_text(training(made.manifest, *write(made, text, config, metrics)))


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def judge(
    config: dsl.Input[dsl.Artifact],
    run: str,
    images: dsl.Input[dsl.Dataset],
    judge: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    curves: dsl.Output[dsl.HTML],
) -> None:
    """The judge: it must recognise what the generator was never shown.

    Returns:
        judge: The CLIP that says how well a picture fits its caption.
        metrics: Its loss, and how often it finds the caption of a picture among others.
        curves: A page with the curves of its training.
    """
    from pathlib import Path

    from components.artifacts import make, write
    from components.step import step

    with step("judge", run):
        from components.page import training

        made = make("judge", config, run, images=images)
        Path(curves.path).write_text(training(made.manifest, *write(made, judge, config, metrics)))
