"""Step: pictures and captions of the source into verified shards."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ingest(config: str, run: str, images: dsl.Output[dsl.Dataset]) -> None:
    """Validate, normalise, split and shard; bad pictures are quarantined with their reasons."""
    from components.step import step, write

    with step("ingest", run):
        from model.config import parse_config
        from model.ingest import ingest

        write(ingest(parse_config(config).data), images)
