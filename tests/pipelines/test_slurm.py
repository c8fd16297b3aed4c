"""Scripts for Slurm: what they say, that a shell takes them, and, where Slurm is, a whole run by them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model.errors import UserError
from model.plumbing.tracking import mlflow_client
from pipelines.slurm import scripts
from tests import ROOT
from tests.data.test_ingest import picture, write

SITE = """# of a trial
LATENT_GPT_STORE=/shared/latent-gpt
MLFLOW_TRACKING_URI=http://node1.cluster:5000

MLFLOW_TRACKING_USERNAME=latent-gpt
MLFLOW_TRACKING_PASSWORD=a-secret
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """What a site says of itself."""
    path = tmp_path / "slurm.env"
    path.write_text(SITE)
    return path


def test_a_node_of_eight_gpus_is_one_worker_of_eight_processes(site: Path, tmp_path: Path) -> None:
    made = scripts(
        "coco256-xl-8xa100",
        ["seed=1"],
        site,
        tmp_path,
        tmp_path,
        gpus=8,
        cpus=96,
        time="1-0",
        partition="gpu",
    )
    lines = made["run.sbatch"].splitlines()
    for line in (
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=96",
        "#SBATCH --time=1-0",
        "#SBATCH --partition=gpu",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@180",
        f"#SBATCH --output={tmp_path}/run-%j.log",
        f". {site}",
        "export LATENT_GPT_LAUNCHER=slurm",
    ):
        assert line in lines
    (run,) = (line for line in lines if " -m pipelines.cli run " in line)
    assert run == (
        f"{sys.executable} -m pipelines.cli run --preset coco256-xl-8xa100 --set jobs.gpus_per_worker=8"
        " --set jobs.processes_per_worker=8 --set seed=1 &"
    )
    assert not any("--account" in line for line in lines)


def test_ones_own_pictures_travel_by_their_whole_path(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "my pictures", {"1.png": picture(1), "1.txt": "one"})
    monkeypatch.chdir(tmp_path)
    made = scripts("auto", ("recipe.minutes=25",), site, tmp_path, tmp_path, data="my pictures")
    told = f"--preset auto --data '{tmp_path}/my pictures' --set recipe.minutes=25 &"
    assert f" run {told}" in made["run.sbatch"]
    with pytest.raises(UserError, match="there is no folder nowhere here"):
        scripts("auto", (), site, tmp_path, tmp_path, data="nowhere")


def test_directives_come_before_any_command(site: Path, tmp_path: Path) -> None:
    for text in scripts("smoke", [], site, tmp_path, tmp_path).values():
        lines = text.splitlines()
        last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
        assert all(line.startswith("#") for line in lines[: last + 1]), "sbatch reads no further"


def test_the_example_of_the_readme_is_taken(site: Path, tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split("## On Slurm")[1]
    example = section.split("\n\n    ", 1)[1].split("\n\n", 1)[0]
    site.write_text("\n".join(line.strip() for line in example.splitlines()))
    assert "LATENT_GPT_STORE=" in site.read_text()
    assert "MLFLOW_FLASK_SERVER_SECRET_KEY=" in site.read_text()
    assert "--port=5000" in scripts("smoke", [], site, tmp_path, tmp_path)["mlflow.sbatch"]


def test_several_nodes_are_as_many_workers(site: Path, tmp_path: Path) -> None:
    run = scripts("coco256-xl-8xa100", [], site, tmp_path, tmp_path, nodes=2, gpus=8)["run.sbatch"]
    assert "--set jobs.workers=2 " in run
    assert "#SBATCH --nodes=2" in run
    with pytest.raises(UserError, match=r"jobs.workers \(3\) must be a multiple of --nodes \(2\)"):
        scripts(
            "smoke",
            ["jobs.workers=3", "jobs.processes_per_worker=1", "jobs.cpu=1", *THREE],
            site,
            tmp_path,
            tmp_path,
            nodes=2,
        )


THREE = [f"{net}.training.batch_size=12" for net in ("tokenizer", "clip", "transformer")]


def test_mlflow_listens_where_its_address_says(site: Path, tmp_path: Path) -> None:
    text = scripts("smoke", [], site, tmp_path, Path("/opt/mlflow"), time="30", partition="cpu")[
        "mlflow.sbatch"
    ]
    assert "#SBATCH --nodelist=node1.cluster" in text
    assert "#SBATCH --partition=cpu" in text
    assert "--time" not in text, "it outlives the runs"
    assert "exec /opt/mlflow/bin/mlflow server --app-name=basic-auth" in text
    assert "--port=5000" in text
    assert "node1.cluster,node1.cluster:*" in text


def test_no_secret_is_written_into_a_script(site: Path, tmp_path: Path) -> None:
    assert "a-secret" not in "".join(scripts("smoke", [], site, tmp_path, tmp_path).values())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("A=$(rm -rf /)", r"slurm.env:7 must read NAME=value, with nothing that a shell would take apart"),
        ("export A=b", r"slurm.env:7 must read NAME=value"),
        (
            "MLFLOW_TRACKING_URI=nowhere",
            r"^MLFLOW_TRACKING_URI is nowhere; it must be like http://node1:5000",
        ),
    ],
)
def test_a_site_that_says_it_otherwise_is_refused(site: Path, tmp_path: Path, line: str, says: str) -> None:
    site.write_text(f"{SITE}{line}\n")
    with pytest.raises(UserError, match=says):
        scripts("smoke", [], site, tmp_path, tmp_path)


def test_what_is_missing_or_contradicts_itself_is_refused(site: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--env .*none cannot be read: No such file"):
        scripts("smoke", [], tmp_path / "none", tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"^partition is 'a b'; sbatch takes letters"):
        scripts("smoke", [], site, tmp_path, tmp_path, partition="a b")
    with pytest.raises(UserError, match=r"must be a multiple of processes"):
        scripts("smoke", [], site, tmp_path, tmp_path, gpus=7)
    site.write_text("LATENT_GPT_STORE=/shared\n")
    with pytest.raises(UserError, match=r"does not set MLFLOW_TRACKING_URI; README"):
        scripts("smoke", [], site, tmp_path, tmp_path)


def test_a_shell_takes_them(site: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name, text in scripts("smoke", ["sampling={temperature: 0.5}"], site, folder, folder).items():
        (folder / name).write_text(text)
        subprocess.run(["bash", "-n", str(folder / name)], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", str(folder / name)], check=True)


def slurm() -> str:
    """Why no job can be given to Slurm here; "" if one can."""
    if not shutil.which("sbatch"):
        return "there is no sbatch: the scripts were not run (Debian: slurm-wlm)"
    done = subprocess.run(["sinfo", "--noheader", "--states=idle"], capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        return f"Slurm has no idle node: the scripts were not run ({done.stderr.strip()})"
    return ""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_whole_run_by_slurm(services: dict[str, str], tmp_path: Path) -> None:
    if why := slurm():
        pytest.skip(why)
    site = tmp_path / "slurm.env"
    told = {**services, "LATENT_GPT_STATE": str(tmp_path / "state")}
    site.write_text("".join(f"{name}={value}\n" for name, value in told.items()))
    folder = tmp_path / "out"
    folder.mkdir()
    two = ["jobs.workers=2", "jobs.processes_per_worker=1"]
    (folder / "run.sbatch").write_text(scripts("smoke", two, site, folder, folder)["run.sbatch"])
    done = subprocess.run(
        ["sbatch", "--wait", str(folder / "run.sbatch")], cwd=ROOT, capture_output=True, text=True
    )
    log = "".join(path.read_text() for path in folder.glob("run-*.log"))
    assert done.returncode == 0, done.stderr + log
    registered = re.search(r"latent-gpt-smoke version (\d+)", log)
    assert registered, log
    assert mlflow_client().get_model_version("latent-gpt-smoke", registered[1]).status == "READY"
