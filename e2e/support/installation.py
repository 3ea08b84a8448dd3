"""kvfleet as its users have it: the chart's release under a name and in a namespace that are not the default ones.

One release serves all tests of a session; `Installation.ensure` installs it when the first of them asks. Its resync is
short, so that tests need not wait minutes for what only a listing shows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
from harness.cluster import Cluster
from harness.kube import Kube, Object, wait_until
from harness.settings import E2E_DIR

CHART = E2E_DIR.parent / "helm/kvfleet"
RELEASE, NAMESPACE = "blue", "platform"
OPERATOR = "blue-kvfleet-operator"
"""Name of the Deployment, the ServiceAccount and the Lease."""
CLUSTER_ROLE = "blue-kvfleet-platform-operator"
CONTAINER = "operator"
METRICS_PORT = 8081
RESYNC_S = 10
VALUES = [f"--set=operator.resyncSeconds={RESYNC_S},operator.terminationGracePeriodSeconds=5"]

_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Installation:
    """The release, and the operator that runs from it."""

    namespace = NAMESPACE

    def __init__(self, cluster: Cluster, scratch: Path) -> None:
        self.cluster = cluster
        self.kube = Kube(cluster.kubeconfig, NAMESPACE, scratch / "discovery.json")

    # --- Helm

    def helm(self, *arguments: str) -> str:
        return self.cluster.run("helm", *arguments, f"--namespace={NAMESPACE}", timeout_s=180)

    def install(self, *arguments: str) -> None:
        """Until the operator is ready."""
        ready = ["--create-namespace", "--wait", "--timeout=120s"]
        self.helm("upgrade", "--install", RELEASE, str(CHART), *ready, *VALUES, *arguments)

    def ensure(self) -> Installation:
        if not self.installed:
            self.install()
        return self

    @property
    def installed(self) -> bool:
        return bool(json.loads(self.helm("list", f"--filter=^{RELEASE}$", "--output=json")))

    def uninstall(self) -> None:
        self.helm("uninstall", RELEASE, "--ignore-not-found", "--wait", "--timeout=60s")

    def remove(self) -> None:
        """The release, its namespace, and the CRDs with all there is of these kinds."""
        self.uninstall()
        names = self.cluster.run("kubectl", "get", "customresourcedefinitions", "--output=name").split()
        if crds := [name for name in names if name.endswith(".kvfleet.io")]:
            self.cluster.run("kubectl", "delete", *crds, "--timeout=60s")
        self.cluster.run("kubectl", "delete", "namespace", NAMESPACE, "--ignore-not-found", "--timeout=90s")

    def close(self) -> None:
        self.kube.close()

    # --- the operator

    def pods(self) -> list[Object]:
        return self.kube.list("Pod", f"app.kubernetes.io/component=operator,app.kubernetes.io/instance={RELEASE}")

    def ready_pods(self) -> list[str]:
        """Names of the replicas that are ready and not on their way out."""
        return [
            pod["metadata"]["name"]
            for pod in self.pods()
            if condition(pod, "Ready").get("status") == "True" and "deletionTimestamp" not in pod["metadata"]
        ]

    def lease(self) -> Object:
        spec: Object = self.kube.get("Lease", OPERATOR)["spec"]
        return spec

    def leader(self) -> str:
        """The pod whose operator works."""
        return str(wait_until(lambda: self.lease().get("holderIdentity"), "an operator leads", 60)).partition("_")[0]

    def log(self) -> str:
        """What the operator's replicas have logged, those of containers that ended included."""
        parts: list[str] = []
        for pod in self.pods():
            restarted = pod["status"]["containerStatuses"][0]["restartCount"] > 0
            starts = (True, False) if restarted else (False,)
            parts += [self.kube.logs(pod["metadata"]["name"], CONTAINER, previous) for previous in starts]
        return "".join(parts)

    def metrics(self, pod: str = "") -> Metrics:
        """Of the leader, or of one replica."""
        return Metrics(pod_page(self.cluster, self.kube, pod or self.leader(), METRICS_PORT, "/metrics"))


class Metrics:
    """A Prometheus text page."""

    def __init__(self, page: str) -> None:
        self._samples = [_sample(found) for line in page.splitlines() if (found := _SAMPLE.match(line))]

    def total(self, name: str, **labels: str) -> float:
        """The sum over all samples of a name with these labels; a pattern as a label's value must match as a whole."""
        return sum(
            value
            for sample, found, value in self._samples
            if sample == name and all(re.fullmatch(text, found.get(key, "")) for key, text in labels.items())
        )


def _sample(found: re.Match[str]) -> tuple[str, dict[str, str], float]:
    return found["name"], dict(_LABEL.findall(found["labels"] or "")), float(found["value"])


def pod_page(cluster: Cluster, kube: Kube, pod: str, port: int, path: str) -> str:
    """What a pod serves over HTTP."""
    if cluster.reaches_pods:
        url = f"http://{kube.get('Pod', pod)['status']['podIP']}:{port}{path}"
    else:
        url = f"{cluster.api_proxy()}/api/v1/namespaces/{kube.namespace}/pods/{pod}:{port}/proxy{path}"
    return httpx.get(url, timeout=10).raise_for_status().text


def condition(item: Object, kind: str) -> dict[str, Any]:
    """A condition of an object; empty where it has none of this type."""
    found = (entry for entry in (item.get("status") or {}).get("conditions") or [] if entry["type"] == kind)
    return next(found, {})
