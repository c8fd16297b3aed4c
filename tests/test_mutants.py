"""The mutants do not go stale: what each of them changes is there, and so is the test that must notice."""

import ast

import pytest

from tests import ROOT
from tests.mutants import Mutant
from tests.mutants.behaviours import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_a_text_that_is_there_once_and_names_its_test(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    path, *_, name = mutant.test.split("::")
    function, _, row = name.partition("[")
    text = (ROOT / path).read_text()
    assert function in {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    assert row.removesuffix("]") in text, f"{path} has no row {row}"


def test_names_of_mutants_are_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
