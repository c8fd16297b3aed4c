"""MLflow and S3 of a cluster, reached from here: where the environment says, or through kubectl."""

from __future__ import annotations

import base64
import re
import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from model.errors import UserError
from model.plumbing import environment
from pipelines.cluster.kubectl import Kubectl

SERVICES = (environment.MLFLOW_TRACKING_URI, environment.S3_ENDPOINT_URL)


@contextmanager
def services(kubectl: Kubectl) -> Iterator[None]:
    """Within the block the environment leads to the MLflow and the S3 that steps use.

    What it names already is taken for reachable. The rest is what the cluster's ConfigMap and Secret say, and
    services of the namespace are led to by `kubectl port-forward`.

    Raises:
        UserError: the cluster does not say it, or does not let us read it.
    """
    if environment.MLFLOW_TRACKING_URI.get():
        yield
        return
    told = _told(kubectl)
    with ExitStack() as stack:
        for one in SERVICES:
            if address := told.get(one.name):
                told[one.name] = stack.enter_context(_led_to(kubectl, address))
        stack.enter_context(environment.within(told))
        yield


def _told(kubectl: Kubectl) -> dict[str, str | None]:
    """What steps are told that matters here, too."""
    name = environment.ON_CLUSTER
    found = kubectl.objects("get", "configmap,secret", "--field-selector", f"metadata.name={name}")
    told: dict[str, str] = {}
    for one in found:
        data = one.get("data") or {}
        secret = one["kind"] == "Secret"
        told |= {key: base64.b64decode(value).decode() if secret else value for key, value in data.items()}
    if not told.get(environment.MLFLOW_TRACKING_URI.name):
        raise UserError(
            f"namespace {kubectl.namespace} has no ConfigMap {name} that names an MLflow; `make deploy`, or"
            " let MLFLOW_TRACKING_URI and S3_ENDPOINT_URL name addresses that are reached from here"
        )
    wanted = {*SERVICES, environment.STORE, environment.AWS_DEFAULT_REGION, *environment.IN_SECRET}
    of_services = wanted - {*environment.OF_HUB}
    return {one.name: told.get(one.name) for one in of_services if told.get(one.name)}


@contextmanager
def _led_to(kubectl: Kubectl, address: str) -> Iterator[str]:
    """An address that leads from here to where this one leads from pods."""
    within = rf"(?:\.{re.escape(kubectl.namespace)}(?:\.svc(?:\.cluster\.local)?)?)?"
    match = re.fullmatch(rf"http://([a-z0-9-]+){within}:(\d+)/?", address)
    if not match or not kubectl.objects("get", "service", match[1], "--ignore-not-found"):
        yield address  # no service of this namespace
        return
    command = ["kubectl", "-n", kubectl.namespace, "port-forward", f"service/{match[1]}", f":{match[2]}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        try:
            assert child.stdout
            line = child.stdout.readline()  # Forwarding from 127.0.0.1:41234 -> 8333
            if "127.0.0.1:" not in line:
                raise UserError(f"no way to {address}: {' '.join(line.split())}")
            # It says something of each connection, and would wait for ever for who reads it.
            rest = threading.Thread(target=deque, args=(child.stdout, 0), daemon=True)
            rest.start()
            try:
                yield f"http://127.0.0.1:{line.split('127.0.0.1:')[1].split()[0]}"
            finally:
                child.kill()
                rest.join()
        finally:
            child.kill()
