"""What strangers hand over is refused in the line, the time and the memory that the table has."""

import subprocess
import sys

import pytest

from tests import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bundles", "sources", "settings"])
def test_each_is_refused_in_one_line_at_little_cost(kind: str) -> None:
    command = [sys.executable, "-m", "tests.refusals", "--only", kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as they should be, 0 not" in done.stdout
