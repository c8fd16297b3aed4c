"""In a pod of a cluster, as a step would be: print what is found; status 2 where something stops a run.

    python -m components.preflight CONFIG

`CONFIG` is a whole config as JSON.
"""

import sys

from components.preflight import PROBES, findings
from model.config import RunConfig


def main() -> None:
    """See above."""
    found = findings(RunConfig.model_validate_json(sys.argv[1]), PROBES)
    print(*found, sep="\n", flush=True)
    sys.exit(2 if any(one.error for one in found) else 0)


if __name__ == "__main__":
    main()
