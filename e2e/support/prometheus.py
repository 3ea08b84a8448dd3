"""A real Prometheus beside the built-in cluster, and a gate in front of it that can be told to fail or to lie.

Prometheus finds the pods through the cluster's API, and labels what it scrapes as a PodMonitor would. The gate is what the
operator is given as Prometheus: it passes everything on until a test tells it otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import httpx
import yaml
from harness.kube import wait_until
from harness.network import NODE_IP

SCRAPE_S: Final = 1
PORT: Final = 19090
SLOW_S: Final = 15
"""Longer than the operator waits for an answer."""


def configuration(kubeconfig: Path) -> dict[str, object]:
    """Routers and workers of all namespaces."""

    def label(source: str, target: str, **more: str) -> dict[str, object]:
        return {"source_labels": [f"__meta_kubernetes_pod_{source}"], "target_label": target, **more}

    pods = {
        "job_name": "kvfleet",
        "kubernetes_sd_configs": [{"role": "pod", "kubeconfig_file": str(kubeconfig)}],
        "relabel_configs": [
            {
                "action": "keep",
                "source_labels": [
                    "__meta_kubernetes_pod_label_app_kubernetes_io_component",
                    "__meta_kubernetes_pod_container_port_name",
                ],
                "regex": "router;admin|engine;http",
            },
            {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
            label("name", "pod"),
            label("label_kvfleet_io_pool", "kvfleet_io_pool"),
        ],
    }
    return {"global": {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": f"{SCRAPE_S}s"}, "scrape_configs": [pods]}


@contextmanager
def prometheus(kubeconfig: Path, folder: Path) -> Iterator[str]:
    """The URL of a Prometheus that ends with the block."""
    program = shutil.which("prometheus")
    assert program is not None, "there is no prometheus: run e2e/setup.sh"
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration(kubeconfig)))
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
        yield url
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

    behind: str
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
def gate(behind: str) -> Iterator[Gate]:
    found = Gate(behind)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            try:
                status, content = found.answer(self.path, body)
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
