"""The command line: its commands, and how their errors reach a person."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from model.errors import UserError, one_line
from model.plumbing import environment
from pipelines import commands

app = typer.Typer(
    name="latent-gpt",
    help="Train a text-to-image model and use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(commands.run)
app.command()(commands.retrain)
app.command("compile")(commands.compile_)
app.command()(commands.secrets)
app.command()(commands.generate)
app.command()(commands.logs)
app.command()(commands.mlflow_ui)
app.command()(commands.gc)
app.command()(commands.preflight)
app.command()(commands.slurm)
app.command()(commands.plan)
app.command()(commands.models)
app.command()(commands.evaluate)
app.command()(commands.promote)
app.command()(commands.rollback)
app.command()(commands.presets)
app.command()(commands.deploy)
app.command()(commands.undeploy)
app.command()(commands.upload)
app.command()(commands.submit)
app.command()(commands.schedule)
app.command()(commands.runs)
app.command()(commands.status)
app.command()(commands.cancel)
app.command()(commands.retry)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")] = False,
) -> None:
    """Options of every command; `--debug` may stand anywhere and is taken out by `main`."""


def main() -> None:
    """Entry point: a `UserError` is one line and status 2; `--debug` keeps the stack trace.

    Where the locale or PYTHONIOENCODING names another encoding it begins anew in Python's UTF-8 mode, which
    children inherit.
    """
    if not environment.speaks_utf8():
        environment.speak_utf8()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if "--debug" in sys.argv:
        sys.argv = [argument for argument in sys.argv if argument != "--debug"]
        environment.DEBUG.put("1")
    debug = bool(environment.DEBUG.get())
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        if debug:
            raise
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        print(f"error: {type(error).__name__}: {error}; `--debug` shows where", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
