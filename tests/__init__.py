"""One folder per package, one file per module, and the whole system through its command line."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def peak() -> int:
    """KiB that were resident in this process at its height: since its `exec`, unlike `getrusage`'s figure,
    which begins with what the parent held."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
