"""A namespace of a real cluster, with what our steps need in it, and what tests do to pods there."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from tests.k8s.rendering import overlay

ROOT = Path(__file__).resolve().parents[2]
IN_POD = (Path(__file__).parent / "in_pod.py").read_text()
ALL = ("images", "tokenizer", "text", "tokens", "transformer")
S3, MLFLOW = "latent-gpt-s3", "latent-gpt-mlflow"  # Deployments and Services
Found = TypeVar("Found")

# As KFP's launcher does: the step is no process 1, which could not be killed, and is told when the pod is.
AS_A_CHILD = """python -u -c "$CODE" "$@" & child=$!; echo $child >/tmp/child
trap 'kill -TERM $child' TERM; wait $child; status=$?; [ $status -gt 128 ] && wait $child; exit $status"""


def until(look: Callable[[], Found], seconds: float, what: str, every: float = 0.5) -> Found:
    """The first thing found that is true; a failure after so many seconds."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(every)
    return found


class Cluster:
    """One namespace of its own, which is deleted in the end."""

    def __init__(self, image: str, mlflow: str) -> None:
        self.image, self.mlflow = image, mlflow
        self.namespace = f"latent-gpt-test-{secrets.token_hex(3)}"
        drawn = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")
        self.keys = {name: secrets.token_hex(16) for name in drawn} | {"MLFLOW_TRACKING_USERNAME": "tester"}

    # ── kubectl ─────────────────────────────────────────────────────────────────────────────────────────

    def kubectl(self, *arguments: str, stdin: str = "") -> str:
        """What kubectl prints; a failure with what it says."""
        command = ["kubectl", "--namespace", self.namespace, *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def get(self, kind: str, *arguments: str) -> list[dict[str, Any]]:
        """Objects of a kind, e.g. by `-l` label."""
        found: list[dict[str, Any]] = json.loads(self.kubectl("get", kind, "-o", "json", *arguments))["items"]
        return found

    def apply(self, *objects: dict[str, Any]) -> None:
        """Make objects what these say."""
        whole = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "-f", "-", stdin=json.dumps(whole))

    # ── what is there ───────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def up(self) -> Iterator[dict[str, str]]:
        """The namespace with `k8s/base` and an S3; yields the environment that reaches both from here."""
        restricted = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
        meta = {"name": self.namespace, "labels": restricted}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
        try:
            own = {"MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16)}
            for name, data in (("latent-gpt", self.keys), ("latent-gpt-mlflow", own)):
                secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}}
                self.apply({**secret, "stringData": data})
            self.deploy()
            with self.reached() as environment:
                yield environment
        finally:
            self.kubectl("delete", "namespace", self.namespace, "--wait=false")

    def deploy(self) -> None:
        """`k8s/base` with both servers, as soon as they are ready; their data ends with their pods."""
        content = {
            "resources": ["../../base"],
            "components": ["../../components/seaweedfs", "../../components/mlflow"],
            "images": [_pinned("latent-gpt", self.image), _pinned("latent-gpt-mlflow", self.mlflow)],
            "patches": [patch for server in (S3, MLFLOW) for patch in _for_a_while(server)],
        }
        with tempfile.TemporaryDirectory() as root:
            self.kubectl("apply", "-k", str(overlay(Path(root), self.namespace, **content)))
        for name in (S3, MLFLOW):  # the first pull of some GB
            self.kubectl("rollout", "status", f"deployment/{name}", "--timeout=900s")

    @contextmanager
    def reached(self) -> Iterator[dict[str, str]]:
        """The environment that reaches both servers from here."""
        with self.forwarded(S3, 8333) as s3, self.forwarded(MLFLOW, 5000) as mlflow:
            yield {
                **self.keys,
                "S3_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
                "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow}",
                "AWS_DEFAULT_REGION": "us-east-1",
            }

    @contextmanager
    def forwarded(self, service: str, port: int) -> Iterator[int]:
        """A port of this machine that leads to a service."""
        command = ["kubectl", "-n", self.namespace, "port-forward", f"service/{service}", f":{port}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
            try:
                assert child.stdout
                line = child.stdout.readline()  # Forwarding from 127.0.0.1:41234 -> 8333
                assert "127.0.0.1:" in line, line
                # It says a line for each connection, and stands still where nobody reads them.
                threading.Thread(target=child.stdout.read, daemon=True).start()
                yield int(line.split("127.0.0.1:")[1].split()[0])
            finally:
                child.kill()

    # ── steps and what they started ─────────────────────────────────────────────────────────────────────

    def step(
        self,
        name: str,
        overrides: Sequence[str],
        kinds: Sequence[str] = ALL,
        launcher: str = "pytorchjob",
        store: str = "s3://latent-gpt/jobs",
        run: str = "",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Step:
        """Start a pod that makes the assets of these kinds as a pipeline's steps do."""
        said = {"LATENT_GPT_LAUNCHER": launcher, "LATENT_GPT_STORE": store, "CODE": IN_POD, **environment}
        arguments = [run or name, "smoke", json.dumps(list(overrides)), *kinds]
        container = {
            "name": "main",
            "image": self.image,
            "command": ["/bin/sh", "-c", AS_A_CHILD, "step", *arguments],
            "env": [{"name": key, "value": value} for key, value in said.items()],
            "envFrom": [{"configMapRef": {"name": "latent-gpt"}}, {"secretRef": {"name": "latent-gpt"}}],
            "resources": {"requests": {"cpu": "50m", "memory": "512Mi"}},
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "labels": {"test": "step"}},
                "spec": {
                    "restartPolicy": "Never",
                    "serviceAccountName": "latent-gpt",
                    "securityContext": {
                        "runAsNonRoot": True,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "containers": [container],
                    "volumes": [{"name": "tmp", "emptyDir": {}}],
                },
            }
        )
        return Step(self, name)

    def job_pods(self, job: str) -> dict[str, dict[str, Any]]:
        """Worker pods of a job by name; those that are going are not among them."""
        found = self.get("pods", "-l", f"training.kubeflow.org/job-name={job}")
        return {one["metadata"]["name"]: one for one in found if "deletionTimestamp" not in one["metadata"]}

    def job_is_gone(self, job: str) -> bool:
        """Whether neither the job nor a pod of it is left."""
        return not (
            self.kubectl("get", "pytorchjob", job, "--ignore-not-found", "-o", "name")
            or self.get("pods", "-l", f"training.kubeflow.org/job-name={job}")
        )


def _pinned(name: str, image: str) -> dict[str, str]:
    """An image of the manifests, by digest."""
    new, _, digest = image.partition("@")
    return {"name": name, "newName": new, "digest": digest}


def _for_a_while(service: str) -> list[dict[str, Any]]:
    """Patches by which a service keeps its data in its pod, and leaves no volume behind."""
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": service}}
    volume = {
        "op": "replace",
        "path": "/spec/template/spec/volumes/0",
        "value": {"name": "data", "emptyDir": {}},
    }
    return [
        {"target": {"kind": "Deployment", "name": service}, "patch": json.dumps([volume])},
        {"patch": json.dumps({**claim, "$patch": "delete"})},
    ]


class Step:
    """A step's pod."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name

    @property
    def log(self) -> str:
        """What it has printed so far."""
        command = ["kubectl", "-n", self.cluster.namespace, "logs", self.name]
        return subprocess.run(command, capture_output=True, text=True).stdout

    @property
    def status(self) -> dict[str, Any]:
        """The pod's."""
        found: dict[str, Any] = json.loads(self.cluster.kubectl("get", "pod", self.name, "-o", "json"))
        return found["status"]

    def says(self, text: str, seconds: float = 120) -> str:
        """Its log, as soon as it has this text."""
        return until(
            lambda: self.log if text in self.log else "", seconds, f"'{text}' of {self.name}:\n{self.log}"
        )

    def ended(self, seconds: float = 300) -> tuple[int, str]:
        """Its exit code and termination message, as soon as it has ended."""

        def look() -> dict[str, Any] | None:
            for one in self.status.get("containerStatuses", []):
                if terminated := one["state"].get("terminated"):
                    return terminated
            return None

        end = until(look, seconds, f"the end of {self.name}:\n{self.log[-3000:]}")
        assert end
        return end["exitCode"], end.get("message", "")

    def kill(self) -> None:
        """SIGKILL to the step, nothing to its pod."""
        self.cluster.kubectl("exec", self.name, "--", "sh", "-c", "kill -9 $(cat /tmp/child)")

    def terminate(self) -> None:
        """End its pod as KFP does, which gives it less than a second."""
        self.cluster.kubectl("delete", "pod", self.name, "--grace-period=1", "--wait=false")

    def gone(self) -> None:
        """Delete what is left of it, once it has ended."""
        self.cluster.kubectl("delete", "pod", self.name, "--ignore-not-found", "--grace-period=1")


def image(suffix: str = "") -> str:
    """The image under test: what `make push` left, or LATENT_GPT_IMAGE; `-mlflow`: its server's, likewise."""
    if given := os.environ.get(f"LATENT_GPT_IMAGE{suffix.replace('-', '_').upper()}"):
        return given
    pushed = ROOT / "build" / f"image{suffix}"
    assert pushed.exists(), "no image was pushed; `make build push REGISTRY=…` first, or set LATENT_GPT_IMAGE"
    return pushed.read_text().strip()
