"""Steps: the CLIP model that reads prompts, and the one that judges pictures: trained here or pretrained.

Two models from separate seeds and splits, so that none judges itself.
"""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def text(
    config: dsl.Input[dsl.Artifact], run: str, images: dsl.Input[dsl.Dataset], text: dsl.Output[dsl.Model]
) -> None:
    """The text encoder: it sees the training pictures alone.

    Returns:
        text: The CLIP that turns prompts into what the transformer listens to.
    """
    from components.artifacts import make, write
    from components.step import step

    with step("text", run):
        write(make("text", config, run, images=images), text)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def judge(
    config: dsl.Input[dsl.Artifact], run: str, images: dsl.Input[dsl.Dataset], judge: dsl.Output[dsl.Model]
) -> None:
    """The judge: it must recognise what the generator was never shown.

    Returns:
        judge: The CLIP that says how well a picture fits its caption.
    """
    from components.artifacts import make, write
    from components.step import step

    with step("judge", run):
        write(make("judge", config, run, images=images), judge)
