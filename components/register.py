"""Step: the model into the registry, as challenger; champion if it is better than the one there."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(
    config: dsl.Input[dsl.Artifact],
    run: str,
    evaluation: dsl.Input[dsl.Artifact],
) -> str:
    """Log the model as a pyfunc that loads without pickle.

    Returns:
        Output: What was registered, as JSON.
    """
    from components.artifacts import config_of, read
    from components.step import step

    with step("register", run):
        from components.registration import register_model
        from model.plumbing.leases import alone
        from model.plumbing.tracking import finish_pipeline_run

        with alone("register", "register"):
            registered = register_model(config_of(config), run, read(evaluation))
        finish_pipeline_run(run)
    return registered.model_dump_json()
