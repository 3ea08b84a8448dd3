"""The engine's container: the `vllm serve` command of a ModelPool, its probes, ports and its drain.

**Arguments.** Generated ones come first; whatever flag the user gives in `engine.args` replaces the generated one.

**Leaving.** A vLLM that got SIGTERM answers new requests with 500, and with `--shutdown-timeout N` it stays for all N
seconds though idle, and leaves open streams hanging when N is over. So the drain happens before SIGTERM, in the preStop
hook: for `SETTLE_S` the engine serves on while routers learn that its endpoint is gone; then it goes as soon as nothing
runs or waits, or when `drainSeconds` are over. SIGTERM then finds it idle; with vLLM's default of no shutdown timeout
what is left ends at once and cleanly (`finish_reason: abort`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from kvfleet_api.modelpool import ModelPool, ModelPoolSpec
from kvfleet_api.resolve import integer_argument
from kvfleet_operator.reconcile import arguments, lora

CONTAINER: Final = "engine"
SETTLE_S: Final = 5
"""Seconds a leaving engine serves on so that every router has dropped its endpoint."""
TEARDOWN_S: Final = 30
"""Seconds the engine gets to release its devices after SIGTERM."""
CACHE_VOLUME: Final = "model-cache"
CACHE_PATH: Final = "/model-cache"
NIXL_PORT: Final = 5600

WIRED: Final = {
    "--port": "set spec.engine.port instead",
    "--served-model-name": "set spec.model.name instead",
    "--kv-events-config": "set spec.engine.kvEvents instead",
    "--uds": "remove it, the engine must listen on its port",
    "--root-path": "remove it, the engine must answer at /",
    "--api-key": "remove it, routers hold no key for engines",
}
"""Flags that cut an engine off from probes, routers or drain when set by hand → the remedy."""
SERVES_TLS: Final = frozenset({"--ssl-keyfile", "--ssl-certfile"})
TLS_VOLUME: Final = "kvfleet-engine-tls"
TLS_PATH: Final = "/etc/kvfleet-engine-tls"

DRAIN_SCRIPT: Final = """\
import os, sys, time, urllib.request
port, settle_s, drain_s, follow = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "follow"
host = os.environ.get("LWS_LEADER_ADDRESS" if follow else "POD_IP", "127.0.0.1")
url = "http://%s:%s/metrics" % ("[%s]" % host if ":" in host else host, port)
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
busy_metrics = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
start, idle, failed = time.monotonic(), 0, 0
while time.monotonic() - start < settle_s + drain_s and failed < 5:
    time.sleep(0.5)
    try:
        lines = direct.open(url, timeout=2).read().decode().splitlines()
        busy = sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(busy_metrics))
        idle, failed = (0 if busy else idle + 1), 0
    except OSError:
        idle, failed = 0, failed + 1
    if idle >= 3 and time.monotonic() - start >= settle_s:
        break
"""
"""The preStop hook. A follower of a multi-node worker stays until its leader is idle or gone. It knows the leader by the
group's address, where the next leader is soon: that one is idle until it has followers of its own."""


def serve_args(pool: ModelPool, *, with_lora: bool = False) -> list[str]:
    """Everything after `vllm serve`: the model, the generated flags, then the user's."""
    user = list(pool.spec.engine.args)
    overridden = arguments.flags(user)
    generated: list[str] = []
    for flag, *values in [*_flags(pool.spec), *(lora.flags(pool.spec) if with_lora else [])]:
        if flag not in overridden and f"--no-{flag.removeprefix('--')}" not in overridden:
            generated += [flag, *values]
    return [pool.spec.model.source, *generated, *user]


def unwired(spec: ModelPoolSpec) -> list[str]:
    """What is wrong with the user's arguments: flags that break the wiring, each with the remedy."""
    found = arguments.flags(spec.engine.args)
    wrong = [f"engine.args sets {flag}: {WIRED[flag]}" for flag in sorted(found & WIRED.keys())]
    if spec.engine.tls is None:
        remedy = "set spec.engine.tls as well, or routers speak plain HTTP to engines"
        wrong += [f"engine.args sets {flag}: {remedy}" for flag in sorted(found & SERVES_TLS)]
    return wrong


def _flags(spec: ModelPoolSpec) -> list[list[str]]:
    model, engine, parallel = spec.model, spec.engine, spec.parallelism
    flags = [
        ["--served-model-name", model.name],
        ["--port", str(engine.port)],
        ["--enable-prefix-caching"],
        ["--enable-prompt-tokens-details"],
        ["--enable-request-id-headers"],
        ["--block-size", str(engine.block_tokens)],
        ["--tensor-parallel-size", str(parallel.tensor)],
    ]
    if parallel.pipeline > 1:
        flags.append(["--pipeline-parallel-size", str(parallel.pipeline)])
    if parallel.nodes > 1:
        flags += [
            ["--nnodes", str(parallel.nodes)],
            ["--node-rank", "$(LWS_WORKER_INDEX)"],
            ["--master-addr", "$(LWS_LEADER_ADDRESS)"],
        ]
    if model.revision:
        flags.append(["--revision", model.revision])
    if model.max_context_tokens is not None:
        flags.append(["--max-model-len", str(model.max_context_tokens)])
    if certificate_secret(spec) is not None:
        flags += [["--ssl-certfile", f"{TLS_PATH}/tls.crt"], ["--ssl-keyfile", f"{TLS_PATH}/tls.key"]]
        flags.append(["--enable-ssl-refresh"])
    if engine.kv_events.enabled:
        flags.append(["--kv-events-config", _json(_kv_events(spec))])
    if spec.role != "Unified":
        flags.append(["--kv-transfer-config", _json({"kv_connector": "NixlConnector", "kv_role": "kv_both"})])
    return flags


def certificate_secret(spec: ModelPoolSpec) -> str | None:
    """The Secret with the certificate that engines are started with."""
    return spec.engine.tls.certificate_secret_ref if spec.engine.tls else None


def over_tls(script: str) -> str:
    """The script, asking by HTTPS. It asks its own worker: whose certificate that has does not matter."""
    plain, unverified = "ProxyHandler({})", "urllib.request.HTTPSHandler(context=ssl._create_unverified_context())"
    script = script.replace("import ", "import ssl, ", 1).replace('"http://', '"https://')
    return script.replace(plain, f"{plain}, {unverified}")


def _kv_events(spec: ModelPoolSpec) -> dict[str, Any]:
    events = spec.engine.kv_events
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{events.port}",
        "replay_endpoint": f"tcp://*:{events.replay_port}",
        "topic": f"kv@$(POD_NAME)@{spec.model.name}",
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def grace_s(spec: ModelPoolSpec) -> int:
    """`terminationGracePeriodSeconds`: settle, drain, the wait a user added after SIGTERM, teardown."""
    added_s = integer_argument(spec.engine.args, "shutdown-timeout") or 0
    return SETTLE_S + spec.rollout.drain_seconds + added_s + TEARDOWN_S


def container(
    pool: ModelPool, resource_name: str, *, follower: bool = False, with_lora: bool = False
) -> dict[str, Any]:
    """The engine's container; a follower (further node of a multi-node worker) serves nothing and has no probes."""
    spec = pool.spec
    engine = spec.engine
    args = serve_args(pool, with_lora=with_lora) + (["--headless"] if follower else [])
    built: dict[str, Any] = {
        "name": CONTAINER,
        "image": engine.image,
        "command": ["vllm", "serve"],
        "args": args,
        "env": _environment(spec, with_lora),
        "resources": {"limits": {resource_name: str(spec.devices_per_pod)}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "lifecycle": {"preStop": {"exec": {"command": _drain_command(spec, follower)}}},
        "volumeMounts": [
            {"name": CACHE_VOLUME, "mountPath": CACHE_PATH},
            {"name": "shm", "mountPath": "/dev/shm"},
            *([lora.mount()] if with_lora else []),
            *([{"name": TLS_VOLUME, "mountPath": TLS_PATH, "readOnly": True}] if certificate_secret(spec) else []),
        ],
    }
    if not follower:
        built |= {"ports": _ports(spec), **_probes(spec, with_lora)}
    return built


def _environment(spec: ModelPoolSpec, with_lora: bool) -> list[dict[str, Any]]:
    pod_ip = {"fieldRef": {"fieldPath": "status.podIP"}}
    generated: list[dict[str, Any]] = [
        {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "POD_IP", "valueFrom": pod_ip},
        {"name": "HF_HOME", "value": f"{CACHE_PATH}/huggingface"},
        {"name": "VLLM_CACHE_ROOT", "value": f"{CACHE_PATH}/vllm"},
    ]
    if spec.parallelism.nodes > 1:
        generated.append({"name": "VLLM_HOST_IP", "valueFrom": pod_ip})
    if spec.role != "Unified":
        generated += [
            {"name": "VLLM_NIXL_SIDE_CHANNEL_HOST", "valueFrom": pod_ip},
            {"name": "VLLM_NIXL_SIDE_CHANNEL_PORT", "value": str(NIXL_PORT)},
        ]
    if with_lora:
        generated += [{"name": name, "value": value} for name, value in lora.environment().items()]
    users = {variable.name: {"name": variable.name, "value": variable.value} for variable in spec.engine.env}
    kept = [variable for variable in generated if variable["name"] not in users]
    return kept + list(users.values())


def _ports(spec: ModelPoolSpec) -> list[dict[str, Any]]:
    return [
        {"name": name, "containerPort": number, "protocol": "TCP"} for name, number in service_ports(spec)
    ]  # fmt: skip


def service_ports(spec: ModelPoolSpec) -> list[tuple[str, int]]:
    """(name, number) of what routers connect to."""
    ports = [("http", spec.engine.port)]
    if spec.engine.kv_events.enabled:
        ports += [("kv-events", spec.engine.kv_events.port), ("kv-replay", spec.engine.kv_events.replay_port)]
    return ports


def _probes(spec: ModelPoolSpec, with_lora: bool) -> dict[str, Any]:
    """vLLM opens its port only once it can serve: /health tells started, ready and alive alike."""
    scheme = {"scheme": "HTTPS"} if spec.engine.tls else {}
    health = {"httpGet": {"path": "/health", "port": "http", **scheme}, "timeoutSeconds": 5}
    startup_period_s = 5
    return {
        "startupProbe": {
            **(_startup_check(spec) if with_lora else health),
            "periodSeconds": startup_period_s,
            "failureThreshold": -(-spec.engine.startup_seconds // startup_period_s),
        },
        "readinessProbe": {**health, "periodSeconds": 5, "failureThreshold": 2},
        "livenessProbe": {**health, "periodSeconds": 10, "failureThreshold": 3},
    }


def _startup_check(spec: ModelPoolSpec) -> dict[str, Any]:
    return lora.startup_check(spec, over_tls(lora.LOADER) if spec.engine.tls else lora.LOADER)


def _drain_command(spec: ModelPoolSpec, follower: bool) -> Sequence[str]:
    """The drain script; where the image has no python3, at least the time it would take."""
    return [
        "/bin/sh",
        "-c",
        'python3 -c "$0" "$1" "$2" "$3" "$4" || sleep "$3"',
        over_tls(DRAIN_SCRIPT) if spec.engine.tls else DRAIN_SCRIPT,
        str(spec.engine.port),
        str(SETTLE_S),
        str(spec.rollout.drain_seconds),
        "follow" if follower else "lead",
    ]
