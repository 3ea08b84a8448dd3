"""What a Prometheus in a cluster scrapes: the pages that the chart's monitors select, and a DCGM exporter's on each node.

The exporter speaks of the pods that hold its GPUs, and has a pod of its own: its labels collide, as they do in clusters. The
simulated workers stand in for it, with a page of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.cluster import Cluster
from harness.kube import Kube, Object
from harness.sentences import Story
from support.installation import METRICS_PORT, Installation


@dataclass(frozen=True)
class Target:
    """A page of metrics, with the labels that the monitors and the GPU operator give it."""

    pod: Object
    port: int
    path: str
    labels: dict[str, str]

    def entry(self, cluster: Cluster) -> dict[str, Any]:
        """As Prometheus takes it from a list of static or discovered targets."""
        meta = self.pod["metadata"]
        if cluster.reaches_pods:
            host, path = f"{self.pod['status']['podIP']}:{self.port}", self.path
        else:
            host = cluster.api_proxy().removeprefix("http://")
            path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}:{self.port}/proxy{self.path}"
        labels = {"namespace": meta["namespace"], "pod": meta["name"], "instance": f"{meta['name']}:{self.port}"}
        return {"targets": [host], "labels": {"__metrics_path__": path, **labels, **self.labels}}


def component(kube: Kube, name: str) -> list[Object]:
    return kube.list("Pod", f"app.kubernetes.io/component={name}")


def entries(story: Story, kvfleet: Installation) -> list[dict[str, Any]]:
    """Of the pods that have an address now."""
    found = [Target(pod, METRICS_PORT, "/metrics", {"job": "operator"}) for pod in kvfleet.pods()]
    found += [Target(pod, port_of(pod, "admin"), "/metrics", {}) for pod in component(story.kube, "router")]
    for number, pod in enumerate(component(story.kube, "engine")):
        port, labels = port_of(pod, "http"), pod["metadata"]["labels"]
        found.append(Target(pod, port, "/metrics", {"kvfleet_io_pool": labels["kvfleet.io/pool"]}))
        exporter = {"namespace": "gpu-operator", "pod": f"dcgm-exporter-{number}", "instance": f"node-{number}:9400"}
        found.append(Target(pod, port, "/dcgm/metrics", exporter))
    return [target.entry(story.cluster) for target in found if target.pod["status"].get("podIP")]


def port_of(pod: Object, name: str) -> int:
    (port,) = (
        port["containerPort"]
        for container in pod["spec"]["containers"]
        for port in container.get("ports", [])
        if port["name"] == name
    )
    return int(port)
