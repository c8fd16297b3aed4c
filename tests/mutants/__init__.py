"""Behaviours that one change of the source takes away, each with the one test that must notice it.

A promise that no test holds is prose. Each mutant here is a small edit that breaks one promise; its test
fails when, and only when, the edit is made. `python -m tests.mutants [WORD …]` (`make mutants`) makes the
edits one by one in copies of the tree and runs the tests; `tests/test_mutants.py` keeps them fresh.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One edit of one file, and the test that must notice it."""

    name: str  # of the behaviour that it takes away
    file: str  # path from the root of the repository
    old: str  # text that the file holds exactly once
    new: str
    test: str  # pytest's node id; a parametrised test with the id of its row
