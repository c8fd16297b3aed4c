"""Step: the model into the registry, as challenger; champion if it is better than the one there."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(
    config: str,
    run: str,
    tokenizer: dsl.Input[dsl.Model],
    clip: dsl.Input[dsl.Model],
    judge: dsl.Input[dsl.Model],
    transformer: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
) -> str:
    """Log the model as a pyfunc that loads without pickle; returns what was registered, as JSON."""
    from components.step import read, step

    with step("register"):
        import json

        from components.work import register_model
        from model.config import parse_config

        inputs = {
            "tokenizer": read(tokenizer),
            "text": read(clip),
            "judge": read(judge),
            "transformer": read(transformer),
            "evaluation": read(evaluation),
        }
        registered = register_model(parse_config(config), run, inputs)
    return json.dumps(registered)
