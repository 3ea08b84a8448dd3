"""LoRA in a worker's pod: the engine's flags, and how adapters get into a worker that starts.

The list of adapters is no part of the pod template, or each change of it would restart every engine. It is in a ConfigMap
that the pod mounts. A worker that starts (or whose engine was restarted) loads that list itself, in its startup probe: it
becomes ready, and gets requests, with its adapters, whether or not an operator is there. An adapter that cannot be loaded
delays a worker by `LOAD_S` at most and never keeps the base model away. Running workers follow a changed list because
the operator tells them (`kvfleet_operator.adapters`), which also says in the status what did not load, and why.

LoRA costs device memory, so engines run with it only where the pool has adapters, had some since its workload was made,
or asks for it (`--enable-lora` in `engine.args`). `--no-enable-lora` there forbids it. The flags depend on nothing else:
adding or removing adapters never changes them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Final

from kvfleet_api.modelpool import ModelPool, ModelPoolSpec
from kvfleet_api.resolve import integer_argument
from kvfleet_operator.reconcile import arguments, names
from kvfleet_operator.reconcile.plan import Manifest

ACTIVE: Final = 4
"""Adapters batched together (--max-loras). Each slot costs device memory for an adapter of `MAX_RANK`."""
MAX_RANK: Final = 64
"""Largest rank that loads (--max-lora-rank)."""
CACHED: Final = 32
"""Adapters kept in host memory (--max-cpu-loras); further ones are read again when a request asks for them."""

VOLUME: Final = "kvfleet-adapters"
FOLDER: Final = "/etc/kvfleet-adapters"
FILE: Final = "adapters.json"
RUNTIME_VARIABLE: Final = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
LOAD_S: Final = 120
"""Seconds a starting worker spends on adapters before it serves without those that are missing."""
ASK_S: Final = 5

LOADER: Final = """\
import json, os, sys, time, urllib.request
port, path, load_s, ask_s = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
host = os.environ.get("POD_IP", "127.0.0.1")
url = "http://%s:%s" % ("[%s]" % host if ":" in host else host, port)
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
end = time.monotonic() + load_s
def ask(path, body, timeout_s):
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    with direct.open(request, timeout=timeout_s) as answer:
        return answer.read()
try:
    ask("/health", None, ask_s)
except Exception as error:
    sys.exit("%s/health: %s" % (url, error))
try:
    wanted = json.load(open(path)).items()
    loaded = {card["id"] for card in json.loads(ask("/v1/models", None, ask_s))["data"]}
except Exception:
    sys.exit(0)
for name, uri in wanted:
    left_s = end - time.monotonic()
    if name in loaded or left_s <= 0:
        continue
    try:
        ask("/v1/load_lora_adapter", json.dumps({"lora_name": name, "lora_path": uri}).encode(), left_s)
    except Exception:
        pass
"""
"""The startup probe: 0 once the engine answers and each adapter was tried. The operator tells what did not load."""


def enabled(spec: ModelPoolSpec, live: Mapping[str, Any] | None) -> bool:
    """Whether the engines run with LoRA. `live`: the workload as it is; what it has it keeps until forbidden."""
    given = arguments.flags(spec.engine.args)
    if "--no-enable-lora" in given:
        return False
    return bool(spec.adapters) or "--enable-lora" in given or _runs_with_it(live)


def forbidden(spec: ModelPoolSpec) -> bool:
    return "--no-enable-lora" in arguments.flags(spec.engine.args)


def _runs_with_it(live: Mapping[str, Any] | None) -> bool:
    spec = (live or {}).get("spec") or {}
    template = spec.get("template") or (spec.get("leaderWorkerTemplate") or {}).get("leaderTemplate") or {}
    return names.LORA in ((template.get("metadata") or {}).get("labels") or {})


def flags(spec: ModelPoolSpec) -> list[list[str]]:
    active = integer_argument(spec.engine.args, "max-loras") or ACTIVE
    return [
        ["--enable-lora"],
        ["--max-loras", str(ACTIVE)],
        ["--max-lora-rank", str(MAX_RANK)],
        ["--max-cpu-loras", str(max(active, CACHED))],
    ]


def environment() -> dict[str, str]:
    return {RUNTIME_VARIABLE: "True"}


def config_map(pool: ModelPool, labels: Mapping[str, str]) -> Manifest:
    """The list, as a starting worker reads it: adapter → where it is loaded from."""
    listed = {adapter.name: adapter.uri for adapter in pool.spec.adapters}
    return names.child(
        pool, "v1", "ConfigMap", config_map_name(pool), labels, {"data": {FILE: json.dumps(listed, indent=1)}}
    )


def config_map_name(pool: ModelPool) -> str:
    return names.bounded(pool.metadata.name, "-adapters")


def volume(pool: ModelPool) -> dict[str, Any]:
    """Optional: without its list a worker serves the base model, and the operator loads the rest."""
    return {"name": VOLUME, "configMap": {"name": config_map_name(pool), "optional": True}}


def mount() -> dict[str, Any]:
    return {"name": VOLUME, "mountPath": FOLDER, "readOnly": True}


def startup_check(spec: ModelPoolSpec, loader: str = LOADER) -> dict[str, Any]:
    """The handler of the startup probe. `loader`: the script that loads."""
    command = ["python3", "-c", loader, str(spec.engine.port), f"{FOLDER}/{FILE}", str(LOAD_S), str(ASK_S)]
    return {"exec": {"command": command}, "timeoutSeconds": LOAD_S + 3 * ASK_S}


def static_names(spec: ModelPoolSpec) -> Collection[str]:
    """Adapters that `--lora-modules` in `engine.args` loads: the user's own business."""
    found = set()
    for text in arguments.values(spec.engine.args, "--lora-modules"):
        try:
            module = json.loads(text) if text.startswith("{") else {"name": text.partition("=")[0]}
        except ValueError:
            continue  # the engine will say so
        if isinstance(module, dict) and isinstance(module.get("name"), str):
            found.add(module["name"])
    return found
