"""The mutants do not go stale: what each of them changes is there, and so is the test that must notice."""

import ast
import subprocess
import sys

import pytest

from tests import ROOT
from tests.mutants import Mutant
from tests.mutants.behaviours import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_a_text_that_is_there_once_and_names_its_test(mutant: Mutant) -> None:
    found = (ROOT / mutant.file).read_text().count(mutant.old)
    assert found == 1, f"{mutant.file} holds {mutant.old!r} {found} times"
    assert mutant.old != mutant.new
    path, *_, name = mutant.test.partition("[")[0].split("::")
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.slow
def test_every_row_that_a_mutant_names_is_collected() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", *{mutant.test for mutant in MUTANTS}]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_of_mutants_are_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
