"""Step: the model into the registry; champion if the gate says so."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(
    config: dsl.Input[dsl.Artifact],
    run: str,
    evaluation: dsl.Input[dsl.Artifact],
    model: dsl.Output[dsl.HTML],
    report: dsl.Output[dsl.HTML],
) -> str:
    """Log the model as a pyfunc that loads without pickle.

    Returns:
        model: A page that says which version it is, whether it is in use, why, and how to draw with it.
        report: The report of the evaluation, with the verdict on top.
        Output: What was registered, as JSON.
    """
    from pathlib import Path

    from components.artifacts import MLFLOW, config_of, read
    from components.step import step

    with step("register", run):
        from components import page
        from components.registration import register_model
        from model.plumbing import storage
        from model.plumbing.tracking import finish_pipeline_run

        measured = read(evaluation)
        registered = register_model(config_of(config), run, measured)
        Path(report.path).write_bytes(storage.read_bytes(registered.report))
        Path(model.path).write_text(page.registered(registered, measured, config.metadata.get(MLFLOW, "")))
        finish_pipeline_run(run)
    return registered.model_dump_json()
