"""What the tests of data share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty folder beside the store."""
    path = tmp_path / "here"
    path.mkdir()
    return path
