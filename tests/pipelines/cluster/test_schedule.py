"""Recurring runs as people see them, with a KFP and a kubectl that a test plays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.parameters import RETRAINING
from model.errors import Unavailable, UserError
from pipelines import commands
from pipelines.cluster import runs, schedule
from pipelines.cluster.kfp import Kfp
from pipelines.dag import PIPELINES
from tests.kfpserver import KfpServer
from tests.kubectl import FakeKubectl, made

NIGHTLY = "0 0 3 * * *"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    with KfpServer() as one:
        monkeypatch.setenv("KFP_ENDPOINT", one.url)
        monkeypatch.setattr(runs, "LOOK", 0.0)
        yield one


@pytest.fixture
def kubectl(monkeypatch: pytest.MonkeyPatch) -> FakeKubectl:
    one = FakeKubectl()
    monkeypatch.setattr(schedule, "Kubectl", lambda namespace: one)
    return one


@pytest.fixture
def kfp(server: KfpServer, kubectl: FakeKubectl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kfp:
    """Where an upload makes a new version each time."""
    kfp = Kfp(server.url, "", "kubeflow")
    package, count = tmp_path / "package.yaml", [0]
    names = PIPELINES[RETRAINING].component_spec.inputs
    presets = "literals: [smoke, auto]"
    wanted = ", ".join(f"{name}: {{{presets if name == 'preset' else ''}}}" for name in names)

    def upload() -> None:
        count[0] += 1
        package.write_text(f"root: {{inputDefinitions: {{parameters: {{{wanted}}}}}}}\n# {count[0]}\n")
        kfp.upload(RETRAINING, package, "")

    monkeypatch.setattr(schedule, "upload", upload)
    return kfp


def controller(kubectl: FakeKubectl, *environment: dict[str, Any]) -> None:
    """KFP's controller with these variables."""
    containers = [{"name": "main", "env": list(environment)}]
    kubectl.add(
        made("Deployment", schedule.CONTROLLER, {}, spec={"template": {"spec": {"containers": containers}}})
    )


def test_a_schedule_is_one_recurring_run_of_the_version_that_was_just_uploaded(
    kfp: Kfp, server: KfpServer, kubectl: FakeKubectl, capsys: pytest.CaptureFixture[str]
) -> None:
    controller(kubectl, {"name": schedule.ZONE, "value": "UTC"})
    first = schedule.schedule(NIGHTLY, preset="smoke", model="mine", overrides=("seed=1",))
    assert server.recurring[first]["no_catchup"] is True
    assert server.recurring[first]["max_concurrency"] == "1"
    assert server.recurring[first]["display_name"] == "mine-retraining"
    assert server.recurring[first]["runtime_config"]["parameters"] == {
        "preset": "smoke",
        "model": "mine",
        "overrides": "seed=1",
    }
    said = capsys.readouterr().out
    assert (
        f"made recurring run mine-retraining ({first}): {NIGHTLY}, zone UTC, as KFP's controller says" in said
    )
    assert said.count("03:00:00 UTC (UTC)") == 3

    other = schedule.schedule(NIGHTLY, preset="smoke", name="other")
    second = schedule.schedule("0 30 4 * * mon", preset="smoke", model="mine")
    assert set(server.recurring) == {other, second}, "it took the first one's place"
    assert "replaced recurring run mine-retraining" in capsys.readouterr().out
    newest = server.uploads[kfp.pipeline(RETRAINING)][-1]["pipeline_version_id"]
    assert server.recurring[second]["pipeline_version_reference"]["pipeline_version_id"] == newest


def test_each_run_has_the_minutes_that_the_command_was_given(
    kfp: Kfp, server: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_cluster", lambda: "kubeflow")
    commands.schedule(NIGHTLY, data="s3://bucket/mine", minutes=25)
    (made,) = server.recurring.values()
    assert made["runtime_config"]["parameters"] == {
        "preset": "auto",
        "data": "s3://bucket/mine",
        "overrides": "recipe.minutes=25",
    }


def test_whatever_fails_leaves_a_schedule(
    kfp: Kfp, server: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = schedule.schedule(NIGHTLY, preset="smoke")
    with monkeypatch.context() as patch:
        patch.setattr(server, "_repeat", _away)
        with pytest.raises(Unavailable):
            schedule.schedule("0 0 4 * * *", preset="smoke")
    assert set(server.recurring) == {first}
    with monkeypatch.context() as patch:
        patch.setattr(server, "_stop", _away)
        with pytest.raises(Unavailable):
            schedule.schedule("0 0 4 * * *", preset="smoke")
    assert len(server.recurring) == 2
    third = schedule.schedule("0 0 5 * * *", preset="smoke")
    assert set(server.recurring) == {third}, "and the next one tidies up"


def _away(*_: object, **__: object) -> Any:
    from tests.kfpserver import Refused

    raise Refused(503, 14, "away")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"cron": "0 3 * * *"}, "has five fields; KFP's begin with seconds: write '0 0 3 \\* \\* \\*'"),
        ({"zone": "Mars"}, "there is no zone 'Mars'"),
        ({"preset": "smok"}, "preset 'smok' does not exist"),
        ({"data": "/my/pictures"}, "is a path of this machine"),
        ({"overrides": ("transformer=null",)}, "has no transformer"),
        ({"overrides": ("transformer.depht=1",)}, "depht"),
        ({"start": "champoin"}, "start is 'champoin'"),
    ],
)
def test_what_is_wrong_is_said_before_anybody_is_asked(
    server: KfpServer, kubectl: FakeKubectl, how: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        schedule.schedule(**{"cron": NIGHTLY, "preset": "smoke", **how})
    assert server.requests == []


def test_a_zone_that_is_not_the_controllers_is_refused(
    kfp: Kfp, server: KfpServer, kubectl: FakeKubectl, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = {"name": "install-config", "key": "zone"}
    controller(kubectl, {"name": schedule.ZONE, "valueFrom": {"configMapKeyRef": reference}})
    kubectl.add({**made("ConfigMap", "install-config", {}), "data": {"zone": "Europe/Berlin"}})
    with pytest.raises(UserError, match=r"crons in zone Europe/Berlin .*not UTC.*--zone Europe/Berlin"):
        schedule.schedule(NIGHTLY, preset="smoke")
    assert not server.recurring
    schedule.schedule(NIGHTLY, "Europe/Berlin", preset="smoke")
    said = capsys.readouterr().out
    assert "03:00:00 CET (Europe/Berlin)" in said or "03:00:00 CEST (Europe/Berlin)" in said
    schedule.listed()
    assert "(Europe/Berlin)  next " in capsys.readouterr().out


def test_who_may_not_look_is_told_that_the_zone_is_a_guess(
    kfp: Kfp, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule.schedule(NIGHTLY, preset="smoke")
    assert "zone UTC, if KFP's controller is of that" in capsys.readouterr().out


def test_schedules_are_listed_paused_and_deleted_by_name(
    kfp: Kfp, server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule.listed()
    assert "has no recurring run of ours" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is none of ours"):
        schedule.pause("")
    only = schedule.schedule(NIGHTLY, preset="smoke")
    schedule.pause("")
    assert server.recurring[only]["status"] == "DISABLED"
    capsys.readouterr()
    schedule.listed()
    assert capsys.readouterr().out.startswith(f"latent-gpt-smoke-retraining  {NIGHTLY} (UTC)  paused  made ")
    schedule.pause("latent-gpt-smoke-retraining", paused=False)
    assert server.recurring[only]["status"] == "ENABLED"
    schedule.schedule(NIGHTLY, preset="smoke", name="b")
    with pytest.raises(UserError, match="there is b, latent-gpt-smoke-retraining; name one by --name"):
        schedule.delete("")
    schedule.delete("b")
    assert set(server.recurring) == {only}
    server.recurring["theirs"] = {**server.recurring[only], "recurring_run_id": "theirs"}
    server.recurring["theirs"]["pipeline_version_reference"] = {"pipeline_id": "theirs"}
    runs.remove(kfp, FakeKubectl())
    assert set(server.recurring) == {"theirs"}
    assert "deleted recurring run latent-gpt-smoke-retraining" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("trigger", "said"),
    [
        ({"cron_schedule": {"cron": "0 3 * * *"}}, "0 3 * * *, not made by `latent-gpt schedule`  made "),
        (
            {"periodic_schedule": {"interval_second": "60"}},
            "no cron, not made by `latent-gpt schedule`  made ",
        ),
    ],
)
def test_one_that_was_made_elsewhere_is_listed_and_deleted_too(
    kfp: Kfp, server: KfpServer, capsys: pytest.CaptureFixture[str], trigger: dict[str, Any], said: str
) -> None:
    ours = schedule.schedule(NIGHTLY, preset="smoke")
    theirs = {"recurring_run_id": "theirs", "display_name": "theirs", "trigger": trigger}
    theirs["description"] = "every night, says Mars"
    server.recurring["theirs"] = {**server.recurring[ours], **theirs}
    capsys.readouterr()
    schedule.listed()
    shown = capsys.readouterr().out
    assert f"theirs  {said}" in shown
    assert f"{NIGHTLY} (UTC)  next " in shown
    schedule.pause("theirs")
    schedule.listed()
    assert "schedule`  paused" in capsys.readouterr().out
    schedule.delete("theirs")
    assert set(server.recurring) == {ours}


def test_a_file_travels_as_its_content(kfp: Kfp, server: KfpServer, tmp_path: Path) -> None:
    from model.config import PRESETS

    path = tmp_path / "mine.yaml"
    path.write_text((PRESETS / "smoke.yaml").read_text())
    made = schedule.schedule(NIGHTLY, preset=str(path))
    given = server.recurring[made]["runtime_config"]["parameters"]
    assert given == {"config": path.read_text()}
