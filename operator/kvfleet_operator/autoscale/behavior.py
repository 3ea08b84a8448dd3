"""HorizontalPodAutoscaler's `behavior`: stabilisation windows and rates, over a state that stays small.

The state remembers two things:
- recommendations: what the signals asked for, so that a wish must hold for a window before it is followed. Of those
  only the ones that can still be a window's largest or smallest are kept.
- changes: how the number of workers really moved, so that the rate policies can look back over their periods. They
  are taken from what is observed, not from what was decided: a change that failed to apply does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Final

from kvfleet_api.modelpool import AutoscalingSpec, ScalingPolicy, ScalingRules

LONGEST_PERIOD_S: Final = 1800
LONG_GAP_S: Final = 120.0
"""No scaler that runs looks less often; one that did not look for this long does not know what it missed."""
MAX_ENTRIES: Final = 256
"""Of each kind. Beyond it the two oldest are merged into one that lives as long as the later."""
DEFAULT_UP: Final = ScalingRules(
    stabilization_window_seconds=0,
    policies=[
        ScalingPolicy(type="Percent", value=100, period_seconds=15),
        ScalingPolicy(type="Pods", value=4, period_seconds=15),
    ],
)
DEFAULT_DOWN: Final = ScalingRules(
    stabilization_window_seconds=300, policies=[ScalingPolicy(type="Percent", value=100, period_seconds=15)]
)


@dataclass(frozen=True, slots=True)
class Behavior:
    """The rules of both directions with every default filled in."""

    up: ScalingRules
    down: ScalingRules

    @property
    def up_window_s(self) -> int:
        return self.up.stabilization_window_seconds or 0

    @property
    def down_window_s(self) -> int:
        return self.down.stabilization_window_seconds or 0


def behavior_of(spec: AutoscalingSpec) -> Behavior:
    return Behavior(_filled(spec.behavior.scale_up, DEFAULT_UP), _filled(spec.behavior.scale_down, DEFAULT_DOWN))


def _filled(rules: ScalingRules | None, default: ScalingRules) -> ScalingRules:
    if rules is None:
        return default
    window = rules.stabilization_window_seconds
    return rules.model_copy(
        update={
            "stabilization_window_seconds": default.stabilization_window_seconds if window is None else window,
            "policies": rules.policies or default.policies,
        }
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """Something that happened at a time: a recommendation of so many workers, or a change by so many."""

    at_s: float
    replicas: int


@dataclass(frozen=True, slots=True)
class ScalerState:
    """What one pool's scaler remembers. Empty: it just started."""

    highs: tuple[Entry, ...] = ()
    """Recommendations that may still be the largest of the scale-down window: ever later, ever smaller."""
    lows: tuple[Entry, ...] = ()
    """Recommendations that may still be the smallest of the scale-up window: ever later, ever larger."""
    changes: tuple[Entry, ...] = ()
    wanted: int | None = None
    """Workers wanted when last looked at."""
    looked_at_s: float = 0.0

    def observed(self, wanted: int, now_s: float, behavior: Behavior) -> ScalerState:
        """Take note of the workers wanted now. What changed since the last look happened right after that look.

        A scaler that just started, whose clock was set back, or that has not looked for longer than its windows begins
        with what is there as its recommendation: nothing is removed before a whole window was seen.
        """
        gap_s = now_s - self.looked_at_s
        if self.wanted is None or gap_s < 0:
            return ScalerState(wanted=wanted, looked_at_s=now_s).recommended(wanted, now_s, behavior)
        changes = [entry for entry in self.changes if entry.at_s > now_s - LONGEST_PERIOD_S]
        if wanted != self.wanted:
            changes.append(Entry(self.looked_at_s, wanted - self.wanted))
        seen = replace(self, changes=_bounded(changes, int.__add__), wanted=wanted, looked_at_s=now_s)
        if gap_s > max(behavior.up_window_s, behavior.down_window_s, LONG_GAP_S):
            return seen.recommended(wanted, now_s, behavior)
        return seen

    def recommended(self, replicas: int, now_s: float, behavior: Behavior, *, blind: bool = False) -> ScalerState:
        """Take note of a recommendation. `blind`: there was no data, so it speaks only against scaling down."""
        entry = Entry(now_s, replicas)
        highs = [old for old in self.highs if old.at_s > now_s - behavior.down_window_s and old.replicas > replicas]
        lows = [old for old in self.lows if old.at_s > now_s - behavior.up_window_s]
        if not blind:
            lows = [*(old for old in lows if old.replicas < replicas), entry]
        return replace(self, highs=_bounded([*highs, entry], max), lows=_bounded(lows, min))

    def stabilised(self, wish: int, current: int, now_s: float, behavior: Behavior) -> int:
        """`current`, moved only as far as every recommendation of a window agrees on."""
        ups = [entry.replicas for entry in self.lows if entry.at_s > now_s - behavior.up_window_s]
        downs = [entry.replicas for entry in self.highs if entry.at_s > now_s - behavior.down_window_s]
        return min(max(current, min([wish, *ups])), max([wish, *downs]))

    def unneeded(self, current: int, now_s: float, behavior: Behavior) -> int:
        """Workers without which every recommendation of the later half of the scale-down window would have done."""
        later_s = now_s - behavior.down_window_s / 2
        return max(current - max((entry.replicas for entry in self.highs if entry.at_s > later_s), default=current), 0)

    def start_replicas(self, current: int, period_s: int, now_s: float) -> int:
        """Workers at the beginning of a period."""
        return current - sum(entry.replicas for entry in self.changes if entry.at_s > now_s - period_s)


def _bounded(entries: list[Entry], merge: Callable[[int, int], int]) -> tuple[Entry, ...]:
    while len(entries) > MAX_ENTRIES:
        first, second, *rest = entries
        entries = [Entry(second.at_s, merge(first.replicas, second.replicas)), *rest]
    return tuple(entries)


def limited(state: ScalerState, wanted: int, current: int, now_s: float, behavior: Behavior) -> int:
    """`wanted`, as far as the rate policies of its direction let `current` move now."""
    if wanted > current:
        return min(wanted, max(current, _up_limit(state, current, now_s, behavior.up)))
    if wanted < current:
        return max(wanted, min(current, _down_limit(state, current, now_s, behavior.down)))
    return wanted


def _up_limit(state: ScalerState, current: int, now_s: float, rules: ScalingRules) -> int:
    if rules.select_policy == "Disabled":
        return current
    limits = []
    for policy in rules.policies:
        start = state.start_replicas(current, policy.period_seconds, now_s)
        # Percent of nothing is nothing: from zero, the first worker is always allowed.
        grown = start + policy.value if policy.type == "Pods" else max(1, ceil(start * (100 + policy.value) / 100))
        limits.append(grown)
    return min(limits) if rules.select_policy == "Min" else max(limits)


def _down_limit(state: ScalerState, current: int, now_s: float, rules: ScalingRules) -> int:
    if rules.select_policy == "Disabled":
        return current
    limits = []
    for policy in rules.policies:
        start = state.start_replicas(current, policy.period_seconds, now_s)
        left = start - policy.value if policy.type == "Pods" else int(start * (100 - policy.value) / 100)
        limits.append(left)
    return max(limits) if rules.select_policy == "Min" else min(limits)
