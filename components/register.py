"""Step: the model into the registry, as challenger; champion if it is better than the one there."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(
    config: str,
    run: str,
    evaluation: dsl.Input[dsl.Artifact],
) -> str:
    """Log the model as a pyfunc that loads without pickle; returns what was registered, as JSON."""
    from components.artifacts import read
    from components.step import step

    with step("register", run):
        from components.registration import register_model
        from model.config import parse_config
        from model.plumbing.leases import alone
        from model.plumbing.tracking import finish_pipeline_run

        with alone("register", "register"):
            registered = register_model(parse_config(config), run, read(evaluation))
        finish_pipeline_run(run)
    return registered.model_dump_json()
