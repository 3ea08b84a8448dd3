"""What power telemetry says of one worker, and whether it may be believed. Pure.

A Meter takes readings of a worker's devices (joules since boot, watts) and yields the joules between two of them. Counters go
back to zero when a device's host reboots: what a device shows after a fall is what it drew since. A reading that cannot be
true is never used; it says why, and for `RECOVERY_READINGS` good ones after it the worker's telemetry is not trusted.

    Learning   no interval measured yet: the profile's figures stand
    Measured   fresh and plausible
    Stale      no reading for `stale_s`
    Frozen     the counters stand still although the device is powered
    Absurd     negative, not a number, or more than a device can draw
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite

MAX_DEVICE_WATTS = 3000.0
"""No accelerator draws more; a profile's power limit is no bound, boards exceed it for seconds."""
DEFAULT_STALE_S = 60.0
FROZEN_AFTER_S = 60.0
RECOVERY_READINGS = 3
MIN_INTERVAL_S = 0.5
"""Readings closer together say nothing: counters move in steps of some 100 ms."""


class State(StrEnum):
    LEARNING = "Learning"
    MEASURED = "Measured"
    STALE = "Stale"
    FROZEN = "Frozen"
    ABSURD = "Absurd"


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """One device as its exporter shows it; None: not shown."""

    joules: float | None
    """Since boot."""
    watts: float | None = None


@dataclass(frozen=True, slots=True)
class Interval:
    """What a worker drew between two readings."""

    seconds: float
    joules: float
    resets: int = 0
    """Devices whose counter began anew."""


class Meter:
    """One worker's telemetry."""

    def __init__(self, now: float, *, stale_s: float = DEFAULT_STALE_S) -> None:
        self._stale_s = stale_s
        self._counters: dict[str, float] = {}
        self._read_at: float | None = None
        self._moved_at = now
        self._heard_at = now
        self._distrust = 0
        self._measured = False
        self.problem = ""
        """What was wrong with the last reading that could not be used."""
        self.joules = 0.0
        """Of all intervals."""
        self.resets = 0

    def observe(self, devices: Mapping[str, DeviceReading], now: float) -> Interval | None:
        """Take a reading of all the worker's devices; the interval since the last good one, if there is one."""
        wrong = _wrong(devices)
        if wrong:
            self._doubt(wrong)
            return None
        counters = {name: reading.joules for name, reading in devices.items() if reading.joules is not None}
        since, before = self._read_at, self._counters
        if since is not None and counters.keys() == before.keys():
            if now - since < MIN_INTERVAL_S:
                return None
            return self._interval(counters, before, now - since, now)
        self._begin(counters, now)
        return None

    def _interval(
        self, counters: dict[str, float], before: dict[str, float], seconds: float, now: float
    ) -> Interval | None:
        resets = sum(value < before[name] for name, value in counters.items())
        joules = sum(value - before[name] if value >= before[name] else value for name, value in counters.items())
        if joules > MAX_DEVICE_WATTS * len(counters) * seconds:
            self._doubt(f"{joules / seconds:.0f} W from {len(counters)} device(s)")
            self._begin(counters, now)
            return None
        if resets and self._distrust:  # back from what could not be: it did not begin anew
            self._begin(counters, now)
            return None
        self._heard_at = now
        if joules <= 0.0 and not resets:
            if now - self._moved_at >= FROZEN_AFTER_S:
                self.problem = f"the counter has not moved for {now - self._moved_at:.0f} s"
            return None  # the next one that moves covers this time, too
        self._begin(counters, now)
        self._measured = True
        self._distrust = max(self._distrust - 1, 0)
        self.joules += joules
        self.resets += resets
        return Interval(seconds, joules, resets)

    @property
    def begun_at(self) -> float | None:
        """When the interval began that the next good reading ends."""
        return self._read_at

    def _begin(self, counters: dict[str, float], now: float) -> None:
        self._counters, self._read_at = counters, now
        self._heard_at = self._moved_at = now

    def _doubt(self, problem: str) -> None:
        self.problem = problem
        self._distrust = RECOVERY_READINGS

    def state(self, now: float) -> State:
        """How far the telemetry can be trusted now."""
        if self._distrust:
            return State.ABSURD
        if now - self._heard_at > self._stale_s:
            return State.STALE
        if self._read_at is not None and now - self._moved_at >= FROZEN_AFTER_S:
            return State.FROZEN
        return State.MEASURED if self._measured else State.LEARNING


def _wrong(devices: Mapping[str, DeviceReading]) -> str:
    for name, reading in devices.items():
        for unit, value, most in (("J", reading.joules, None), ("W", reading.watts, MAX_DEVICE_WATTS)):
            if value is None:
                continue
            if not isfinite(value) or value < 0 or (most is not None and value > most):
                return f"device {name[:64]} shows {value:g} {unit}"
    if not any(reading.joules is not None for reading in devices.values()):
        return "no device shows an energy counter (DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION)"
    return ""
