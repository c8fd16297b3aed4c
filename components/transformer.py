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
    metrics: dsl.Output[dsl.Metrics],
    curves: dsl.Output[dsl.HTML],
) -> None:
    """Train as a job of as many processes as the config asks for.

    Returns:
        transformer: The net that predicts codes from a prompt.
        metrics: Nats per token of held-out pictures: with their captions, without, and with others'.
        curves: A page with the curves of its training.
    """
    from pathlib import Path

    from components.artifacts import make, write
    from components.step import step

    with step("transformer", run):
        from components.page import training

        made = make("transformer", config, run, tokens=tokens, text=text, tokenizer=tokenizer)
        Path(curves.path).write_text(training(made.manifest, *write(made, transformer, config, metrics)))
