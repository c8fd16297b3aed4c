"""Jobs: a spec survives its trip, and a worker says in one line what is wrong with it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from model.config import load_config
from model.errors import UserError
from model.plumbing import storage
from model.plumbing.jobs import JobSpec, TrackingIds, read_spec, write_spec
from tests import ROOT


def spec() -> JobSpec:
    return JobSpec(
        kind="transformer",
        module="model.training.transformer",
        config=load_config("smoke"),
        settings={"said": "text"},
        inputs={},
        tracking=TrackingIds(experiment="e", run="r", step="transformer"),
    )


def test_a_spec_survives_its_trip(store: str) -> None:
    written = spec()
    assert read_spec(write_spec(written)) == written
    assert written.name == "transformer"
    assert written.output.startswith(f"{store}/transformer/")
    assert written.checkpoints == f"{written.output}/checkpoints"


def test_what_is_no_spec_is_one_line(store: str) -> None:
    uri = storage.join(store, "job.json")
    with pytest.raises(storage.NotFound):
        read_spec(uri)
    storage.write_bytes(uri, b'{"module": "x"}')
    with pytest.raises(UserError, match=r"job.json is not a job spec of this version: .*config"):
        read_spec(uri)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("raise UserError('the data is bad')", 2, "error: the data is bad"),
        ("raise ValueError('a bug')", 1, "ValueError: a bug"),
        ("print(job.spec.settings['said'])", 0, "text"),
    ],
)
def test_a_worker_ends_as_it_should(store: str, body: str, status: int, said: str) -> None:
    code = (
        "from model.errors import UserError\n"
        "from model.plumbing import worker\n"
        "from model.plumbing.tracking import Tracker\n"
        f"def main(job):\n    {body}\n"
        "worker.Tracker = lambda ids, params, enabled: Tracker(ids, params, False)\n"
        "worker.run_worker(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, write_spec(spec())],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "LATENT_GPT_DEBUG"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    assert said in (done.stdout + done.stderr).splitlines()
    assert ("Traceback" in done.stderr) == (status == 1)
