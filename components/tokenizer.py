"""Step: the tokenizer between pictures and codes: a VQ-VAE trained here, or a pretrained one imported."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def tokenizer(
    config: dsl.Input[dsl.Artifact],
    run: str,
    images: dsl.Input[dsl.Dataset],
    tokenizer: dsl.Output[dsl.Model],
) -> None:
    """Train the VQ-VAE that the config describes, or import the pretrained one it names.

    Returns:
        tokenizer: The net that turns pictures into codes, and codes into pictures.
    """
    from components.artifacts import config_of, make, write
    from components.step import step

    with step("tokenizer", run):
        from model.plumbing.tracking import finish_pipeline_run

        write(make("tokenizer", config, run, images=images), tokenizer)
        if config_of(config).transformer is None:  # the run ends here
            finish_pipeline_run(run)
