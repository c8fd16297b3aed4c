"""What goes wrong on a cluster, tried with the rights of whoever runs this: a step's account, or an operator.

What an account may not look at is said to be unknown, and stops nothing. Where a run can go on, though not as
one would think, the line begins with `worth knowing`. Steps whose jobs are processes of their own pod
(`LATENT_GPT_LAUNCHER`) need none of it.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from model.config import RunConfig
from model.errors import Unavailable, UserError
from model.plumbing import environment, storage

if TYPE_CHECKING:
    from components.launch.cluster import Cluster, Object

NOTE = "worth knowing: "
PATIENCE = 3.0  # seconds for an answer of a service
CLOCKS = 60.0  # seconds by which clocks may differ; AWS refuses requests from fifteen minutes on
FORBIDDEN = re.compile(r'cannot (\w+) resource "([\w/]+)"')  # a refusal of this account, and of no content

Look = Callable[["Cluster", RunConfig], str | None]


def concerned() -> bool:
    """Whether jobs go to a cluster."""
    return environment.LAUNCHER.get() == "pytorchjob"


def asked(what: str) -> Callable[[Look], Callable[[RunConfig], str | None]]:
    """Make a probe of a function that asks the API server; `what` it looks for is unknown if it may not."""

    def probe(look: Look) -> Callable[[RunConfig], str | None]:
        @functools.wraps(look)
        def check(config: RunConfig) -> str | None:
            if not concerned():
                return None
            from kubernetes.client.exceptions import ApiException  # type: ignore[import-untyped]

            from components.launch import cluster

            there = cluster.here()
            try:
                return look(there, config)
            except ApiException as error:
                said = cluster.told(error)
                if error.status == 403 and (denied := FORBIDDEN.search(said)):
                    return f"{what} is unknown: this account may not {denied[1]} {denied[2]}"
                raise UserError(f"cluster: {said}") from None
            except cluster.NETWORK as error:
                raise Unavailable(
                    f"cluster: {there.configuration.host} does not answer: {cluster.plain(error)}; check that"
                    " it runs, and what KUBECONFIG says"
                ) from None

        return check

    return probe


# ── what is there ───────────────────────────────────────────────────────────────────────────────────────


@asked("its version")
def answers(there: Cluster, config: RunConfig) -> str:
    """The API server is reached, and knows us."""
    version = there.ask("/version").found["gitVersion"]
    return f"Kubernetes {version} at {there.configuration.host}, namespace {there.namespace}"


@asked("whether it has PyTorchJobs")
def has_jobs(there: Cluster, config: RunConfig) -> str | None:
    """The training operator's PyTorchJobs are there, and Argo's Workflows, in the versions that we speak."""
    from components.launch.pytorchjob import RESOURCE

    if RESOURCE.plural not in _kinds(there, RESOURCE.group, RESOURCE.version):
        raise UserError(
            f"cluster: it has no {RESOURCE.plural}.{RESOURCE.group} of {RESOURCE.version}; install Kubeflow's"
            " training operator 1.9 (`make cluster-addons`)"
        )
    if "workflows" not in _kinds(there, "argoproj.io", "v1alpha1"):
        return f"{NOTE}it has no workflows.argoproj.io of v1alpha1, with which KFP runs its pipelines"
    return None


def _kinds(there: Cluster, group: str, version: str) -> set[str]:
    there_is = found(there, f"/apis/{group}/{version}") or {"resources": []}
    return {one["name"] for one in there_is["resources"]}


@asked("what this account may do")
def allows(there: Cluster, config: RunConfig) -> None:
    """The account may do what following a job takes."""
    from components.launch.pytorchjob import RESOURCE

    if lacks := there.lacks(RESOURCE):
        what = ", ".join(f"{verb} {resource}" for resource, verbs in lacks.items() for verb in verbs)
        rules = []
        for resource, verbs in lacks.items():
            name, _, group = resource.partition(".")
            rules.append(f"{{apiGroups: ['{group}'], resources: [{name}], verbs: [{', '.join(verbs)}]}}")
        raise UserError(
            f"cluster: {_account(there)} may not {what} in namespace {there.namespace}; apply"
            f" k8s/base/rbac.yaml, or add to the rules of its Role: [{', '.join(rules)}]"
        )


def _account(there: Cluster) -> str:
    """Who we are, as the server sees it."""
    from kubernetes.client.exceptions import ApiException

    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    with contextlib.suppress(ApiException, KeyError):
        answer = there.ask("/apis/authentication.k8s.io/v1/selfsubjectreviews", review)
        return str(answer.found["status"]["userInfo"]["username"])
    return "this account"


@asked("what workers are told")
def tells_workers(there: Cluster, config: RunConfig) -> None:
    """ConfigMap and Secret have what this step was told: its workers learn it from there alone."""
    name = environment.ON_CLUSTER
    own = {environment.LAUNCHER.name, environment.STORE.name, *environment.OF_A_STEP}
    map_keys = [one for one in environment.IN_CONFIG_MAP if one.name not in own]
    config_map = _keys(there, "configmaps", f"ConfigMap '{name}'", map_keys)
    if environment.MLFLOW_TRACKING_URI.name not in config_map:
        raise UserError(
            f"cluster: ConfigMap '{name}' in namespace {there.namespace} has no"
            f" {environment.MLFLOW_TRACKING_URI.name}, the address of MLflow; `make deploy` writes it"
        )
    secret = _keys(there, "secrets", f"Secret '{name}'", list(environment.IN_SECRET))
    pair = {environment.AWS_ACCESS_KEY_ID.name, environment.AWS_SECRET_ACCESS_KEY.name}
    if len(pair & secret) == 1:
        raise UserError(
            f"cluster: Secret '{name}' in namespace {there.namespace} has no {(pair - secret).pop()}, and S3"
            " takes both keys or none; `make secrets` makes what is missing"
        )


def _keys(there: Cluster, plural: str, what: str, keys: list[Any]) -> set[str]:
    """The keys of such an object, among them all that this process was told."""
    where = f"namespace {there.namespace}"
    one = found(there, f"/api/v1/namespaces/{there.namespace}/{plural}/{environment.ON_CLUSTER}")
    if one is None:
        raise UserError(
            f"cluster: {where} has no {what}, from which workers learn where their services are;"
            " `make secrets deploy` makes it"
        )
    held = set(one.get("data") or {})
    told = {key.name for key in keys if key.get() != key.default}
    if missing := sorted(told - held):
        raise UserError(
            f"cluster: {what} in {where} has no {', '.join(missing)}, which this step was told, and which its"
            " workers will lack; add it there"
        )
    return held


def found(there: Cluster, path: str) -> Object | None:
    """What is at a path; None if there is nothing."""
    from kubernetes.client.exceptions import ApiException

    try:
        return there.ask(path).found
    except ApiException as error:
        if error.status == 404:
            return None
        raise


@asked("the image of jobs")
def has_image(there: Cluster, config: RunConfig) -> str:
    """The image is one by its digest, and what the registry asks for is there."""
    for name in config.jobs.image_pull_secrets:
        if found(there, f"/api/v1/namespaces/{there.namespace}/secrets/{name}") is None:
            raise UserError(
                f"cluster: namespace {there.namespace} has no Secret '{name}', which jobs.image_pull_secrets"
                " names; kubectl create secret docker-registry makes one"
            )
    image = there.image()
    if "@sha256:" in image:
        return f"image {image}"
    return (
        f"{NOTE}image {image} has a tag and no digest: nodes that have it already do not look for a newer"
        " one; name it by its digest, as `make push` writes it into build/image"
    )


@asked("the API server's clock")
def keeps_time(there: Cluster, config: RunConfig) -> str:
    """This clock, the API server's and S3's show the same time."""
    shows = {"the API server's": there.ask("/version").headers.get("Date", "")}
    if storage.is_s3(environment.STORE.get()):
        shows["S3's"] = _date_of_s3()
    now = datetime.now(UTC)
    behind = {
        whose: (now - parsedate_to_datetime(date)).total_seconds() for whose, date in shows.items() if date
    }
    off = {whose: by for whose, by in behind.items() if abs(by) > CLOCKS}
    if off:
        what = ", and ".join(
            f"{abs(by):.0f} s {'ahead of' if by > 0 else 'behind'} {whose}" for whose, by in off.items()
        )
        return (
            f"{NOTE}the clock here is {what}; S3 refuses requests that are 15 minutes off: have the nodes"
            " keep time (chrony, systemd-timesyncd)"
        )
    return f"the clocks here and of {' and '.join(behind)} are less than a minute apart".replace("'s", "")


def _date_of_s3() -> str:
    """The time of S3's answer, whatever the answer is; "" if there is none."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _ = storage.split(storage.store_root())
    try:
        with storage.hasty(PATIENCE, 1):
            answer: Mapping[str, Any] = storage.client().head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
    except (BotoCoreError, UserError):
        return ""  # the section on storage says why
    return str(answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date", ""))
