"""How many workers one pool should have: HorizontalPodAutoscaler's algorithm, as a pure function.

    each signal   AverageValue: ceil(value / target);  Value: ceil(value / target x ready workers)
                  unchanged where value and target differ by no more than the tolerance
    wish          the largest over the signals
    no fresh data a signal that is not fresh may add workers, where its value is true as a lower bound, but while any
                  signal is not fresh nothing is removed
    stabilised    within the windows of `behavior`, then limited by its rate policies, then by the bounds

From the Kubernetes documentation, "Horizontal Pod Autoscaling", sections "Algorithm details" and "Configurable scaling
behavior". Where this differs from HPA, it is on purpose:
- A Value signal above its target never removes workers, even where few of them are ready yet; with none ready it says
  nothing.
- Time without data counts as a recommendation to stay: a window must be seen, not just pass.
- The tolerance is taken around the workers wanted, not those existing, so a slow start does not take back its wish.
- A pool at zero wakes when there is demand; going to zero is not decided here but by idleness (`idleness`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

from kvfleet_api.modelpool import AutoscalingSpec
from kvfleet_operator.autoscale.behavior import Behavior, ScalerState, behavior_of, limited
from kvfleet_operator.autoscale.readings import Reading

MAX_REPLICAS = 1_000_000
"""No wish is larger, whatever a query returns."""
ROUNDING = 1e-9
"""Relative error of the arithmetic: 0.7 / 0.1 is 7, and 10 % off is within 10 %."""


@dataclass(frozen=True, slots=True)
class Workers:
    """A pool's workers."""

    wanted: int
    """`replicas` of the workload: what HPA calls the current scale."""
    ready: int
    """Those that can take requests."""


@dataclass(frozen=True, slots=True)
class Floor:
    """A lower bound beside minReplicas, and where it comes from."""

    replicas: int = 0
    source: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """The number of workers wanted, and why."""

    desired: int
    reason: str
    """One word in CamelCase, HPA's where HPA has one."""
    message: str
    """A sentence for people."""
    state: ScalerState = field(repr=False)
    binding_signal: str | None = None
    """The signal that asked for most."""
    value: float | None = None
    target: float | None = None
    wish: int | None = None
    """What the signals ask for, before anything holds it back. None: they say nothing."""
    held_back_by: str | None = None
    """What keeps the pool from that wish."""
    blind: str | None = None
    """What is wrong with the signals that could not be used in full."""
    leaving: int = 0
    """Of the workers desired, those that are likely to go once the scale-down window is over: better not filled any more."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one signal asks for."""

    reading: Reading
    replicas: int


def decide(
    spec: AutoscalingSpec,
    signals: Sequence[Reading],
    workers: Workers,
    state: ScalerState,
    now_s: float,
    *,
    floor: Floor = Floor(),
) -> Decision:
    """Workers wanted now. The decision carries the state to pass in the next time."""
    behavior = behavior_of(spec)
    state = state.observed(workers.wanted, now_s, behavior)
    proposals = [found for reading in signals if (found := propose(reading, workers, spec.tolerance_percent / 100))]
    blind = _blind(signals)
    best = max(proposals, key=lambda proposal: proposal.replicas, default=None)
    wish = best.replicas if best else None
    held = wish is None or (blind is not None and wish < workers.wanted)
    asked = workers.wanted if wish is None or held else wish
    stable = state.stabilised(asked, workers.wanted, now_s, behavior)
    moved = limited(state, stable, workers.wanted, now_s, behavior)
    desired = min(max(moved, _lowest(spec, floor, workers)), spec.max_replicas)
    steps = _Steps(workers.wanted, wish, asked, stable, moved, desired)
    reason, held_back_by = _explain(steps, spec, floor, blind, behavior)
    after = state.recommended(asked, now_s, behavior, blind=held)
    leaving = 0 if desired > workers.wanted else after.unneeded(desired, now_s, behavior)
    if behavior.down.select_policy == "Disabled":
        leaving = 0
    return Decision(
        desired,
        reason,
        _message(steps, best, held_back_by),
        after,
        binding_signal=best.reading.signal if best else None,
        value=best.reading.value if best else None,
        target=best.reading.target if best else None,
        wish=wish,
        held_back_by=held_back_by,
        blind=blind,
        leaving=max(min(leaving, desired - _lowest(spec, floor, workers)), 0),
    )


def propose(reading: Reading, workers: Workers, tolerance: float) -> Proposal | None:
    """What one signal asks for; None where it says nothing."""
    usable = reading.usable
    if usable is None:
        return None
    value, target = usable
    current = workers.wanted
    if reading.kind == "AverageValue":
        if current and abs(value / (target * current) - 1) <= tolerance + ROUNDING:
            return Proposal(reading, current)
        return Proposal(reading, _ceil(value / target))
    ratio = value / target
    if workers.ready == 0:
        return None
    if abs(ratio - 1) <= tolerance + ROUNDING:
        return Proposal(reading, current)
    asked = _ceil(ratio * workers.ready)
    return Proposal(reading, max(asked, current) if ratio > 1 else min(asked, current))


def _ceil(value: float) -> int:
    return ceil(min(max(value * (1 - ROUNDING), 0.0), MAX_REPLICAS))


def _lowest(spec: AutoscalingSpec, floor: Floor, workers: Workers) -> int:
    """Signals alone never take the last worker; only an idle pool goes to zero."""
    return min(max(spec.min_replicas, floor.replicas, 1 if workers.wanted else 0), spec.max_replicas)


def _blind(signals: Sequence[Reading]) -> str | None:
    if not signals:
        return "no signal was read"
    wrong = [
        f"{reading.signal}: {reading.quality.lower()}, {reading.message}" for reading in signals if not reading.complete
    ]
    return "; ".join(wrong) or None


@dataclass(frozen=True, slots=True)
class _Steps:
    """A number's way through the rules."""

    current: int
    wish: int | None
    asked: int
    stable: int
    moved: int
    desired: int


def _explain(
    steps: _Steps, spec: AutoscalingSpec, floor: Floor, blind: str | None, behavior: Behavior
) -> tuple[str, str | None]:
    """(reason, what holds the wish back): the last rule that changed the number."""
    up = steps.asked > steps.current
    if steps.desired < steps.moved:
        return "TooManyReplicas", f"maxReplicas {spec.max_replicas}"
    if steps.desired > steps.moved:
        return "TooFewReplicas", _floor_name(spec, floor, steps.desired)
    if steps.moved != steps.stable:
        direction = "Up" if steps.stable > steps.current else "Down"
        return f"Scale{direction}Limit", f"rate policies of scale{direction} let it go to {steps.moved} for now"
    if steps.stable != steps.asked:
        window_s, verb = (behavior.up_window_s, "fewer") if up else (behavior.down_window_s, "more")
        why = f"stabilisation: {steps.stable} or {verb} were recommended within the last {window_s} s"
        return ("ScaleUpStabilized" if up else "ScaleDownStabilized"), why
    if steps.asked != steps.wish:
        return "MissingData", f"missing data ({blind or 'no signal has a figure yet'})"
    return "DesiredWithinRange", None


def _floor_name(spec: AutoscalingSpec, floor: Floor, desired: int) -> str:
    if floor.replicas >= desired > spec.min_replicas:
        return floor.source
    return f"minReplicas {spec.min_replicas}" if spec.min_replicas == desired else "the last worker goes only when idle"


def _message(steps: _Steps, best: Proposal | None, held_back_by: str | None) -> str:
    if best is None:
        says = "no signal can be used"
    else:
        reading = best.reading
        per = " per worker" if reading.kind == "AverageValue" else ""
        says = f"{reading.signal} is {reading.value:.4g} against a target of {reading.target:.4g}{per}: asks for {steps.wish}"
    held = f"; held back by {held_back_by}" if held_back_by else ""
    verb = "stays at" if steps.desired == steps.current else f"goes from {steps.current} to"
    return f"{says}; {verb} {steps.desired}{held}"
