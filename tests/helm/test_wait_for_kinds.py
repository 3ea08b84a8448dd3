"""The hook between the chart's CRDs and its first objects of their kinds: what it says when it gives up. End to end it runs in every first install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_it_gives_up_with_the_reason_and_the_remedy(repository: Path, tmp_path: Path) -> None:
    script = repository / "helm/kvfleet/files/wait_for_kinds.py"
    environment = {
        "KUBERNETES_SERVICE_HOST": "::1",
        "KUBERNETES_SERVICE_PORT": "1",
        "SERVICE_ACCOUNT": str(tmp_path),
        "TIMEOUT_S": "0",
    }
    result = subprocess.run(
        [sys.executable, str(script), "FleetRouter"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "https://[::1]:1/apis/kvfleet.io/v1alpha1" in result.stderr
    assert "install the CRDs" in result.stderr
