"""A kubectl that keeps objects in memory, and says what kubectl says."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from model.errors import UserError
from pipelines.cluster.kubectl import Forbidden, Kubectl, NoKind

OURS = {"app.kubernetes.io/part-of": "latent-gpt"}
KINDS = {  # as api-resources names them
    "Deployment": "deployments.apps",
    "Service": "services",
    "ConfigMap": "configmaps",
    "Secret": "secrets",
    "Pod": "pods",
    "PersistentVolumeClaim": "persistentvolumeclaims",
    "PyTorchJob": "pytorchjobs.kubeflow.org",
    "PriorityClass": "priorityclasses.scheduling.k8s.io",
    "Namespace": "namespaces",
}
Object = dict[str, Any]


def made(kind: str, name: str, labels: Object = OURS, **content: Any) -> Object:
    """An object as a manifest has it."""
    group = KINDS[kind].partition(".")[2]
    version = f"{group}/v1" if group else "v1"
    meta = {"name": name, "labels": labels, "namespace": "ours"}
    return {"apiVersion": version, "kind": kind, "metadata": meta, **content}


class FakeKubectl(Kubectl):
    """Of one namespace, `ours`; it runs nothing."""

    def __init__(self) -> None:
        super().__init__("ours")
        object.__setattr__(self, "there", {})
        object.__setattr__(self, "calls", [])
        object.__setattr__(self, "logs", {})
        object.__setattr__(self, "forbidden", set())

    there: dict[tuple[str, str], Object]
    calls: list[tuple[str, ...]]
    logs: dict[tuple[str, str], str]
    forbidden: set[str]  # kinds, as api-resources names them

    def add(self, *objects: Object) -> None:
        """Make objects, or put them in the place of those of their names."""
        for one in objects:
            kept = copy.deepcopy(one)
            kept["metadata"] |= {"resourceVersion": str(len(self.calls)), "uid": f"uid-{len(self.there)}"}
            self.there[one["kind"], one["metadata"]["name"]] = kept

    def names(self) -> set[str]:
        """Kinds and names of all there are."""
        return {f"{kind} {name}" for kind, name in self.there}

    def __call__(self, *arguments: str, stdin: str = "") -> str:
        self.calls.append(arguments)
        if arguments[0] == "api-resources":
            raise UserError("kubectl api-resources: unable to retrieve the complete list of server APIs")
        if arguments[0] == "logs":
            return self.logs.get((arguments[1], arguments[3]), "")
        given = json.loads(stdin)["items"] if stdin else []
        if arguments[0] == "apply":
            for one in given:
                before = self.there.get((one["kind"], one["metadata"]["name"]), {"metadata": {}})
                now = {**before, **copy.deepcopy(one)}
                now["metadata"] = {**before["metadata"], **one["metadata"]}
                self.there[one["kind"], one["metadata"]["name"]] = now
        if arguments[0] == "delete":
            for one in self._asked(arguments[1:]):
                del self.there[one["kind"], one["metadata"]["name"]]
            return ""
        if "-f" in arguments:
            keys = [(one["kind"], one["metadata"]["name"]) for one in given]
            return json.dumps({"items": [self.there[key] for key in keys if key in self.there]})
        assert arguments[0] == "get", arguments
        return json.dumps({"items": self._asked(arguments[1:])})

    def _asked(self, arguments: tuple[str, ...]) -> list[Object]:
        for asked in arguments[0].split(","):
            if asked in self.forbidden:
                raise Forbidden(f'kubectl get: {asked} is forbidden: User "me" cannot list')
            if "." in asked and asked.partition(".")[2] not in {
                one.partition(".")[2] for one in KINDS.values()
            }:
                raise NoKind(f'kubectl get: the server doesn\'t have a resource type "{asked}"')
        kinds = {_singular(one) for one in arguments[0].split(",")}
        found = [one for one in self.there.values() if _singular(KINDS[one["kind"]]) in kinds]
        if "-l" in arguments:
            wanted = dict([arguments[arguments.index("-l") + 1].split("=")])
            return [one for one in found if one["metadata"]["labels"].items() >= wanted.items()]
        by_field = arguments[1] == "--field-selector"
        name = arguments[2].removeprefix("metadata.name=") if by_field else arguments[1]
        return [one for one in found if one["metadata"]["name"] == name]


def _singular(kind: str) -> str:
    name = kind.partition(".")[0]
    return name.removesuffix("es") if name.endswith("classes") else re.sub(r"(?<!s)s$", "", name)
