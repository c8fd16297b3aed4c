"""Step: measure the model, draw its report, and show both in the pipeline's own interface."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    config: str,
    run: str,
    images: dsl.Input[dsl.Dataset],
    tokens: dsl.Input[dsl.Dataset],
    tokenizer: dsl.Input[dsl.Model],
    clip: dsl.Input[dsl.Model],
    judge: dsl.Input[dsl.Model],
    transformer: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Metrics on held-out pictures, sample grids, curves and lineage in one self-contained page."""
    from components.step import read, step, write

    with step("evaluate"):
        from pathlib import Path

        from components.work import make_evaluation
        from model.config import parse_config
        from model.plumbing import storage

        inputs = {
            "images": read(images),
            "tokens": read(tokens),
            "tokenizer": read(tokenizer),
            "text": read(clip),
            "judge": read(judge),
            "transformer": read(transformer),
        }
        made = make_evaluation(parse_config(config), run, inputs)
        write(made, evaluation)
        for name, value in made.info.items():
            if isinstance(value, int | float):
                metrics.log_metric(name, value)
        Path(report.path).write_bytes(storage.read_bytes(storage.join(made.uri, "report.html")))
