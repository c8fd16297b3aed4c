"""The DAG on this machine: services, `kfp.local` in a process of its own, and lines a person can follow.

`run` starts what is not configured, then `python -m pipelines.local` as a session of its own. That child
runs the very object that compiles for a cluster; everything it prints goes to the run's log, and the lines
that steps speak (`components.step.say`) go to the terminal too. Stopping ends the whole session.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from model import steps
from model.config import load_config
from model.errors import UserError
from model.plumbing.jobs import die_with_parent

ROOT = Path(__file__).resolve().parent.parent
GRACE = 20.0  # seconds that processes get to stop before they are killed
MAIN_METRICS = {  # of the closing lines; the report has all. Of held-out pictures and captions:
    "validation/psnr": "PSNR {:.1f} dB",
    "codebook_use": "codebook use {:.0%}",
    "validation/nll": "NLL {:.2f} nats/token",
    "validation/clip_score": "CLIP score {:.1f}",
    "validation/clip_score_real": "real pictures {:.1f}",
    "validation/retrieval": "retrieval {:.2f}",
    "validation/retrieval_chance": "chance {:.2f}",
    "composition/oracle_all_right": "all attributes right on held-out combinations {:.2f}",
}


def state_folder() -> Path:
    """Where services keep their data and runs their logs: in the clone, or where LATENT_GPT_STATE says."""
    if configured := os.environ.get("LATENT_GPT_STATE"):
        return Path(configured).expanduser().resolve()
    base = ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()
    return base / ".latent-gpt"


def run(preset: str, overrides: tuple[str, ...]) -> None:
    """Run the pipeline to its end on this machine, and say what came of it.

    Raises:
        UserError: what is wrong with the input, from here or from any step.
    """
    config = load_config(preset, overrides)
    if preset.endswith((".yaml", ".yml")):
        preset = str(Path(preset).resolve())
    from components.preflight import check_disk
    from pipelines.embedded.services import services

    state = state_folder()
    check_disk(state)
    folder = _new_folder(state / "runs")
    started = time.monotonic()
    with _stopping_on_sigterm(), services(state) as environment:
        follower = Follower(steps.names(config))
        environment = {
            **os.environ,
            **environment,
            "LATENT_GPT_LOGS": str(folder / "jobs"),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(_made(folder / "tmp")),  # kfp leaves a folder behind for every step
        }
        command = [sys.executable, "-m", "pipelines.local", str(folder), preset, json.dumps(overrides)]
        with (folder / "log.txt").open("w") as log, _session(command, environment) as child:
            assert child.stdout
            for line in child.stdout:
                log.write(line)
                follower.line(line)
            code = child.wait()
        follower.end_line()
        if not code and follower.seconds.keys() != set(follower.steps):
            missing = [name for name in follower.steps if name not in follower.seconds]
            raise RuntimeError(f"the pipeline ended without {', '.join(missing)}; see {folder}/log.txt")
        if code:
            raise UserError(follower.error or f"the pipeline stopped (status {code}); see {folder}/log.txt")
    print("\n".join(_summary(follower, folder, time.monotonic() - started)))


def generate(
    prompt: str,
    out: Path,
    model: str,
    count: int,
    seed: int,
    sampling: dict[str, float],
    unconditional: bool,
) -> None:
    """Draw `count` pictures into `out` (numbered where there are several) with seeds from `seed` on.

    Raises:
        UserError: no prompt, a suffix that is no picture's, a model that is not there.
    """
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {out} must end in .png, .jpg or .webp")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: folder {out.parent} does not exist")
    from model.inference.generate import Generator, check_prompt
    from model.plumbing import registry

    if not unconditional:
        check_prompt(prompt)
    with _stopping_on_sigterm(), _services_for(model):
        folder = registry.resolve(model)
    generator = Generator.load(folder)
    settings = generator.sampling.model_copy(update=sampling)
    seeds = list(range(seed, seed + count))
    pictures = generator.generate([prompt] * count, seeds, settings, unconditional)
    for number, picture in enumerate(pictures):
        path = out if count == 1 else out.with_stem(f"{out.stem}-{number}")
        picture.save(path)
        print(path)


@contextlib.contextmanager
def _services_for(model: str) -> Iterator[None]:
    """The services where a model's name needs them, none for a folder."""
    if not model.startswith(("models:/", "s3://")):
        yield
        return
    from pipelines.embedded.services import services

    with services(state_folder()):
        yield


def mlflow_ui() -> None:
    """Keep the services running until Ctrl-C, and say where MLflow is."""
    from pipelines.embedded.services import services

    with _stopping_on_sigterm(), services(state_folder()) as environment:
        print(f"MLflow is at {environment['MLFLOW_TRACKING_URI']}; Ctrl-C stops it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


def rollback() -> None:
    """Swap champion and previous champion."""
    from model.plumbing import registry
    from pipelines.embedded.services import services

    with _stopping_on_sigterm(), services(state_folder()):
        print(f"{registry.MODEL} version {registry.rollback()} is champion")


def check(preset: str, overrides: tuple[str, ...]) -> None:
    """Print what `preflight` finds, with the services of a run."""
    config = load_config(preset, overrides)
    from components.preflight import preflight
    from pipelines.embedded.services import services

    with _stopping_on_sigterm(), services(state_folder()):
        print("\n".join(preflight(config)))


@dataclass
class Follower:
    """Turns the child's output into progress on the terminal."""

    steps: list[str]
    seconds: dict[str, float] = field(default_factory=dict)
    reused: set[str] = field(default_factory=set)
    error: str = ""
    out: TextIO = sys.stdout
    _step: str = ""
    _started: int = 0
    _open: bool = False  # a progress line stands on the terminal that the next one replaces

    def line(self, text: str) -> None:
        """Take one line of output."""
        text = text.strip()
        if text.startswith("error: "):
            self.error = text.removeprefix("error: ")
            return
        match = re.match(r"(\w+)  (\S.*)", text)
        if not match:
            return
        name, said = match.groups()
        if said == "started" and name in self.steps:
            self._step = name
            self._started += 1
            self._print(f"[{self._started}/{len(self.steps)}] {name}")
        elif name == self._step and (done := re.fullmatch(r"done in ([\d.]+) s", said)):
            self.seconds[name] = float(done[1])
            self._print(f"      {said}")
        elif self._step:
            if said.startswith("reused"):
                self.reused.add(self._step)
            self._print(f"      {said}", replaceable="ETA" in said)

    def _print(self, text: str, replaceable: bool = False) -> None:
        tty = self.out.isatty()
        if tty and self._open:
            self.out.write("\r\033[2K" if replaceable else "\n")
        self._open = tty and replaceable
        self.out.write(text if self._open else f"{text}\n")
        self.out.flush()

    def end_line(self) -> None:
        """Leave the terminal at the start of a line."""
        if self._open:
            self.out.write("\n")
            self._open = False


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _new_folder(runs: Path) -> Path:
    """A fresh folder for this run's log and KFP's files; runs beside each other get different ones."""
    name = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        with contextlib.suppress(FileExistsError):
            (runs / (name + suffix)).mkdir(parents=True)
            return runs / (name + suffix)
    raise RuntimeError(f"{runs} has too many runs of this second")


@contextlib.contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """Make SIGTERM unwind the stack as Ctrl-C does, so that children and services are stopped."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _session(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a session of its own, and end all of it on the way out."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    ) as child:
        try:
            yield child
        finally:
            _end_session(child)


def _end_session(child: subprocess.Popen[str]) -> None:
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        until = time.monotonic() + patience
        while time.monotonic() < until:
            child.poll()
            try:
                os.killpg(child.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


def _summary(follower: Follower, folder: Path, total: float) -> list[str]:
    """What came of a run, in a few lines."""
    steps = sum(follower.seconds.values())
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in follower.seconds.items())
    lines = ["", f"finished in {total:.0f} s, {100 * (1 - steps / total):.0f} % of it outside the steps"]
    lines.append(f"{'steps':10}{times}")
    if reused := [name for name in follower.seconds if name in follower.reused]:
        lines.append(f"{'reused':10}{', '.join(reused)}")
    if registered := _registered(folder):
        measured = registered["metrics"]
        metrics = ", ".join(
            text.format(measured[name]) for name, text in MAIN_METRICS.items() if name in measured
        )
        lines.append(f"{'model':10}latent-gpt version {registered['version']}, {registered['alias']}")
        lines.append(f"{'':10}{registered['reason']}")
        lines.append(f"{'metrics':10}{metrics}")
        lines.append(f"{'report':10}{folder / 'report.html'}")
        lines.append(f'{"draw":10}make generate PROMPT="red apple" OUT=apple.png')
    lines.append(f"{'MLflow':10}make mlflow-ui")
    lines.append(f"{'log':10}{folder / 'log.txt'}")
    return lines


def _registered(folder: Path) -> dict[str, Any] | None:
    """What the register step returned; the report is copied out of KFP's folder on the way."""
    for output in folder.glob("kfp/*/register/executor_output.json"):
        for report in folder.glob("kfp/*/evaluation/report*"):
            shutil.copyfile(report, folder / "report.html")
        value: dict[str, Any] = json.loads(json.loads(output.read_text())["parameterValues"]["Output"])
        return value
    return None


def _run_dag(folder: Path, preset: str, overrides: list[str]) -> None:
    """The child: run the pipeline with kfp.local."""
    signal.signal(signal.SIGUSR1, lambda *_: os.killpg(0, signal.SIGTERM))
    die_with_parent(signal.SIGUSR1)  # and take along the step that runs
    from kfp import local

    from pipelines.dag import text_to_image

    # kfp.local deletes the workspace after the run: it gets a folder of its own.
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(folder / "kfp"),
        workspace_root=str(folder / "workspace"),
    )
    try:
        text_to_image(preset=preset, overrides="\n".join(overrides))
    except RuntimeError as error:  # a failed step, whose own line has already said why
        print(error)
        sys.exit(1)


if __name__ == "__main__":
    _run_dag(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
