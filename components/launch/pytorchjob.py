"""Jobs on a cluster, by the PyTorchJobs of Kubeflow's training operator. What is particular to them is here.

A job has workers and no master: all of them meet at worker 0, as torch's elastic launcher does anywhere. The
operator starts a worker again that ends with an exit code of 128 or more, and takes any other for the job's
end; see `outcome.EXIT_CODES`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from components.launch.cluster import Kind
from components.launch.decide import Job
from components.launch.pods import seconds
from model.config import JobConfig
from model.plumbing import environment, storage
from model.plumbing.jobs import JobSpec
from model.plumbing.outcome import Outcome

if TYPE_CHECKING:
    from kubeflow.training.models import KubeflowOrgV1PyTorchJob
    from kubernetes.client import V1PodTemplateSpec  # type: ignore[import-untyped]

RESOURCE = Kind("kubeflow.org", "v1", "pytorchjobs")
CONTAINER = "pytorch"  # the operator looks for a container of this name
ENTRY = "components.launch.entry"
ACCESS = environment.ON_CLUSTER  # the ConfigMap and the Secret that name the services, for steps and workers
AUTHORITIES, AUTHORITIES_AT = "latent-gpt-ca", "/etc/latent-gpt/ca"  # a Secret, for services with their own
QUEUE = "kueue.x-k8s.io/queue-name"
RUN, STEP, SPEC = "latent-gpt/run", "latent-gpt/step", "latent-gpt/spec"
PART_OF = {"app.kubernetes.io/part-of": "latent-gpt"}
POD_JOB, POD_WORKER = "training.kubeflow.org/job-name", "training.kubeflow.org/replica-index"
USER = 10001
TTL = 600  # seconds that a job which succeeded is still there
AFTER_GRACE = 60  # seconds that the entry has beyond its ranks' grace, to store their logs
LONGEST = 63 - len("-worker-1023")  # of a job's name: what the operator appends has to fit as well


def run(spec: JobSpec) -> Outcome:
    """See `Backend.run`. SIGTERM deletes the job, unless another step wants what it makes."""
    from components.launch import pytorchjob
    from components.launch.follow import follow

    return follow(spec, pytorchjob)


# ── the object ──────────────────────────────────────────────────────────────────────────────────────────


def name(spec: JobSpec) -> str:
    """The name of the job that makes this asset: the same work has the same job."""
    store = hashlib.sha256(spec.output.encode()).hexdigest()[:6]  # two stores may share a namespace
    key = spec.output.rpartition("/")[2]
    return f"{spec.kind}-{key}-{store}"[:LONGEST]


def labels(spec: JobSpec) -> dict[str, str]:
    """Labels of a job and of its pods."""
    return {**PART_OF, RUN: label_value(spec.tracking.run), STEP: label_value(spec.name)}


def label_value(text: str) -> str:
    """The next best text that a label may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:63].strip("-_.")


def job(
    spec: JobSpec, spec_uri: str, image: str, namespace: str, labels: Mapping[str, str]
) -> KubeflowOrgV1PyTorchJob:
    """The job that makes an asset.

    Args:
        spec: of the asset.
        spec_uri: where the workers find it.
        image: of the workers.
        namespace: in which it runs.
        labels: of the job and of its pods.
    """
    from kubeflow.training import models
    from kubernetes import client  # type: ignore[import-untyped]

    jobs = spec.jobs
    replicas = models.KubeflowOrgV1ReplicaSpec(
        replicas=jobs.workers,
        restart_policy="ExitCode",
        template=template(jobs, spec_uri, image, labels, storage.store_root()),
    )
    return models.KubeflowOrgV1PyTorchJob(
        api_version=f"{RESOURCE.group}/{RESOURCE.version}",
        kind="PyTorchJob",
        metadata=client.V1ObjectMeta(
            name=name(spec),
            namespace=namespace,
            labels={**labels, **({QUEUE: jobs.queue} if jobs.queue else {})},
            annotations={RUN: spec.tracking.run, SPEC: spec_uri},
        ),
        spec=models.KubeflowOrgV1PyTorchJobSpec(
            elastic_policy=models.KubeflowOrgV1ElasticPolicy(
                min_replicas=jobs.min_workers or jobs.workers,
                max_replicas=jobs.workers,
                rdzv_backend="c10d",
                max_restarts=0,
            ),
            nproc_per_node=str(jobs.processes_per_worker),  # unsaid, it is the number of cores
            pytorch_replica_specs={"Worker": replicas},
            run_policy=models.KubeflowOrgV1RunPolicy(
                clean_pod_policy="Running",  # pods that have ended stay: they know why
                ttl_seconds_after_finished=TTL,
            ),
        ),
    )


def template(
    jobs: JobConfig, spec_uri: str, image: str, labels: Mapping[str, str], store: str
) -> V1PodTemplateSpec:
    """The pod of a worker; see `job`. `store` is the step's, where the spec lies."""
    from kubernetes import client

    mounts = {"tmp": "/tmp", "cache": "/cache", "shm": "/dev/shm", "ca": AUTHORITIES_AT}
    container = client.V1Container(
        name=CONTAINER,
        image=image,
        command=["python", "-m", ENTRY, spec_uri],
        env=_environment(store, image),
        env_from=[
            client.V1EnvFromSource(config_map_ref=client.V1ConfigMapEnvSource(name=ACCESS)),
            client.V1EnvFromSource(secret_ref=client.V1SecretEnvSource(name=ACCESS)),
        ],
        resources=_resources(jobs),
        security_context=client.V1SecurityContext(
            allow_privilege_escalation=False,
            read_only_root_filesystem=True,
            capabilities=client.V1Capabilities(drop=["ALL"]),
        ),
        volume_mounts=[
            client.V1VolumeMount(name=volume, mount_path=path, read_only=volume == "ca" or None)
            for volume, path in mounts.items()
        ],
    )
    shm = client.V1EmptyDirVolumeSource(medium="Memory", size_limit=jobs.shared_memory)
    authorities = client.V1SecretVolumeSource(secret_name=AUTHORITIES, optional=True)
    return client.V1PodTemplateSpec(
        metadata=client.V1ObjectMeta(
            labels={**labels, "sidecar.istio.io/inject": "false"}  # a sidecar would outlive the worker
        ),
        spec=client.V1PodSpec(
            containers=[container],
            volumes=[
                client.V1Volume(name="tmp", empty_dir=client.V1EmptyDirVolumeSource()),
                client.V1Volume(name="cache", empty_dir=client.V1EmptyDirVolumeSource()),
                client.V1Volume(name="shm", empty_dir=shm),
                client.V1Volume(name="ca", secret=authorities),
            ],
            automount_service_account_token=False,
            enable_service_links=False,
            security_context=client.V1PodSecurityContext(
                run_as_non_root=True,
                run_as_user=USER,
                run_as_group=USER,
                seccomp_profile=client.V1SeccompProfile(type="RuntimeDefault"),
            ),
            termination_grace_period_seconds=jobs.grace_seconds + AFTER_GRACE,
            node_selector=jobs.node_selector or None,
            tolerations=[
                client.V1Toleration(
                    key=one.key or None,
                    operator=one.operator,
                    value=one.value or None,
                    effect=one.effect or None,
                )
                for one in jobs.tolerations
            ]
            or None,
            priority_class_name=jobs.priority_class or None,
            image_pull_secrets=[client.V1LocalObjectReference(name=one) for one in jobs.image_pull_secrets]
            or None,
        ),
    )


def _resources(jobs: JobConfig) -> Any:
    from kubernetes import client

    limits = {"cpu": jobs.cpu_limit or jobs.cpu, "memory": jobs.memory}
    if jobs.gpus_per_worker:
        limits["nvidia.com/gpu"] = str(jobs.gpus_per_worker)
    return client.V1ResourceRequirements(requests={"cpu": jobs.cpu, "memory": jobs.memory}, limits=limits)


def _environment(store: str, image: str) -> list[Any]:
    from kubernetes import client

    said = {
        environment.STORE.name: store,
        environment.IMAGE.name: image,
        environment.CACHE.name: "/cache",
        "HOME": "/tmp",
        "PYTHONUNBUFFERED": "1",
    }
    of_pod = {
        environment.POD.name: "metadata.name",
        environment.POD_UID.name: "metadata.uid",
        environment.WORKER.name: f"metadata.labels['{POD_WORKER}']",
    }
    return [
        *(client.V1EnvVar(name=name, value=value) for name, value in said.items()),
        *(
            client.V1EnvVar(
                name=name,
                value_from=client.V1EnvVarSource(field_ref=client.V1ObjectFieldSelector(field_path=path)),
            )
            for name, path in of_pod.items()
        ),
    ]


# ── what the operator says of it ────────────────────────────────────────────────────────────────────────


def read(found: Mapping[str, Any]) -> Job:
    """What a job that was found is, in the words of `decide`."""
    meta, spec, status = found["metadata"], found["spec"], found.get("status", {})
    true = {one["type"] for one in status.get("conditions") or [] if one["status"] == "True"}
    policy = spec.get("runPolicy", {})
    return Job(
        uid=meta["uid"],
        created=seconds(meta["creationTimestamp"]),
        terminating="deletionTimestamp" in meta,
        suspended=bool(policy.get("suspend")),
        failed="Failed" in true,
        succeeded="Succeeded" in true,
        workers=sum(one.get("replicas", 1) for one in spec["pytorchReplicaSpecs"].values()),
        queue=meta.get("labels", {}).get(QUEUE, ""),
    )


def pods(name: str) -> str:
    """What selects the pods of a job by their labels."""
    return f"{POD_JOB}={name}"


def worker(pod: Mapping[str, Any]) -> int:
    """A pod's number among those of its job."""
    return int(pod["metadata"].get("labels", {}).get(POD_WORKER, 0))
