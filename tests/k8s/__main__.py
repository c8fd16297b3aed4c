"""Render every overlay, and all components together, for a checker: `python -m tests.k8s FOLDER`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import yaml

from tests.k8s.rendering import K8S, OVERLAYS, build, everything

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
with tempfile.TemporaryDirectory() as root:
    folders = {name: K8S / "overlays" / name for name in OVERLAYS} | {"everything": everything(Path(root))}
    for name, folder in folders.items():
        (out / f"{name}.yaml").write_text(yaml.safe_dump_all(build(folder)))
