"""A run on Slurm, as two scripts for sbatch: MLflow's server, and the pipeline with its training jobs.

The script of the pipeline runs the DAG as `latent-gpt run` does on one machine; jobs go by srun to all nodes
of its allocation (`components/launch/slurm.py`). A site says in one file where its store and MLflow are.
"""

from __future__ import annotations

import re
import shlex
import string
import sys
import urllib.parse
from pathlib import Path

from model.config import RunConfig, load_config
from model.data.sources import recognise
from model.errors import UserError
from model.plumbing import environment
from pipelines.run import ROOT, absolute

TEMPLATES = Path(__file__).resolve().parent / "templates"
NOTICE = 60  # seconds beyond a job's grace between the warning and the end of the time
LINE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\s'\"$`\\;&|<>()#*?\[\]{}~!]*")
NEEDED = (environment.STORE, environment.MLFLOW_TRACKING_URI)


class _Template(string.Template):
    delimiter = "@"


def scripts(
    preset: str,
    overrides: list[str] | tuple[str, ...],
    site: Path,
    folder: Path,
    mlflow: Path,
    nodes: int = 1,
    gpus: int = 0,
    cpus: int = 0,
    data: str = "",
    **options: str,
) -> dict[str, str]:
    """The two scripts, by file name.

    Args:
        preset: name of a shipped one, or a YAML file.
        overrides: settings that win over it.
        site: the file that says where store and MLflow are.
        folder: for logs and MLflow's database; all nodes see it.
        mlflow: a virtual environment with requirements-mlflow.lock.
        nodes: of the allocation. With more than one each gets a worker of a job, unless jobs.workers is set.
        gpus: of a node, and processes of a worker; 0: none, and as many processes as the preset says.
        cpus: cores of a node; 0: as Slurm gives them.
        data: other pictures, as `pipelines.run.run` takes them; all nodes see them.
        options: of sbatch, where not empty: time, partition, account.

    Raises:
        UserError: settings contradict each other, or the file lacks something.
    """
    if gpus:
        overrides = [f"jobs.gpus_per_worker={gpus}", f"jobs.processes_per_worker={gpus}", *overrides]
    if nodes > 1:
        overrides = [f"jobs.workers={nodes}", *overrides]
    data = absolute(data)
    config = load_config(preset, overrides, recognise(data, look=False))
    preset = str(Path(preset).resolve()) if preset.endswith((".yaml", ".yml")) else preset
    told = [*("--preset", preset), *(("--data", data) if data else ())]
    told += [word for one in overrides for word in ("--set", one)]
    host, port = _server(_read(site))
    lines = [f"#SBATCH --{name}={_word(name, value)}" for name, value in options.items() if value]
    of_nodes = [f"#SBATCH --gpus-per-node={gpus}"] * bool(gpus) + [f"#SBATCH --cpus-per-task={cpus}"] * bool(
        cpus
    )
    common = {
        "folder": _word("folder", str(folder.resolve())),
        "root": shlex.quote(str(ROOT)),
        "environment": shlex.quote(str(site.resolve())),
    }
    return {
        "run.sbatch": _filled(
            "run.sbatch",
            **common,
            nodes=nodes,
            tasks=_per_node(config, nodes),
            options="\n".join([*lines, *of_nodes]),
            notice=config.jobs.grace_seconds + NOTICE,
            grace=config.jobs.grace_seconds,
            python=shlex.quote(sys.executable),
            told=shlex.join(told),
        ),
        "mlflow.sbatch": _filled(
            "mlflow.sbatch",
            **common,
            host=host,
            port=port,
            options="\n".join(line for line in lines if "--time=" not in line),  # it outlives the runs
            database=f"{folder.resolve()}/mlflow.db",
            mlflow=shlex.quote(str(mlflow.resolve())),
        ),
    }


def _filled(name: str, **values: object) -> str:
    text = _Template((TEMPLATES / name).read_text()).substitute(values)
    return re.sub(r"\n\n(#SBATCH)", r"\n\1", text)  # where there was nothing to say


def _per_node(config: RunConfig, nodes: int) -> int:
    workers = config.jobs.workers
    if workers % nodes:
        raise UserError(f"jobs.workers ({workers}) must be a multiple of --nodes ({nodes})")
    return workers // nodes


def _read(site: Path) -> dict[str, str]:
    """What the file says, which the scripts have the shell read."""
    try:
        lines = site.read_text().splitlines()
    except OSError as error:
        raise UserError(f"--env {site} cannot be read: {error.strerror}") from None
    said = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            if not LINE.fullmatch(line):
                raise UserError(
                    f"{site}:{number} must read NAME=value, with nothing that a shell would take apart"
                )
            name, _, value = line.partition("=")
            said[name] = value
    if missing := [one.name for one in NEEDED if not said.get(one.name)]:
        raise UserError(f'{site} does not set {", ".join(missing)}; README, "On Slurm", has an example')
    return said


def _server(said: dict[str, str]) -> tuple[str, int]:
    uri = said[environment.MLFLOW_TRACKING_URI.name]
    address = urllib.parse.urlsplit(uri)
    if not address.hostname:
        raise UserError(f"{environment.MLFLOW_TRACKING_URI.name} is {uri}; it must be like http://node1:5000")
    return _word(environment.MLFLOW_TRACKING_URI.name, address.hostname), address.port or 80


def _word(name: str, value: str) -> str:
    """A value as sbatch takes it in a script, where nothing is quoted."""
    if not re.fullmatch(r"[A-Za-z0-9_.,:/@%+=-]+", value):
        raise UserError(f"{name} is '{value}'; sbatch takes letters, digits and _.,:/@%+=- there")
    return value
