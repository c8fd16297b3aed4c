"""Environment variables: read when they are asked for, in one place, which the README repeats."""

from __future__ import annotations

import ast
import os

import pytest

from model.errors import UserError
from model.plumbing import environment
from model.plumbing.environment import CACHE_GIB, FOR_PEOPLE, LAUNCHER, Number, Variable
from tests import ROOT


def test_a_value_is_read_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATENT_GPT_LAUNCHER", raising=False)
    assert LAUNCHER.get() == "torchrun"
    monkeypatch.setenv("LATENT_GPT_LAUNCHER", "pytorchjob")
    assert LAUNCHER.get() == "pytorchjob"
    monkeypatch.setenv("LATENT_GPT_LAUNCHER", "")
    assert LAUNCHER.get() == "torchrun", "set to nothing is as good as unset"


def test_a_number_is_a_number_above_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_CACHE_GIB", "0.5")
    assert CACHE_GIB.get() == 0.5
    for wrong in ("much", "-1", "0", "inf", "nan"):
        monkeypatch.setenv("LATENT_GPT_CACHE_GIB", wrong)
        with pytest.raises(
            UserError, match=f"^LATENT_GPT_CACHE_GIB is '{wrong}'; it must be a number of GiB"
        ):
            CACHE_GIB.get()


SERVICES = {"LATENT_GPT_STORE": "s3://b", "MLFLOW_TRACKING_URI": "http://m"}
IN_A_POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
OF_S3 = {"S3_ENDPOINT_URL": "http://s3", "AWS_ACCESS_KEY_ID": "a"}
THERE = "on a cluster the {} 'latent-gpt' of this namespace says so, and `make {}` makes that"


@pytest.mark.parametrize(
    ("said", "missing"),
    [
        ({}, "not set: LATENT_GPT_STORE, MLFLOW_TRACKING_URI"),
        ({"LATENT_GPT_STORE": "/data"}, "not set: MLFLOW_TRACKING_URI"),
        (
            {**IN_A_POD, **OF_S3, "MLFLOW_TRACKING_URI": "http://m"},
            f"not set: LATENT_GPT_STORE; {THERE.format('ConfigMap', 'deploy')}",
        ),
        (
            {**IN_A_POD, **OF_S3, **SERVICES},
            f"not set: AWS_SECRET_ACCESS_KEY; {THERE.format('Secret', 'secrets')}",
        ),
        ({**OF_S3, **SERVICES}, ""),
        ({**IN_A_POD, **SERVICES}, ""),
        ({**IN_A_POD, **SERVICES, "S3_ENDPOINT_URL": "https://s3.eu-central-1.amazonaws.com"}, ""),
        (
            {**IN_A_POD, **SERVICES, "S3_ENDPOINT_URL": "http://latent-gpt-s3:8333"},
            f"not set: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; {THERE.format('Secret', 'secrets')}",
        ),
    ],
    ids=[
        "all",
        "one",
        "on a cluster",
        "a secret",
        "a file of boto3's",
        "AWS's own",
        "a pod's account",
        "our S3",
    ],
)
def test_services_that_nobody_named_are_missed_at_once(said: dict[str, str], missing: str) -> None:
    needed = ("LATENT_GPT_STORE", "MLFLOW_TRACKING_URI", "S3_ENDPOINT_URL", "KUBERNETES_SERVICE_HOST")
    unset = dict.fromkeys([*needed, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
    with environment.within({**unset, **said}):
        if not missing:
            environment.check_services()
            return
        with pytest.raises(UserError) as refused:
            environment.check_services()
        assert str(refused.value) == missing


def test_variables_are_back_after_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_STORE", "/before")
    monkeypatch.delenv("LATENT_GPT_CACHE", raising=False)
    with environment.within({"LATENT_GPT_STORE": "/within", "LATENT_GPT_CACHE": "/c"}):
        assert (environment.STORE.get(), environment.CACHE.get()) == ("/within", "/c")
    assert os.environ["LATENT_GPT_STORE"] == "/before"
    assert "LATENT_GPT_CACHE" not in os.environ


def test_a_child_gets_ours_and_the_last_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_STORE", "/ours")
    child = environment.of_a_child({"A": "1", "B": "1"}, {"B": "2"})
    assert (child["LATENT_GPT_STORE"], child["A"], child["B"]) == ("/ours", "1", "2")
    assert "A" not in os.environ


def test_the_readme_repeats_the_table() -> None:
    assert environment.table() in (ROOT / "README.md").read_text()


def test_every_variable_of_ours_is_for_people_or_between_processes() -> None:
    declared = [one for one in vars(environment).values() if isinstance(one, Variable | Number)]
    assert {one.name for one in declared} - {one.name for one in FOR_PEOPLE} == {
        "LATENT_GPT_LEASES",
        "LATENT_GPT_LOGS",
        "LATENT_GPT_OUTCOMES",
        "KFP_POD_NAME",
        "KFP_MLFLOW_CONFIG",
        "MLFLOW_RUN_ID",
        "LATENT_GPT_REVISION",
        "LATENT_GPT_POD",
        "LATENT_GPT_POD_UID",
        "LATENT_GPT_WORKER",
        "LATENT_GPT_MEETING",
        "SLURM_JOB_ID",
        "SLURM_JOB_NUM_NODES",
        "SLURM_CPUS_PER_TASK",
        "PET_LOCAL_ADDR",
        "PET_NNODES",
        "PET_NPROC_PER_NODE",
        "PET_RDZV_CONF",
        "PET_RDZV_ENDPOINT",
    }


OTHERS = {  # that may read the environment themselves
    "model/plumbing/environment.py": "the one place",
    "model/plumbing/distributed.py": "what torchrun says",
    "pipelines/embedded": "environments of the servers that it starts",
    "pipelines/images": "what is said to programs that run alone",
}


def test_nobody_else_reads_the_environment() -> None:
    found = []
    for layer in ("model", "components", "pipelines"):
        for path in sorted((ROOT / layer).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(tuple(OTHERS)):
                found += [f"{name}:{line}" for line in accesses(path.read_text())]
    assert not found, "goes through model.plumbing.environment"


def accesses(code: str) -> list[int]:
    """Lines in which code reaches for the environment by itself."""
    lines = []
    for node in ast.walk(ast.parse(code)):
        attribute = isinstance(node, ast.Attribute) and node.attr in REACHES
        imported = isinstance(node, ast.ImportFrom) and any(alias.name in REACHES for alias in node.names)
        if attribute or imported:
            lines.append(node.lineno)
    return sorted(lines)


REACHES = {"environ", "environb", "getenv", "putenv", "unsetenv"}


def test_that_check_sees_what_it_looks_for() -> None:
    assert accesses("import os\nos.environ['A']\nos.getenv('A')\nfrom os import environ\n") == [2, 3, 4]
