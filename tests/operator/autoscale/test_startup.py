"""How long workers take to start, from what the API server tells of their pods."""

from __future__ import annotations

import pytest

from kvfleet_operator.autoscale.startup import Start, StartupTimes

LIMIT_S = 600.0


def took(number: int, seconds: float | None) -> Start:
    return Start(f"uid-{number}", 1000.0, None if seconds is None else 1000.0 + seconds)


def usual(*seconds: float | None) -> float | None:
    times = StartupTimes()
    times.see([took(number, each) for number, each in enumerate(seconds)], LIMIT_S)
    return times.usual_s


def test_it_is_that_of_the_slower_workers() -> None:
    assert usual(*[60.0] * 9, 240.0) == pytest.approx(78.0)


def test_without_a_worker_that_is_ready_nothing_is_known() -> None:
    assert usual() is None
    assert usual(None, None) is None


def test_times_that_cannot_be_are_left_out() -> None:
    assert usual(-5.0, LIMIT_S + 1, 90.0) == 90.0


def test_a_worker_counts_once_though_it_becomes_ready_again() -> None:
    times = StartupTimes()
    times.see([took(1, 50.0)], LIMIT_S)
    times.see([took(1, None)], LIMIT_S)
    times.see([took(1, 500.0)], LIMIT_S)
    assert times.usual_s == 50.0


def test_the_last_workers_count() -> None:
    times = StartupTimes()
    for number in range(40):
        times.see([took(number, 500.0 if number < 8 else 50.0)], LIMIT_S)
    assert times.usual_s == 50.0
