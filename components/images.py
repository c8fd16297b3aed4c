"""Step: pictures and captions of the source into verified shards."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def images(config: dsl.Input[dsl.Artifact], run: str, images: dsl.Output[dsl.Dataset]) -> None:
    """Validate, normalise, split and shard; bad pictures are quarantined with their reasons.

    Returns:
        images: Captioned pictures in verified shards.
    """
    from components.artifacts import config_of, write
    from components.step import step

    with step("images", run):
        from model.data.ingest import ingest
        from model.errors import UserError
        from model.plumbing.leases import alone
        from model.steps import writer

        settings = config_of(config)
        output = writer("images", settings, {})
        with alone("images", output.uri):
            made = ingest(settings.data, output)
        if not made.info["validation"]:
            raise UserError(
                f"data: none of {made.info['train']} pictures ({made.info['duplicates']} duplicates apart) is"
                f" held out; give more, or raise validation_share (it is {settings.data.validation_share:g})"
            )
        write(made, images)
