"""Step: the CLIP model that reads prompts, or the one that judges pictures: trained here or pretrained."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def clip(
    config: str, run: str, role: str, images: dsl.Input[dsl.Dataset], model: dsl.Output[dsl.Model]
) -> None:
    """`role` is "text" or "judge": two models from separate seeds and splits, so that none judges itself."""
    from components.step import read, step, write

    with step(f"clip_{role}"):
        from components.work import make_clip
        from model.config import parse_config

        write(make_clip(parse_config(config), run, role, read(images)), model)
