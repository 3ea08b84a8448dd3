"""Whether routers know what a pool's workers cache, or guess: condition `CacheKnown` of pools that name a tokenizer, and of
policies over such pools.

It is not part of `Ready`: a pool whose caches are guessed serves, only its requests find less of what is cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from kvfleet_api.modelpool import ModelPool
from kvfleet_api.routingpolicy import RoutingPolicy
from kvfleet_operator.reconcile.conditions import Finding

TYPE: Final = "CacheKnown"
_PORTS: Final = "Let engines publish KV events (spec.engine.kvEvents), and routers reach their ports."
REMEDIES: Final = {
    "NoTokenizer": "Name the model's in spec.model.tokenizer of the ModelPool.",
    "EventsDisabled": "Set spec.engine.kvEvents.enabled of the ModelPool.",
    "TokenizerNotFound": "Create the ConfigMap (kvfleet tokenizer DIR --name NAME), or mount the volume in the FleetRouter.",
    "TokenizerInvalid": "Replace the file with the one the model is published with.",
    "EventsNotHeard": _PORTS,
    "NoEvents": _PORTS,
    "PredictionsMiss": "Name the tokenizer and chat template that the engines use.",
}
"""What to do, by the reason a router gives."""
CANNOT_BE_FOLLOWED: Final = "Take spec.model.tokenizer out of the ModelPool: guesses serve as well."
"""Of the other reasons: what is wrong is the tokenizer's or the template's nature."""


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
            said.setdefault((view.message or view.reason).removesuffix("."), []).append(pod)
        return _guessed(first.reason, "; ".join(f"{', '.join(pods)}: {words}" for words, pods in said.items()))
    silent = [pod for pod, view in sorted(replicas.items()) if view is None]
    if silent:
        return Finding(TYPE, "Unknown", "Pending", f"{', '.join(silent)} did not say yet.")
    message = f"{len(replicas)} router replicas follow the workers' KV events."
    return Finding(TYPE, "True", "EventsFollowed", message)


def of_pool(pool: ModelPool, replicas: Mapping[str, CacheView | None]) -> Finding:
    """Of one pool, by its spec and what routers say of it."""
    if pool.spec.model.tokenizer is None:
        return _guessed("NoTokenizer", "No tokenizer is named")
    if not pool.spec.engine.kv_events.enabled:
        return _guessed("EventsDisabled", "The engines do not tell what they cache")
    return finding(replicas)


def of_policy(policy: RoutingPolicy, pools: Mapping[str, Finding]) -> Finding | None:
    """Of a policy, by what is to be said `of_pool` of those of its pools that there are; None: it does not ask for more than
    guesses (no prefixes, `source: Approximate`, or `Auto` where no pool names a tokenizer)."""
    prefix = policy.spec.prefix
    if not prefix.enabled or prefix.source == "Approximate" or not pools:
        return None
    if prefix.source == "Auto" and all(found.reason == "NoTokenizer" for found in pools.values()):
        return None
    for status in ("False", "Unknown"):
        worse = {name: found for name, found in sorted(pools.items()) if found.status == status}
        if worse:
            message = "; ".join(f"pool {name}: {found.message}" for name, found in worse.items())
            return Finding(TYPE, next(iter(worse.values())).status, next(iter(worse.values())).reason, message)
    names = ", ".join(sorted(pools))
    return Finding(TYPE, "True", "EventsFollowed", f"Routers follow the KV events of the workers of {names}.")


def _guessed(reason: str, why: str) -> Finding:
    """With the remedy, where there is one but waiting."""
    remedy = "" if reason == "Loading" else " " + REMEDIES.get(reason, CANNOT_BE_FOLLOWED)
    return Finding(TYPE, "False", reason, f"Cached prefixes are guessed. {why}{'' if why[-1] in '.?' else '.'}{remedy}")
