"""Crons as KFP reads them: `robfig.jsonl` has what robfig/cron v1.2.0 itself said, asked by a Go program."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from model.errors import UserError
from pipelines.cluster.cron import Cron, zone_of

SAID = [json.loads(line) for line in (Path(__file__).parent / "robfig.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("said", SAID, ids=lambda said: f"{said['zone']} {said['cron']}")
def test_times_are_those_of_the_library_that_kfp_reads_crons_with(said: dict[str, Any]) -> None:
    refused = "error" in said or "next" not in said or len(said["cron"].split()) == 5
    if refused:
        with pytest.raises(UserError):
            Cron(said["cron"])
        return
    times = Cron(said["cron"]).after(datetime.fromisoformat(said["from"]), ZoneInfo(said["zone"]), 5)
    assert [one.isoformat().replace("+00:00", "Z") for one in times] == [
        one.replace("+00:00", "Z") for one in said["next"]
    ]


def test_the_samples_have_every_kind_of_answer() -> None:
    assert sum("error" in one for one in SAID) > 10
    assert sum("next" in one for one in SAID) > 30
    assert {"Europe/Berlin", "America/New_York", "Australia/Lord_Howe"} <= {one["zone"] for one in SAID}


@pytest.mark.parametrize(
    ("cron", "said"),
    [
        ("0 3 * * *", "cron '0 3 * * *' has five fields; KFP's begin with seconds: write '0 0 3 * * *'"),
        ("@daily", "must have six fields (second, minute, hour, day, month, weekday), e.g. '0 0 3 * * *'"),
        ("", "must have six fields"),
        ("0 0 25 * * *", "hour '25' must lie within 0-23"),
        ("0 0 3 * * 7", "weekday '7' must lie within 0-6"),
        ("0 0 3 * foo *", "month 'foo' is no number or name"),
        ("0 0 3h * * *", "hour '3h' is no number"),
        ("0 0 */0 * * *", "hour '*/0'"),
        ("0 0 0 31 2 *", "names a time that never comes"),
    ],
)
def test_a_cron_that_kfp_would_not_take_or_take_amiss_is_refused(cron: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        Cron(cron)


def test_a_zone_has_a_name() -> None:
    assert (
        Cron("0 0 3 * * *").after(datetime(2026, 7, 1, tzinfo=UTC), zone_of("Europe/Berlin"), 1)[0].hour == 3
    )
    for name in ("Mars", "../etc/passwd", ""):
        with pytest.raises(UserError, match="there is no zone"):
            zone_of(name)
