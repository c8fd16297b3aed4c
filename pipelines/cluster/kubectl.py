"""kubectl, which brings kustomize and server-side apply along."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from typing import Any

from model.errors import Unavailable, UserError

Object = dict[str, Any]

AWAY = ("was refused", "Unable to connect", "i/o timeout", "no such host", "TLS handshake timeout")
LOGGED = re.compile(r"[IWEF]\d{4} \d\d:")  # as of an API whose own server is away, at each look
PATIENCE = "--request-timeout=60s"


class Forbidden(UserError):
    """This user may not."""


class NoKind(UserError):
    """The cluster has no objects of that kind."""


@dataclass(frozen=True)
class Kubectl:
    """The cluster of KUBECONFIG, in one namespace."""

    namespace: str

    def __call__(self, *arguments: str, stdin: str = "") -> str:
        """What kubectl prints.

        Raises:
            UserError: what it says against it, in one line.
        """
        command = ["kubectl", "--namespace", self.namespace, PATIENCE, *arguments]
        try:
            done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UserError(
                "kubectl is not found; install it (https://kubernetes.io/docs/tasks/tools/), 1.27 or newer"
            ) from None
        if done.returncode:
            said = plain(done.stderr)
            raise _kind(said)(f"kubectl {arguments[0]}: {said}{_remedy(said)}")
        return done.stdout

    def objects(self, *arguments: str, stdin: str = "") -> list[Object]:
        """The objects that kubectl answers with."""
        printed = self(*arguments, "-o", "json", stdin=stdin)
        found = json.loads(printed) if printed.strip() else {"items": []}
        items: list[Object] = found.get("items", [found])
        return items


def plain(said: str) -> str:
    """What kubectl says against something, in one line; its warnings and its log are not that."""
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith("Warning:")]
    lines = [line for line in lines if not LOGGED.match(line)] or lines
    return re.sub(r"\s+", " ", " ".join(lines)).removeprefix("error: ")[:600]


def _kind(said: str) -> type[UserError]:
    if any(word in said for word in AWAY):
        return Unavailable
    if "orbidden" in said:
        return Forbidden
    return NoKind if "doesn't have a resource type" in said else UserError


def _remedy(said: str) -> str:
    if "was refused" in said or "Unable to connect" in said:
        return "; check that KUBECONFIG names your cluster's file, and that the cluster is up"
    if match := re.search(r'namespaces "([^"]+)" not found', said):
        return f"; make it (kubectl create namespace {match[1]}), or name another one by NAMESPACE"
    if "orbidden" in said:
        return "; your user of the cluster may not do that: ask who administers it"
    if "no matches for kind" in said:
        return "; what serves that kind is not installed: `make cluster-addons`, or leave that component out"
    return ""
