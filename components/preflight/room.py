"""Whether a cluster would take a job's workers: what judges pods, nodes, quota."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from components.preflight.cluster import FORBIDDEN, NOTE, asked
from model.config import JobConfig, RunConfig
from model.errors import UserError

if TYPE_CHECKING:
    from components.launch.cluster import Cluster, Object

GPU = "nvidia.com/gpu"
FIELDS = {"cpu": "jobs.cpu", "memory": "jobs.memory", GPU: "jobs.gpus_per_worker"}  # that ask for a resource


def _worker(there: Cluster, config: RunConfig) -> Object:
    """A worker's pod."""
    from components.launch import pytorchjob

    template = pytorchjob.template(config.jobs, "s3://a/b", there.image(), pytorchjob.PART_OF, "s3://a")
    made: Object = there.api.sanitize_for_serialization(template)
    made["metadata"]["generateName"] = "latent-gpt-preflight-"
    return {"apiVersion": "v1", "kind": "Pod", **made}


def _admitted(there: Cluster, config: RunConfig) -> tuple[Object, str]:
    """A worker's pod as the server would make it, and what it warns of.

    Raises:
        ApiException: it would not, or we may not ask.
    """
    answer = there.ask(f"/api/v1/namespaces/{there.namespace}/pods", _worker(there, config), dryRun="All")
    return answer.found, answer.headers.get("Warning", "")


@asked("whether a worker's pod is let in")
def admits(there: Cluster, config: RunConfig) -> str | None:
    """The server would make a worker's pod: Pod Security, priority class, limits and whatever else judges."""
    from kubernetes.client.exceptions import ApiException  # type: ignore[import-untyped]

    from components.launch import cluster

    try:
        _, warning = _admitted(there, config)
    except ApiException as error:
        said = cluster.told(error)
        if "exceeded quota" in said:
            return f"{NOTE}jobs wait, as quota is used up: {said}"
        if error.status not in (400, 403, 422) or FORBIDDEN.search(said):
            raise
        right = "change jobs, or the rule"
        if "PodSecurity" in said:
            right = "our jobs meet `restricted`; what changes pods of this namespace does not"
        elif "PriorityClass" in said:
            right = "create it, or set jobs.priority_class to one that there is"
        raise UserError(f"cluster: a worker's pod is refused: {said}; {right}") from None
    said = warning.partition('"')[2].rstrip('"')
    return f"{NOTE}a worker's pod is let in with a warning: {said}" if said else None


@asked("whether a node has room for a worker")
def has_nodes(there: Cluster, config: RunConfig) -> str | None:
    """Some node may take a worker, were it empty."""
    from kubernetes.client.exceptions import ApiException

    nodes = there.ask("/api/v1/nodes").found["items"]
    try:
        pod, _ = _admitted(there, config)  # with what the cluster adds, e.g. tolerations of GPU nodes
    except ApiException:
        pod = _worker(there, config)
    if not (why := lacks_room(nodes, pod)):
        return None
    if config.jobs.pending_hours:
        return (
            f"{NOTE}{why}; a job waits for {config.jobs.pending_hours:g} hours for one (jobs.pending_hours)"
        )
    if config.jobs.queue:
        return f"{NOTE}{why}, unless the queue's flavour gives it to workers (jobs.queue)"
    raise UserError(
        f"cluster: {why}; where an autoscaler brings such nodes, say in jobs.pending_hours how long to wait"
    )


def lacks_room(nodes: list[Object], pod: Object) -> str:
    """Why no node could take a pod, were it empty, and what would be right; "" if one could."""
    spec = pod["spec"]
    wanted = spec.get("nodeSelector") or {}
    chosen = [one for one in nodes if wanted.items() <= (one["metadata"].get("labels") or {}).items()]
    if not chosen:
        labels = ", ".join(f"{name}={value}" for name, value in wanted.items())
        return f"none of the {len(nodes)} nodes is labelled {labels}; mend jobs.node_selector, or label one"
    suffered = [one for one in chosen if not _repels(one, spec.get("tolerations") or [])]
    if not suffered:
        taints = sorted({taint for one in chosen for taint in _repels(one, spec.get("tolerations") or [])})
        return (
            f"each of the {len(chosen)} nodes keeps workers off by {', '.join(taints)}; kubectl uncordon one,"
            " or name the taint in jobs.tolerations"
        )
    needs = requests(pod)
    for resource, field in FIELDS.items():
        need = needs.get(resource, 0.0)
        most = max((_number(_allocatable(one).get(resource, "0")) for one in suffered), default=0.0)
        if need > most:
            hint = ", with NVIDIA's device plugin" if resource == GPU else ""
            return (
                f"no node has {shown(resource, need)} for a worker, at most {shown(resource, most)}; lower"
                f" {field}, or add such a node{hint}"
            )
    if any(
        all(need <= _number(_allocatable(one).get(resource, "0")) for resource, need in needs.items())
        for one in suffered
    ):
        return ""
    all_of_it = ", ".join(shown(resource, need) for resource, need in needs.items())
    return (
        f"no single node has {all_of_it} for a worker; lower {', '.join(FIELDS.values())}, or add such a node"
    )


def _allocatable(node: Object) -> Mapping[str, str]:
    found: Mapping[str, str] = node["status"].get("allocatable") or {}
    return found


def _repels(node: Object, tolerations: list[Object]) -> list[str]:
    """Taints of a node that a pod does not put up with."""
    return [
        "=".join(filter(None, [taint["key"], taint.get("value")])) + f":{taint['effect']}"
        for taint in node["spec"].get("taints") or []
        if taint["effect"] != "PreferNoSchedule" and not any(_puts_up(one, taint) for one in tolerations)
    ]


def _puts_up(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    same = toleration.get("value") or "", taint.get("value") or ""
    return toleration.get("key") == taint["key"] and same[0] == same[1]


@asked("what is left of quota")
def has_quota(there: Cluster, config: RunConfig) -> str | None:
    """The quotas of the namespace leave room for a job."""
    quotas = there.ask(f"/api/v1/namespaces/{there.namespace}/resourcequotas").found["items"]
    pod = _worker(there, config)
    needs = of_job(config.jobs, pod)
    waits = []
    for quota in quotas:
        if not counts(quota, pod["spec"]):
            continue
        name, status = quota["metadata"]["name"], quota.get("status") or {}
        for resource, limit in (quota["spec"].get("hard") or {}).items():
            need, hard = needs.get(resource, 0.0), _number(limit)
            used = _number((status.get("used") or {}).get(resource, "0"))
            if need > hard:
                raise UserError(
                    f"cluster: quota {name} allows {shown(resource, hard)}, and a job asks for"
                    f" {shown(resource, need)}; raise it, or lower jobs"
                )
            if need > hard - used:
                waits.append(
                    f"{shown(resource, need)} of quota {name}, whose {shown(resource, hard - used)} are left"
                )
    return f"{NOTE}jobs wait for {', and for '.join(waits)}" if waits else None


def of_job(jobs: JobConfig, pod: Object) -> dict[str, float]:
    """What a job takes of a quota, by the quota's names."""
    resources = pod["spec"]["containers"][0]["resources"]
    needs = {"pods": 1.0, "count/pods": 1.0}
    for kind in ("requests", "limits"):
        for resource, amount in resources[kind].items():
            needs[f"{kind}.{resource}"] = _number(amount)
    needs |= {resource: needs[f"requests.{resource}"] for resource in ("cpu", "memory")}
    needs = {resource: need * jobs.workers for resource, need in needs.items()}
    return {**needs, "count/pytorchjobs.kubeflow.org": 1.0}


def counts(quota: Object, pod: Object) -> bool:
    """Whether a quota is one for such pods; they ask for resources, and have no deadline."""
    spec = quota["spec"]
    scopes = list(spec.get("scopes") or [])
    if set(scopes) & {"BestEffort", "Terminating"}:
        return False
    for one in (spec.get("scopeSelector") or {}).get("matchExpressions") or []:
        if one["scopeName"] in ("BestEffort", "Terminating"):
            return False
        if one["scopeName"] == "PriorityClass":
            name = pod.get("priorityClassName") or ""
            among, there = name in (one.get("values") or []), bool(name)
            answer = {"In": among, "NotIn": not among, "Exists": there, "DoesNotExist": not there}
            if not answer[one["operator"]]:
                return False
    return True


def requests(pod: Object) -> dict[str, float]:
    """What a pod of one container asks of its node, in cores, bytes and pieces."""
    asked_for = pod["spec"]["containers"][0]["resources"]
    both = {**(asked_for.get("limits") or {}), **(asked_for.get("requests") or {})}
    return {resource: _number(both[resource]) for resource in FIELDS if resource in both}


def _number(quantity: Any) -> float:
    from kubernetes.utils.quantity import parse_quantity  # type: ignore[import-untyped]

    return float(parse_quantity(quantity))


def shown(resource: str, number: float) -> str:
    """An amount of a resource, for people."""
    if "memory" in resource:
        return f"{number / 2**30:.3g} GiB of {resource}"
    return f"{number:.4g} {resource}"
