"""Step: resolve the config and check everything that can be known before the expensive part."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare(
    pipeline: str,
    preset: str,
    data: str,
    workers: int,
    gpus_per_worker: int,
    overrides: str,
    experiment_name: str,
    yaml: str,
    job: str,
    config: dsl.Output[dsl.Artifact],
    run: dsl.OutputPath(str),  # type: ignore[valid-type]
    checks: dsl.Output[dsl.HTML],
) -> None:
    """Check what can be checked before anything expensive starts, and open the run in MLflow.

    Args:
        pipeline: Name of the pipeline that runs.
        preset: Name of a shipped preset.
        data: Where the captioned pictures are; empty, those of the preset.
        workers: Pods of a training job; 0, as many as the preset says.
        gpus_per_worker: GPUs of such a pod; -1, as many as the preset says.
        overrides: Settings that win over all of these, one `section.field=value` per line.
        experiment_name: Of MLflow; empty, that of the phase.
        yaml: A whole config that is used instead of the preset; empty, none.
        job: The id of this run in KFP.

    Returns:
        config: Every setting of the run, as all other steps read them.
        run: Name of the run in MLflow, below which all steps log.
        checks: A page with what was found, and where the run is in MLflow.
    """
    from components.step import step

    with step("prepare"):
        from pathlib import Path

        from components.artifacts import MLFLOW
        from components.beginning import begin

        begun = begin(
            job,
            pipeline=pipeline,
            preset=preset,
            data=data,
            workers=workers,
            gpus_per_worker=gpus_per_worker,
            overrides=overrides,
            experiment_name=experiment_name,
            config=yaml,
        )
        Path(config.path).write_text(begun.config.model_dump_json(indent=2))
        config.metadata |= {
            MLFLOW: begun.address,
            "preset": begun.config.name,
            "experiment": begun.config.experiment,
        }
        Path(checks.path).write_text(begun.page)
        Path(run).write_text(begun.name)
