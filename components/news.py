"""Step: whether there is anything new to learn; where there is not, it is the only one of a retraining."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def news(
    preset: str,
    model: str,
    data: str,
    start: str,
    workers: int,
    gpus_per_worker: int,
    overrides: str,
    experiment_name: str,
    yaml: str,
    config: dsl.OutputPath(str),  # type: ignore[valid-type]
    found: dsl.Output[dsl.HTML],
) -> str:
    """Compare source, settings and steps with what the registered versions were made from.

    Args:
        preset: Name of a shipped preset, of which the first model is trained.
        model: Name of the registered model; empty, that of the preset.
        data: Where the captioned pictures are; empty, where the champion's were.
        start: Weights that the transformer begins from, champion or scratch; empty, as the config says.
        workers: Pods of a training job; 0, as many as the config says.
        gpus_per_worker: GPUs of such a pod; -1, as many as the config says.
        overrides: Settings that win over all of these, one `section.field=value` per line.
        experiment_name: Of MLflow; empty, that of the config.
        yaml: A whole config that is used instead of the preset; empty, none.

    Returns:
        config: Every setting of the run to come, as YAML.
        found: A page that says what is new.
        Output: Whether anything is: new, or nothing.
    """
    from components.step import step

    with step("news"):
        from pathlib import Path

        import yaml as writer

        from components import page
        from components.retraining import NEW, NOTHING, look
        from model.plumbing import environment, speech

        environment.check_services()
        asked: dict[str, str | int] = {
            "preset": preset,
            "data": data,
            "workers": workers,
            "gpus_per_worker": gpus_per_worker,
        }
        asked |= {"overrides": overrides, "experiment_name": experiment_name, "config": yaml}
        seen = look(model, start, asked)
        for line in seen.said:
            speech.say("news", line)
        Path(config).write_text(writer.safe_dump(seen.config.model_dump(mode="json"), sort_keys=False))
        Path(found.path).write_text(page.news(seen))
    return NEW if seen.new else NOTHING
