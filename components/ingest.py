"""Step: pictures and captions of the source into verified shards."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ingest(config: str, run: str, images: dsl.Output[dsl.Dataset]) -> None:
    """Validate, normalise, split and shard; bad pictures are quarantined with their reasons."""
    from components.step import alone, step, write

    with step("ingest", run):
        from model.config import parse_config
        from model.data.ingest import ingest

        data = parse_config(config).data
        with alone("ingest", data.model_dump_json()):
            made = ingest(data)
        write(made, images)
