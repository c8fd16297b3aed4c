"""What belongs to the machine and not to the run: environment variables, read and written here alone.

A value is read when it is asked for, never when a module is loaded. `python -m model.plumbing.environment`
prints the README's table.
"""

from __future__ import annotations

import locale
import math
import os
import shlex
import shutil
import socket
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError


@dataclass(frozen=True)
class Variable:
    """A variable that holds text; set to nothing is as good as unset."""

    name: str
    meaning: str
    without: str = ""  # what happens where it is unset
    default: str = ""

    def get(self) -> str:
        """What the environment says, or the default."""
        return os.environ.get(self.name) or self.default

    def given(self) -> str:
        """What the environment says, and no default."""
        return os.environ.get(self.name, "")

    def put(self, value: str) -> None:
        """Say so from here on, here and in processes that are started later."""
        os.environ[self.name] = value


@dataclass(frozen=True)
class Number:
    """A variable that holds a number above 0."""

    name: str
    meaning: str
    default: float
    unit: str

    @property
    def without(self) -> str:
        """What happens where it is unset."""
        return f"{self.default:g}"

    def get(self) -> float:
        """What the environment says, or the default.

        Raises:
            UserError: it says something that is no number above 0.
        """
        given = os.environ.get(self.name) or str(self.default)
        try:
            number = float(given)
        except ValueError:
            number = 0
        if not 0 < number < math.inf:
            raise UserError(
                f"{self.name} is '{given}'; it must be a number of {self.unit} above 0, e.g. {self.default:g}"
            )
        return number


S3_ENDPOINT_URL = Variable("S3_ENDPOINT_URL", "address of the S3 server", "SeaweedFS is started on loopback")
AWS_ACCESS_KEY_ID = Variable("AWS_ACCESS_KEY_ID", "its user", "what boto3 finds")
AWS_SECRET_ACCESS_KEY = Variable("AWS_SECRET_ACCESS_KEY", "that user's secret", "what boto3 finds")
AWS_SESSION_TOKEN = Variable("AWS_SESSION_TOKEN", "of a secret that expires", "none")
AWS_DEFAULT_REGION = Variable("AWS_DEFAULT_REGION", "region of S3", "what boto3 finds, or `us-east-1`")
AWS_CA_BUNDLE = Variable(
    "AWS_CA_BUNDLE", "file with the authority of S3's certificate", "those that everybody trusts"
)
STORE = Variable(
    "LATENT_GPT_STORE",
    "where assets go: `s3://bucket/prefix`, or a folder",
    "a bucket of the embedded server",
)
MLFLOW_TRACKING_URI = Variable(
    "MLFLOW_TRACKING_URI", "address of the MLflow server", "one is started on loopback"
)
MLFLOW_TRACKING_USERNAME = Variable("MLFLOW_TRACKING_USERNAME", "its user", "nobody in particular")
MLFLOW_TRACKING_PASSWORD = Variable("MLFLOW_TRACKING_PASSWORD", "that user's password", "none")
MLFLOW_TRACKING_TOKEN = Variable("MLFLOW_TRACKING_TOKEN", "a token instead of both", "none")
MLFLOW_TRACKING_SERVER_CERT_PATH = Variable(
    "MLFLOW_TRACKING_SERVER_CERT_PATH", "file with the authority of its certificate", "what requests trusts"
)
MLFLOW_TRACKING_CLIENT_CERT_PATH = Variable(
    "MLFLOW_TRACKING_CLIENT_CERT_PATH", "certificate and key to show it", "none"
)
MLFLOW_TRACKING_INSECURE_TLS = Variable(
    "MLFLOW_TRACKING_INSECURE_TLS", "`true`: any certificate will do", "it has to be trusted"
)
MLFLOW_REGISTRY_URI = Variable(
    "MLFLOW_REGISTRY_URI", "another server for registered models", "the same server"
)
MLFLOW_BACKEND_STORE_URI = Variable(
    "MLFLOW_BACKEND_STORE_URI",
    "database of a cluster's MLflow, e.g. `postgresql://…`, for `latent-gpt secrets`",
    "SQLite, where the overlay says so",
)
MLFLOW_FLASK_SERVER_SECRET_KEY = Variable(
    "MLFLOW_FLASK_SERVER_SECRET_KEY", "by which that MLflow knows its own pages, likewise", "one is drawn"
)
HF_TOKEN = Variable("HF_TOKEN", "for private and gated data sets of the Hugging Face hub", "what is public")
HF_ENDPOINT = Variable("HF_ENDPOINT", "a mirror of that hub", "the hub")
HF_HUB_OFFLINE = Variable(
    "HF_HUB_OFFLINE", "`1`: the hub is not asked, its cache (`HF_HOME`) has to do", "it is asked"
)
MLFLOW_UI = Variable(
    "LATENT_GPT_MLFLOW_UI", "address at which people open MLflow", "the server's address above"
)
KFP_UI = Variable(
    "LATENT_GPT_KFP_UI", "address at which people open KFP", "MLflow's runs name KFP's, without a link"
)
STATE = Variable("LATENT_GPT_STATE", "folder of the embedded services and of run logs", "`.latent-gpt`")
CACHE = Variable(
    "LATENT_GPT_CACHE",
    "folder for copies of what lies in S3, and for what is unpacked",
    "`cache` in that folder, or `~/.cache/latent-gpt` where no services are started",
)
CACHE_GIB = Number("LATENT_GPT_CACHE_GIB", "how large it may become, in GiB", 64, "GiB")
S3_PATIENCE = Number(
    "LATENT_GPT_S3_PATIENCE", "seconds to wait for one answer of S3 (eleven are asked for)", 10, "seconds"
)
LAUNCHER = Variable(
    "LATENT_GPT_LAUNCHER",
    "what runs training jobs: `torchrun`, `pytorchjob` on a cluster, or `slurm`",
    "`torchrun`, processes of this machine",
    default="torchrun",
)
IMAGE = Variable(
    "LATENT_GPT_IMAGE",
    "image of all steps, when the pipeline is compiled",
    "`latent-gpt:dev`",
    default="latent-gpt:dev",
)
NAMESPACE = Variable(
    "LATENT_GPT_NAMESPACE",
    "namespace of training jobs on a cluster",
    "that of this pod, or of the kubeconfig; `kubeflow` for what is deployed and submitted",
)
ACCOUNT = Variable(
    "LATENT_GPT_ACCOUNT",
    "service account of steps on a cluster, as whom `preflight --cluster` looks",
    "`pipeline-runner`",
    default="pipeline-runner",
)
KUBECONFIG = Variable("KUBECONFIG", "file that names the cluster of training jobs", "the one this pod is in")
KFP_ENDPOINT = Variable(
    "KFP_ENDPOINT", "address of the KFP API, e.g. `http://localhost:8080`", "nothing is uploaded or submitted"
)
KFP_TOKEN = Variable("KFP_TOKEN", "token for a KFP with a login", "none")
OVERLAY = Variable("OVERLAY", "what `make deploy` applies of `k8s/overlays`", "`local`", default="local")
CXX = Variable("CXX", "C++ compiler with which torch compiles what is trained", "`g++`", default="g++")
DEBUG = Variable(
    "LATENT_GPT_DEBUG", "anything: every error comes with its stack trace", "in logs, defects alone do"
)

# What one of our processes says to another that it starts:
LOGS = Variable("LATENT_GPT_LOGS", "folder for the logs of training jobs", "a temporary one")
OUTCOMES = Variable("LATENT_GPT_OUTCOMES", "where a process leaves how it ended; of this attempt alone")
MEETING = Variable("LATENT_GPT_MEETING", "file in which the processes of a job find each other", "a port")
LEASES = Variable("LATENT_GPT_LEASES", "URI of the leases of those who want what a job makes", "nobody need")
POD = Variable("LATENT_GPT_POD", "name of this pod")
KFP_POD = Variable("KFP_POD_NAME", "the same, as KFP says it to a step")
POD_UID = Variable("LATENT_GPT_POD_UID", "what tells it from another pod of that name")
WORKER = Variable("LATENT_GPT_WORKER", "number of this pod among those of its job", default="0")

# What an image says of itself, and KFP's plugin for MLflow to a step:
REVISION = Variable("LATENT_GPT_REVISION", "the commit that the image was built from")
KFP_MLFLOW_CONFIG = Variable("KFP_MLFLOW_CONFIG", "names the run that KFP has opened in MLflow, as JSON")
MLFLOW_RUN_ID = Variable("MLFLOW_RUN_ID", "the run that it has opened for this step, below that")

# What the operator says to a worker of a training job, under torchrun's names:
MEETING_POINT = Variable("PET_RDZV_ENDPOINT", "host and port of worker 0, where all workers meet")
MEETING_ADDRESS = Variable("PET_LOCAL_ADDR", "by which the others find this worker", "its host's name")
MEETING_SETTINGS = Variable(
    "PET_RDZV_CONF", "e.g. `join_timeout=600`, the seconds to wait for all", "thirty days"
)
WORKERS = Variable("PET_NNODES", "how many there are; or least and most, as 1:2", default="1:1")
PROCESSES = Variable("PET_NPROC_PER_NODE", "how many each of them starts", "as many as the job's spec says")

# What Slurm says to a batch job:
SLURM_JOB = Variable("SLURM_JOB_ID", "its number")
SLURM_NODES = Variable("SLURM_JOB_NUM_NODES", "nodes of its allocation", default="1")
SLURM_CPUS = Variable("SLURM_CPUS_PER_TASK", "cores of a task, where that was said")

FOR_PEOPLE = (
    *(S3_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_DEFAULT_REGION),
    *(AWS_CA_BUNDLE, STORE, MLFLOW_TRACKING_URI),
    *(MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN),
    *(MLFLOW_TRACKING_SERVER_CERT_PATH, MLFLOW_TRACKING_CLIENT_CERT_PATH, MLFLOW_TRACKING_INSECURE_TLS),
    *(MLFLOW_REGISTRY_URI, MLFLOW_UI, KFP_UI, MLFLOW_BACKEND_STORE_URI, MLFLOW_FLASK_SERVER_SECRET_KEY),
    *(HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE),
    *(STATE, CACHE, CACHE_GIB, S3_PATIENCE, LAUNCHER, IMAGE, NAMESPACE, ACCOUNT),
    *(KUBECONFIG, KFP_ENDPOINT, KFP_TOKEN, OVERLAY, CXX, DEBUG),
)

# What steps and training workers of a cluster are told, by a ConfigMap and a Secret of this name:
ON_CLUSTER = "latent-gpt"
IN_CONFIG_MAP = (
    *(LAUNCHER, STORE, S3_ENDPOINT_URL, AWS_DEFAULT_REGION, MLFLOW_TRACKING_URI, MLFLOW_REGISTRY_URI),
    *(MLFLOW_UI, KFP_UI, CACHE_GIB, S3_PATIENCE, AWS_CA_BUNDLE, MLFLOW_TRACKING_SERVER_CERT_PATH),
    *(HF_ENDPOINT, HF_HUB_OFFLINE),
)
IN_SECRET = (
    *(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN),
    *(MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN, HF_TOKEN),
)
OF_HUB = (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE)  # of these, what only matters to whoever reads a source

# What a step's pod is told of itself. Its workers have folders of their own, whose size is in the ConfigMap:
OF_A_STEP = {CACHE.name: "/cache", CACHE_GIB.name: "32", "HOME": "/tmp"}


def check_services() -> None:
    """Check that this machine is told where assets and runs go.

    Raises:
        UserError: naming all that is missing, and where it belongs.
    """
    on_cluster = "KUBERNETES_SERVICE_HOST" in os.environ
    needed, kind, made = [STORE, MLFLOW_TRACKING_URI], "ConfigMap", "make deploy"
    if on_cluster and STORE.get() and MLFLOW_TRACKING_URI.get():
        needed, kind, made = [AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY], "Secret", "make secrets"
        if not (any(one.get() for one in needed) or f"://{ON_CLUSTER}-s3" in S3_ENDPOINT_URL.get()):
            needed = []  # somebody else's S3 may know a pod by its account
    if missing := [one.name for one in needed if not one.get()]:
        where = f"; on a cluster the {kind} '{ON_CLUSTER}' of this namespace says so, and `{made}` makes that"
        raise UserError(f"not set: {', '.join(missing)}{where if on_cluster else ''}")


def put(values: Mapping[str, str]) -> None:
    """Set variables from here on, for libraries that read their own."""
    os.environ.update(values)


def put_default(name: str, value: str) -> None:
    """Set a variable unless the environment does."""
    os.environ.setdefault(name, value)


@contextmanager
def within(values: Mapping[str, str | None]) -> Iterator[None]:
    """Variables, unset where the value is None, that are back to what they were after the block."""

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    before = {name: os.environ.get(name) for name in values}
    put(values)
    try:
        yield
    finally:
        put(before)


def starting(*prefixes: str) -> tuple[tuple[str, str], ...]:
    """Variables, and what they say, of libraries that read their own."""
    return tuple(sorted(one for one in os.environ.items() if one[0].startswith(prefixes)))


def of_a_child(*changes: Mapping[str, str]) -> dict[str, str]:
    """Ours with changes, the last one first, for a process that we start."""
    environment = dict(os.environ)
    for change in changes:
        environment |= change
    return environment


def imports_as_we_do() -> dict[str, str]:
    """With these a child finds our packages where we have them, whatever `model.py` its folder holds."""
    home, others = Path(__file__).resolve().parents[2], os.environ.get("PYTHONPATH")
    if not (home / "pyproject.toml").is_file():  # installed: ahead of Python's own library it would hide that
        return {"PYTHONSAFEPATH": "1"}
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, [str(home), others]))}


def pod() -> str:
    """Name of this pod. The host's is no more than its first 63 letters, and KFP's pods have longer ones."""
    return POD.get() or KFP_POD.get() or socket.gethostname()


def rank() -> int:
    """This process's number in its job, as torchrun gives it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def ranks_here() -> int:
    """Processes of this one's job on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def speaks_utf8() -> bool:
    """Whether text goes to files, children and people as UTF-8, or was told to and cannot."""
    told = os.environ.get("PYTHONUTF8") == "1" and "PYTHONIOENCODING" not in os.environ
    written = getattr(sys.stdout, "encoding", None) or "utf-8"  # it may be closed
    return told or {locale.getpreferredencoding(False).lower(), written.lower()} == {"utf-8"}


def speak_utf8() -> None:
    """Say so to every Python that is started from here on."""
    os.environ["PYTHONUTF8"] = "1"
    os.environ.pop("PYTHONIOENCODING", None)


def lacks_to_compile() -> str:
    """What torch misses here to compile anything, on a GPU or not; "" where it has all."""
    compiler = (shlex.split(CXX.get()) or [CXX.default])[0]
    if not shutil.which(compiler):
        return f"the C++ compiler {compiler}"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the headers of Python"
    return ""


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def table() -> str:
    """The README's table of what a machine can say."""
    rows = [f"| `{one.name}` | {one.meaning} | {one.without} |" for one in FOR_PEOPLE]
    return "\n".join(["| variable | meaning | without it |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
