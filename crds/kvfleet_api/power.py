"""The least that power budgets must allow for."""

from __future__ import annotations

from kvfleet_api.cost import CostModel


def least_watts(cost: CostModel, workers: int) -> tuple[float, float]:
    """What `workers` (at least one) draw when idle, and what the first request on one of them adds. Watts."""
    step_s = cost.decode_step_s(1, 0)
    working = cost.decode_step_joules(1, 0) / step_s if step_s > 0 else 0.0
    return cost.idle_watts * max(workers, 1), max(working - cost.idle_watts, 0.0)
