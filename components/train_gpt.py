"""Step: the transformer over image tokens, conditioned on text."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train_gpt(
    config: str,
    run: str,
    tokens: dsl.Input[dsl.Dataset],
    clip: dsl.Input[dsl.Model],
    transformer: dsl.Output[dsl.Model],
) -> None:
    """Train as a job of as many processes as the config asks for."""
    from components.step import read, step, write

    with step("train_gpt"):
        from components.work import make_transformer
        from model.config import parse_config

        write(make_transformer(parse_config(config), run, read(tokens), read(clip)), transformer)
