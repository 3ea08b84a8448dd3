"""To zero after idleness, and when a pool may not sleep.

A pool is active while a request is in flight, held for it, or was served since the last look. It may go to zero after
`idleSeconds` without activity. Being woken, by whomever, is activity, and what cannot be seen counts as activity: a pool
never goes to zero because its routers could not be asked, nor while a signal is missing, nor with a request held or in
flight.

Waking needs no rule of its own: requests held for a pool at zero count into `concurrency`, and `decide` gives a pool at
zero at least one worker as soon as a signal is above zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfleet_api.modelpool import AutoscalingSpec, ScaleToZeroSpec
from kvfleet_operator.autoscale.readings import Reading


@dataclass(frozen=True, slots=True)
class Activity:
    """What is remembered of a pool's activity."""

    active_at_s: float
    """When it was last seen active, or could not be seen."""
    served: float | None
    """Requests ever served, as last read."""


def observe(before: Activity | None, busy: Reading, served: Reading, now_s: float) -> Activity:
    """Take note of the two activity readings (`signals.activity_signals`)."""
    seen = busy.fresh and served.fresh
    if not seen or before is None or before.active_at_s > now_s:
        return Activity(now_s, served.value if served.fresh else None)
    active = busy.value != 0 or served.value != before.served
    return Activity(now_s if active else before.active_at_s, served.value)


def idle_s(activity: Activity, now_s: float) -> float:
    return now_s - activity.active_at_s


def may_sleep(spec: AutoscalingSpec, activity: Activity, now_s: float) -> bool:
    """Whether the pool has been idle for long enough to go to zero."""
    if spec.min_replicas > 0:
        return False
    rule = spec.scale_to_zero or ScaleToZeroSpec()
    return idle_s(activity, now_s) >= rule.idle_seconds
