"""What lies in k8s/, and what kustomize makes of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests import ROOT

Object = dict[str, Any]
K8S = ROOT / "k8s"
FILES = sorted(path for path in K8S.rglob("*.yaml") if not path.parent.name.startswith("."))
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in K8S.glob("components/*/kustomization.yaml"))


def objects(path: Path) -> list[Object]:
    """What a file holds."""
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def into(namespace: str) -> Object:
    """What puts all objects into a namespace, as the overlays do: KFP's accounts and a Namespace, too."""
    found = yaml.safe_load((K8S / "overlays" / "local" / "namespace.yaml").read_text())
    found["metadata"]["namespace"] = namespace
    return dict(found)


def can_build() -> bool:
    """Whether kustomize is here, or kubectl, which has one."""
    return bool(shutil.which("kustomize") or shutil.which("kubectl"))


def build(folder: Path) -> list[Object]:
    """The objects that a folder stands for."""
    command = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kustomize warns"
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def overlay(root: Path, namespace: str, **content: Any) -> Path:
    """A folder with an overlay of our own, in a copy of k8s/ at `root`."""
    shutil.copytree(K8S, root, dirs_exist_ok=True)
    folder = root / "overlays" / "own"
    folder.mkdir()
    whole = {**content, "transformers": [json.dumps(into(namespace))]}
    (folder / "kustomization.yaml").write_text(json.dumps(whole))
    return folder


def everything(root: Path, namespace: str = "latent-gpt") -> Path:
    """A folder with base and all components, for `build`."""
    components = [f"../../components/{name}" for name in COMPONENTS]
    return overlay(root, namespace, resources=["../../base"], components=components)
