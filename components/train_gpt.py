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

    with step("train_gpt", run):
        from components.launcher import launch
        from model.config import parse_config
        from model.plumbing.steps import job

        settings = parse_config(config)
        inputs = {"tokens": read(tokens), "text": read(clip)}
        write(launch(job("transformer", "train_gpt", settings, run, inputs), settings.jobs), transformer)
