"""A pool's pods as a Deployment, or as a LeaderWorkerSet where several pods together make one worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_api.modelpool import ModelPool, ModelPoolSpec
from kvfleet_operator.reconcile import engine, lora, names, podtemplate
from kvfleet_operator.reconcile.drift import others_scale
from kvfleet_operator.reconcile.plan import Manifest

PRODUCT_LABEL: Final = "nvidia.com/gpu.product"
"""Node label of GPU feature discovery."""
LEADER_WORKER_SET: Final = "leaderworkerset.x-k8s.io/v1"
PULL_S: Final = 600
"""Seconds a rollout may take beyond the engine's start before it counts as stuck: scheduling and image pull."""


def build(pool: ModelPool, profile: AcceleratorProfile, live: Mapping[str, Any] | None) -> Manifest:
    """The Deployment or LeaderWorkerSet. Raises TemplateError where `podTemplate` does not fit."""
    if pool.spec.parallelism.nodes > 1:
        return _leader_worker_set(pool, profile, live)
    spec = pool.spec
    body = {
        **_replicas(pool, live),
        "selector": {"matchLabels": names.pool_selector(pool.metadata.name)},
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": spec.rollout.max_surge, "maxUnavailable": spec.rollout.max_unavailable},
        },
        "progressDeadlineSeconds": spec.engine.startup_seconds + PULL_S,
        "template": _template(pool, profile, live),
    }
    name = names.pool_workload(pool.metadata.name, multi_node=False)
    return _guarded(names.child(pool, "apps/v1", "Deployment", name, labels(pool), {"spec": body}), pool, live)


def _leader_worker_set(pool: ModelPool, profile: AcceleratorProfile, live: Mapping[str, Any] | None) -> Manifest:
    spec = pool.spec
    body = {
        **_replicas(pool, live),
        "rolloutStrategy": {
            "type": "RollingUpdate",
            "rollingUpdateConfiguration": {
                "maxSurge": spec.rollout.max_surge,
                "maxUnavailable": spec.rollout.max_unavailable,
            },
        },
        "startupPolicy": "LeaderCreated",
        "leaderWorkerTemplate": {
            "size": spec.parallelism.nodes,
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": _template(pool, profile, live),
            "workerTemplate": _template(pool, profile, live, follower=True),
        },
    }
    name = names.pool_workload(pool.metadata.name, multi_node=True)
    return _guarded(
        names.child(pool, LEADER_WORKER_SET, "LeaderWorkerSet", name, labels(pool), {"spec": body}), pool, live
    )


def _guarded(manifest: Manifest, pool: ModelPool, live: Mapping[str, Any] | None) -> Manifest:
    """Where `replicas` merely repeats the live value, the write holds for that very version only: a scaler may be at it."""
    if pool.spec.autoscaling is not None and live is not None and "replicas" in manifest["spec"]:
        manifest["metadata"]["resourceVersion"] = live["metadata"].get("resourceVersion")
    return manifest


def _replicas(pool: ModelPool, live: Mapping[str, Any] | None) -> dict[str, int]:
    """`replicas`, unless the autoscaler owns them.

    Under server-side apply a field its only owner no longer states falls back to its default, 1. So an autoscaled pool
    keeps stating the live value until somebody else has written the field; from then on it is left out.
    """
    spec = pool.spec
    if spec.autoscaling is None:
        return {"replicas": wanted_replicas(spec)}
    if live is None:
        return {"replicas": spec.autoscaling.min_replicas}
    if others_scale(live, names.MANAGER):
        return {}
    return {"replicas": live["spec"].get("replicas", 1)}


def labels(pool: ModelPool) -> dict[str, str]:
    """Labels of every child of the pool."""
    return {
        **names.common_labels("vllm", pool.metadata.name),
        names.COMPONENT: names.ENGINE,
        names.POOL: names.label_value(pool.metadata.name),
        names.MODEL: names.label_value(pool.spec.model.name),
        names.PROFILE: names.label_value(pool.spec.accelerator.profile_ref),
        names.ROLE: pool.spec.role,
    }


def _template(
    pool: ModelPool, profile: AcceleratorProfile, live: Mapping[str, Any] | None, *, follower: bool = False
) -> dict[str, Any]:
    """The pod template: generated, the user's part merged over it, and on top the labels that selectors need."""
    with_lora = lora.enabled(pool.spec, live)
    own = labels(pool)
    own |= {names.COMPONENT: names.FOLLOWER} if follower else {}
    own |= {names.LORA: "enabled"} if with_lora else {}
    generated = {"metadata": {"labels": own}, "spec": _pod_spec(pool, profile, follower, with_lora)}
    if pool.spec.pod_template is None:
        return generated
    return podtemplate.merge_pod(generated, pool.spec.pod_template, own)


def _pod_spec(pool: ModelPool, profile: AcceleratorProfile, follower: bool, with_lora: bool) -> dict[str, Any]:
    device = profile.spec.accelerator
    return {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": engine.grace_s(pool.spec),
        "containers": [engine.container(pool, device.resource_name, follower=follower, with_lora=with_lora)],
        "volumes": [
            {"name": engine.CACHE_VOLUME, "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            *([lora.volume(pool)] if with_lora else []),
            *_certificate(pool.spec),
        ],
        "tolerations": [{"key": device.resource_name, "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [_prefer(device.product)]}},
    }


def _certificate(spec: ModelPoolSpec) -> list[dict[str, Any]]:
    secret = engine.certificate_secret(spec)
    return [{"name": engine.TLS_VOLUME, "secret": {"secretName": secret}}] if secret else []


def _prefer(product: str) -> dict[str, Any]:
    """Nodes with the profile's product first. A preference: where GPU feature discovery is absent no node has the label."""
    match = {"key": PRODUCT_LABEL, "operator": "In", "values": [product]}
    return {"weight": 100, "preference": {"matchExpressions": [match]}}


def service(pool: ModelPool) -> Manifest:
    """Headless: routers read its EndpointSlices and talk to the pods directly."""
    body = {
        "clusterIP": "None",
        "publishNotReadyAddresses": False,
        "selector": names.pool_selector(pool.metadata.name),
        "ports": [
            {"name": name, "port": number, "targetPort": name, "protocol": "TCP"}
            for name, number in engine.service_ports(pool.spec)
        ],
    }
    name = names.pool_workload(pool.metadata.name, multi_node=False)
    return names.child(pool, "v1", "Service", name, labels(pool), {"spec": body})


def disruption_budget(pool: ModelPool) -> Manifest:
    """At most as many workers away by node drains as a rollout may take away, and at least one, or drains never end."""
    body = {
        "maxUnavailable": max(1, pool.spec.rollout.max_unavailable),
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": names.pool_selector(pool.metadata.name)},
    }
    name = names.pool_workload(pool.metadata.name, multi_node=False)
    return names.child(pool, "policy/v1", "PodDisruptionBudget", name, labels(pool), {"spec": body})


def wanted_replicas(spec: ModelPoolSpec) -> int:
    """Workers wanted of a pool that is not autoscaled."""
    return 1 if spec.replicas is None else spec.replicas
