"""What a run's pictures are like: for the page of their step, a file beside them, and the last report.

It is only looked at: where it cannot be made, that is said, and the run goes on.
"""

from __future__ import annotations

from model.config import RunConfig
from model.errors import Stopped
from model.plumbing import speech, storage
from model.plumbing.assets import PICTURES, Manifest

NAME = "data.html"  # beside the images; the figures are in `data.json`


def section(images: Manifest, config: RunConfig) -> str:
    """The section on a run's pictures, in HTML, whose figures are found beside them or counted now; a line or
    two of it are said. Empty, with a warning, where that fails."""
    try:
        from model.evaluation import census, findings, report

        context = findings.context_length(config)
        counted = census.left(images) or census.take(images)
        for line in findings.lines(counted, context):
            speech.say("images", line)
        return report.data(counted, context)
    except Stopped:
        raise
    except Exception as error:  # whatever strangers' captions bring about; the pictures are there and whole
        speech.warn("images", f"no report on the data: {type(error).__name__}: {error}")
        return ""


def leave(images: Manifest, page: str) -> None:
    """Leave the page beside the images; that fails nothing either."""
    try:
        storage.write_bytes(storage.join(images.uri, PICTURES, NAME), page.encode())
    except Stopped:
        raise
    except Exception as error:
        speech.warn("images", f"{NAME} cannot be stored: {error}")


def in_report(page: str, evaluation: Manifest, config: RunConfig) -> str:
    """The report of an evaluation with the section on its pictures, where their figures are still there."""
    from model.evaluation import census, findings, report

    try:
        counted = census.left(evaluation.input("images"))
        return (
            report.with_data(page, report.data(counted, findings.context_length(config))) if counted else page
        )
    except Stopped:
        raise
    except Exception as error:  # as above
        speech.warn("register", f"no section on the data: {type(error).__name__}: {error}")
        return page
