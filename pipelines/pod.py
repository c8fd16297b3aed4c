"""What the pod of a step is on a cluster. On a laptop nothing of it matters.

Requests are from measurement, on runs of `smoke` and `openmoji-tiny`: a step that has others compute takes
0.12 GB, `prepare` 0.18 (0.8 where it derives sizes), `images` up to 0.7, `register` 0.73 as it loads the
model. What has a limit has room above it. `images` computes on all cores that it gets, and so does what looks
at pictures before it, `news` and `prepare`: they have a limit of those. `prepare` may wait for the job that
times the hardware.

A step is not tried again by KFP: its retry acts on whatever failed, which is somebody's input more often than
not, and not on a pod that was evicted. Services that are away are waited for within a step; the cluster's
Argo, if it is told to, starts an evicted pod anew, which finds its job at work; and a person may retry a run.
"""

from __future__ import annotations

from dataclasses import dataclass

from kfp import dsl, kubernetes

from components.launch.pytorchjob import AUTHORITIES, AUTHORITIES_AT, PART_OF, USER
from model.plumbing import environment

HOUR = 3600
FIXED = environment.OF_A_STEP
CACHE, CACHE_GIB = FIXED[environment.CACHE.name], int(FIXED[environment.CACHE_GIB.name])
ROOM_GIB = CACHE_GIB + 8  # of a volume: it is what the node's disk gives, and nothing is set aside


@dataclass(frozen=True)
class Pod:
    """Resources of a step, in Kubernetes' quantities, and how long it may take."""

    cpu: str = "50m"
    memory: str = "192Mi"
    memory_limit: str = "1Gi"
    cpu_limit: str = ""
    hours: float = 30 * 24  # a job has its own deadline, and may wait for room as long as it takes

    @property
    def resources(self) -> dict[str, str]:
        """As a compiled pipeline has them."""
        limit = {"resourceCpuLimit": self.cpu_limit} if self.cpu_limit else {}
        requests = {"resourceCpuRequest": self.cpu, "resourceMemoryRequest": self.memory}
        return {**requests, **limit, "resourceMemoryLimit": self.memory_limit}


PODS = {
    "news": Pod(cpu="100m", memory="256Mi", memory_limit="4Gi", cpu_limit="8", hours=24),
    "prepare": Pod(cpu="100m", memory="256Mi", memory_limit="3Gi", cpu_limit="8", hours=24),
    "images": Pod(cpu="200m", memory="768Mi", memory_limit="4Gi", cpu_limit="8", hours=3 * 24),
    "register": Pod(cpu="200m", memory="1Gi", memory_limit="16Gi", hours=6),
}
READS = ("news", "prepare", "images")  # steps that look at sources; a Workflow is to stay short for the rest


def pod_of(step: str) -> Pod:
    """What a step needs."""
    return PODS.get(step, Pod())


def on_cluster(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Give a task its environment, time, user, labels and folders to write to.

    Its resources, and what is said to it without a ConfigMap, `pipelines.compile` puts in: kfp takes half a
    second for each step to write a quantity down, and would tell a step on a laptop as well.
    """
    kubernetes.set_timeout(task, round(pod_of(task.name).hours * HOUR))
    left_out = {*FIXED, *(one.name for one in environment.OF_HUB if task.name not in READS)}
    told = {one.name: one.name for one in environment.IN_CONFIG_MAP if one.name not in left_out}
    secret = {one.name: one.name for one in environment.IN_SECRET if one.name not in left_out}
    kubernetes.use_config_map_as_env(task, environment.ON_CLUSTER, told, optional=True)
    kubernetes.use_secret_as_env(task, environment.ON_CLUSTER, secret, optional=True)
    kubernetes.use_secret_as_volume(task, AUTHORITIES, AUTHORITIES_AT, optional=True)
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    for volume, path in (("tmp", "/tmp"), ("cache", CACHE)):
        kubernetes.empty_dir_mount(task, volume, path, size_limit=f"{ROOM_GIB}Gi")
    for name, value in {**PART_OF, "app.kubernetes.io/name": task.name}.items():
        kubernetes.add_pod_label(task, name, value)
    return task
