"""What the first step of a run does: the config resolved, everything checked, the run opened in MLflow."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from components import page, recipe
from components.parameters import resolve
from components.preflight import preflight
from components.retraining import MARK_TAG, mark
from components.step import end_given_up_runs
from model.config import RunConfig
from model.data.sources import remembered
from model.plumbing import environment, speech
from model.plumbing.leases import carried
from model.plumbing.provenance import kfp_tags
from model.plumbing.tracking import address, open_pipeline_run

BEFORE = 12.0  # seconds that a person has waited already: services were started, or a pod was


class Begun(NamedTuple):
    """A run that has begun."""

    config: RunConfig
    name: str  # of the run
    address: str  # where people open it in MLflow
    page: str  # what was found


@remembered()
def begin(job: str, **asked: Any) -> Begun:
    """Check what can be checked before anything expensive starts, and open the run.

    Args:
        job: the id of the run in KFP.
        asked: as `components.parameters.resolve` takes it.

    Raises:
        UserError: whatever would end the run later.
    """
    began = time.time() - BEFORE
    resolve(**asked)  # what is wrong with it is said before anybody is asked
    environment.check_services()
    resolved = recipe.with_end(recipe.resolved(asked), began)
    config = resolved.config
    found = preflight(config)
    if asked.get("data"):
        resolved = recipe.looked(resolved)
    for line in (*recipe.lines(resolved), *found):
        speech.say("prepare", line)
    end_given_up_runs("prepare")
    name = f"{config.name}-{job}"
    with carried("prepare", name):
        shown = config.model_dump(mode="json")
        tags = {MARK_TAG: mark(config), **kfp_tags(job)}
        opened = address(open_pipeline_run(config.experiment, name, shown, tags))
    return Begun(config, name, opened, page.checks(resolved, name, found, opened))
