"""Step: the transformer over image tokens, conditioned on text."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def transformer(
    config: dsl.Input[dsl.Artifact],
    run: str,
    tokens: dsl.Input[dsl.Dataset],
    text: dsl.Input[dsl.Model],
    tokenizer: dsl.Input[dsl.Model],
    transformer: dsl.Output[dsl.Model],
) -> None:
    """Train as a job of as many processes as the config asks for.

    Returns:
        transformer: The net that predicts codes from a prompt.
    """
    from components.artifacts import make, write
    from components.step import step

    with step("transformer", run):
        made = make("transformer", config, run, tokens=tokens, text=text, tokenizer=tokenizer)
        write(made, transformer)
