"""Step: every picture of every split into codes, and its captions into token ids."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def tokenize_data(
    config: str,
    run: str,
    images: dsl.Input[dsl.Dataset],
    tokenizer: dsl.Input[dsl.Model],
    clip: dsl.Input[dsl.Model],
    tokens: dsl.Output[dsl.Dataset],
) -> None:
    """Write token shards that the trainer reads without touching a picture again."""
    from components.step import read, step, write

    with step("tokenize_data"):
        from components.work import make_tokens
        from model.config import parse_config

        write(make_tokens(parse_config(config), run, read(images), read(tokenizer), read(clip)), tokens)
