"""The old name of `speech`, until the last importer has moved."""

from model.plumbing.speech import Progress, quantity

__all__ = ["Progress", "quantity"]
