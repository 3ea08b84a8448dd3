"""The children of a FleetRouter, one function each. All carry the router's own name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

from kvfleet_api.fleetconfig import FLEET_CONFIG_KEY, FleetConfig, PoolConfig
from kvfleet_api.fleetrouter import FleetRouter
from kvfleet_operator.reconcile import names, podtemplate
from kvfleet_operator.reconcile.plan import Manifest

CONTAINER: Final = "router"
Volume = tuple[str, dict[str, Any], str]
"""(name, source, mount path)"""
CONFIG_PATH: Final = "/etc/kvfleet"
TLS_PATH: Final = "/etc/kvfleet-tls"
KEYS_PATH: Final = "/etc/kvfleet-keys"
REDIS_PASSWORD_PATH: Final = "/etc/kvfleet-redis-password"
REDIS_CA_PATH: Final = "/etc/kvfleet-redis-ca"
CONFIG_MAP_VARIABLE: Final = "KVFLEET_CONFIG_MAP"
"""Environment variable of the router: the ConfigMap it watches, as `namespace/name`."""
SETTLE_S: Final = 5
"""Seconds a leaving router serves on so that load balancers have dropped its endpoint."""
TEARDOWN_S: Final = 10
USER_ID: Final = 65532


def labels(router: FleetRouter) -> dict[str, str]:
    """Labels of every child of the router."""
    return {
        **names.common_labels("kvfleet-router", router.metadata.name),
        **names.router_selector(router.metadata.name),
    }


def _child(router: FleetRouter, api_version: str, kind: str, body: dict[str, Any], **more: Any) -> Manifest:
    name = names.bounded(router.metadata.name)
    return names.child(router, api_version, kind, name, labels(router), body, **more)


def address(router: FleetRouter) -> str:
    """Where clients in the cluster reach the router."""
    scheme, default = ("https", 443) if router.spec.tls else ("http", 80)
    port = router.spec.service.port
    host = f"{names.bounded(router.metadata.name)}.{router.metadata.namespace or 'default'}.svc"
    return f"{scheme}://{host}" + ("" if port == default else f":{port}")


def config_map(router: FleetRouter, config: FleetConfig) -> Manifest:
    body = {"data": {FLEET_CONFIG_KEY: config.to_json()}}
    return _child(router, "v1", "ConfigMap", body, annotations={names.REVISION: config.revision})


def service_account(router: FleetRouter) -> Manifest:
    return _child(router, "v1", "ServiceAccount", {"automountServiceAccountToken": False})


def permissions(router: FleetRouter, config: FleetConfig) -> list[Manifest]:
    """What a router may do: follow its own ConfigMap and the EndpointSlices of its namespace, wake pools at zero, nothing else."""
    name, namespace = names.bounded(router.metadata.name), router.metadata.namespace or "default"
    follow = ["list", "watch"]
    rules: list[dict[str, Any]] = [
        {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [name], "verbs": follow},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": follow},
    ]
    rules += _waking(config)
    group = "rbac.authorization.k8s.io"
    binding = {
        "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
    }
    return [
        _child(router, f"{group}/v1", "Role", {"rules": rules}),
        _child(router, f"{group}/v1", "RoleBinding", binding),
    ]


def _waking(config: FleetConfig) -> list[dict[str, Any]]:
    """The scale of exactly the workloads that may be at zero."""
    targets = [pool.wake_target.split("/") for pool in config.pools if pool.wake_target]
    rules: list[dict[str, Any]] = []
    for group, plural in (("apps", "deployments"), ("leaderworkerset.x-k8s.io", "leaderworkersets")):
        workloads = sorted(name for kind, name in targets if kind == plural)
        if workloads:
            resources, verbs = [f"{plural}/scale"], ["get", "patch"]
            rules.append({"apiGroups": [group], "resources": resources, "resourceNames": workloads, "verbs": verbs})
    return rules


def service(router: FleetRouter) -> Manifest:
    spec = router.spec.service
    body = {
        "type": spec.type,
        "selector": names.router_selector(router.metadata.name),
        "ports": [{"name": "http", "port": spec.port, "targetPort": "http", "protocol": "TCP"}],
    }
    return _child(router, "v1", "Service", {"spec": body}, annotations=spec.annotations)


def disruption_budget(router: FleetRouter) -> Manifest:
    body = {
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": names.router_selector(router.metadata.name)},
    }
    return _child(router, "policy/v1", "PodDisruptionBudget", {"spec": body})


def deployment(router: FleetRouter, pools: Sequence[PoolConfig] = ()) -> Manifest:
    """`pools`: those it serves. Raises TemplateError where `podTemplate` does not fit."""
    own = labels(router)
    template: dict[str, Any] = {"metadata": {"labels": own}, "spec": _pod_spec(router, pools)}
    if router.spec.pod_template is not None:
        template = podtemplate.merge_pod(template, router.spec.pod_template, own)
    body = {
        "replicas": router.spec.replicas,
        "selector": {"matchLabels": names.router_selector(router.metadata.name)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "template": template,
    }
    return _child(router, "apps/v1", "Deployment", {"spec": body})


def _pod_spec(router: FleetRouter, pools: Sequence[PoolConfig]) -> dict[str, Any]:
    volumes = [*_volumes(router), *_tokenizers(pools), *_worker_tls(pools)]
    name = names.bounded(router.metadata.name)
    return {
        "serviceAccountName": name,
        "automountServiceAccountToken": True,
        "terminationGracePeriodSeconds": SETTLE_S + router.spec.drain_seconds + TEARDOWN_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            _spread(router, "kubernetes.io/hostname"),
            _spread(router, "topology.kubernetes.io/zone"),
        ],
        "containers": [_container(router, volumes)],
        "volumes": [{"name": name, **source} for name, source, _path in volumes],
    }


def _spread(router: FleetRouter, key: str) -> dict[str, Any]:
    return {
        "maxSkew": 1,
        "topologyKey": key,
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": names.router_selector(router.metadata.name)},
    }


def _container(router: FleetRouter, volumes: Sequence[Volume]) -> dict[str, Any]:
    spec = router.spec
    built: dict[str, Any] = {
        "name": CONTAINER,
        "image": spec.image,
        "command": ["kvfleet"],
        "args": _args(router),
        "env": _environment(router),
        "ports": [
            {"name": "http", "containerPort": spec.port, "protocol": "TCP"},
            {"name": "admin", "containerPort": spec.admin_port, "protocol": "TCP"},
        ],
        "startupProbe": {**_probe("/healthz"), "periodSeconds": 1, "failureThreshold": 60},
        "readinessProbe": {**_probe("/readyz"), "periodSeconds": 2, "failureThreshold": 2},
        "livenessProbe": {**_probe("/healthz"), "periodSeconds": 10, "failureThreshold": 3},
        "lifecycle": {"preStop": {"sleep": {"seconds": SETTLE_S}}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": name, "mountPath": path} for name, _source, path in volumes],
    }
    if spec.resources is not None:
        built["resources"] = spec.resources
    return built


def _probe(path: str) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": "admin"}, "timeoutSeconds": 2}


def _args(router: FleetRouter) -> list[str]:
    spec = router.spec
    args = ["router", "--config", f"{CONFIG_PATH}/{FLEET_CONFIG_KEY}", "--kubernetes"]
    args += ["--port", str(spec.port), "--admin-port", str(spec.admin_port)]
    if spec.auth.api_keys_secret_ref:
        args += ["--api-keys-file", f"{KEYS_PATH}/{spec.auth.api_keys_secret_ref.key}"]
    if spec.tls:
        args += ["--tls-cert", f"{TLS_PATH}/tls.crt", "--tls-key", f"{TLS_PATH}/tls.key"]
    if spec.processes > 1:
        args += ["--processes", str(spec.processes)]
    if spec.redis:
        args += ["--redis-url", spec.redis.url]
        if ref := spec.redis.password_secret_ref:
            args += ["--redis-password-file", f"{REDIS_PASSWORD_PATH}/{ref.key}"]
        if ref := spec.redis.ca_secret_ref:
            args += ["--redis-ca-file", f"{REDIS_CA_PATH}/{ref.key}"]
    return args


def _environment(router: FleetRouter) -> list[dict[str, Any]]:
    fields = {"POD_NAME": "metadata.name", "POD_NAMESPACE": "metadata.namespace", "POD_IP": "status.podIP"}
    config = f"{router.metadata.namespace or 'default'}/{names.bounded(router.metadata.name)}"
    downward = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()]
    return [*downward, {"name": CONFIG_MAP_VARIABLE, "value": config}]


def _tokenizers(pools: Sequence[PoolConfig]) -> list[Volume]:
    """The tokenizers of pools that have theirs in a ConfigMap. Optional: a router serves without, and says so."""
    found: list[Volume] = []
    for pool in pools:
        if pool.tokenizer_config_map and pool.tokenizer_path:
            source = {"configMap": {"name": pool.tokenizer_config_map, "optional": True}}
            found.append((_volume_name("tokenizer", pool), source, pool.tokenizer_path))
    return found


def _worker_tls(pools: Sequence[PoolConfig]) -> list[Volume]:
    """Whom to trust to be a worker, and what to show workers. Optional, so that what is missing of one pool ends no router."""
    found: list[Volume] = []
    for pool in pools:
        tls = pool.tls
        if tls is None:
            continue
        if tls.ca_config_map and tls.ca_path:
            source = {"configMap": {"name": tls.ca_config_map, "optional": True}}
            found.append((_volume_name("worker-ca", pool), source, tls.ca_path.rpartition("/")[0]))
        if tls.client_certificate_secret and tls.client_certificate_path:
            source = {"secret": {"secretName": tls.client_certificate_secret, "optional": True}}
            found.append((_volume_name("worker-client", pool), source, tls.client_certificate_path))
    return found


def _volume_name(what: str, pool: PoolConfig) -> str:
    return f"{what}-{hashlib.sha256(pool.name.encode()).hexdigest()[:8]}"


def _volumes(router: FleetRouter) -> list[Volume]:
    spec = router.spec
    volumes: list[Volume] = [
        ("config", {"configMap": {"name": names.bounded(router.metadata.name)}}, CONFIG_PATH),
        ("tmp", {"emptyDir": {}}, "/tmp"),
    ]
    if spec.auth.api_keys_secret_ref:
        volumes.append(("keys", {"secret": {"secretName": spec.auth.api_keys_secret_ref.name}}, KEYS_PATH))
    if spec.tls:
        volumes.append(("tls", {"secret": {"secretName": spec.tls.secret_ref}}, TLS_PATH))
    if spec.redis and (ref := spec.redis.password_secret_ref):
        volumes.append(("redis-password", {"secret": {"secretName": ref.name}}, REDIS_PASSWORD_PATH))
    if spec.redis and (ref := spec.redis.ca_secret_ref):
        volumes.append(("redis-ca", {"secret": {"secretName": ref.name}}, REDIS_CA_PATH))
    return volumes
