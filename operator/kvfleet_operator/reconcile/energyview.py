"""What routers learned of a pool's energy, and whether joules steer: condition `EnergyTrusted`, `status.energy` of a pool and
`status.estimates` of its AcceleratorProfile. Of pools in a namespace whose routers have `spec.telemetry`.

Coefficients move a little with every interval. Only what moved noticeably (`moved`) is news: else every poll of the routers
would write a status. The condition is no part of `Ready`: a pool whose joules are not believed serves, by the latency policy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import floor, log10
from typing import Any, Final

from kvfleet_api.acceleratorprofile import Estimate
from kvfleet_api.acceleratorprofile import Learned as Reported
from kvfleet_api.modelpool import EnergyStatus
from kvfleet_operator.reconcile.conditions import Finding

TYPE: Final = "EnergyTrusted"
BY_SEVERITY: Final = ("Absurd", "Frozen", "Stale", "LowConfidence", "Learning", "Profile", "Measured")
"""Where a router says that joules come from; worst first."""
MOVED: Final = 0.05
"""A coefficient that moved by less is no news, …"""
GROWN: Final = 2.0
"""… nor is it that more is known of it, up to this factor."""
PAST: Final = 200
"""Samples that count: what was learned from more is not better known, as routers forget."""
MAX_ESTIMATES: Final = 512
DIGITS: Final = 3


@dataclass(frozen=True, slots=True)
class Learned:
    """A coefficient: joules, or watts when idle."""

    value: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class EnergyView:
    """What a router replica says of a pool."""

    source: str
    trusted: bool
    message: str = ""
    error: float = 0.0
    """By how much intervals differ from what the coefficients say, as a share of it."""
    intervals: int = 0
    estimates: Mapping[str, Learned] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PoolEnergy:
    """A pool as its profile sees it."""

    pool: str
    """`namespace/name`."""
    model: str
    tensor_parallel: int
    view: EnergyView


def moved(before: EnergyView | None, after: EnergyView) -> bool:
    """There is something new to say."""
    if before is None or (before.source, before.trusted) != (after.source, after.trusted):
        return True
    if _grown(before.intervals, after.intervals) or before.estimates.keys() != after.estimates.keys():
        return True
    return any(_differs(before.estimates[name], learned) for name, learned in after.estimates.items())


def _differs(before: Learned, after: Learned) -> bool:
    apart = abs(after.value - before.value)
    return apart > MOVED * abs(before.value) or _grown(before.standard_error, after.standard_error)


def _grown(before: float, after: float) -> bool:
    return not before <= GROWN * after or not after <= GROWN * before


def steady(before: Mapping[str, EnergyView], after: Mapping[str, EnergyView]) -> dict[str, EnergyView]:
    """Pool → what it said before, as long as nothing noticeable is new."""
    return {pool: view if moved(before.get(pool), view) else before[pool] for pool, view in after.items()}


def best(replicas: Iterable[EnergyView | None]) -> EnergyView | None:
    """The words of the replica that learned most."""
    return max((view for view in replicas if view is not None), key=lambda view: view.intervals, default=None)


def finding(replicas: Mapping[str, EnergyView | None]) -> Finding:
    """`replicas`: ready router replica → what it says of the pool; None: nothing yet."""
    if not replicas:
        return Finding(TYPE, "Unknown", "NoRouterReady", "No router replica is ready.")
    said = {pod: view for pod, view in sorted(replicas.items()) if view is not None}
    doubting = {pod: view for pod, view in said.items() if not view.trusted}
    if doubting:
        words = "; ".join(f"{pod}: {view.message or view.source}" for pod, view in doubting.items())
        return Finding(TYPE, "False", _worst(doubting.values()), f"Joules do not steer requests. {words}")
    silent = [pod for pod in sorted(replicas) if pod not in said]
    if silent:
        return Finding(TYPE, "Unknown", "Pending", f"{', '.join(silent)} did not say yet.")
    reason = _worst(said.values())
    return Finding(TYPE, "True", reason, f"What {len(said)} router replicas count with: {_MEANING[reason]}.")


_MEANING: Final = {
    "Learning": "the profile's figures, until something is measured",
    "Profile": "the profile's figures, as no telemetry is read",
    "Measured": "what telemetry taught them",
}


def _worst(views: Iterable[EnergyView]) -> str:
    return min((view.source for view in views), key=BY_SEVERITY.index)


def pool_status(replicas: Iterable[EnergyView | None], before: EnergyStatus | None) -> dict[str, Any] | None:
    """`status.energy`; as it was while nothing noticeable is new, or nobody says anything."""
    views = [view for view in replicas if view is not None]
    told = best(views)
    source = _worst(views) if views else ""
    if told is None or (before is not None and before.source == source and not _news(before, told)):
        return None if before is None else before.model_dump(by_alias=True, mode="json")
    return {
        "source": source,
        "errorPercent": round(100 * told.error),
        "samples": told.intervals,
        "coefficients": [{"coefficient": name, **_micro(learned)} for name, learned in told.estimates.items()],
    }


def _news(before: EnergyStatus, told: EnergyView) -> bool:
    estimates: dict[str, Learned] = {entry.coefficient: _learned(entry) for entry in before.coefficients}
    return moved(replace(told, intervals=before.samples, estimates=estimates), told)


def estimates(
    pools: Iterable[PoolEnergy], before: Sequence[Estimate], foreign: Collection[str], now: str
) -> list[dict[str, Any]]:
    """`status.estimates` of the profile that these pools refer to.

    What was learned stays until something at least as well founded differs noticeably. `foreign`: the pools of namespaces that
    another operator looks after; what was learned there is its matter.
    """
    found: dict[tuple[str, int, str], Estimate] = {
        (entry.model, entry.tensor_parallel, entry.coefficient): entry for entry in before
    }
    ranked = sorted(pools, key=lambda pool: (-min(pool.view.intervals, PAST), pool.pool))
    judged: set[tuple[str, int, str]] = set()
    for pool in ranked:
        for name, learned in pool.view.estimates.items():
            key = (pool.model, pool.tensor_parallel, name)
            known = found.get(key)
            if key in judged or not pool.view.intervals:
                continue
            judged.add(key)
            if known is None or (known.pool not in foreign and _replaces(pool.view, learned, known)):
                entry = {"model": pool.model, "tensorParallel": pool.tensor_parallel, "coefficient": name}
                told = {"pool": pool.pool, "samples": pool.view.intervals, "lastUpdateTime": now}
                found[key] = Estimate.model_validate({**entry, **_micro(learned), **told})
    ordered = sorted(found.values(), key=lambda entry: (entry.model, entry.tensor_parallel, entry.coefficient))
    return [entry.model_dump(by_alias=True, exclude_none=True) for entry in ordered[:MAX_ESTIMATES]]


def _replaces(view: EnergyView, learned: Learned, known: Estimate) -> bool:
    if view.intervals < min(known.samples, PAST):
        return False
    return _differs(_learned(known), learned) or _grown(known.samples, view.intervals)


def _learned(entry: Reported) -> Learned:
    return Learned(entry.value_microunits / 1e6, entry.standard_error_microunits / 1e6)


def _micro(learned: Learned) -> dict[str, int]:
    return {
        "valueMicrounits": _rounded(learned.value * 1e6),
        "standardErrorMicrounits": _rounded(learned.standard_error * 1e6),
    }


def _rounded(value: float) -> int:
    """To DIGITS significant digits: more are noise."""
    return 0 if value == 0 else int(round(value, DIGITS - 1 - floor(log10(abs(value)))))
