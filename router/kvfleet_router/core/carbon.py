"""Carbon intensity of the electricity over the day."""

from __future__ import annotations

from typing import Final

from kvfleet_api.fleetrouter import TelemetrySpec

HOUR_S: Final = 3600.0


def grams_per_kwh(spec: TelemetrySpec, hour: int) -> float | None:
    """Carbon intensity at an hour of the day (UTC)."""
    hours = sorted((entry.hour, entry.grams_per_kilowatt_hour) for entry in spec.carbon_by_hour)
    if not hours:
        return spec.carbon_grams_per_kilowatt_hour
    begun = [grams for from_hour, grams in hours if from_hour <= hour]
    return begun[-1] if begun else hours[-1][1]  # before the first of the day, yesterday's last holds


def grams_by_hour(spec: TelemetrySpec | None) -> tuple[float, ...]:
    """24 intensities; empty where the intensity is the same all day, or not known."""
    if spec is None or not spec.carbon_by_hour:
        return ()
    found = tuple(grams_per_kwh(spec, hour) or 0.0 for hour in range(24))
    return found if len(set(found)) > 1 else ()
