"""Whether routers know what a pool's workers cache, or guess: condition `CacheKnown` of pools that name a tokenizer.

It is not part of `Ready`: a pool whose caches are guessed serves, only its requests find less of what is cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from kvfleet_operator.reconcile.conditions import Finding

TYPE: Final = "CacheKnown"


@dataclass(frozen=True, slots=True)
class CacheView:
    """What a router replica goes by, in its own words."""

    mode: Literal["Precise", "Approximate"]
    reason: str
    message: str = ""


def finding(replicas: Mapping[str, CacheView | None]) -> Finding:
    """`replicas`: ready router replica → what it says of the pool; None: nothing yet."""
    if not replicas:
        return Finding(TYPE, "Unknown", "NoRouterReady", "No router replica is ready.")
    guessing = {pod: view for pod, view in sorted(replicas.items()) if view is not None and view.mode != "Precise"}
    if guessing:
        first = next(iter(guessing.values()))
        said: dict[str, list[str]] = {}
        for pod, view in guessing.items():
            said.setdefault(view.message or view.reason, []).append(pod)
        message = "; ".join(f"{', '.join(pods)}: {words}" for words, pods in said.items())
        return Finding(TYPE, "False", first.reason, f"Cached prefixes are guessed. {message}")
    silent = [pod for pod, view in sorted(replicas.items()) if view is None]
    if silent:
        return Finding(TYPE, "Unknown", "Pending", f"{', '.join(silent)} did not say yet.")
    message = f"{len(replicas)} router replicas follow the workers' KV events."
    return Finding(TYPE, "True", "EventsFollowed", message)
