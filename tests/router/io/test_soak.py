"""The soak in short (bench/soak.py): a router process, workers killed under mixed load, every request accounted for."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[3] / "bench"
TIMEOUT_S = 120.0


def test_mixed_load_over_dying_workers_is_accounted_for(tmp_path: Path) -> None:
    file = tmp_path / "soak.json"
    command = [sys.executable, str(BENCH / "soak.py"), "--seconds", "6", "--clients", "12", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert all(result["checks"].values())
    assert sum(result["verdicts"].values()) == sum(result["router's outcomes"].values())
    assert {"streams", "pipelines", "leaves", "slow_reader"} <= result["kinds"].keys()
