"""What the namespace of a failed test looks like: objects, events, the end of every log."""

from __future__ import annotations

import subprocess

from harness.cluster import Cluster, ClusterError

LOG_LINES = 40


def describe(cluster: Cluster, namespace: str) -> str:
    """Never raises: it explains a failure and must not replace it."""
    pods = _kubectl(cluster, "get", "pods", "-n", namespace, "-o=name").split()
    parts = [
        _kubectl(cluster, "get", "all,endpointslices,pdb,configmaps,nodes", "-n", namespace, "-o=wide"),
        _kubectl(cluster, "get", "kvfleet", "-n", namespace, "-o=yaml", "--ignore-not-found"),
        _kubectl(cluster, "get", "events", "-n", namespace, "--sort-by=.metadata.creationTimestamp"),
    ]
    for pod in pods:
        logs = ["logs", pod, "-n", namespace, "--all-containers", "--prefix", f"--tail={LOG_LINES}"]
        parts.append(f"--- {pod}\n{_kubectl(cluster, *logs)}")
    parts.append(cluster.diagnosis())
    return "\n".join(part for part in parts if part)


def _kubectl(cluster: Cluster, *arguments: str) -> str:
    try:
        return cluster.run("kubectl", *arguments, timeout_s=20)
    except (ClusterError, subprocess.TimeoutExpired) as error:
        return "" if "the server doesn't have a resource type" in str(error) else str(error)
