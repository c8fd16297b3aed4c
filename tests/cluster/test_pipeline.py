"""The installation and the pipeline on a real cluster with KFP, as an operator and a user work with them.

`make test-cluster PART=pipeline` runs this file from a clean clone against the cluster of KUBECONFIG and the
KFP of KFP_ENDPOINT, with images built for REGISTRY, as README's "On a cluster" says. In the end all is gone
but the data.
"""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from kfp import compiler, dsl

from benchmarks.pictures import collection
from components.launch import pytorchjob
from model.plumbing import assets, storage
from tests.cluster.cluster import ROOT, Cluster, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3000)]

PIPELINE = "latent-gpt-text-to-image"
OURS = "app.kubernetes.io/part-of=latent-gpt"
KINDS = (  # of which objects of ours may be left, in the order of `kubectl get`
    "deployments,statefulsets,services,configmaps,secrets,serviceaccounts,roles,rolebindings,networkpolicies,"
    "pods,jobs,pytorchjobs,poddisruptionbudgets"
)
LEFT = ROOT / "build" / "cluster"  # what the tests fetch, to be looked at
ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")


def long() -> tuple[str, ...]:
    """Some minutes of steps, with a checkpoint every few seconds: a training that nobody has made yet."""
    return (
        "transformer.training.steps=8000",
        f"transformer.training.learning_rate={1e-4 + random.randrange(10**6) * 1e-10:.10f}",
        "transformer.training.log_every=50",
        "transformer.training.eval_every=4000",
        "transformer.training.checkpoint_every=100",
        "jobs.grace_seconds=30",
    )


# SIGKILL to the step's own process, as the kernel does it where memory is short; nothing to KFP's around it.
KILL = """
import os, pathlib
for one in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    if one.read_bytes().startswith(b"python3\\0-m\\0kfp.dsl.executor_main"):
        os.kill(int(one.parent.name), 9)
"""


class KFP:
    """KFP's REST API, asked as its page does."""

    def __init__(self, endpoint: str) -> None:
        self.root = endpoint.rstrip("/") + "/apis/v2beta1"

    def get(self, path: str, **parameters: Any) -> Any:
        answer = requests.get(f"{self.root}/{path}", params=parameters, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def version(self, pipeline: str) -> dict[str, Any]:
        """The version of a pipeline that its page shows first."""
        ids = {one["display_name"]: one["pipeline_id"] for one in self.pipelines()}
        assert pipeline in ids, f"{pipeline} is not among {sorted(ids)}"
        of = f"pipelines/{ids[pipeline]}/versions"
        newest: dict[str, Any] = self.get(of, sort_by="created_at desc")["pipeline_versions"][0]
        return newest

    def pipelines(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("pipelines", page_size=200).get("pipelines", [])
        return found

    def start(self, name: str, version: dict[str, Any], **parameters: Any) -> requests.Response:
        """What the button does."""
        wanted = {
            "display_name": name,
            "pipeline_version_reference": {
                key: version[key] for key in ("pipeline_id", "pipeline_version_id")
            },
            "runtime_config": {"parameters": parameters},
        }
        return requests.post(f"{self.root}/runs", json=wanted, timeout=60)

    def state(self, run: str) -> str:
        found: str = self.get(f"runs/{run}").get("state", "PENDING")
        return found

    def ended(self, run: str, seconds: float) -> str:
        """The state that a run ends in."""
        until(lambda: self.state(run) in ENDED, seconds, f"the end of run {run}", every=2)
        return self.state(run)


class Installation(Cluster):
    """Ours, made by `make` in a clean clone."""

    def __init__(self, clone: Path, kfp: KFP) -> None:
        self.clone, self.kfp = clone, kfp
        self.namespace = os.environ.get("NAMESPACE", "kubeflow")
        self.said: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def make(self, *arguments: str, well: bool = True) -> str:
        """What a target prints."""
        began = time.monotonic()
        done = subprocess.run(
            ["make", "--no-print-directory", *arguments],
            cwd=self.clone,
            env=_outside_of_make(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.seconds[" ".join(arguments)] = time.monotonic() - began
        print(f"── make {' '.join(arguments)}: {time.monotonic() - began:.0f} s\n{done.stdout}", flush=True)
        assert (done.returncode == 0) is well, done.stdout[-5000:]
        return done.stdout

    def cli(self, *arguments: str, well: bool = True) -> str:
        """What our command line prints."""
        done = subprocess.run(
            [self.clone / ".venv/bin/latent-gpt", *arguments],
            cwd=self.clone,
            env=_outside_of_make() | {"LATENT_GPT_NAMESPACE": self.namespace},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(f"── latent-gpt {' '.join(arguments)}\n{done.stdout}", flush=True)
        assert (done.returncode == 0) is well, done.stdout[-5000:]
        return done.stdout

    @property
    def images(self) -> tuple[str, ...]:
        return tuple((self.clone / "build" / name).read_text().strip() for name in ("image", "image-mlflow"))

    def objects(self) -> dict[str, str]:
        """Our objects and their generations, which move when somebody changes what they are to be."""
        found = self.get(KINDS, "-l", OURS)
        return {
            f"{one['kind']}/{one['metadata']['name']}": str(
                one["metadata"].get("generation", one.get("data"))
            )
            for one in found
            if not one["metadata"].get("ownerReferences")
        }

    def submit(self, name: str, preset: str, overrides: Sequence[str]) -> str:
        """A run's id, begun from a terminal."""
        asked = [part for one in overrides for part in ("--set", one)]
        self.cli("submit", "--preset", preset, *asked, "--name", name)
        return str(next(one["run_id"] for one in self.runs() if one["display_name"] == name))  # the newest

    def runs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.kfp.get("runs", page_size=200, sort_by="created_at desc")["runs"]
        return found

    def training(self, run: str, seconds: float) -> dict[str, Any]:
        """The PyTorchJob of a run's transformer, as soon as it is under way."""

        def look() -> list[dict[str, Any]]:
            asked = f"{pytorchjob.STEP}=transformer,{pytorchjob.RUN}=smoke-{run}"
            found = self.get("pytorchjobs", "-l", asked)
            return [one for one in found if "deletionTimestamp" not in one["metadata"] and not _is_over(one)]

        (job,) = until(look, seconds, "a training of the transformer")
        return job

    def steps_of(self, run: str) -> list[dict[str, Any]]:
        """Pods of a KFP run whose container `main` runs ours."""
        pods = self.get("pods", "-l", f"pipeline/runid={run}")
        return [
            one
            for one in pods
            if one["status"]["phase"] == "Running"
            and any("latent-gpt" in main["image"] for main in one["spec"]["containers"])
        ]

    def fetched(self, run: str) -> dict[str, bytes]:
        """What KFP itself keeps of a run's artifacts, by name: read by a pod, with KFP's own credentials."""
        launcher = self.get("configmap", "--field-selector", "metadata.name=kfp-launcher")[0]["data"]
        s3 = yaml.safe_load(launcher["providers"])["s3"]["default"]
        keys = s3["credentials"]["secretRef"]
        root = launcher["defaultPipelineRoot"]
        code = (
            "import boto3, base64, json\n"
            f"s3 = boto3.client('s3', endpoint_url='http://{s3['endpoint']}', region_name='{s3['region']}')\n"
            f"bucket, _, prefix = '{root}'.removeprefix('s3://').partition('/')\n"
            "found = {}\n"
            "for page in s3.get_paginator('list_objects_v2').paginate(Bucket=bucket, Prefix=prefix):\n"
            "    for one in page.get('Contents', []):\n"
            f"        if '{run}' in one['Key'] and not one['Key'].endswith('executor-logs'):\n"
            "            body = s3.get_object(Bucket=bucket, Key=one['Key'])['Body'].read()\n"
            f"            found[one['Key'].split('{run}/')[1]] = base64.b64encode(body).decode()\n"
            "print(json.dumps(found))"
        )
        env = [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": keys["secretName"], "key": keys[key]}}}
            for name, key in (
                ("AWS_ACCESS_KEY_ID", "accessKeyKey"),
                ("AWS_SECRET_ACCESS_KEY", "secretKeyKey"),
            )
        ]
        name = f"fetch-{run[:8]}"
        self.apply(self.pod(name, ["python", "-c", code], env=env))
        try:
            until(lambda: self.phase(name) in ("Succeeded", "Failed"), 120, f"the artifacts of {run}")
            text = self.kubectl("logs", name)
            return {key: base64.b64decode(value) for key, value in json.loads(text).items()}
        finally:
            self.kubectl("delete", "pod", name, "--wait=false")

    def pod(self, name: str, command: Sequence[str], **container: Any) -> dict[str, Any]:
        """A restricted pod of our image."""
        closed = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        main = {"name": "main", "image": self.images[0], "command": list(command), "securityContext": closed}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [main | container],
            },
        }

    def phase(self, name: str) -> str:
        found: str = json.loads(self.kubectl("get", "pod", name, "-o", "json"))["status"]["phase"]
        return found


def _outside_of_make() -> dict[str, str]:
    """Our environment without what a `make` that started these tests says to its children."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARGS")
    }


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """An installation from a clean clone; undone in the end, also where a test has failed."""
    endpoint = os.environ.get("KFP_ENDPOINT")
    assert endpoint, "KFP_ENDPOINT names no KFP"
    clone = tmp_path_factory.mktemp("clean") / "latent-gpt"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    LEFT.mkdir(parents=True, exist_ok=True)
    one = Installation(clone, KFP(endpoint))
    one.said["first"] = one.make("build-and-deploy")
    yield one
    if one.get("deployments", "-l", OURS):
        one.make("undeploy")


@pytest.fixture(scope="module")
def secrets(here: Installation) -> dict[str, str]:
    """What the installation's Secrets hold."""
    found = here.get("secrets", "-l", OURS)
    return {name: base64.b64decode(value).decode() for one in found for name, value in one["data"].items()}


@pytest.fixture
def store(here: Installation, secrets: dict[str, str]) -> Iterator[None]:
    """This process's environment leads to the installation's S3."""
    with here.forwarded("latent-gpt-s3", 8333) as port, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, secrets[name])
        patch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("LATENT_GPT_STORE", "s3://latent-gpt")
        yield


def foreign(here: Installation, name: str) -> str:
    """The end of a run of somebody else's pipeline."""

    @dsl.container_component
    def hello():  # type: ignore[no-untyped-def]  # KFP reads annotations that are no text
        return dsl.ContainerSpec(image=here.images[0], command=["echo", "hello"])

    @dsl.pipeline(name="somebody-elses")
    def somebody_elses():  # type: ignore[no-untyped-def]
        hello()

    path = here.clone / "build" / "foreign.yaml"
    compiler.Compiler().compile(somebody_elses, str(path))
    wanted = {"display_name": name, "pipeline_spec": yaml.safe_load(path.read_text())}
    answer = requests.post(f"{here.kfp.root}/runs", json=wanted, timeout=60)
    answer.raise_for_status()
    return here.kfp.ended(answer.json()["run_id"], 300)


def test_it_says_where_everything_is(here: Installation) -> None:
    for word in ("MLflow", "KFP", PIPELINE, here.images[0]):
        assert word in here.said["first"], word
    for one in here.get("deployments", "-l", OURS):
        status = one["status"]
        assert status["readyReplicas"] == status["replicas"] == 1, one["metadata"]["name"]


def test_the_second_call_changes_nothing_in_half_a_minute(here: Installation) -> None:
    before, images = here.objects(), here.images
    version = here.kfp.version(PIPELINE)
    here.make("build-and-deploy")
    assert (here.objects(), here.images) == (before, images)
    assert here.kfp.version(PIPELINE) == version
    assert here.seconds["build-and-deploy"] < 30


def test_somebody_elses_pipeline_still_runs(here: Installation) -> None:
    assert foreign(here, "foreign-after-deploy") == "SUCCEEDED"


def test_a_wrong_preset_is_refused_before_any_pod(here: Installation) -> None:
    answer = here.kfp.start("wrong", here.kfp.version(PIPELINE), preset="openmoji-tyni")
    assert answer.status_code == 400
    assert "openmoji-tiny" in answer.text, "and it says which there are"
    assert "wrong" not in {one["display_name"] for one in here.runs()}


def test_cancel_takes_the_job_along_and_retry_goes_on(here: Installation, store: None) -> None:
    run = here.submit("cancelled", "smoke", long())
    job = here.training(run, 600)
    uid, output = job["metadata"]["uid"], _output(job)
    checkpoint = until(lambda: _checkpoint(output), 300, "a checkpoint")
    here.cli("cancel", run)
    began = time.monotonic()
    until(lambda: here.job_is_gone(job["metadata"]["name"]), 120, "the end of the job and its pods")
    print(f"── job and pods gone {time.monotonic() - began:.0f} s after cancel; checkpoint {checkpoint}")
    here.kfp.ended(run, 120)
    assert "cancelled" in here.cli("status", run)
    assert _checkpoint(output) >= checkpoint, "the checkpoint is kept"

    here.cli("retry", run)
    again = here.training(run, 300)
    assert again["metadata"]["uid"] != uid, "made anew"
    assert here.kfp.ended(run, 1200) == "SUCCEEDED"
    assert "goes on from step" in _logs(output)


def test_a_failed_step_that_is_retried_adopts_its_job(here: Installation, store: None) -> None:
    run = here.submit("failed", "smoke", long())
    job = here.training(run, 900)
    output = _output(job)
    until(lambda: _checkpoint(output), 300, "a checkpoint")
    (pod,) = [one["metadata"]["name"] for one in here.steps_of(run)]
    here.kubectl("exec", pod, "-c", "main", "--", "python", "-c", KILL)
    assert here.kfp.ended(run, 300) == "FAILED"
    assert not here.job_is_gone(job["metadata"]["name"]), "it trains on"
    here.cli("retry", run)
    assert here.kfp.ended(run, 1200) == "SUCCEEDED"
    after = here.get("pytorchjobs", "--field-selector", f"metadata.name={job['metadata']['name']}")
    assert [one["metadata"]["uid"] for one in after] == [job["metadata"]["uid"]], "the very same job"


def test_sets_are_those_of_a_laptop(here: Installation, store: None) -> None:
    """The same image, processes and threads: every set of preset smoke has the same key and the same hash."""
    run = here.submit("parity", "smoke", ())
    variables = {
        "LATENT_GPT_STORE": "s3://latent-gpt/laptop",
        "LATENT_GPT_LAUNCHER": "torchrun",
        "LATENT_GPT_STATE": "/tmp/state",
        "HOME": "/tmp",
    }
    laptop = here.pod(
        "laptop",
        ["latent-gpt", "run", "--preset", "smoke"],
        env=[{"name": name, "value": value} for name, value in variables.items()],
        envFrom=[{"configMapRef": {"name": "latent-gpt"}}, {"secretRef": {"name": "latent-gpt"}}],
        resources={"requests": {"cpu": "200m", "memory": "2Gi"}},
    )
    assert here.kfp.ended(run, 900) == "SUCCEEDED"
    here.apply(laptop)
    until(lambda: here.phase("laptop") in ("Succeeded", "Failed"), 900, "the end of the laptop")
    assert here.phase("laptop") == "Succeeded", here.kubectl("logs", "laptop")
    here.kubectl("delete", "pod", "laptop", "--wait=false")
    compared = []
    for uri in storage.list_uris("s3://latent-gpt/laptop"):
        if uri.endswith("/manifest.json"):
            there = uri.removesuffix("/manifest.json")
            if "/laptop/measurement/" in there:
                continue  # of the champion: KFP's store has its evaluation, which counts as one
            other = assets.find(there.replace("/laptop", ""))
            mine = assets.find(there)
            assert other, f"KFP made nothing at {there}"
            assert mine, there
            assert mine.sha256 == other.sha256, there
            compared.append(mine.kind)
    assert {"images", "tokenizer", "text", "judge", "tokens", "transformer", "evaluation"} <= set(compared)


def test_a_folder_in_s3_is_all_that_a_run_needs(here: Installation, store: None, tmp_path: Path) -> None:
    """Sizes are from a look and, where there are minutes, from a job that times the hardware."""
    collection(tmp_path, 60)
    where = f"s3://latent-gpt/own/{random.randrange(10**6)}/birds"  # pictures that nobody has looked at yet
    for path in tmp_path.rglob("*.*"):
        storage.write_bytes(f"{where}/{path.relative_to(tmp_path)}", path.read_bytes())
    named = f"model_name=birds-{random.randrange(10**6)}"
    batch = (
        f"clip.training.batch_size={random.randrange(16, 64, 2)}"  # of which nobody knows how long it takes
    )
    jobs: set[str] = set()

    def run(dial: str) -> str:
        asked = {"preset": "auto", "data": where, "overrides": f"{dial}\n{named}\n{batch}"}
        answer = here.kfp.start(dial, here.kfp.version(PIPELINE), **asked)
        assert answer.status_code == 200, answer.text
        begun: str = answer.json()["run_id"]

        def over() -> bool:
            jobs.update(one["metadata"]["name"] for one in here.get("pytorchjobs"))
            return here.kfp.state(begun) in ENDED

        until(over, 1200, f"the end of {begun}", every=2)
        return begun

    short = run("recipe.minutes=1")
    assert here.kfp.state(short) == "FAILED"
    said = here.cli("status", short)
    assert "recipe.minutes: 1 minutes are too few" in said, "in the step's own words"
    assert any(name.startswith("speed-") for name in jobs), "the hardware was not timed by a job"
    whole = run("recipe.effort=0.05")
    assert here.kfp.state(whole) == "SUCCEEDED", whole
    found = here.fetched(whole)
    pages = [data for name, data in found.items() if "prepare" in name and b"about twice the root" in data]
    assert len(pages) == 1, f"no page says why which size was chosen: {sorted(found)}"
    (LEFT / "birds.html").write_bytes(pages[0])


def test_from_the_page_to_a_registered_model_with_pictures(here: Installation, store: None) -> None:
    answer = here.kfp.start("openmoji-tiny", here.kfp.version(PIPELINE), preset="openmoji-tiny")
    assert answer.status_code == 200, answer.text
    run = answer.json()["run_id"]
    began = time.monotonic()
    jobs: set[str] = set()

    def over() -> bool:
        jobs.update(one["metadata"]["name"] for one in here.get("pytorchjobs"))
        return here.kfp.state(run) in ENDED

    until(over, 2400, f"the end of {run}", every=2)
    assert here.kfp.state(run) == "SUCCEEDED"
    print(f"── openmoji-tiny on KFP: {time.monotonic() - began:.0f} s; jobs {sorted(jobs)}")
    for kind in ("tokenizer", "text", "judge", "transformer"):
        assert any(name.startswith(f"{kind}-") for name in jobs), f"{kind} was no PyTorchJob"

    found = here.fetched(run)
    for name, data in found.items():
        path = LEFT / name.replace("/", "_")
        path.write_bytes(data)
    pages = {
        name: data for name, data in found.items() if data.lstrip().lower().startswith(b"<!doctype html")
    }
    pictures = {name: data for name, data in found.items() if data.startswith(b"\x89PNG")}
    assert any("evaluation" in name for name in pages), found.keys()
    assert any("evaluation" in name for name in pictures), found.keys()
    assert all(len(data) < 5_000_000 for data in pages.values())
    said = here.cli("status", run)
    assert "latent-gpt-openmoji-tiny" in said, "the model that was registered"


def test_no_secret_is_where_it_may_be_read(here: Installation, secrets: dict[str, str]) -> None:
    """Of all runs so far: in KFP's records and artifacts, Workflows, jobs, logs, MLflow."""
    user, names = secrets["MLFLOW_TRACKING_USERNAME"], ("MLFLOW_TRACKING_USERNAME", "AWS_ACCESS_KEY_ID")
    run = next(one["run_id"] for one in here.runs() if one["display_name"] == "openmoji-tiny")
    places = {f"artifact {name}": data.decode(errors="replace") for name, data in here.fetched(run).items()}
    places["KFP's record"] = json.dumps(here.kfp.get(f"runs/{run}"))
    for kind in ("workflows", "pytorchjobs", "configmaps", "events"):
        places[kind] = here.kubectl("get", kind, "-o", "json")
    logs = ("logs", "--all-containers", "--tail=-1", "--ignore-errors", "--max-log-requests=50", "-l")
    places["logs of steps"] = here.kubectl(*logs, f"pipeline/runid={run}")
    places["logs of servers"] = here.kubectl(*logs, OURS)
    with here.forwarded("latent-gpt-mlflow", 5000) as port:
        api, login = f"http://127.0.0.1:{port}/api/2.0/mlflow", (user, secrets["MLFLOW_TRACKING_PASSWORD"])
        known = requests.get(f"{api}/experiments/search?max_results=100", auth=login, timeout=30).json()
        ids = [one["experiment_id"] for one in known["experiments"]]
        asked = {"experiment_ids": ids, "max_results": 1000}
        places["MLflow's runs"] = requests.post(f"{api}/runs/search", json=asked, auth=login, timeout=60).text
        models = f"{api}/registered-models/search"
        places["MLflow's models"] = requests.get(models, auth=login, timeout=30).text
    assert "openmoji-tiny" in places["MLflow's runs"]
    assert "step 650/650" in places["logs of steps"]
    kept = {name: value for name, value in secrets.items() if name not in names}  # names of users are said
    for name, value in kept.items():
        for written in (value, base64.b64encode(value.encode()).decode()):
            found = [where for where, text in places.items() if written in text]
            assert not found, f"{name} is in {found}"


def test_undeploy_leaves_the_data_and_nothing_else(here: Installation) -> None:
    claims = {one["metadata"]["name"] for one in here.get("persistentvolumeclaims", "-l", OURS)}
    assert claims
    said = here.make("undeploy")
    for name in claims:
        assert name in said, "it says where the data is"
    until(lambda: not here.objects(), 120, f"the end of {here.objects()}")
    assert {one["metadata"]["name"] for one in here.get("persistentvolumeclaims", "-l", OURS)} == claims
    assert not [one for one in here.kfp.pipelines() if "latent-gpt" in one["display_name"]]
    assert foreign(here, "foreign-after-undeploy") == "SUCCEEDED"


def _is_over(job: dict[str, Any]) -> bool:
    true = {one["type"] for one in job.get("status", {}).get("conditions", []) if one["status"] == "True"}
    return bool(true & {"Succeeded", "Failed"})


def _output(job: dict[str, Any]) -> str:
    """Where the asset of a job will lie: its workers are told the spec beside it."""
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    spec = next(
        word for word in (*container["command"], *container.get("args", ())) if word.startswith("s3://")
    )
    return str(spec).rpartition("/")[0]


def _checkpoint(output: str) -> int:
    from model.plumbing.checkpoints import Checkpointer

    newest = Checkpointer(f"{output}/checkpoints").newest()
    return int(newest.rpartition("-")[2]) if newest else 0


def _logs(output: str) -> str:
    found = [uri for uri in storage.list_uris(f"{output}/attempts") if uri.endswith(".log")]
    return "\n".join(storage.read_bytes(uri).decode(errors="replace") for uri in found)
