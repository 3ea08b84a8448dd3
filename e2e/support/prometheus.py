"""A real Prometheus beside the built-in cluster, and a gate in front of it that can be told to fail or to lie.

The gate is what the operator is given as Prometheus: it passes everything on until a test tells it otherwise. It also tells
Prometheus what there is to scrape.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import httpx
import yaml
from harness.kube import wait_until
from harness.network import NODE_IP

SCRAPE_S: Final = 1
PORT: Final = 19090
SLOW_S: Final = 15
"""Longer than the operator waits for an answer."""


def configuration(targets_url: str) -> dict[str, object]:
    """Debian's build cannot ask Kubernetes for targets; it asks the gate, which does."""
    finding = {"url": targets_url, "refresh_interval": f"{SCRAPE_S}s"}
    pods = {"job_name": "kvfleet", "http_sd_configs": [finding]}
    return {"global": {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": f"{SCRAPE_S}s"}, "scrape_configs": [pods]}


@contextmanager
def prometheus(gate: Gate, folder: Path) -> Iterator[None]:
    """A Prometheus behind the gate, which ends with the block."""
    program = shutil.which("prometheus")
    assert program is not None, "there is no prometheus: run e2e/setup.sh"
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration(f"{gate.url}/targets")))
    url = f"http://{NODE_IP}:{PORT}"
    arguments = [
        f"--config.file={file}",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={NODE_IP}:{PORT}",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([program, *arguments], stdout=log, stderr=log, env={**os.environ, "GOMAXPROCS": "1"})
    try:
        wait_until(lambda: _ready(url, process, folder / "prometheus.log"), "Prometheus is ready", 60)
        gate.behind = url
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _ready(url: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()[-2000:]
    try:
        return httpx.get(f"{url}/-/ready", timeout=2).is_success
    except httpx.HTTPError:
        return False


@dataclass
class Gate:
    """`mode`: honest, refusing, empty, nan, stale or slow."""

    behind: str = ""
    bearer: str = ""
    """The token that must come with a query; empty: none."""
    targets: Callable[[], list[dict[str, Any]]] = list
    """What is scraped now (`scraping.entries`)."""
    mode: str = "honest"
    asked: int = 0
    """Queries that came while `mode` was what it is."""
    url: str = ""
    over: threading.Event = field(default_factory=threading.Event)

    def turn(self, mode: str) -> None:
        self.mode, self.asked = mode, 0

    def answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        self.asked += 1
        if self.mode == "refusing":
            return 503, b"no"
        if self.mode == "empty":
            return 200, _vector({})
        if self.mode == "nan":
            return 200, _vector({"value": "NaN", "sources": "1", "age": "0.5", "target": "2"})
        if self.mode == "stale":
            return 200, _vector({"value": "0", "sources": "1", "age": "3600", "target": "2"})
        if self.mode == "slow":
            self.over.wait(SLOW_S)
        headers = {"content-type": "application/x-www-form-urlencoded"}
        answer = httpx.post(self.behind + path, content=body, headers=headers, timeout=10)
        return answer.status_code, answer.content


def _vector(parts: dict[str, str]) -> bytes:
    """As Prometheus answers a query."""
    now = time.time()
    result = [{"metric": {"part": part}, "value": [now, text]} for part, text in parts.items()]
    return json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode()


@contextmanager
def gate() -> Iterator[Gate]:
    found = Gate()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = json.dumps(found.targets()).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            try:
                allowed = not found.bearer or self.headers["authorization"] == f"Bearer {found.bearer}"
                status, content = found.answer(self.path, body) if allowed else (401, b"who asks?")
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except (httpx.HTTPError, OSError):
                self.close_connection = True  # the asker is gone, or Prometheus is

        def log_message(self, *_: object) -> None:
            """The story is told by the test."""

    server = ThreadingHTTPServer((NODE_IP, 0), Handler)
    server.daemon_threads = True
    found.url = f"http://{NODE_IP}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        found.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
