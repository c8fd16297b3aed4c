"""What is in the image that runs this: Debian's packages and Python's, as CycloneDX 1.6 in JSON on stdout."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

DEBIAN = Path("/var/lib/dpkg/status")
LONGEST = 80  # of a licence's name
Component = dict[str, object]


def of_python() -> Iterator[Component]:
    """The distributions on this interpreter's path."""
    for one in metadata.distributions():
        said: Any = one.metadata  # an email's message, whose types do not say so
        name = said["Name"].lower().replace("_", "-")
        kinds = [kind.rpartition(":: ")[2] for kind in said.get_all("Classifier", []) if "License ::" in kind]
        licence = said.get("License-Expression") or " OR ".join(kinds) or said.get("License", "")
        if len(licence) > LONGEST:  # a whole text
            licence = ""
        yield component(name, one.version, f"pkg:pypi/{name}@{one.version}", licence)


def of_debian(status: str) -> Iterator[Component]:
    """The packages that dpkg's `status` holds."""
    for paragraph in status.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if ": " in line and not line.startswith(" ")]
        fields = dict(line.split(": ", 1) for line in lines)
        if fields.get("Status", "").endswith(" installed"):
            name, version = fields["Package"], fields["Version"]
            yield component(name, version, f"pkg:deb/debian/{name}@{version.replace('+', '%2B')}")


def component(name: str, version: str, purl: str, licence: str = "") -> Component:
    """One entry."""
    found: Component = {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}
    if licence:
        found["licenses"] = [{"license": {"name": licence}}]
    return found


def main() -> None:
    """Print all of it, in the same order each time."""
    python = f"pkg:generic/python@{platform.python_version()}"
    components = [component("python", platform.python_version(), python), *of_python()]
    if DEBIAN.exists():
        components += of_debian(DEBIAN.read_text())
    unique = {str(one["bom-ref"]): one for one in components}
    bom = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}
    json.dump({**bom, "components": [unique[ref] for ref in sorted(unique)]}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
