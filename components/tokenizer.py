"""Step: the tokenizer between pictures and codes: a VQ-VAE trained here, or a pretrained one imported."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def tokenizer(
    config: dsl.Input[dsl.Artifact],
    run: str,
    images: dsl.Input[dsl.Dataset],
    tokenizer: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    curves: dsl.Output[dsl.HTML],
    reconstructions: dsl.Output[dsl.Artifact],
) -> None:
    """Train the VQ-VAE that the config describes, or import the pretrained one it names.

    Returns:
        tokenizer: The net that turns pictures into codes, and codes into pictures.
        metrics: PSNR of held-out pictures in dB, and the share of the codebook that they use.
        curves: A page with the curves of its training, and with reconstructions.
        reconstructions: Held-out pictures, each before what the tokenizer makes of it; PNG.
    """
    from pathlib import Path

    from components.artifacts import config_of, make, write
    from components.step import step

    with step("tokenizer", run):
        from components.page import left, nothing, training
        from model.plumbing.assets import RECONSTRUCTIONS
        from model.plumbing.tracking import finish_pipeline_run

        made = make("tokenizer", config, run, images=images)
        Path(curves.path).write_text(training(made.manifest, *write(made, tokenizer, config, metrics)))
        pairs = left(made.manifest, RECONSTRUCTIONS) or nothing(
            "The evaluation has them: none are left here."
        )
        Path(reconstructions.path).write_bytes(pairs)
        if config_of(config).transformer is None:  # the run ends here
            finish_pipeline_run(run)
