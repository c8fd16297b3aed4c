"""The Secrets of an installation: made once, kept, and never shown.

`latent-gpt` is the environment of steps and workers, `latent-gpt-mlflow` that of MLflow's server alone. A
value goes from the environment, or from chance, to the API server: no file, command line or output has it.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from kubernetes import client  # type: ignore[import-untyped]
from kubernetes.client.exceptions import ApiException  # type: ignore[import-untyped]

from components.launch.cluster import NETWORK, PATIENCE, Cluster, plain, told
from components.launch.pytorchjob import PART_OF
from model.errors import Unavailable, UserError
from model.plumbing import environment
from model.plumbing.environment import ON_CLUSTER
from pipelines.cluster.deploy import keys_needed
from pipelines.cluster.kubectl import Object

SERVER = "latent-gpt-mlflow"
OWN_S3 = "Deployment latent-gpt-s3"  # kind and name of a server that takes for its user's keys what it finds
USER = "latent-gpt"  # MLflow's administrator, unless the environment names one
SHORTEST = 12  # letters of a password that MLflow takes
T = TypeVar("T")
Drawn = Mapping[str, Callable[[], str]]


def keep(cluster: Cluster, overlay: Iterable[Object], replace: bool = False) -> list[str]:
    """See to it that both Secrets are there, with all that can be given or drawn.

    Keys of S3 are drawn for an S3 of our own, and then those of the environment, which may be for AWS,
    go nowhere. For another S3 they come from the environment or are left out: pods may get theirs by account.

    Args:
        cluster: where; its namespace has to be there.
        overlay: objects that will be applied there.
        replace: the environment wins over what the cluster has; without this, what is there is kept.

    Returns:
        One line on each Secret: which keys were drawn, taken or kept. Values are in none.

    Raises:
        UserError: a password is too short, the address of a database is missing, or the cluster does not
            let us.
        Unavailable: it does not answer.
    """
    overlay = list(overlay)
    own_s3 = any(f"{one['kind']} {one['metadata']['name']}" == OWN_S3 for one in overlay)
    given = {one.name: one.get() for one in environment.IN_SECRET if one.get()}
    if own_s3:
        given = {name: value for name, value in given.items() if not name.startswith("AWS_")}
    user, password = environment.MLFLOW_TRACKING_USERNAME, environment.MLFLOW_TRACKING_PASSWORD
    if len(given.get(password.name, password.name)) < SHORTEST:
        raise UserError(f"{password.name} has fewer than {SHORTEST} letters, which MLflow does not take")
    keys = (environment.AWS_ACCESS_KEY_ID.name, environment.AWS_SECRET_ACCESS_KEY.name)
    if len(given.keys() & keys) == 1:
        raise UserError(f"the environment gives one of {' and '.join(keys)}; S3 wants both, or neither")
    drawn: Drawn = dict.fromkeys(keys, _drawn) if own_s3 else {}
    if environment.MLFLOW_TRACKING_TOKEN.name not in given:
        drawn = {**drawn, user.name: lambda: USER, password.name: _drawn}
    server = (environment.MLFLOW_BACKEND_STORE_URI, environment.MLFLOW_FLASK_SERVER_SECRET_KEY)
    of_server = {one.name: one.get() for one in server if one.get()}
    if server[0].name in keys_needed(overlay).get(SERVER, set()) - of_server.keys():
        found = _asked(cluster, SERVER, lambda: _read(cluster, SERVER))
        if server[0].name not in ((found and found.data) or {}):
            raise UserError(
                f"{server[0].name} is not set, the database of the overlay's MLflow; export it once, e.g."
                " postgresql://user:password@host/mlflow"
            )
    return [
        _keep(cluster, ON_CLUSTER, given, drawn, replace),
        _keep(cluster, SERVER, of_server, {server[1].name: _drawn}, replace),
    ]


# ── below ───────────────────────────────────────────────────────────────────────────────────────────────


def _keep(cluster: Cluster, name: str, given: Mapping[str, str], draw: Drawn, replace: bool) -> str:
    """One Secret; `draw` where neither it nor `given` has a key."""
    found = _asked(cluster, name, lambda: _read(cluster, name))
    had = {key: base64.b64decode(value).decode() for key, value in ((found and found.data) or {}).items()}
    differ = {key for key, value in given.items() if had.get(key, value) != value}
    values = {key: value for key, value in given.items() if key not in had or (replace and key in differ)}
    values |= {key: make() for key, make in draw.items() if key not in had and key not in given}
    labels = (found and found.metadata.labels) or {}
    if values or (found and not PART_OF.items() <= labels.items()):
        meta = client.V1ObjectMeta(name=name, labels=PART_OF)
        data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
        body = client.V1Secret(metadata=meta, data=data)
        where, how = cluster.namespace, {"_request_timeout": PATIENCE}
        if not found:
            _asked(cluster, name, lambda: cluster.core.create_namespaced_secret(where, body, **how))
        else:
            _asked(cluster, name, lambda: cluster.core.patch_namespaced_secret(name, where, body, **how))
    said = {
        "from the environment": values.keys() & given.keys(),
        "drawn": values.keys() - given.keys(),
        "kept": had.keys() - values.keys() - differ,
        "kept, though the environment says otherwise (--replace takes that)": differ - values.keys(),
    }
    parts = [f"{', '.join(sorted(keys))} {how}" for how, keys in said.items() if keys]
    return f"Secret {name} in {cluster.namespace}: {'; '.join(parts)}"


def _read(cluster: Cluster, name: str) -> client.V1Secret | None:
    try:
        return cluster.core.read_namespaced_secret(name, cluster.namespace, _request_timeout=PATIENCE)
    except ApiException as error:
        if error.status == 404:
            return None
        raise


def _asked(cluster: Cluster, name: str, ask: Callable[[], T]) -> T:
    """The answer; a refusal in one line."""
    try:
        return ask()
    except ApiException as error:
        said = told(error)
        none = f'namespaces "{cluster.namespace}" not found' in said
        remedy = f"; make it first: kubectl create namespace {cluster.namespace}" if none else ""
        raise UserError(
            f"the cluster does not take Secret {name} in namespace {cluster.namespace}: {said}{remedy}"
        ) from None
    except NETWORK as error:
        raise Unavailable(
            f"the cluster at {cluster.configuration.host} does not answer: {plain(error)}"
        ) from None


def _drawn() -> str:
    return secrets.token_hex(20)
