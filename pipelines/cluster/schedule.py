"""Retrainings that start of themselves: recurring runs of KFP, by their names."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from pathlib import Path

from components.parameters import PRESET_GPUS, RETRAINING, TEXT_TO_IMAGE, resolve
from components.retraining import with_start
from model.errors import UserError
from model.plumbing import environment
from pipelines.cluster.cron import Cron, zone_of
from pipelines.cluster.kfp import Kfp, Recurring, connected
from pipelines.cluster.kubectl import Kubectl
from pipelines.cluster.runs import PIPELINES, config_for_pods, upload
from pipelines.cluster.settings import USUAL_NAMESPACE

TIMES = 3  # that are said
CONTROLLER = "ml-pipeline-scheduledworkflow"  # the Deployment of KFP's that starts recurring runs
DESCRIBED = "latent-gpt: times are of zone "  # in the description of ours
ZONE = "CRON_SCHEDULE_TIMEZONE"  # its environment's, by which it reads crons


def schedule(
    cron: str,
    zone: str = "UTC",
    preset: str = "auto",
    model: str = "",
    data: str = "",
    start: str = "",
    overrides: tuple[str, ...] = (),
    workers: int = 0,
    gpus_per_worker: int = PRESET_GPUS,
    experiment_name: str = "",
    name: str = "",
) -> str:
    """Have retrainings start at the times of a cron, in place of what had the name before; returns its id.

    Args:
        cron: six fields, seconds first.
        zone: that its times are of, which has to be that of KFP's controller.
        preset: of the first model; a file's content is sent.
        model: name of the registered model; "": that of the preset.
        data: other pictures than those of the champion.
        start: champion or scratch; "": as the config says.
        overrides: settings that win over all else.
        workers: pods of a training job; 0: as the config says.
        gpus_per_worker: of such a pod; -1: as the config says.
        experiment_name: of MLflow; "": as the config says.
        name: of the recurring run; "": that of the registered model, and what it does.

    Raises:
        UserError: what is wrong with cron, zone or config, from here; or KFP refuses.
    """
    times, its_zone = Cron(cron), zone_of(zone)
    file = Path(preset) if preset.endswith((".yaml", ".yml")) else None
    config = config_for_pods(preset, overrides, data)
    asked: dict[str, str | int] = {
        "preset": "" if file else preset,
        "model": model,
        "data": data,
        "start": start,
        "workers": workers,
        "gpus_per_worker": gpus_per_worker,
        "overrides": "\n".join(overrides),
        "experiment_name": experiment_name,
        "config": file.read_text() if file else "",
    }
    _check({**asked, "preset": preset})
    kfp = connected()
    how_known = _check_zone(zone, Kubectl(environment.NAMESPACE.get()))
    upload()
    usual = {"workers": 0, "gpus_per_worker": PRESET_GPUS}
    parameters = {key: value for key, value in asked.items() if value != usual.get(key, "")}
    name = name or usual_name(model or config.registered_model)
    pipeline = kfp.pipeline(RETRAINING)
    before = [one for one in kfp.recurring({pipeline}) if one.name == name]
    made = kfp.repeat(pipeline, name, times.text, f"{DESCRIBED}{zone}", parameters)
    for one in before:  # last, so that whatever fails leaves one of them
        kfp.stop(one.id)
    print(f"{'replaced' if before else 'made'} recurring run {name} ({made}): {times.text}, {how_known}")
    for when in times.after(datetime.now(UTC), its_zone, TIMES):
        print(f"{'next':10}{when:%Y-%m-%d %H:%M:%S %Z} ({zone})")
    print(f"{'runs':10}latent-gpt runs; `latent-gpt schedule --pause --name {name}`, or --resume, --delete")
    return made


def usual_name(model: str) -> str:
    """What the recurring run of a registered model is called."""
    return f"{model}-retraining"


def listed() -> None:
    """List our recurring runs."""
    kfp = connected()
    found = _all(kfp)
    if not found:
        print(f"KFP at {kfp.endpoint} has no recurring run of ours; `latent-gpt schedule --cron …` makes one")
    for one in found:
        asked = " ".join(f"{key}={value}" for key, value in one.parameters.items() if "\n" not in str(value))
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.made))
        print(f"{one.name}  {_times(one)}  made {made}  {asked}")


def _times(one: Recurring) -> str:
    """When a recurring run starts; of one that was made elsewhere, as far as it can be told."""
    known = re.fullmatch(f"{DESCRIBED}(.+)", one.description)
    text = (one.cron or "no cron") + (f" ({known[1]})" if known else ", not made by `latent-gpt schedule`")
    if one.paused or not known:
        return f"{text}  paused" if one.paused else text
    times = Cron(one.cron).after(datetime.now(UTC), zone_of(known[1]), 1)
    return f"{text}  next {times[0]:%Y-%m-%d %H:%M:%S %Z}"


def pause(name: str, paused: bool = True) -> None:
    """Have no more retrainings start of a recurring run, or again some. Raises UserError: there is none."""
    kfp = connected()
    for one in _named(kfp, name):
        kfp.pause(one.id, paused)
        print(f"{one.name} ({one.id}) {'is paused' if paused else 'goes on'}")


def delete(name: str) -> None:
    """Delete a recurring run; what it started goes on. Raises UserError: there is none."""
    kfp = connected()
    for one in _named(kfp, name):
        kfp.stop(one.id)
        print(f"deleted {one.name} ({one.id}); runs that it started go on")


def _all(kfp: Kfp) -> list[Recurring]:
    return kfp.recurring({identity for name in PIPELINES if (identity := kfp.pipeline(name))})


def _named(kfp: Kfp, name: str) -> list[Recurring]:
    """Those of a name; where that is left out, the only ones that there are."""
    found = _all(kfp)
    names = sorted({one.name for one in found})
    if chosen := [one for one in found if one.name == (name or names[0]) and (name or len(names) == 1)]:
        return chosen
    which = f"there is {', '.join(names)}; name one by --name" if names else "there is none of ours"
    raise UserError(f"no recurring run is called '{name}': {which}")


def _check(asked: dict[str, str | int]) -> None:
    """Refuse parameters that the first step would refuse."""
    overrides = with_start(str(asked["start"]), str(asked["overrides"]))
    of_run = {key: value for key, value in asked.items() if key not in ("model", "start")}
    resolve(TEXT_TO_IMAGE, **{**of_run, "overrides": overrides, "look": False})  # type: ignore[arg-type]


def _check_zone(zone: str, kubectl: Kubectl) -> str:
    """Refuse a zone that is not that of KFP's controller; says how it is known."""
    for namespace in dict.fromkeys((kubectl.namespace, USUAL_NAMESPACE)):
        try:
            found = Kubectl(namespace).objects("get", "deployment", CONTROLLER)
            its = _zone_of(found[0], Kubectl(namespace)) if found else ""
        except UserError:  # no such Deployment, or not for our eyes
            continue
        if not its:
            continue
        if zone_of(its).key != zone:
            raise UserError(
                f"KFP's controller reads crons in zone {its} ({ZONE} of its Deployment in {namespace}), not"
                f" {zone}: give the cron in that, and --zone {its}"
            )
        return f"zone {zone}, as KFP's controller says"
    return f"zone {zone}, if KFP's controller is of that: its {ZONE} cannot be read from here"


def _zone_of(deployment: dict[str, object], kubectl: Kubectl) -> str:
    """The zone of the controller's Deployment, of its own words or a ConfigMap's; its image's is UTC."""
    containers = deployment["spec"]["template"]["spec"]["containers"]  # type: ignore[index]
    said = {one["name"]: one for container in containers for one in container.get("env", [])}
    if not (one := said.get(ZONE)):
        return "UTC"
    if value := one.get("value"):
        return str(value)
    reference = one["valueFrom"]["configMapKeyRef"]
    (found,) = kubectl.objects("get", "configmap", reference["name"])
    return str(found["data"][reference["key"]])
