"""Step: pictures and captions of the source into verified shards."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def images(
    config: dsl.Input[dsl.Artifact],
    run: str,
    images: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    examples: dsl.Output[dsl.HTML],
    pictures: dsl.Output[dsl.Artifact],
) -> None:
    """Validate, normalise, split and shard; bad pictures are quarantined with their reasons.

    Returns:
        images: Captioned pictures in verified shards.
        metrics: Pictures per split, duplicates, and those that were quarantined.
        examples: A page on the data: figures, what they mean, and some of the pictures with their captions.
        pictures: The same pictures side by side; PNG.
    """
    import time
    from pathlib import Path

    from components.artifacts import Made, config_of, is_made, noted, use, write
    from components.step import step

    with step("images", run):
        from components import data, page
        from model.data.growth import GROWN_FROM, Unfit, earlier
        from model.data.ingest import ingest
        from model.errors import UserError
        from model.plumbing import speech
        from model.plumbing.leases import alone
        from model.steps import STEPS, writer

        settings = config_of(config)
        use("images", settings, run)  # what they may grow from, before it is looked for
        output = writer("images", settings, {})
        use("images", settings, run, output.uri)
        if (ref := settings.origin.get("images")) and GROWN_FROM not in output.settings:
            try:
                earlier(ref, settings.data, STEPS["images"].version)
            except Unfit as reason:
                speech.say("images", f"reads all of the source: {reason}")
        began = time.monotonic()
        with alone("images", output.uri):
            reused = is_made(output.uri)
            made = ingest(settings.data, output)
        if not made.info["validation"]:
            raise UserError(
                f"data: none of {made.info['train']} pictures ({made.info['duplicates']} duplicates apart) is"
                f" held out; give more, or raise validation_share (it is {settings.data.validation_share:g})"
            )
        about = write(
            noted(run, Made(made, reused), [made], time.monotonic() - began), images, config, metrics
        )
        shown = page.examples(made)
        Path(pictures.path).write_bytes(page.sheet(shown))
        section = data.section(made, settings) or page.figures(made)
        some = ["<h2>Some of the pictures</h2>", page.gallery(shown)]
        text = page.page("Pictures and captions", *about, section, *some)
        data.leave(made, text)
        Path(examples.path).write_text(text)
