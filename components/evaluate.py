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

    with step("evaluate", run):
        from pathlib import Path

        from components.launcher import launch
        from model.config import parse_config
        from model.plumbing import storage
        from model.plumbing.steps import job

        inputs = {
            "images": read(images),
            "tokens": read(tokens),
            "tokenizer": read(tokenizer),
            "text": read(clip),
            "judge": read(judge),
            "transformer": read(transformer),
        }
        settings = parse_config(config)
        alone = settings.jobs.model_copy(update={"workers": 1, "processes_per_worker": 1})
        made = launch(job("evaluation", "evaluate", settings, run, inputs), alone)
        write(made, evaluation)
        for name, value in made.info.items():
            if isinstance(value, int | float):
                metrics.log_metric(name, value)
        Path(report.path).write_bytes(storage.read_bytes(storage.join(made.uri, "report.html")))
