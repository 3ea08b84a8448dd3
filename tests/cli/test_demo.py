"""The demo as a user runs it: a whole fleet as processes, requests through the real router, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

KEYS = {
    "ttft_p50_ms",
    "ttft_p99_ms",
    "prefix_hit_ratio",
    "joules_per_token",
    "tokens_per_second",
    "completed",
    "failed",
}


def heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def demo(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    """The demo; TMPDIR marks every process that belongs to it. Ctrl-C works also where the tests' own shell ignores it."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "kvfleet", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
        preexec_fn=heed_ctrl_c,
    )


def family(tmp_path: Path) -> list[int]:
    """Processes that have `tmp_path` in their environment."""
    mark = f"TMPDIR={tmp_path / 'scratch'}".encode()
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def wait_for(what: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not what():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.02)
    return True


def test_figures_and_nothing_left_behind(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    process = demo(tmp_path, "--limit", "16", "--speed", "20", "--json", str(out))
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    policies = json.loads(out.read_text())["policies"]
    assert list(policies) == ["round_robin", "kvfleet"]
    for figures in policies.values():
        assert figures.keys() >= KEYS
        assert (figures["completed"], figures["failed"]) == (16, 0)
        assert sum(figures["requests_by_worker"].values()) == 16
        assert figures["joules_per_token"] > 0
    assert "Why? 3 decisions of kvfleet" in text
    assert family(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_an_interrupted_demo_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    process = demo(tmp_path, "--limit", "300", "--speed", "1")
    assert wait_for(lambda: len(family(tmp_path)) == 6), "the demo, four workers and the router should run"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert wait_for(lambda: not family(tmp_path)), family(tmp_path)
