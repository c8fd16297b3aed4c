"""The one exception that is meant for a person."""


class UserError(Exception):
    """Bad input: its message names the field or file, what is wrong and what would be right, in one line.

    The command line prints it without a stack trace (unless `--debug`) and exits with status 2. Anything
    else that escapes is a bug of ours and keeps its trace.
    """


class Diverged(UserError):
    """A training whose loss, gradients or metrics are no longer finite; names the step and the figure."""
