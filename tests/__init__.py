"""One folder per package, one file per module, and the whole system through its command line."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
