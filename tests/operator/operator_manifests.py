"""Manifests for tests: valid ones, with whatever a test wants otherwise."""


def own(kind, name, spec, **metadata):
    scope = {} if kind == "AcceleratorProfile" else {"namespace": "default"}
    return {
        "apiVersion": "kvfleet.io/v1alpha1",
        "kind": kind,
        "metadata": {"name": name, **scope, **metadata},
        "spec": spec,
    }


def profile(name="h100", product="NVIDIA-H100-80GB-HBM3", **metadata):
    prior = {
        "stepMicrosecondsPerWeightGB": 420, "stepNanosecondsPerSequence": 89000,
        "prefillNanosecondsPerBillionParameters": 5000, "stepMillijoulesPerWeightGB": 190,
        "tokenMicrojoulesPerBillionParameters": 8300, "prefillTokenMicrojoulesPerBillionParameters": 2750,
        "kvBytesPerTokenPerBillionParameters": 16384,
    }  # fmt: skip
    accelerator = {"product": product, "memoryGiB": 80}
    spec = {"accelerator": accelerator, "power": {"idleWatts": 115, "maxWatts": 700}, "prior": prior}
    return own("AcceleratorProfile", name, spec, **metadata)


def pool(name="llama", profile="h100", metadata=None, **spec):
    model = {"name": "llama-8b", "uri": "meta-llama/Llama-3.1-8B-Instruct"}
    spec = {"model": model, "accelerator": {"profileRef": profile}, **spec}
    return own("ModelPool", name, spec, **(metadata or {}))


def policy(name="policy", pools=("llama",), metadata=None, **spec):
    return own("RoutingPolicy", name, {"pools": [{"name": pool} for pool in pools], **spec}, **(metadata or {}))


def router(name="router", metadata=None, **spec):
    return own("FleetRouter", name, spec, **(metadata or {}))


def router_pod(name="router-0", ip="127.0.0.1", ready=True, router="router"):
    labels = {
        "app.kubernetes.io/managed-by": "kvfleet-operator", "app.kubernetes.io/component": "router",
        "kvfleet.io/router": router,
    }  # fmt: skip
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    metadata = {"name": name, "namespace": "default", "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": {"podIP": ip, "conditions": conditions}}


def worker_pod(name="w1", ip="127.0.0.1", ready=True, pool="llama", since="2026-01-01T00:00:00Z", with_lora=True):
    labels = {
        "app.kubernetes.io/managed-by": "kvfleet-operator", "app.kubernetes.io/component": "engine",
        "kvfleet.io/pool": pool, **({"kvfleet.io/lora": "enabled"} if with_lora else {}),
    }  # fmt: skip
    conditions = [{"type": "Ready", "status": "True" if ready else "False", "lastTransitionTime": since}]
    metadata = {"name": name, "namespace": "default", "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": {"podIP": ip, "conditions": conditions}}
