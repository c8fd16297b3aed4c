"""In a pod of a cluster, as a step would be: print what is found; status 2 where something stops a run.

    python -m components.preflight CONFIG [DATA]

`CONFIG` is a whole config as JSON. `DATA` is where its pictures are, whose kind only a look from there tells.
"""

import json
import sys

from components.preflight import PROBES, Finding, findings
from model.config import RunConfig, parse_config
from model.data.sources import recognise
from model.errors import UserError


def main() -> None:
    """See above."""
    found: list[Finding] = []
    probes = PROBES
    try:
        config = _config(*sys.argv[1:])
    except UserError as error:
        config = RunConfig.model_validate_json(sys.argv[1])
        found, probes = (
            [Finding("source", str(error), error)],
            [one for one in probes if one.section != "source"],
        )
    found += findings(config, probes)
    print(*found, sep="\n", flush=True)
    sys.exit(2 if any(one.error for one in found) else 0)


def _config(told: str, data: str = "") -> RunConfig:
    """The config with its pictures as they are. Raises UserError: nobody can use what is there."""
    values = json.loads(told)
    if source := recognise(data):
        values["data"]["source"] = source
    return parse_config(values)


if __name__ == "__main__":
    main()
