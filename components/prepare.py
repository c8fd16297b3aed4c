"""Step: resolve the config and check everything that can be known before the expensive part."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare(
    preset: str,
    overrides: str,
    job: str,
    config: dsl.OutputPath(str),  # type: ignore[valid-type]
    run: dsl.OutputPath(str),  # type: ignore[valid-type]
) -> str:
    """Write the full config and the name of the MLflow run that all steps log below.

    Returns "transformer" or "tokenizer", what the run is to end with: the pipeline branches on it. (It is
    the function's return value because kfp.local takes the named outputs of a task in a condition for unset.)
    """
    from components.step import end_given_up_runs, step

    with step("prepare"):
        from pathlib import Path

        from components.preflight import preflight
        from model.config import load_config
        from model.plumbing import speech
        from model.plumbing.leases import carried
        from model.plumbing.tracking import open_pipeline_run

        resolved = load_config(preset, overrides.split("\n") if overrides else [])
        for line in preflight(resolved):
            speech.say("prepare", line)
        end_given_up_runs("prepare")
        Path(config).write_text(resolved.model_dump_json())
        name = f"{resolved.name}-{job}"
        with carried("prepare", name):
            open_pipeline_run(resolved.experiment, name, resolved.model_dump(mode="json"))
        Path(run).write_text(name)
    return "transformer" if resolved.transformer else "tokenizer"
