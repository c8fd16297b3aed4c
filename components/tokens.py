"""Step: every picture of every split into codes, and its captions into token ids."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def tokens(
    config: dsl.Input[dsl.Artifact],
    run: str,
    images: dsl.Input[dsl.Dataset],
    tokenizer: dsl.Input[dsl.Model],
    text: dsl.Input[dsl.Model],
    tokens: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Write token shards that the trainer reads without touching a picture again.

    Returns:
        tokens: Codes of the pictures and ids of their captions, in shards.
        metrics: Pictures per split, tokens of a picture, views of each.
    """
    from components.artifacts import make, write
    from components.step import step

    with step("tokens", run):
        made = make("tokens", config, run, images=images, tokenizer=tokenizer, text=text)
        write(made, tokens, config, metrics)
