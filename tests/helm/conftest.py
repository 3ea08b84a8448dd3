"""The generators under scripts/ are programs, not a package: the tests import them from their folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "scripts"), str(Path(__file__).parent)]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY
