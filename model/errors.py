"""The exceptions that are meant for a person."""


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
