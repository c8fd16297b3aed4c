"""Step: the CLIP model that reads prompts, or the one that judges pictures: trained here or pretrained."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def clip(
    config: str, run: str, role: str, images: dsl.Input[dsl.Dataset], model: dsl.Output[dsl.Model]
) -> None:
    """`role` is "text" or "judge": two models from separate seeds and splits, so that none judges itself."""
    from components.step import read, step, write

    with step(f"clip_{role}", run):
        from components.launcher import launch
        from model.config import parse_config
        from model.plumbing.steps import job

        settings = parse_config(config)
        spec = job("clip", f"clip_{role}", settings, run, {"images": read(images)}, role)
        write(launch(spec, settings.jobs), model)
