"""The command line's way in: what it imports of ours is ours, whatever PYTHONPATH leads to.

Others have a `model` or `pipelines`, too, and PYTHONPATH goes before what is installed.
"""

import importlib
import sys
from pathlib import Path


def main() -> None:
    """Run the command line."""
    home = Path(__file__).resolve().parent
    sys.path.insert(0, str(home))
    for package in ("model", "components", "pipelines"):
        importlib.import_module(package)  # whose modules are looked for where it lies from here on
    if not (home / "pyproject.toml").is_file():  # installed, beside what may hide Python's own library
        del sys.path[0]
    from pipelines.cli import main

    main()


if __name__ == "__main__":
    main()
