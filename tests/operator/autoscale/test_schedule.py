"""Lower bounds by the clock, daylight saving included."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_api.modelpool import ScheduleEntry
from kvfleet_operator.autoscale.decide import Floor
from kvfleet_operator.autoscale.schedule import ScheduleError, is_active, schedule_floor


def entry(start: str, minutes: int = 60, least: int = 5, zone: str = "UTC") -> ScheduleEntry:
    fields: dict[str, Any] = {"start": start, "timeZone": zone, "durationMinutes": minutes, "minReplicas": least}
    return ScheduleEntry.model_validate(fields)


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


OFFICE_HOURS = entry("0 8 * * 1-5", 600, zone="Europe/Berlin")


@pytest.mark.parametrize(
    ("when", "active"),
    [
        ("2024-06-03T07:59:59", False),
        ("2024-06-03T08:00:00", True),
        ("2024-06-03T17:59:59", True),
        ("2024-06-03T18:00:00", False),
        ("2024-06-01T12:00:00", False),
        ("2024-01-15T08:00:00", True),
    ],
)
def test_an_entry_lasts_from_its_start_in_its_time_zone(when: str, active: bool) -> None:
    assert is_active(OFFICE_HOURS, at(when, "Europe/Berlin")) is active


def test_an_entry_may_last_into_the_next_day() -> None:
    night = entry("0 22 * * *", 8 * 60)
    assert [is_active(night, at(f"2024-06-02T{hour}:30:00")) for hour in ("21", "23")] == [False, True]
    assert [is_active(night, at(f"2024-06-03T{hour}:30:00")) for hour in ("05", "06")] == [True, False]


@pytest.mark.parametrize(
    ("when", "active"),
    [
        ("2024-03-31T00:59:00", False),  # 01:59 in Berlin; at 02:00 the clock goes to 03:00
        ("2024-03-31T01:00:00", True),  # 02:30 is skipped: it happens right after the change
        ("2024-03-31T01:59:00", True),
        ("2024-03-31T02:00:00", False),
        ("2024-10-27T00:30:00", True),  # the first 02:30; an hour later the clock shows it again
        ("2024-10-27T01:29:00", True),
        ("2024-10-27T01:30:00", False),
        ("2024-10-27T02:15:00", False),
    ],
)
def test_clock_changes(when: str, active: bool) -> None:
    assert is_active(entry("30 2 * * *", zone="Europe/Berlin"), at(when)) is active


def test_the_largest_lower_bound_in_force_counts() -> None:
    entries = [entry("0 8 * * *", 600, least=4), entry("0 9 * * *", 60, least=9), entry("0 20 * * *", 60, least=99)]
    floor, problems = schedule_floor(entries, at("2024-06-03T09:30:00"))
    assert floor == Floor(9, "schedule '0 9 * * *' (UTC): 9")
    assert problems == []


def test_outside_every_entry_there_is_no_bound() -> None:
    assert schedule_floor([OFFICE_HOURS], at("2024-06-02T12:00:00")) == (Floor(), [])


@pytest.mark.parametrize(
    ("wrong", "field", "words"),
    [
        (entry("0 25 * * *"), "start", "not a cron expression: bad hour"),
        (entry("0 0 30 2 *"), "start", "bad day-of-month"),
        (entry("* * * * * *"), "start", "five fields"),
        (entry("@every 1h"), "start", "five fields"),
        (entry("0 8 * * 1", zone="Europe/Atlantis"), "timeZone", "no time zone 'Europe/Atlantis'"),
        (entry("0 8 * * 1", zone="../../etc/passwd"), "timeZone", "IANA name"),
        (entry("0 8 * * 1", zone="America"), "timeZone", "IANA name"),
    ],
)
def test_a_wrong_entry_is_reported_and_the_others_count(wrong: ScheduleEntry, field: str, words: str) -> None:
    floor, (problem,) = schedule_floor([wrong, entry("0 * * * *", 60)], at("2024-06-03T09:30:00"))
    assert floor.replicas == 5
    assert problem.field == f"spec.autoscaling.schedule[0].{field}"
    assert words in problem.message


@given(st.text("0123456789*/,-LW#SUNMO ", min_size=9, max_size=40), st.sampled_from(["UTC", "Europe/Berlin"]))
def test_any_text_is_either_evaluated_or_refused(start: str, zone: str) -> None:
    try:
        is_active(entry(start, zone=zone), at("2024-03-31T00:30:00"))
    except ScheduleError as error:
        assert error.field == "start"


@given(st.integers(0, 23), st.integers(0, 59), st.integers(1, 3000), st.integers(0, 60 * 24 * 400))
def test_an_entry_is_active_exactly_within_its_duration(hour: int, minute: int, duration: int, ahead: int) -> None:
    """Against arithmetic on days, where no clock changes."""
    now = datetime(2024, 1, 1, tzinfo=ZoneInfo("UTC")) + timedelta(minutes=ahead)
    since_start = (now.hour * 60 + now.minute - hour * 60 - minute) % (24 * 60)
    assert is_active(entry(f"{minute} {hour} * * *", duration), now.timestamp()) is (since_start < duration)
