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
    """Write the full config and the id of the MLflow run that all steps log below.

    Returns "transformer" or "tokenizer", what the run is to end with: the pipeline branches on it. (It is
    the function's return value because kfp.local takes the named outputs of a task in a condition for unset.)
    """
    from components.step import say, step

    with step("prepare"):
        from pathlib import Path

        from components.preflight import preflight
        from components.work import start_run
        from model.config import load_config

        resolved = load_config(preset, overrides.split("\n") if overrides else [])
        for line in preflight(resolved):
            say("prepare", line)
        Path(config).write_text(resolved.model_dump_json())
        Path(run).write_text(start_run(resolved, job))
    return "transformer" if resolved.transformer else "tokenizer"
