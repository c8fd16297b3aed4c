"""Step: measure the model, draw its report, and show both in the pipeline's own interface."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluation(
    config: dsl.Input[dsl.Artifact],
    run: str,
    images: dsl.Input[dsl.Dataset],
    tokenizer: dsl.Input[dsl.Model],
    text: dsl.Input[dsl.Model],
    judge: dsl.Input[dsl.Model],
    transformer: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    samples: dsl.Output[dsl.Artifact],
) -> None:
    """Metrics on held-out pictures, sample grids, curves and lineage in one self-contained page.

    Returns:
        evaluation: What was measured, the report and its pictures.
        metrics: The figures that are named first.
        report: A page to read: samples, scores, curves, lineage.
        samples: What the model draws for captions, beside them; PNG.
    """
    from pathlib import Path

    from components.artifacts import config_of, launched, read, use, write
    from components.step import step

    with step("evaluation", run):
        from components.page import SAMPLES, left
        from model.evaluation.benchmark import benchmark_writer, make_benchmark
        from model.inference.bundle import make_bundle
        from model.plumbing import storage
        from model.steps import writer

        artifacts = {"tokenizer": tokenizer, "text": text, "judge": judge, "transformer": transformer}
        settings, parts = config_of(config), {name: read(part) for name, part in artifacts.items()}
        pictures = read(images)
        use("evaluation", settings, run, benchmark_writer(settings, pictures, parts["judge"]).uri)
        benchmark = make_benchmark(settings, pictures, parts["judge"])
        if settings.sweep.configured:
            swept = launched("sampling", settings, run, {"images": pictures, **parts})
            parts["sampling"] = swept.manifest
        use("evaluation", settings, run, writer("model", settings, parts).uri)
        measured_on = {"images": pictures, "model": make_bundle(settings, parts), "benchmark": benchmark}
        made = launched("evaluation", settings, run, measured_on)
        write(made, evaluation, config, metrics)
        Path(report.path).write_bytes(storage.read_bytes(made.manifest.where("report.html")))
        Path(samples.path).write_bytes(next(data for name in SAMPLES if (data := left(made.manifest, name))))
