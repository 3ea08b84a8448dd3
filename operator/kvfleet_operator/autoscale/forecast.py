"""Demand ahead of time: what a day and a week usually bring, and how today differs from that.

    season(slot)  mean demand around that slot of the week, leaning on the same slot of every day while weeks are few
    level         today's demand relative to the season: the trend, damped with the distance
    forecast(h)   season(now + h) x (1 + (level − 1)·exp(−h/DAMPING_S))

A forecast is only ever a lower bound: it starts workers before the load comes, because a worker takes minutes to load
its model, and keeps those that will be needed again before they could be started anew. It is used once a day was seen,
and only while its own past forecasts were good: each one is kept and compared with what came.

Memory is fixed: a few arrays of a week's slots. All times are Unix seconds; seasons are UTC days and weeks, so a
daylight-saving change shifts the pattern by an hour for about a week.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, exp, isfinite
from typing import Final

import numpy as np

DAY_S: Final = 86_400
WEEK_S: Final = 7 * DAY_S
DEFAULT_STARTUP_S: Final = 300.0
"""How far to look ahead while nobody knows how long a worker takes."""
MAX_LEAD_S: Final = 6 * 3600.0
"""No forecast reaches further."""

LEARNED_SEASONS: Final = 4
"""After so many visits a slot forgets: each further one counts for a fourth."""
OUTLIER: Final = 3.0
"""Demand this many times the usual counts as no more than that, so that one odd hour does not return every day."""
SMOOTHED_S: Final = 600
"""A slot's season is the mean of what lies this far around it, nearer slots counting for more: one day's noise is not
next day's forecast."""
LEVEL_MEMORY_S: Final = 3000.0
"""The level is an average over about this long: a morning that begins a little late must not count as a quiet day."""
DAMPING_S: Final = 30_000.0
"""Today's difference from the season fades with the distance."""
LEVEL_BOUNDS: Final = (0.2, 5.0)
ERROR_MEMORY_S: Final = DAY_S / 2
"""Errors are averaged over about this long."""
SCORED_S: Final = DAY_S / 4
"""For so long forecasts must have been compared with what came before any is used."""
MIN_CONFIDENCE: Final = 0.6
SEEN_DAY: Final = 0.9
"""Share of a day's slots that must have been seen: a short gap is no reason to wait for another day."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The largest demand expected until a worker started now would be ready."""

    demand: float
    confidence: float
    """1 − (mean error / mean demand) of past forecasts that reached as far; 0 while nothing is known."""
    usable: bool
    message: str


class SeasonalForecaster:
    """Learns one pool's demand. `observe` it at any rate; `forecast` when wanted."""

    def __init__(self, slot_s: int = 300) -> None:
        if slot_s <= 0 or DAY_S % slot_s:
            raise ValueError(f"slot_s {slot_s} must divide a day ({DAY_S} s): use 300, 600 or 900")
        self.slot_s = slot_s
        self._days = _Season(DAY_S // slot_s, SMOOTHED_S // slot_s)
        self._weeks = _Season(WEEK_S // slot_s, SMOOTHED_S // slot_s)
        self._slot: int | None = None
        self._sum = 0.0
        self._count = 0
        self._closed: int | None = None
        self._level = 1.0
        self._lead_slots = 1
        self._made: deque[tuple[int, float]] = deque(maxlen=ceil(MAX_LEAD_S / slot_s) + 1)
        self._error = 0.0
        self._demand = 0.0
        self._scored = 0
        self._scored_enough = ceil(SCORED_S / slot_s)

    def observe(self, now_s: float, demand: float) -> None:
        """Demand as it is at a time. Times must not decrease; what is older than the current slot is ignored."""
        if not isfinite(demand) or demand < 0:
            return
        slot = int(now_s // self.slot_s)
        if self._slot is not None and slot < self._slot:
            return
        if self._slot is not None and slot > self._slot and self._count:
            self._close(self._slot, self._sum / self._count)
        if slot != self._slot:
            self._slot, self._sum, self._count = slot, 0.0, 0
        self._sum += demand
        self._count += 1

    def learn(self, history: Iterable[tuple[float, float]]) -> None:
        """Observe a past, as (Unix time, demand) in order of time."""
        for at_s, demand in history:
            self.observe(at_s, demand)

    def forecast(self, now_s: float, lead_s: float) -> Forecast:
        """The largest demand expected from now until one slot after `lead_s`."""
        lead_s = min(max(lead_s, 0.0), MAX_LEAD_S)
        self._lead_slots = max(1, ceil(lead_s / self.slot_s))
        first = int(now_s // self.slot_s)
        expected = [self._expected(first + ahead) for ahead in range(1, self._lead_slots + 2)]
        known = [demand for demand in expected if demand is not None]
        confidence = self.confidence
        seen = self._days.visited / self._days.slots
        if not known or seen < SEEN_DAY:
            return Forecast(max(known, default=0.0), confidence, False, f"learning: {seen:.0%} of a day seen")
        if self._scored < self._scored_enough:
            message = f"learning: {self._scored} of {self._scored_enough} forecasts compared"
            return Forecast(max(known), 0.0, False, message)
        message = f"{max(known):.4g} within {lead_s / 60:.0f} min (confidence {confidence:.0%})"
        return Forecast(max(known), confidence, confidence >= MIN_CONFIDENCE, message)

    @property
    def confidence(self) -> float:
        if self._scored < self._scored_enough:
            return 0.0
        return max(0.0, 1.0 - self._error / self._demand) if self._demand > 0 else 1.0

    def _close(self, slot: int, demand: float) -> None:
        """A slot is over: compare, learn, and forecast the slot a lead ahead."""
        self._score(slot, demand)
        usual = self._usual(slot)
        if usual is not None:
            self._track(slot, demand, usual)
            demand = min(demand, OUTLIER * (usual + self._small))
        self._closed = slot
        self._days.add(slot, demand)
        self._weeks.add(slot, demand)
        ahead = self._expected(slot + self._lead_slots)
        if ahead is not None:
            self._made.append((slot + self._lead_slots, ahead))

    def _track(self, slot: int, demand: float, usual: float) -> None:
        """Today's demand relative to the season; slots without data pull it back to 1."""
        gap = slot - self._closed if self._closed is not None else 1
        level = 1 + (self._level - 1) * self._fading(gap)
        ratio = float(np.clip((demand + self._small) / (usual + self._small), *LEVEL_BOUNDS))
        self._level = level + (1 - exp(-self.slot_s / LEVEL_MEMORY_S)) * (ratio - level)

    def _fading(self, slots: int) -> float:
        """What so many slots leave of a difference from the season."""
        return exp(-slots * self.slot_s / DAMPING_S)

    def _score(self, slot: int, demand: float) -> None:
        while self._made and self._made[0][0] <= slot:
            made_for, expected = self._made.popleft()
            if made_for == slot:
                self._scored = min(self._scored + 1, self._scored_enough)
                gain = max(self.slot_s / ERROR_MEMORY_S, 1 / self._scored)
                self._error += gain * (abs(expected - demand) - self._error)
                self._demand += gain * (demand - self._demand)

    def _expected(self, slot: int) -> float | None:
        usual = self._usual(slot)
        if usual is None or self._closed is None:
            return usual
        level = 1 + (self._level - 1) * self._fading(max(slot - self._closed, 1))
        return max(0.0, (usual + self._small) * level - self._small)

    def _usual(self, slot: int) -> float | None:
        """The season's demand of a slot: of its week, leaning on its day with the weight of one week."""
        days, day = self._days.of(slot)
        weeks, week = self._weeks.of(slot)
        if days == 0:
            return None
        return (weeks * week + day) / (weeks + 1)

    @property
    def _small(self) -> float:
        """Added to demand and season before they are divided, so that quiet nights do not make wild ratios."""
        return 0.05 * self._days.mean + 1e-9


class _Season:
    """The mean of each slot of a repeating period, smoothed over its neighbours when read."""

    def __init__(self, slots: int, reach: int) -> None:
        self.slots = slots
        self._offsets = np.arange(-reach, reach + 1)
        self._weights = reach + 1.0 - np.abs(self._offsets)
        self._means = np.zeros(slots)
        self._visits = np.zeros(slots, dtype=np.int16)
        self.visited = 0
        self._sum = 0.0

    def add(self, slot: int, demand: float) -> None:
        index = slot % self.slots
        visits = int(self._visits[index])
        if visits == 0:
            self.visited += 1
        change = (demand - self._means[index]) / (min(visits, LEARNED_SEASONS - 1) + 1)
        self._means[index] += change
        self._sum += float(change)
        self._visits[index] = min(visits + 1, LEARNED_SEASONS)

    def of(self, slot: int) -> tuple[int, float]:
        """(visits, smoothed mean) of a slot."""
        visits = int(self._visits[slot % self.slots])
        if visits == 0:
            return 0, 0.0
        around = (slot + self._offsets) % self.slots
        weights = self._weights * (self._visits[around] > 0)
        return visits, float(self._means[around] @ weights / weights.sum())

    @property
    def mean(self) -> float:
        """Over the slots visited."""
        return max(self._sum, 0.0) / self.visited if self.visited else 0.0
