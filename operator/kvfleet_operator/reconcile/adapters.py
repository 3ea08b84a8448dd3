"""LoRA adapters of running workers: wanted × loaded → calls, the engine's answers → what is wrong, both → a condition.

The pool owns its workers' adapters: what is neither in `spec.adapters` nor in `--lora-modules` is unloaded. Calls are
idempotent: that an adapter is loaded already, or not there any more, is as good as done.

An adapter whose `uri` changed is not loaded again under its name: vLLM finds cached prefixes by an adapter's name and
would answer from the former one's (https://github.com/vllm-project/vllm/issues/42125).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from kvfleet_api.modelpool import ModelPoolSpec
from kvfleet_operator.reconcile import lora
from kvfleet_operator.reconcile.conditions import Finding
from kvfleet_operator.reconcile.rollout import Rollout

TYPE: Final = "AdaptersLoaded"
WORKER: Final = ""
"""In place of an adapter's name: what is wrong with the worker as a whole."""
MAX_ADAPTERS: Final = 4096
MAX_WORDS: Final = 300
"""Characters of an engine's own words that are passed on."""
_WORKER_ERROR = re.compile(r"Worker failed with error '(.*?)', please check", re.DOTALL)


class NoList(ValueError):
    """What the worker answered is no list of models."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to a worker."""

    action: Literal["load", "unload"]
    name: str
    uri: str = ""

    @property
    def path(self) -> str:
        return f"/v1/{self.action}_lora_adapter"

    @property
    def body(self) -> dict[str, str]:
        return {"lora_name": self.name} | ({"lora_path": self.uri} if self.action == "load" else {})


@dataclass(frozen=True, slots=True)
class WorkerAdapters:
    """What is known of a ready worker."""

    loaded: Mapping[str, str] = field(default_factory=dict)
    """Adapter → where it was loaded from."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Adapter (or `WORKER`) → why it is not as wanted."""
    lora: bool = True
    """False: of a template without LoRA; the rollout replaces it."""


def wanted(spec: ModelPoolSpec) -> dict[str, str]:
    """Adapter → where to load it from."""
    return {adapter.name: adapter.uri for adapter in spec.adapters}


def read_models(body: bytes) -> dict[str, str]:
    """The adapters in an answer to GET /v1/models: those with a parent. Raises NoList."""
    try:
        cards = json.loads(body)["data"]
        found = {str(card["id"]): str(card.get("root") or "") for card in cards if card.get("parent") is not None}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NoList(f"GET /v1/models: no list of models ({type(error).__name__})") from error
    if len(found) > MAX_ADAPTERS:
        raise NoList(f"GET /v1/models: lists {len(found)} adapters")
    return found


def calls(want: Mapping[str, str], loaded: Mapping[str, str], static: Collection[str]) -> list[Call]:
    """What makes a worker's adapters those of the pool: unloads first, they make room."""
    unloads = [Call("unload", name) for name in sorted(loaded) if name not in want and name not in static]
    return unloads + [Call("load", name, uri) for name, uri in want.items() if name not in loaded]


def verdict(call: Call, status: int, body: bytes) -> str | None:
    """None where the worker is now as the call wants it, else what is wrong and what to do."""
    text, kind = _error(body)
    known = kind is not None  # of an engine that has the endpoint: others answer {"detail": …}
    if status == 200 or (status == 400 and call.action == "load" and "already been loaded" in text):
        return None
    if status == 404 and call.action == "unload" and known:
        return None
    if status in (404, 405) and not known:
        return f"the engine does not load adapters at run time: leave {lora.RUNTIME_VARIABLE} and --enable-lora as they are"
    if status == 401:
        return "the engine asks for an API key: remove it, routers and operator hold none for engines"
    if status == 404:
        return f"{text}: correct its uri; it must be a repository, or a path inside the container"
    if "max_lora_rank" in text:
        return f"{text} set --max-lora-rank in engine.args"
    return f"{text or 'no reason given'} (HTTP {status})"


def _error(body: bytes) -> tuple[str, str | None]:
    """(message, type) of an engine's error; type None where it is none of the OpenAI API's."""
    try:
        error = json.loads(body)["error"]
        text, kind = str(error["message"]), str(error["type"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return body[:MAX_WORDS].decode(errors="replace").strip(), None
    found = _WORKER_ERROR.search(text)
    return (found[1] if found else text)[:MAX_WORDS], kind


def everywhere(want: Mapping[str, str], workers: Mapping[str, WorkerAdapters | None]) -> list[str]:
    """The adapters that every ready worker has; workers that were not asked yet do not count."""
    asked = [worker for worker in workers.values() if worker is not None]
    return [name for name, uri in want.items() if asked and all(worker.loaded.get(name) == uri for worker in asked)]


def finding(spec: ModelPoolSpec, reading: Rollout | None, workers: Mapping[str, WorkerAdapters | None]) -> Finding:
    """`workers`: the ready ones; None: not asked yet. Unknown while it is merely a matter of time."""
    want = wanted(spec)
    asked = {name: worker for name, worker in workers.items() if worker is not None}
    if problem := _problem(want, asked):
        return problem
    if not want:
        return Finding(TYPE, "True", "NoAdapters", "The pool has no adapters.")
    if lora.forbidden(spec):
        return Finding(TYPE, "False", "LoraDisabled", "engine.args has --no-enable-lora: remove it, or the adapters")
    if reading is not None and reading.wanted == 0:
        return Finding(TYPE, "True", "ScaledToZero", "A worker that starts loads them.")
    if not workers:
        return Finding(TYPE, "Unknown", "NoneReady", "No worker is ready.")
    if without := [name for name, worker in asked.items() if not worker.lora]:
        message = f"{len(without)} of {len(workers)} ready workers run without LoRA until the rollout has replaced them"
        return Finding(TYPE, "Unknown", "RollingOut", message)
    missing = [name for name in want if name not in everywhere(want, workers)]
    if missing:
        return Finding(TYPE, "Unknown", "Loading", f"{_listed(missing)}: not yet on every ready worker")
    return Finding(TYPE, "True", "Loaded", f"{len(want)} adapter(s) on every ready worker ({len(asked)})")


def _problem(want: Mapping[str, str], asked: Mapping[str, WorkerAdapters]) -> Finding | None:
    """What does not mend itself: (adapter, why) with the workers it happened on, equal ones told once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for worker, known in sorted(asked.items()):
        for name, why in known.failures.items():
            reason = "Unreachable" if name == WORKER else "LoadFailed" if name in want else "UnloadFailed"
            found.setdefault((reason, name, why), []).append(worker)
        for name, uri in known.loaded.items():
            if name in want and want[name] != uri:
                why = f"loaded from {uri}, and no engine can exchange it under its name: choose another name, or restart the workers"
                found.setdefault(("UriChanged", name, why), []).append(worker)
    if not found:
        return None
    message = "; ".join(
        f"{f'{name}: ' if name else ''}{why} ({_listed(workers, 2)})" for (_, name, why), workers in found.items()
    )
    return Finding(TYPE, "False", next(iter(found))[0], message)


def _listed(items: Sequence[str], limit: int = 5) -> str:
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")
