"""The command line. A command imports what it needs when it runs, so that `--help` is instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from model.errors import UserError

app = typer.Typer(
    name="latent-gpt",
    help="Train a text-to-image model and use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Preset = Annotated[str, typer.Option(help="Name of a shipped preset, or a .yaml file.")]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer reads it at run time)
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a setting; may be repeated."),
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")] = False,
) -> None:
    """Options of every command; `--debug` may stand anywhere and is taken out by `main`."""


@app.command()
def run(preset: Preset = "openmoji-tiny", set_: Set = None) -> None:
    """Run the whole pipeline on this machine."""
    from pipelines import local

    local.run(preset, tuple(set_ or ()))


@app.command(name="compile")
def compile_(
    out: Annotated[Path, typer.Option(help="Where the pipeline's YAML goes.")] = Path("latent-gpt.yaml"),
) -> None:
    """Compile the pipeline for a KFP cluster."""
    from kfp import compiler

    from pipelines.dag import text_to_image

    if out.suffix not in (".yaml", ".yml", ".json"):
        raise UserError(f"--out {out} must end in .yaml")
    out.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(text_to_image, str(out))
    print(f"wrote {out}")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")] = "",
    out: Annotated[Path, typer.Option(help="Picture file; more than one are numbered.")] = Path("out.png"),
    model: Annotated[
        str, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION, a folder, or s3://…")
    ] = "models:/latent-gpt@champion",
    num_images: Annotated[int, typer.Option(min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next ones count on.")] = 0,
    cfg_scale: Annotated[Optional[float], typer.Option(min=0, help="Guidance; 1 is none.")] = None,  # noqa: UP045
    temperature: Annotated[Optional[float], typer.Option(min=0, help="0 is greedy.")] = None,  # noqa: UP045
    top_k: Annotated[Optional[int], typer.Option(min=0, help="0 keeps all.")] = None,  # noqa: UP045
    top_p: Annotated[Optional[float], typer.Option(min=0, max=1, help="1 keeps all.")] = None,  # noqa: UP045
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Draw without a prompt.")] = False,
) -> None:
    """Draw pictures from a prompt. Options left out are those that the model was registered with."""
    from pipelines import local

    changed = {"cfg_scale": cfg_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = {name: value for name, value in changed.items() if value is not None}
    local.generate(prompt, out, model, num_images, seed, sampling, unconditional)


@app.command(name="mlflow-ui")
def mlflow_ui() -> None:
    """Keep MLflow and S3 running on what the runs left, until Ctrl-C."""
    from pipelines import local

    local.mlflow_ui()


@app.command()
def preflight(preset: Preset = "openmoji-tiny", set_: Set = None) -> None:
    """Check config, source, storage, tracking and disk without running anything."""
    from pipelines import local

    local.check(preset, tuple(set_ or ()))


@app.command()
def plan(
    preset: Annotated[str, typer.Argument(help="Name of a shipped preset, or a .yaml file.")],
    hardware: Annotated[str, typer.Option(help="cpu, l4, a100, h100 or h200.")] = "a100",
    set_: Set = None,
) -> None:
    """Say what a preset needs: parameters, memory, steps, tokens, estimated hours."""
    from model.config import load_config
    from pipelines.plan import plan

    print(plan(load_config(preset, set_ or []), hardware).render())


@app.command()
def rollback() -> None:
    """Put the previous champion back in use."""
    from pipelines import local

    local.rollback()


@app.command()
def presets() -> None:
    """List the shipped presets and what each promises."""
    from model.config import PRESETS, preset_names

    for name in preset_names():
        header = (PRESETS / f"{name}.yaml").read_text().splitlines()[0]
        print(f"{name:20} {header.lstrip('# ')}")


def main() -> None:
    """Entry point: a `UserError` is one line and status 2; `--debug` keeps the stack trace."""
    if "--debug" in sys.argv:
        sys.argv = [argument for argument in sys.argv if argument != "--debug"]
        os.environ["LATENT_GPT_DEBUG"] = "1"
    debug = bool(os.environ.get("LATENT_GPT_DEBUG"))
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        print(f"error: {type(error).__name__}: {error}; `--debug` shows where", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
