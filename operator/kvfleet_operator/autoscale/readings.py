"""A signal's value as it was read, and how far it can be trusted.

`judge` is the one place that tells a usable value from one that is not: both readers call it, so that Prometheus and
the direct scrape give the same reading for the same figures.

    Fresh    usable in both directions
    Silent   everyone was asked and has no figure, as before the first request: asks for nothing, stands in nobody's way
    Partial  some routers or workers are missing: the value may be too small, so it may only add workers
    Stale    too old to say anything about now
    Absent   nothing there
    Invalid  NaN, infinite, or without a usable target
    Failed   the question could not be asked
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from typing import Final, Literal

SignalKind = Literal["AverageValue", "Value"]
"""HPA's target types. AverageValue: a total, divided by the workers. Value: a figure that is the same however many."""

DEFAULT_MAX_AGE_S: Final = 120.0
"""Twice Prometheus's default scrape interval."""


class Quality(StrEnum):
    FRESH = "Fresh"
    SILENT = "Silent"
    PARTIAL = "Partial"
    STALE = "Stale"
    ABSENT = "Absent"
    INVALID = "Invalid"
    FAILED = "Failed"


@dataclass(frozen=True, slots=True)
class Raw:
    """What a reader found for one signal, not judged yet. None: not there."""

    value: float | None
    target: float | None = None
    """Where the target is itself a metric."""
    sources: int | None = None
    """Routers or workers that contributed; None: cannot be told."""
    age_s: float | None = None
    """Age of the oldest sample; None: cannot be told."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One signal, read."""

    signal: str
    kind: SignalKind
    quality: Quality
    value: float | None = None
    target: float | None = None
    age_s: float | None = None
    message: str = ""
    """What is wrong, and what to do about it. Empty for a fresh reading."""

    @property
    def fresh(self) -> bool:
        return self.quality is Quality.FRESH

    @property
    def complete(self) -> bool:
        """Whether all there is to know is known."""
        return self.quality in (Quality.FRESH, Quality.SILENT)

    @property
    def usable(self) -> tuple[float, float] | None:
        """(value, target), where the value is at least true as a lower bound."""
        if self.quality not in (Quality.FRESH, Quality.PARTIAL) or self.value is None or self.target is None:
            return None
        return self.value, self.target


def judge(
    signal: str, kind: SignalKind, raw: Raw, *, expected_sources: int | None, source_name: str, max_age_s: float
) -> Reading:
    """The reading that `raw` amounts to. `expected_sources` None: completeness cannot be checked."""

    def reading(quality: Quality, message: str = "") -> Reading:
        return Reading(signal, kind, quality, raw.value, raw.target, raw.age_s, message)

    if raw.value is None and not raw.sources:
        return reading(Quality.ABSENT, f"no {source_name} reports it")
    if raw.value is not None and not isfinite(raw.value):
        return reading(Quality.INVALID, f"its value is {raw.value}")
    if raw.target is None:
        return reading(Quality.ABSENT, f"no {source_name} reports its target: set one in the signal")
    if not isfinite(raw.target) or raw.target <= 0:
        return reading(Quality.INVALID, f"its target is {raw.target:g}: it must be above 0")
    if raw.age_s is not None and raw.age_s > max_age_s:
        return reading(Quality.STALE, f"its oldest sample is {raw.age_s:.0f} s old, more than {max_age_s:.0f} s")
    if expected_sources == 0:
        return reading(Quality.STALE, f"no {source_name} is ready, so what was read is of the past")
    if expected_sources is not None and raw.sources is not None and raw.sources < expected_sources:
        return reading(Quality.PARTIAL, f"only {raw.sources} of {expected_sources} {source_name}s report it")
    if raw.value is None:
        return reading(Quality.SILENT, f"no {source_name} has a figure yet")
    return reading(Quality.FRESH)


def failed(signal: str, kind: SignalKind, message: str) -> Reading:
    """The reading of a question that could not be asked."""
    return Reading(signal, kind, Quality.FAILED, message=message)
