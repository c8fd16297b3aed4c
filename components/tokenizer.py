"""Step: the tokenizer between pictures and codes: a VQ-VAE trained here, or a pretrained one imported."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def tokenizer(
    config: str, run: str, images: dsl.Input[dsl.Dataset], tokenizer: dsl.Output[dsl.Model]
) -> None:
    """Train the VQ-VAE that the config describes, or import the pretrained one it names."""
    from components.artifacts import make, write
    from components.step import step

    with step("tokenizer", run):
        from model.config import parse_config
        from model.plumbing.tracking import finish_pipeline_run

        write(make("tokenizer", config, run, images=images), tokenizer)
        if parse_config(config).transformer is None:  # the run ends here
            finish_pipeline_run(run)
