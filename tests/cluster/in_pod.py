"""What a step's pod of these tests runs: the steps up to the last one named, as the pipeline's components do.

    python -c "<this text>" RUN PRESET OVERRIDES KIND…

It is handed over as text, as the image holds no tests.
"""

import json
import sys

from components.launch import launch
from components.step import step
from model import steps
from model.config import load_config
from model.data.ingest import ingest
from model.plumbing.leases import alone
from model.plumbing.tracking import open_pipeline_run


def main(run: str, preset: str, overrides: str, *kinds: str) -> None:
    """Make the assets of these kinds, in order."""
    config = load_config(preset, json.loads(overrides))
    open_pipeline_run(config.experiment, run)
    made = {}
    for kind in kinds:
        needed = {name: made[name] for name in steps.STEPS[kind].needs}
        with step(kind, run):
            if kind == "images":
                output = steps.writer(kind, config, {})
                with alone(kind, output.uri):
                    made[kind] = ingest(config.data, output)
            else:
                made[kind] = launch(steps.job(kind, config, run, needed))


main(*sys.argv[1:])
