"""A result that changes under an unchanged version would be taken for the old one in every store."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.config import RunConfig
from model.plumbing.assets import Kind, Manifest
from tests import golden
from tests.instances import make

opened: list[str] = []  # by whatever runs while the list is in use


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | Path):
        opened.append(str(arguments[0]))


@pytest.fixture(scope="module")
def read() -> dict[str, tuple[set[str], set[str]]]:
    """Of each kind: the assets that its job may read, and those in the store that it did read."""
    return {}


@pytest.fixture(scope="module")
def now(
    tmp_path_factory: pytest.TempPathFactory, read: dict[str, tuple[set[str], set[str]]]
) -> Iterator[dict[str, Any]]:
    store: Path = tmp_path_factory.mktemp("store")
    sys.addaudithook(_note)

    def watched(kind: Kind, run: RunConfig, inputs: dict[str, Manifest]) -> Manifest:
        opened.clear()
        made = make(kind, run, inputs)
        assets = {tuple(Path(path).relative_to(store).parts[:2]) for path in opened if str(store) in path}
        named = [one.uri for one in (made, *inputs.values())]
        read[kind] = {"/".join(Path(uri).parts[-2:]) for uri in named}, {"/".join(one) for one in assets}
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENT_GPT_STORE", str(store))
        yield golden.results(watched)


@pytest.mark.slow
@pytest.mark.parametrize("kind", golden.KINDS)
def test_a_step_makes_what_its_version_made(kind: str, now: dict[str, Any]) -> None:
    recorded = json.loads(golden.RECORDED.read_text())[kind]
    advice = (
        f"if the result of step {kind} has changed, raise its version in model/steps.py, so that stores make"
        " it anew; then `python -m tests.golden`"
    )
    assert recorded["version"] == now[kind]["version"], advice
    assert recorded.keys() == now[kind].keys(), advice
    for name, before in recorded.items():
        assert alike(before, now[kind][name]), f"{name}: {before} is now {now[kind][name]}; {advice}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in golden.KINDS if kind != "images"])
def test_a_job_reads_what_its_spec_names_and_nothing_else(
    kind: str, now: dict[str, Any], read: dict[str, tuple[set[str], set[str]]]
) -> None:
    named, found = read[kind]
    assert found
    assert found <= named


def alike(before: Any, after: Any) -> bool:
    """Equal, but for what rounding in another order may do."""
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(alike(before[name], after[name]) for name in before)
    if isinstance(before, list):
        one, two = np.array(before), np.array(after)
        if one.shape != two.shape:
            return False
        if one.dtype.kind == "i":  # codes: a latent halfway between two entries may fall to either side
            return bool((one != two).mean() <= 0.01)
        return bool(np.allclose(one, two, rtol=5e-3, atol=5e-3)) if one.dtype.kind == "f" else before == after
    return (
        bool(before == pytest.approx(after, rel=5e-3, abs=5e-3))
        if isinstance(before, float)
        else before == after
    )


def test_a_changed_result_is_seen() -> None:
    assert alike({"a": [[1, 0.5], [2, 0.25]]}, {"a": [[1, 0.501], [2, 0.25]]})
    assert not alike({"a": [[1, 0.5], [2, 0.25]]}, {"a": [[1, 0.52], [2, 0.25]]})
    assert not alike("ab", "ac")
    assert not alike([1, 2, 3], [1, 2, 4])
