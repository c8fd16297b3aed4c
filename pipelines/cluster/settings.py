"""What is said about a cluster: in `cluster.env` of the clone, below what the environment says."""

from __future__ import annotations

import re
from pathlib import Path

from model.errors import UserError
from model.plumbing import environment
from model.plumbing.environment import Variable
from pipelines.run import ROOT

FILE = "cluster.env"
SHORT = {"NAMESPACE": environment.NAMESPACE.name}  # names that are too common for everybody's environment
USUAL_NAMESPACE = "kubeflow"  # where a KFP with one user runs its steps


def read(root: Path = ROOT) -> None:
    """Have the environment say what the file says, where it does not say so itself.

    Raises:
        UserError: the file is not one NAME=VALUE a line.
    """
    for short, name in SHORT.items():
        _put(name, Variable(short, "").get())
    path = root / FILE
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", line.rstrip())
        if not match or match[2][:1] in ("'", '"'):
            raise UserError(
                f"{path}:{number} must read NAME=value, without quotes and without spaces around ="
            )
        _put(SHORT.get(match[1], match[1]), match[2])
    _put(environment.NAMESPACE.name, USUAL_NAMESPACE)


def _put(name: str, value: str) -> None:
    known = Variable(name, "")
    if not known.get():
        known.put(value)


def built(image: str) -> str:
    """The image that `make push` left, by digest.

    Args:
        image: its name in the manifests: latent-gpt or latent-gpt-mlflow.

    Raises:
        UserError: it was not pushed.
    """
    if image == "latent-gpt" and environment.IMAGE.get() != environment.IMAGE.default:
        return environment.IMAGE.get()
    pushed = ROOT / "build" / image.replace("latent-gpt", "image")
    if not pushed.is_file():
        raise UserError(
            f"{pushed} is missing, so no image {image} was pushed from here: `make build push REGISTRY=…`"
        )
    return pushed.read_text().strip()
