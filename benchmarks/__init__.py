"""Ours beside its peers; run by `python -m benchmarks`."""
