"""An image's list of what is in it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

from tests import ROOT

STATUS = """Package: libc6
Status: install ok installed
Version: 2.36-9+deb12u1
Description: GNU C Library
 with: colons in its lines

Package: gone
Status: deinstall ok config-files
Version: 1
"""


def test_it_lists_pythons_packages_once_with_version_and_licence() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "pipelines/images/sbom.py"], capture_output=True, text=True, check=True
    )
    bom = json.loads(done.stdout)
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    found = {one["purl"]: one for one in bom["components"]}
    assert len(found) == len(bom["components"])
    numpy = found[f"pkg:pypi/numpy@{version('numpy')}"]
    assert numpy["licenses"][0]["license"]["name"]
    assert [one for one in found if one.startswith("pkg:generic/python@3.")]


def test_it_lists_what_debian_has_installed() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'pipelines/images')!r}); import sbom, json;"
        f"print(json.dumps(list(sbom.of_debian({STATUS!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (one,) = json.loads(done.stdout)
    assert one["purl"] == "pkg:deb/debian/libc6@2.36-9%2Bdeb12u1"
