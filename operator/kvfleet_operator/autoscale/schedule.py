"""Lower bounds by the clock: a cron expression says when an entry begins, a duration how long it lasts.

An entry is active while one of its beginnings lies within the last `durationMinutes`. Cron semantics, daylight saving
included, are Debian cron's, by the library `cronsim`: a beginning that a clock change skips happens right after the
change, and one that it repeats happens once. Several active entries: the largest lower bound counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from kvfleet_api.modelpool import ScheduleEntry
from kvfleet_operator.autoscale.decide import Floor


class ScheduleError(ValueError):
    """An entry that cannot be evaluated. `field` is its field that is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class ScheduleProblem:
    """One entry that is not in force, in the words of a condition."""

    field: str
    message: str


def schedule_floor(entries: Iterable[ScheduleEntry], now_s: float) -> tuple[Floor, list[ScheduleProblem]]:
    """The largest lower bound in force at Unix time `now_s`. Wrong entries are reported, the others still count."""
    best, problems = Floor(), []
    for index, entry in enumerate(entries):
        try:
            if entry.min_replicas > best.replicas and is_active(entry, now_s):
                best = Floor(entry.min_replicas, f"schedule {entry.start!r} ({entry.time_zone}): {entry.min_replicas}")
        except ScheduleError as error:
            problems.append(ScheduleProblem(f"spec.autoscaling.schedule[{index}].{error.field}", str(error)))
    return best, problems


def is_active(entry: ScheduleEntry, now_s: float) -> bool:
    """Whether one of the entry's beginnings lies within the last `durationMinutes`."""
    now = datetime.fromtimestamp(now_s, UTC)
    earliest = now - timedelta(minutes=entry.duration_minutes)
    # Started inside an hour that the clock repeats, CronSim may first yield a beginning that is already past.
    begins = next((begins for begins in _cron(entry, earliest) if begins.astimezone(UTC) > earliest), None)
    return begins is not None and begins.astimezone(UTC) <= now


def _cron(entry: ScheduleEntry, after: datetime) -> CronSim:
    """The entry's beginnings from `after` on, in order."""
    if len(entry.start.split()) != 5:
        raise ScheduleError("start", f"{entry.start!r} must have five fields: minute hour day month weekday")
    try:
        zone = ZoneInfo(entry.time_zone)
    except (KeyError, ValueError, OSError) as error:
        raise ScheduleError(
            "timeZone", f"there is no time zone {entry.time_zone!r}: use an IANA name such as Europe/Berlin"
        ) from error
    try:
        return CronSim(entry.start, after.astimezone(zone))
    except CronSimError as error:
        raise ScheduleError("start", f"{entry.start!r} is not a cron expression: {str(error).lower()}") from error
