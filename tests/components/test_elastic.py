"""Whose end made a job fail: told from exit codes and outcomes, by table."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from components.launch import elastic
from model.plumbing import outcome
from model.plumbing.outcome import Outcome


def failure(exitcode: int, timestamp: int = 100) -> ProcessFailure:
    found = ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file="")
    found.timestamp = timestamp
    return found


def ended(kind: outcome.Kind, reason: str = "", when: float = 100.0) -> Outcome:
    return Outcome(kind=kind, reason=reason, when=when)


LOST = "RuntimeError: connection closed by peer"


@pytest.mark.parametrize(
    ("failures", "left", "kind", "reason"),
    [
        pytest.param(
            {0: failure(1), 1: failure(2)},
            {0: ended("lost", LOST, 100.1), 1: ended("refused", "batch_size 7 is odd")},
            *("refused", "batch_size 7 is odd"),
            id="one refuses its input, the other loses it",
        ),
        pytest.param(
            {0: failure(-6), 1: failure(2)},
            {1: ended("refused", "batch_size 7 is odd")},
            *("refused", "batch_size 7 is odd"),
            id="one refuses its input, the other aborts for it",
        ),
        pytest.param(
            {0: failure(2), 1: failure(2)},
            {
                0: ended("diverged", "step 12: loss is nan", 100.1),
                1: ended("diverged", "step 12: also", 100.2),
            },
            *("diverged", "step 12: loss is nan"),
            id="all see the same, the first speaks",
        ),
        pytest.param(
            {0: failure(1), 1: failure(-9)},
            {0: ended("lost", LOST)},
            *("killed", "process 1 was killed (SIGKILL; most often the machine ran out of memory)"),
            id="one is killed, the other loses it",
        ),
        pytest.param(
            {0: failure(1), 1: failure(1)},
            {0: ended("lost", LOST, 100.1), 1: ended("failed", "KeyError: 'x'", 100.2)},
            *("failed", "process 1 failed: KeyError: 'x'"),
            id="one has a defect, the other loses it",
        ),
        pytest.param(
            {0: failure(1), 1: failure(1)},
            {0: ended("lost", LOST, 100.2), 1: ended("lost", LOST, 100.1)},
            *("lost", f"process 1 failed: {LOST}"),
            id="all lose the connection",
        ),
        pytest.param(
            {0: failure(-15), 1: failure(1)},
            {1: ended("failed", "KeyError: 'x'")},
            *("failed", "process 1 failed: KeyError: 'x'"),
            id="torchrun stops the others",
        ),
        pytest.param(
            {0: failure(-9, 130), 1: failure(1)},
            {1: ended("failed", "KeyError: 'x'")},
            *("failed", "process 1 failed: KeyError: 'x'"),
            id="and kills who does not stop, half a minute later",
        ),
        pytest.param(
            {0: failure(143), 1: failure(1)},
            {0: ended("stopped", "told to end", 100.2), 1: ended("lost", LOST, 100.1)},
            *("lost", f"process 1 failed: {LOST}"),
            id="one loses another pod's, and the rest is stopped for it",
        ),
        pytest.param(
            {0: failure(143), 1: failure(3)},
            {0: ended("stopped", "told to end", 100.2)},
            *("failed", "process 1 ended with exit code 3"),
            id="one leaves without a word, and the rest is stopped for it",
        ),
        pytest.param(
            {0: failure(143), 1: failure(143)},
            {0: ended("stopped", "told to end; step 7 is kept"), 1: ended("stopped", "told to end", 100.2)},
            *("stopped", "told to end; step 7 is kept"),
            id="somebody else stops all, and they save",
        ),
        pytest.param(
            {0: failure(-15), 1: failure(-15)},
            {},
            *("killed", "process 0 was ended by signal 15 (SIGTERM)"),
            id="somebody else stops all",
        ),
        pytest.param(
            {1: failure(-11)},
            {0: ended("finished"), 1: ended("finished")},
            *("killed", "process 1 was ended by signal 11 (SIGSEGV)"),
            id="one falls over on its way out",
        ),
        pytest.param(
            {1: failure(3)},
            {},
            *("failed", "process 1 ended with exit code 3"),
            id="one leaves without a word",
        ),
    ],
)
def test_the_blame_is_on_the_process_that_made_the_others_fail(
    failures: dict[int, ProcessFailure], left: dict[int, Outcome], kind: str, reason: str, tmp_path: Path
) -> None:
    found = elastic.blamed(failures, left, tmp_path)
    assert (found.kind, found.reason) == (kind, reason)
