"""Build hook: with KVFLEET_COMPILE=1 in the environment the wheel holds the router's hot path compiled, for this platform and Python.

Without it the wheel is plain Python. Compiling needs what scripts/compile_router.py needs, in the environment that builds:
`pip wheel --no-build-isolation`, as the Dockerfile does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent


class CompiledRouter(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "standard" or os.environ.get("KVFLEET_COMPILE") != "1":
            return
        sys.path.insert(0, str(ROOT / "scripts"))
        from compile_router import SOURCES, compile_router

        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        for path in compile_router():
            build_data["force_include"][str(path)] = str(path.relative_to(SOURCES))
