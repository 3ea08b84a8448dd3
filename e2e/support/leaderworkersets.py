"""The LeaderWorkerSet controller: SIG Apps' own, from its chart, as clusters with multi-node engines have it."""

from __future__ import annotations

import json
from typing import Any

import yaml
from harness.build import lws, lws_version
from harness.cluster import Cluster, ClusterError
from harness.kube import wait_until

NAMESPACE = "lws-system"
CRD = "leaderworkersets.leaderworkerset.x-k8s.io"
DEPLOYMENT = "lws-controller-manager"
HOOKS = "mutatingwebhookconfigurations,validatingwebhookconfigurations"


def installed(cluster: Cluster) -> bool:
    return CRD in cluster.run("kubectl", "get", "customresourcedefinitions", "--output=name")


def install(cluster: Cluster) -> None:
    """Until its webhooks answer."""
    cluster.run("kubectl", "create", "namespace", NAMESPACE)
    cluster.run("kubectl", "apply", "--server-side", "--filename=-", standard_input=_objects(cluster))
    wait = [
        "wait",
        "--for=condition=Available",
        f"deployment/{DEPLOYMENT}",
        f"--namespace={NAMESPACE}",
        "--timeout=120s",
    ]
    cluster.run("kubectl", *wait, timeout_s=150)
    wait_until(lambda: _answers(cluster), "the webhooks of LeaderWorkerSet answer", 60)


def remove(cluster: Cluster) -> None:
    """The webhooks first: without the controller behind them they would refuse every pod of a group."""
    labels = "--selector=app.kubernetes.io/name=lws"
    cluster.run("kubectl", "delete", HOOKS, labels, "--ignore-not-found")
    cluster.run(
        "kubectl", "delete", "--filename=-", "--ignore-not-found", "--timeout=90s", standard_input=_objects(cluster)
    )
    cluster.run("kubectl", "delete", "namespace", NAMESPACE, "--ignore-not-found", "--timeout=90s")


def _objects(cluster: Cluster) -> str:
    """The chart's. Its image holds the program at `/manager`; the built-in cluster has it in PATH."""
    chart, values = str(lws() / "chart"), f"image.manager.tag={lws_version()},resources=null"
    text = cluster.run(
        "helm", "template", "lws", chart, "--include-crds", f"--namespace={NAMESPACE}", f"--set={values}"
    )
    objects: list[dict[str, Any]] = [found for found in yaml.safe_load_all(text) if found]
    for found in objects:
        if found["kind"] == "Deployment":
            (container,) = found["spec"]["template"]["spec"]["containers"]
            container["readinessProbe"] |= {"initialDelaySeconds": 0, "periodSeconds": 1}
            if cluster.reaches_pods:
                container["command"] = ["manager"]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})


def _answers(cluster: Cluster) -> bool:
    """Whether a wrong object is refused by the webhook's words: replicas times size exceeds int32."""
    template = {"spec": {"containers": [{"name": "main", "image": "busybox:1"}]}}
    wrong = {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": "wrong", "namespace": NAMESPACE},
        "spec": {"replicas": 100_000, "leaderWorkerTemplate": {"size": 100_000, "workerTemplate": template}},
    }
    try:
        cluster.run("kubectl", "create", "--dry-run=server", "--filename=-", standard_input=json.dumps(wrong))
    except ClusterError as error:
        return "admission webhook" in str(error) and "denied" in str(error)
    return False
