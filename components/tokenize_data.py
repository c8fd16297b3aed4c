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

    with step("tokenize_data", run):
        from components.launcher import launch
        from model.config import parse_config
        from model.plumbing.steps import job

        settings = parse_config(config)
        inputs = {"images": read(images), "tokenizer": read(tokenizer), "text": read(clip)}
        write(launch(job("tokens", "tokenize_data", settings, run, inputs), settings.jobs), tokens)
