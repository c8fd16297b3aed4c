"""What a run will need, computed before it starts: weights, memory per GPU, operations, hours.

The figures follow the code: see `model/training/rehearsal.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from components import recipe
from components.parameters import pipeline_of
from model.config import RunConfig, load_config
from model.data.sources import recognise, remembered
from model.errors import UserError
from model.plumbing.speech import duration, quantity
from model.recipe import HARDWARE, UTILISATION, described
from model.training.rehearsal import Cost, Rehearsal, foresee, rehearsals


@dataclass(frozen=True)
class Stage:
    """The training of one net."""

    name: str
    parameters: int
    steps: int
    samples: int  # seen in training, over all devices
    tokens: int  # image tokens seen; 0 where the net reads pictures
    flops: float  # of the whole training
    state_bytes: float  # per device: weights, gradients, optimiser's moments, EMA, low-precision copies
    activation_bytes: float  # per device: what backward keeps of one micro-batch
    hours: float

    @property
    def bytes(self) -> float:
        """Memory that one device needs."""
        return self.state_bytes + self.activation_bytes


@dataclass(frozen=True)
class Plan:
    """All stages of a run on some hardware."""

    preset: str
    hardware: str
    devices: int
    stages: list[Stage]

    def render(self) -> str:
        """A table to print."""
        room = HARDWARE[self.hardware]["memory"]
        lines = [
            f"{self.preset} on {described(self.hardware, self.devices)}, {UTILISATION:.0%} of peak assumed",
            f"{'':12}{'weights':>9}{'steps':>9}{'samples':>9}{'tokens':>9}{'state':>11}{'activations':>13}"
            f"{'FLOP':>10}{'hours':>9}",
        ]
        for stage in self.stages:
            counts = (stage.parameters, stage.steps, stage.samples, stage.tokens)
            memory = (f"{part / 2**30:.2f} GiB" for part in (stage.state_bytes, stage.activation_bytes))
            lines.append(
                f"{stage.name:12}"
                + "".join(f"{quantity(count) if count else '-':>9}" for count in counts)
                + "{:>11}{:>13}".format(*memory)
                + f"{stage.flops:>10.2g}{stage.hours:>9.2f}"
            )
        total = sum(stage.hours for stage in self.stages)
        lines.append(f"{total:.2f} hours of training in all, as estimated")
        processes = self.devices if self.hardware == "cpu" else 1  # processes of one CPU share its memory
        for stage in self.stages:
            needed = stage.bytes * processes
            if needed > 0.9 * room:
                raised = "" if stage.name in ("text", "judge") else "raise accumulate, or "
                lines.append(
                    f"{stage.name} needs {needed / 2**30:.0f} GiB of {room / 2**30:.0f} GiB: {raised}lower"
                    " batch_size"
                )
        return "\n".join(lines)


def is_timed(preset: str, data: str, overrides: tuple[str, ...], hardware: str = "") -> bool:
    """Whether `lines` has the hardware timed, by a job, so with services. Raises UserError: as `lines`."""
    section = load_config(preset, overrides, recognise(data, look=False)).recipe
    return section is not None and section.minutes > 0 and not section.version and not hardware


@remembered()
def lines(preset: str, data: str, overrides: tuple[str, ...], hardware: str = "") -> list[str]:
    """What a run needs and takes, for a terminal; where its sizes are derived, each choice with its reason.

    Args:
        preset, data, overrides: as `pipelines.run.run` takes them.
        hardware: of the table, by which all is foreseen; "": what `jobs` asks for, which is timed where the
            run has its minutes.

    Raises:
        UserError: as `plan` and `components.recipe.planned`.
    """
    config = load_config(preset, overrides, recognise(data))
    _check(hardware or config.jobs.hardware)
    if config.recipe is None or config.recipe.version:
        return plan(config, hardware).render().splitlines()
    asked = {"preset": preset, "data": data, "overrides": "\n".join((*overrides, *_jobs(config, hardware)))}
    found = recipe.planned({"pipeline": pipeline_of(config), **asked}, here=not hardware)
    widest = max(len(choice.field) for choice in found.choices)
    values = [json.dumps(choice.value) for choice in found.choices]
    longest = max(map(len, values))
    return [
        *recipe.lines(found),
        "",
        *(
            f"{choice.field:{widest}}  {value:{longest}}  {choice.reason}"
            for choice, value in zip(found.choices, values, strict=True)
        ),
        "",
        *(f"{part.name:{widest}}  {duration(part.seconds)}" for part in found.parts),
        "",
        *plan(found.config, hardware).render().splitlines(),
    ]


def _jobs(config: RunConfig, hardware: str) -> list[str]:
    """Overrides that ask for hardware of the table: of GPUs as many as the config, or one."""
    if not hardware or hardware == config.jobs.hardware:
        return []
    if hardware == "cpu":
        return ["jobs.gpus_per_worker=0"]
    gpus = config.jobs.gpus_per_worker or 1
    return [f"jobs.gpu={hardware}", f"jobs.gpus_per_worker={gpus}", f"jobs.processes_per_worker={gpus}"]


def plan(config: RunConfig, hardware: str = "") -> Plan:
    """What training this config takes on `jobs.workers × processes_per_worker` devices of a kind.

    Args:
        hardware: of the table; "": what `jobs` asks for.

    Raises:
        UserError: for hardware that is not in the table, a tokenizer that must be loaded to be known, or a
            CLIP that open_clip does not know.
    """
    hardware = hardware or config.jobs.hardware
    _check(hardware)
    devices = config.jobs.devices
    stages = [_stage(rehearsal, foresee(rehearsal), devices, hardware) for rehearsal in rehearsals(config)]
    return Plan(config.name, hardware, devices, stages)


def _check(hardware: str) -> None:
    if hardware not in HARDWARE:
        raise UserError(f"hardware '{hardware}' is unknown; choose one of {', '.join(HARDWARE)}")


def _stage(rehearsal: Rehearsal, cost: Cost, devices: int, hardware: str) -> Stage:
    training = rehearsal.training
    samples = training.steps * training.batch_size
    return Stage(
        name=rehearsal.name,
        parameters=cost.parameters,
        steps=training.steps,
        samples=samples,
        tokens=samples * rehearsal.tokens,
        flops=cost.flops * samples,
        state_bytes=cost.state_bytes,
        activation_bytes=cost.sample_bytes * max(training.batch_size // (devices * training.accumulate), 1),
        hours=cost.step_seconds(training, hardware, devices) * training.steps / 3600,
    )
