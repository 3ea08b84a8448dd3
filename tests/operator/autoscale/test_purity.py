"""The decisions import nothing that could do I/O; only `readers` may."""

from __future__ import annotations

import ast
from pathlib import Path

import kvfleet_operator.autoscale

ROOT = Path(kvfleet_operator.autoscale.__file__).parent
IMPURE = {
    "asyncio",
    "httpx",
    "kopf",
    "kubernetes",
    "prometheus_client",
    "socket",
    "ssl",
    "time",
    "random",
    "threading",
    "os",
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_only_readers_do_io() -> None:
    modules = sorted(ROOT.glob("*.py"))
    assert {path.stem for path in modules} >= {"decide", "forecast", "schedule", "budget", "autoscaler"}
    for path in modules:
        used = imported(path)
        assert not {name.partition(".")[0] for name in used} & IMPURE, path.name
        assert not [name for name in used if "readers" in name], path.name


def test_the_clock_is_passed_in() -> None:
    for path in ROOT.glob("*.py"):
        assert ".now(" not in path.read_text(), path.name
