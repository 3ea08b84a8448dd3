"""The chart's alert rules by Prometheus' own tool: they are valid, and fire when and only when they should."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from harness.settings import E2E_DIR

RULES = sorted((E2E_DIR.parent / "helm/kvfleet/files/rules").glob("*.yaml"))
TESTS = sorted((E2E_DIR.parent / "tests/helm/rules").glob("*_test.yaml"))


def promtool(*arguments: str) -> str:
    """Its output; fails where promtool does. The Debian package prometheus brings it (e2e/setup.sh)."""
    result = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_all_rules_are_valid() -> None:
    assert promtool("check", "rules", *map(str, RULES)).count("SUCCESS") == len(RULES) == 3


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_alerts_fire_when_they_should(file: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", str(file))


def test_a_test_that_expects_something_else_fails(tmp_path: Path) -> None:
    """The tests above can fail: one alert is asked for at a time when it is silent."""
    changed = (
        TESTS[0].read_text().replace("eval_time: 14m", "eval_time: 16m").replace("../../../", f"{E2E_DIR.parent}/")
    )
    (tmp_path / "changed.yaml").write_text(changed)
    with pytest.raises(AssertionError, match="FAILED"):
        promtool("test", "rules", str(tmp_path / "changed.yaml"))
