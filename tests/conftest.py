"""Property tests are the same at every run, so that a red build means a changed program.

`HYPOTHESIS_PROFILE=explore pytest` draws new examples, more of them.
"""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import compile_router

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_report_header() -> str:
    """The same tests hold for both builds of the router (`make compile`): say which one is tested."""
    changed = compile_router.stale()
    if changed:
        names = ", ".join(path.stem for path in changed)
        raise pytest.UsageError(f"{names}: changed since the router was compiled: `make compile`, or `make uncompile`")
    return f"router: {'compiled' if compile_router.in_use() else 'plain Python'}"
