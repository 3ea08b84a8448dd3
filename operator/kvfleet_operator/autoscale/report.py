"""A decision in the words of the pool's status: one condition, and `status.autoscaling`.

`ScalingActive` (HPA's name) is True while every signal can be read. What merely holds a wish back is no condition, as it
comes and goes with the load: it is in `status.autoscaling.heldBackBy`.
"""

from __future__ import annotations

from typing import Final

from kvfleet_api.modelpool import AutoscalingStatus
from kvfleet_operator.autoscale.autoscaler import PoolResult
from kvfleet_operator.autoscale.decide import Decision
from kvfleet_operator.reconcile.conditions import SCALING_ACTIVE, Finding

MAX_TEXT: Final = 1024
"""Of a ShortText."""


def scaling_active(result: PoolResult) -> Finding:
    """The condition that a decision amounts to."""
    decision = result.decision
    if result.schedule_problems:
        wrong = "; ".join(f"{problem.field}: {problem.message}" for problem in result.schedule_problems)
        return Finding(SCALING_ACTIVE, "False", "InvalidSchedule", f"{wrong}; other entries are in force")
    if decision.wish is None:
        wrong = decision.blind or "no signal has a figure yet"
        return Finding(SCALING_ACTIVE, "False", "NoMetrics", f"{wrong}; the pool stays as it is")
    if decision.blind is None:
        return Finding(SCALING_ACTIVE, "True", "ValidMetrics", "Every signal was read.")
    return Finding(SCALING_ACTIVE, "False", "SomeMetrics", f"{decision.blind}; until then no worker is removed")


def status(result: PoolResult, before: AutoscalingStatus | None, *, scaled: bool, now: str) -> AutoscalingStatus:
    """`status.autoscaling` after a step; `scaled`: it changed the number of workers at `now` (RFC 3339)."""
    decision = result.decision
    return AutoscalingStatus(
        desired_replicas=decision.desired,
        binding_signal=_binding(decision),
        last_scale_time=now if scaled else before.last_scale_time if before else None,
        held_back_by=_short(decision.held_back_by),
        forecast=_short(result.forecast.message if result.forecast else None),
        startup_seconds=None if result.startup_s is None else round(result.startup_s),
    )


def _binding(decision: Decision) -> str | None:
    if decision.binding_signal is None or decision.value is None or decision.target is None:
        return None
    return _short(f"{decision.binding_signal}: {decision.value:.4g} against {decision.target:.4g}")


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
