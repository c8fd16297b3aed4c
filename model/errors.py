"""The exceptions that are meant for a person, and how others are told to one."""

from __future__ import annotations

LONGEST_REASON, LONGEST_LINE = 300, 4000  # characters


class UserError(Exception):
    """Bad input: its message names the field or file, what is wrong and what would be right, in one line.

    The command line prints it without a stack trace (unless `--debug`) and exits with status 2. Anything
    else that escapes is a bug of ours and keeps its trace.
    """


class Diverged(UserError):
    """A training whose loss, gradient, metric or weight is no finite number any more: none of it is kept."""

    def __init__(self, message: str, step: int = 0) -> None:
        """
        Args:
            message: names the figure or the tensor, and the step.
            step: optimiser steps done when it was found.
        """
        super().__init__(message)
        self.step = step


class Unavailable(UserError):
    """A service or a disk that does not do its part now, and may do it when it is asked again later."""


class Stopped(Exception):
    """A process was told to end before its work was done; what it had done is kept as far as it goes."""


class Orphaned(Stopped):
    """No step wants any more what the job makes."""


def reason(error: Exception) -> str:
    """What a parser, a library or pydantic has to say of a stranger's file, for within a line."""
    from pydantic import ValidationError  # which takes longer than `--help` does

    if isinstance(error, ValidationError):
        first = error.errors(include_input=False)[0]
        where, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        text = (
            f"'{where}' is missing" if first["type"] == "missing" else f"{where}: {what}" if where else what
        )
    elif isinstance(error, KeyError):
        text = f"{error} is missing"
    else:
        known = isinstance(error, TypeError | ValueError | RecursionError)
        text = f"{error}" if known else f"{type(error).__name__}: {error}"
    return one_line(text)[:LONGEST_REASON]


def one_line(text: str) -> str:
    """A text as a line of a terminal: breaks are spaces, what cannot be printed is escaped, the rest cut."""
    plain = " ".join(text.split())
    plain = plain if len(plain) <= LONGEST_LINE else f"{plain[:LONGEST_LINE]}…"
    return plain if plain.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in plain)
