"""The chart's hook that applies its custom resources, against an API server that is not ready at once."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

API = "/apis/kvfleet.io/v1alpha1"
DISCOVERY = {
    "resources": [
        {"name": "fleetrouters", "kind": "FleetRouter", "namespaced": True},
        {"name": "fleetrouters/status", "kind": "FleetRouter", "namespaced": True},
        {"name": "acceleratorprofiles", "kind": "AcceleratorProfile", "namespaced": False},
    ]
}
ROUTER = {
    "apiVersion": "kvfleet.io/v1alpha1",
    "kind": "FleetRouter",
    "metadata": {"name": "front", "namespace": "team"},
    "spec": {"replicas": 2},
}
PROFILE = {"apiVersion": "kvfleet.io/v1alpha1", "kind": "AcceleratorProfile", "metadata": {"name": "h100"}, "spec": {}}
ROUTER_PATH = f"{API}/namespaces/team/fleetrouters/front?fieldManager=kvfleet-chart&force=true"


class FakeServer(ThreadingHTTPServer):
    """Answers each (method, path) with the next of its answers; the last one stays."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[tuple[str, str], list[tuple[int, object]]] = {("GET", API): [(200, DISCOVERY)]}
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []


class Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.requests.append((self.command, self.path, dict(self.headers), body))
        answers = self.server.answers.get((self.command, self.path), [(404, {"message": "not found"})])
        status, content = answers.pop(0) if len(answers) > 1 else answers[0]
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_PATCH = answer

    def log_message(self, *args: object) -> None:
        """Nothing on the test's output."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


Apply = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def apply(repository: Path, tmp_path: Path, server: FakeServer) -> Apply:
    (tmp_path / "token").write_text("secret\n")

    def run(*objects: dict[str, object], timeout_s: float = 30) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "objects"
        folder.mkdir()
        for index, manifest in enumerate(objects):
            (folder / f"object-{index}.yaml").write_text(yaml.safe_dump(manifest))
        environment = {
            "SERVER": f"http://127.0.0.1:{server.server_port}",
            "ACCOUNT": str(tmp_path),
            "TIMEOUT_S": str(timeout_s),
            "PERIOD_S": "0.01",
        }
        command = [sys.executable, str(repository / "helm/kvfleet/files/apply_objects.py"), str(folder)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_objects_are_applied_server_side_where_their_scope_puts_them(server: FakeServer, apply: Apply) -> None:
    profile_path = f"{API}/acceleratorprofiles/h100?fieldManager=kvfleet-chart&force=true"
    server.answers |= {("PATCH", ROUTER_PATH): [(201, {})], ("PATCH", profile_path): [(200, {})]}
    result = apply(PROFILE, ROUTER)
    assert (result.returncode, result.stdout) == (0, "applied object-0\napplied object-1\n"), result.stderr
    patches = [request for request in server.requests if request[0] == "PATCH"]
    assert [path for _, path, _, _ in patches] == [profile_path, ROUTER_PATH]
    for (_, _, headers, body), manifest in zip(patches, (PROFILE, ROUTER), strict=True):
        assert headers["Authorization"] == "Bearer secret"
        assert headers["Content-Type"] == "application/apply-patch+yaml"
        assert yaml.safe_load(body) == manifest


def test_kinds_and_rights_that_are_not_known_yet_are_waited_for(server: FakeServer, apply: Apply) -> None:
    server.answers = {
        ("GET", API): [(404, {}), (200, {"resources": []}), (503, {}), (200, DISCOVERY)],
        ("PATCH", ROUTER_PATH): [(403, {"message": "no role yet"}), (404, {}), (201, {})],
    }
    result = apply(ROUTER)
    assert result.returncode == 0, result.stderr
    assert [method for method, *_ in server.requests].count("PATCH") == 3


def test_a_wrong_manifest_is_an_error_at_once(server: FakeServer, apply: Apply) -> None:
    server.answers["PATCH", ROUTER_PATH] = [(422, {"message": "spec.replicas: Invalid value"})]
    result = apply(ROUTER)
    assert result.returncode == 1
    assert "422" in result.stderr and "spec.replicas: Invalid value" in result.stderr
    assert len(server.requests) == 2


def test_without_the_crds_it_gives_up_with_the_remedy(server: FakeServer, apply: Apply) -> None:
    server.answers["GET", API] = [(200, {"resources": []})]
    result = apply(ROUTER, timeout_s=0.05)
    assert result.returncode == 1
    assert "object-0.yaml: gave up" in result.stderr
    assert "does not have FleetRouter: install the CRDs" in result.stderr
