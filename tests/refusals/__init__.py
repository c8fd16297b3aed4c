"""What strangers hand over as a model, as data or as settings: each is refused in one line, at little cost.

`python -m tests.refusals [WORD …]` tries those whose names hold one of the words, or all, each in a process
of its own, and holds what is said against `benchmarks/results/refusals.md`, which `--write` writes anew.
`tests/test_refusals.py` tries all of them.
"""
