"""Forecasts of demand: they learn a day that repeats, follow growth, forget outliers, and know when they are no good."""

from __future__ import annotations

from math import inf, nan, pi, sin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_operator.autoscale.forecast import SeasonalForecaster

DAY_S = 86_400
SLOT_S = 900


def day(at_s: float) -> float:
    """A busy afternoon, a quiet night."""
    return 100 + 80 * sin(2 * pi * (at_s / DAY_S - 0.25))


def weekday(at_s: float) -> float:
    return day(at_s) if (at_s // DAY_S) % 7 < 5 else 10.0


def trained(days: float, demand: object = day, slot_s: int = SLOT_S) -> SeasonalForecaster:
    assert callable(demand)
    forecaster = SeasonalForecaster(slot_s)
    for at_s in range(0, int(days * DAY_S), slot_s // 3):
        forecaster.observe(float(at_s), demand(at_s))
    return forecaster


def test_before_a_day_was_seen_nothing_is_forecast() -> None:
    forecast = trained(0.6).forecast(0.6 * DAY_S, 600.0)
    assert not forecast.usable
    assert forecast.message == "learning: 59% of a day seen"


def test_before_forecasts_were_compared_none_is_used() -> None:
    forecast = trained(1.1).forecast(1.1 * DAY_S, 600.0)
    assert (forecast.usable, forecast.confidence) == (False, 0.0)
    assert "forecasts compared" in forecast.message


def test_a_repeating_day_is_known_ahead() -> None:
    forecaster, morning_s = trained(3.25), 3.25 * DAY_S
    now, later = day(morning_s), day(morning_s + 3600)
    forecast = forecaster.forecast(morning_s, 3600.0)
    assert forecast.usable
    assert forecast.confidence > 0.95
    assert later > now * 1.15
    assert forecast.demand == pytest.approx(day(morning_s + 3600 + SLOT_S), rel=0.06)


def test_the_largest_demand_until_then_counts() -> None:
    forecaster, noon_s = trained(3.5), 3.5 * DAY_S
    assert forecaster.forecast(noon_s, 4 * 3600.0).demand == pytest.approx(day(noon_s), rel=0.03)


def test_a_day_of_twice_the_usual_demand_is_followed() -> None:
    def busy(at_s: float) -> float:
        return day(at_s) * (2 if at_s >= 5 * DAY_S else 1)

    now_s = 5.25 * DAY_S
    forecast = trained(5.25, busy).forecast(now_s, 1800.0)
    assert forecast.demand == pytest.approx(2 * day(now_s + 1800 + SLOT_S), rel=0.15)


def test_a_weekend_is_told_from_a_weekday_after_two_weeks() -> None:
    forecaster = trained(12.99, weekday)
    assert forecaster.forecast(12.99 * DAY_S, 1800.0).demand == pytest.approx(10.0, abs=6.0)
    monday_s = 14.3 * DAY_S
    for at_s in range(int(12.99 * DAY_S) + 900, int(monday_s), 300):
        forecaster.observe(float(at_s), weekday(at_s))
    assert forecaster.forecast(monday_s, 1800.0).demand == pytest.approx(day(monday_s + 2700), rel=0.15)


def test_one_odd_hour_does_not_return_every_day() -> None:
    def odd(at_s: float) -> float:
        return 5000.0 if 4.5 * DAY_S <= at_s < 4.5 * DAY_S + 3600 else day(at_s)

    now_s = 5.5 * DAY_S - 900
    assert trained(5.5, odd).forecast(now_s, 1800.0).demand < 2 * day(now_s)


def test_demand_without_a_pattern_is_not_trusted() -> None:
    noise = [1.0, 400.0, 3.0, 3.0, 900.0, 0.0, 0.0]

    def random_like(at_s: float) -> float:
        slot = int(at_s // 3600)
        return noise[(slot * slot * 31 + slot // 5 * 17) % len(noise)]

    forecast = trained(6, random_like).forecast(6 * DAY_S, 3600.0)
    assert forecast.confidence < 0.6
    assert not forecast.usable


def test_a_gap_in_the_data_pulls_back_to_the_season() -> None:
    def doubled(at_s: float) -> float:
        return day(at_s) * (2 if at_s >= 5 * DAY_S else 1)

    forecaster = trained(5.25, doubled)
    later_s = 6.75 * DAY_S
    assert forecaster.forecast(later_s, 900.0).demand == pytest.approx(day(later_s), rel=0.35)


@pytest.mark.parametrize("bad", [nan, inf, -1.0])
def test_what_is_no_demand_is_not_learned(bad: float) -> None:
    forecaster = trained(3.25)
    before = forecaster.forecast(3.25 * DAY_S, 900.0)
    for second in range(0, 3600, 60):
        forecaster.observe(3.25 * DAY_S + second, bad)
    assert forecaster.forecast(3.25 * DAY_S, 900.0) == before


def test_what_comes_late_is_not_learned() -> None:
    forecaster = trained(3.25)
    before = forecaster.forecast(3.25 * DAY_S, 900.0)
    forecaster.observe(DAY_S, 1e9)
    assert forecaster.forecast(3.25 * DAY_S, 900.0) == before


def test_history_can_be_learned_at_once() -> None:
    forecaster = SeasonalForecaster(SLOT_S)
    forecaster.learn((at_s, day(at_s)) for at_s in range(0, 3 * DAY_S, SLOT_S))
    assert forecaster.forecast(3.25 * DAY_S, 900.0).usable


def test_a_slot_must_divide_a_day() -> None:
    with pytest.raises(ValueError, match="slot_s 7 must divide a day"):
        SeasonalForecaster(7)


@given(
    st.lists(st.tuples(st.integers(0, 200_000), st.floats(0, 1e6)), max_size=60),
    st.floats(0, 1e6),
    st.integers(-10, 10_000_000),
)
def test_a_forecast_is_finite_and_never_negative(steps: list[tuple[int, float]], demand: float, lead_s: int) -> None:
    forecaster, now_s = SeasonalForecaster(3600), 0.0
    for gap_s, value in steps:
        now_s += gap_s
        forecaster.observe(now_s, value)
    forecaster.observe(now_s, demand)
    forecast = forecaster.forecast(now_s, float(lead_s))
    assert 0 <= forecast.demand < 1e8
    assert 0 <= forecast.confidence <= 1
