"""The external metrics API, as adapters for Prometheus serve it, with figures that a test sets.

HorizontalPodAutoscaler's controller asks the API server, which passes the question on to whoever an APIService names: a
Service whose only endpoint is this process.
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import trustme
from harness.cluster import Cluster
from harness.kube import Kube, Object
from harness.network import NODE_IP

GROUP, VERSION = "external.metrics.k8s.io", "v1beta1"
API_SERVICE = f"{VERSION}.{GROUP}"
SERVICE = "external-metrics"

Figures = Callable[[str, str], float | None]
"""(namespace, metric) → its value now; None: there is none."""


@contextmanager
def external_metrics(cluster: Cluster, kube: Kube, figures: Figures, folder: Path) -> Iterator[None]:
    """Served, and removed with the block."""
    server = ThreadingHTTPServer((NODE_IP, 0), _handler(figures))
    server.daemon_threads = True
    certificate = trustme.CA().issue_cert(NODE_IP)
    file = folder / "external-metrics.pem"
    certificate.private_key_and_cert_chain_pem.write_to_path(file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        for manifest in _objects(kube.namespace, server.server_port):
            kube.apply(manifest)
        yield
    finally:
        cluster.run("kubectl", "delete", "apiservice", API_SERVICE, "--ignore-not-found")
        server.shutdown()
        thread.join()
        server.server_close()


def _objects(namespace: str, port: int) -> list[Object]:
    named = {"name": SERVICE, "namespace": namespace}
    labels = {"kubernetes.io/service-name": SERVICE}
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": named, "spec": {"ports": [{"port": 443}]}},
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**named, "labels": labels},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [NODE_IP]}],
            "ports": [{"port": port}],
        },
        {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": API_SERVICE},
            "spec": {
                "group": GROUP,
                "version": VERSION,
                "service": named,
                "groupPriorityMinimum": 100,
                "versionPriority": 100,
                "insecureSkipTLSVerify": True,
            },
        },
    ]


def _handler(figures: Figures) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            version = f"{GROUP}/{VERSION}"
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts == ["apis", GROUP, VERSION]:
                self._answer(
                    200, {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": []}
                )
            elif parts[:4] == ["apis", GROUP, VERSION, "namespaces"] and len(parts) == 6:
                value = figures(parts[4], parts[5])
                stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                items = [
                    {"metricName": parts[5], "metricLabels": {}, "timestamp": stamp, "value": f"{round(1000 * found)}m"}
                    for found in [value] if found is not None
                ]  # fmt: skip
                self._answer(
                    200, {"kind": "ExternalMetricValueList", "apiVersion": version, "metadata": {}, "items": items}
                )
            else:
                self._answer(404, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404})

        def _answer(self, status: int, answer: Object) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """The story is told by the test."""

    return Handler
