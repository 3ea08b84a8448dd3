"""Objects of kvfleet as the tests write them; `more` goes into `spec`."""

from __future__ import annotations

from typing import Any

from harness.kube import Object

API_VERSION = "kvfleet.io/v1alpha1"
PROFILE = "nvidia-h100-80gb"
MODEL = "llama-8b"


def _object(kind: str, name: str, spec: Object) -> Object:
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}


def pool(name: str = "llama", replicas: int = 1, model: str = MODEL, **more: Any) -> Object:
    spec = {"model": {"name": model, "maxContextTokens": 32768}, "accelerator": {"profileRef": PROFILE}}
    return _object("ModelPool", name, {**spec, "replicas": replicas, **more})


def engine(speed: float, *args: str) -> Object:
    """`spec.engine` of a pool whose simulated seconds pass at `speed`; `env` and `args` reach the worker's container."""
    return {"env": [{"name": "E2E_SPEED", "value": f"{speed:g}"}], "args": list(args)}


def policy(name: str = "all", *pools: str, **more: Any) -> Object:
    return _object("RoutingPolicy", name, {"pools": [{"name": each} for each in pools or ("llama",)], **more})


def router(name: str = "router", replicas: int = 1, **more: Any) -> Object:
    return _object("FleetRouter", name, {"replicas": replicas, **more})


def profile(name: str, product: str = "E2E-Accelerator") -> Object:
    """An AcceleratorProfile of the least that one needs."""
    prior = {
        "stepMicrosecondsPerWeightGB": 500,
        "stepNanosecondsPerSequence": 20_000,
        "prefillNanosecondsPerBillionParameters": 4_000,
        "stepMillijoulesPerWeightGB": 100,
        "tokenMicrojoulesPerBillionParameters": 500,
        "prefillTokenMicrojoulesPerBillionParameters": 500,
        "kvBytesPerTokenPerBillionParameters": 16_000,
    }
    spec = {
        "accelerator": {"product": product, "memoryGiB": 80},
        "power": {"idleWatts": 100, "maxWatts": 700},
        "prior": prior,
    }
    return _object("AcceleratorProfile", name, spec)
