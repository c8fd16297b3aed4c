"""Retraining on a real cluster with KFP: three ticks of a recurring run, a worse model, a rollback.

`make test-cluster PART=schedule` runs this file from a clean clone, like `test_pipeline.py`, within an hour:
a tick comes every five minutes. New pictures come before the third.
"""

from __future__ import annotations

import io
import secrets as chance
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.parameters import RETRAINING
from model.config import ShapesSource
from model.data.sources import shapes
from model.plumbing import registry, storage
from tests.cluster.cluster import until
from tests.cluster.test_pipeline import ENDED, Installation, here, secrets  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(5400)]

CRON = "0 */5 * * * *"
SIDE = 16  # of the pictures of preset smoke, pixels
MODEL = f"scheduled-{chance.token_hex(3)}"  # volumes are kept: what earlier tests left is of another name
PICTURES = f"s3://latent-gpt/pictures/{MODEL}"
LEARNS = ("transformer.training.steps=300", "transformer.training.learning_rate=0.003")
WHOLE = {
    *("news", "prepare", "images", "tokenizer", "text", "judge", "tokens", "transformer", "evaluation"),
    "register",
}


@contextmanager
def reached(here: Installation, secrets: dict[str, str]) -> Iterator[None]:  # noqa: F811
    """This process, and the command lines that it starts, reach the installation's S3 and MLflow."""
    with (
        here.forwarded("latent-gpt-s3", 8333) as s3,
        here.forwarded("latent-gpt-mlflow", 5000) as mlflow,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, secrets[name])
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            patch.setenv(name, secrets[name])
        patch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{s3}")
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mlflow}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("LATENT_GPT_STORE", "s3://latent-gpt")
        yield


def add_pictures(number: int) -> None:
    """A parquet file more, of drawn shapes and their captions."""
    drawn = list(shapes.iterate(ShapesSource(count=64, seed=number), SIDE, 0))
    table = pa.table({"image": [one.image for one in drawn], "caption": [one.captions[0] for one in drawn]})
    file = io.BytesIO()
    pq.write_table(table, file)
    storage.write_bytes(f"{PICTURES}/{number:03}.parquet", file.getvalue())


def ticks(here: Installation, recurring: str) -> list[str]:  # noqa: F811
    """Ids of the runs that a recurring run started, the oldest first."""
    return [one["run_id"] for one in here.runs() if one.get("recurring_run_id") == recurring][::-1]


def steps_of(here: Installation, run: str) -> set[str]:  # noqa: F811
    """The steps that a run started: pods of ours, in whatever phase they are by now."""
    pods = here.get("pods", "-l", f"pipeline/runid={run}")
    ours = [one for one in pods if any("latent-gpt" in each["image"] for each in one["spec"]["containers"])]
    return {one["metadata"]["labels"].get("app.kubernetes.io/name", "") for one in ours} - {""}


def recurring_runs(here: Installation) -> list[dict[str, Any]]:  # noqa: F811
    found: list[dict[str, Any]] = here.kfp.get("recurringruns", page_size=200).get("recurringRuns", [])
    return found


def test_three_ticks_and_new_pictures_before_the_third_are_one_training(
    here: Installation,  # noqa: F811
    secrets: dict[str, str],  # noqa: F811
) -> None:
    with reached(here, secrets):
        storage.check_store("s3://latent-gpt")
        add_pictures(0)
    asked = (
        "--data",
        PICTURES,
        "--set",
        f"model_name={MODEL}",
        *(x for one in LEARNS for x in ("--set", one)),
    )
    here.cli("submit", "--preset", "smoke", *asked, "--name", f"{MODEL}-first")
    first = next(one["run_id"] for one in here.runs() if one["display_name"] == f"{MODEL}-first")
    assert here.kfp.ended(first, 1200) == "SUCCEEDED"

    name = f"{MODEL}-retraining"
    here.cli("schedule", "--cron", "0 0 3 1 1 *", "--preset", "smoke", "--model", MODEL)
    said = here.cli("schedule", "--cron", CRON, "--preset", "smoke", "--model", MODEL)
    assert f"replaced recurring run {name}" in said
    assert "has five fields" in here.cli("schedule", "--cron", "*/5 * * * *", "--model", MODEL, well=False)
    (recurring,) = [one for one in recurring_runs(here) if one["display_name"] == name]
    identity = recurring["recurring_run_id"]
    times = [line.split()[2] for line in said.splitlines() if line.startswith("next ")]
    assert len(times) == 3

    lines, began = [], 0.0
    for number in (1, 2):
        until(lambda n=number: len(ticks(here, identity)) >= n, 420, f"tick {number}", every=2)  # type: ignore[misc]
        run = ticks(here, identity)[number - 1]
        assert here.kfp.ended(run, 300) == "SUCCEEDED"
        assert steps_of(here, run) == {"news"}
        said = here.cli("status", run)
        assert f"nothing new since version 1 of {MODEL} (champion)" in said
        lines.append(f"tick {number}: only {sorted(steps_of(here, run))}, nothing new")
    with reached(here, secrets):
        add_pictures(1)
    until(lambda: len(ticks(here, identity)) >= 3, 420, "tick 3", every=2)
    began = time.monotonic()
    here.cli("schedule", "--pause", "--name", name)
    third = ticks(here, identity)[2]
    until(lambda: here.kfp.state(third) in ENDED, 1800, "the end of tick 3", every=2)
    assert here.kfp.state(third) == "SUCCEEDED", here.cli("status", third)
    lines.append(f"tick 3: {len(steps_of(here, third))} steps, {time.monotonic() - began:.0f} s")
    print("──", "\n── ".join(lines))
    assert steps_of(here, third) == WHOLE
    said = here.cli("status", third)
    for part in (
        f"new since version 1 of {MODEL}: pictures of the source",
        "images grow from those of version 1",
        "text encoder is that of version 1, whose weights the transformer begins from",
    ):
        assert part in said, part
    with reached(here, secrets):
        versions = registry.tags_of_all(MODEL)
        assert list(versions) == [1, 2], "one training in all, after the first"
        before, after = (registry.lineage(version, MODEL) for version in (1, 2))
    for kind in ("tokenizer", "text"):
        assert before[kind] == after[kind], kind  # type: ignore[index]
    for kind in ("images", "judge", "transformer"):
        assert before[kind] != after[kind], kind  # type: ignore[index]

    here.cli("schedule", "--resume", "--name", name)
    until(lambda: len(ticks(here, identity)) >= 4, 420, "tick 4", every=2)
    here.cli("schedule", "--delete", "--name", name)
    fourth = ticks(here, identity)[3]
    assert here.kfp.ended(fourth, 300) == "SUCCEEDED"
    assert steps_of(here, fourth) == {"news"}
    assert not [one for one in recurring_runs(here) if one["display_name"] == name]


def test_a_worse_model_is_refused(here: Installation, secrets: dict[str, str]) -> None:  # noqa: F811
    with reached(here, secrets):
        champion = registry.version_of(registry.CHAMPION, MODEL)
    asked = {
        "preset": "smoke",
        "model": MODEL,
        "start": "scratch",
        "overrides": "transformer.training.steps=2",
    }
    answer = here.kfp.start(f"{MODEL}-worse", here.kfp.version(RETRAINING), **asked)
    assert answer.status_code == 200, answer.text
    run = answer.json()["run_id"]
    assert here.kfp.ended(run, 1200) == "SUCCEEDED"
    print(here.cli("status", run))
    with reached(here, secrets):
        assert list(registry.tags_of_all(MODEL)) == [1, 2, 3]
        assert registry.version_of(registry.CHAMPION, MODEL) == champion
        assert registry.version_of(registry.CHALLENGER, MODEL) == 3


def test_a_rollback_puts_the_model_before_back_in_use(
    here: Installation,  # noqa: F811
    secrets: dict[str, str],  # noqa: F811
) -> None:
    with reached(here, secrets):
        champion = registry.version_of(registry.CHAMPION, MODEL)
        here.cli("promote", "3", "--model", MODEL)
        assert registry.version_of(registry.CHAMPION, MODEL) == 3
        here.cli("rollback", "--model", MODEL)
        assert registry.version_of(registry.CHAMPION, MODEL) == champion
        assert registry.version_of(registry.PREVIOUS, MODEL) == 3


def test_undeploy_leaves_nothing_that_starts_of_itself(here: Installation) -> None:  # noqa: F811
    here.cli("schedule", "--cron", "0 0 3 1 1 *", "--preset", "smoke", "--model", MODEL)
    here.make("undeploy")
    assert not [one for one in recurring_runs(here) if MODEL in one["display_name"]]
