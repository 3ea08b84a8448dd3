"""All pools of a step together: floors, sleep, waking, forecasts, budgets, memory."""

from __future__ import annotations

from dataclasses import replace
from math import pi, sin
from typing import Any

import pytest

from kvfleet_api.modelpool import AutoscalingSpec, AutoscalingStatus
from kvfleet_operator.autoscale.autoscaler import Autoscaler, PoolStep
from kvfleet_operator.autoscale.budget import Budget
from kvfleet_operator.autoscale.decide import Workers
from kvfleet_operator.autoscale.readings import Quality, Reading
from kvfleet_operator.autoscale.report import scaling_active, status

DAY_S = 86_400
TARGET = 10.0


def value(number: float, quality: Quality = Quality.FRESH) -> Reading:
    return Reading("concurrency", "AverageValue", quality, number, TARGET, message="why" if quality != "Fresh" else "")


def step(
    demand: float,
    wanted: int = 1,
    *,
    key: str = "prod/a",
    served: float = 0.0,
    quality: Quality = Quality.FRESH,
    **fields: Any,
) -> PoolStep:
    names = ("startup_s", "gpus_per_worker", "watts_per_worker", "priority")
    extra = {name: fields.pop(name) for name in names if name in fields}
    spec = AutoscalingSpec.model_validate({"minReplicas": 1, "maxReplicas": 50, **fields})
    busy = Reading("busy", "Value", quality, demand, 1.0)
    all_served = Reading("served", "Value", quality, served, 1.0)
    return PoolStep(key, spec, Workers(wanted, wanted), [value(demand, quality)], busy, all_served, **extra)


class Fleet:
    """One pool that follows its autoscaler."""

    def __init__(self, wanted: int, **fields: Any) -> None:
        self.autoscaler, self.wanted, self.fields = Autoscaler(), wanted, fields
        self.now_s = 1_700_000_000.0

    def tick(self, demand: float, quality: Quality = Quality.FRESH, gap_s: float = 15.0) -> int:
        given = step(demand, self.wanted, quality=quality, **self.fields)
        result = self.autoscaler.step([given], self.now_s)["prod/a"]
        self.wanted = result.decision.desired
        self.now_s += gap_s
        return self.wanted


def test_an_idle_pool_goes_to_zero_after_its_idle_seconds_and_wakes_with_the_next_request() -> None:
    fleet = Fleet(2, minReplicas=0, scaleToZero={"idleSeconds": 60})
    assert [fleet.tick(0.0) for _ in range(6)] == [2, 2, 2, 2, 0, 0]
    assert fleet.tick(1.0) == 1
    assert [fleet.tick(0.0) for _ in range(6)] == [1, 1, 1, 1, 0, 0]


def test_a_pool_whose_routers_cannot_be_asked_does_not_go_to_zero() -> None:
    fleet = Fleet(2, minReplicas=0, scaleToZero={"idleSeconds": 60})
    assert [fleet.tick(0.0, Quality.PARTIAL) for _ in range(20)] == [2] * 20
    assert [fleet.tick(0.0) for _ in range(5)][-1] == 0


def test_a_request_in_flight_keeps_the_pool() -> None:
    fleet = Fleet(2, minReplicas=0, scaleToZero={"idleSeconds": 30})
    assert min(fleet.tick(1.0) for _ in range(100)) == 1


def test_a_schedule_keeps_an_idle_pool_awake() -> None:
    entry = {"start": "* * * * *", "durationMinutes": 1, "minReplicas": 3}
    fleet = Fleet(0, minReplicas=0, scaleToZero={"idleSeconds": 30}, schedule=[entry])
    assert [fleet.tick(0.0) for _ in range(10)] == [3] * 10


def test_a_wrong_schedule_is_reported() -> None:
    given = step(5.0, schedule=[{"start": "0 99 * * *", "durationMinutes": 1, "minReplicas": 3}])
    condition = scaling_active(Autoscaler().step([given], 0.0)["prod/a"])
    assert (condition.status, condition.reason) == ("False", "InvalidSchedule")
    assert "spec.autoscaling.schedule[0].start" in condition.message


def rising(at_s: float) -> float:
    """From half a request at midnight to 20 workers' worth at noon."""
    return max(0.5, 100 - 110 * sin(2 * pi * at_s / DAY_S + pi / 2))


def test_workers_are_started_ahead_of_a_day_that_repeats_itself() -> None:
    autoscaler = Autoscaler()
    start_s = 1_700_000_000.0 // DAY_S * DAY_S
    morning_s = start_s + 4 * DAY_S + 6 * 3600
    past = [(start_s + at_s, rising(at_s)) for at_s in range(0, int(morning_s - start_s), 300)]
    autoscaler.learn("prod/a", past)
    demand_now = rising(morning_s - start_s)
    given = step(demand_now, 10, startup_s=3600.0)
    result = autoscaler.step([given], morning_s)["prod/a"]
    needed_then = rising(morning_s - start_s + 3600) / TARGET
    assert result.decision.wish == 10
    assert result.decision.desired == pytest.approx(needed_then, abs=1.5)
    assert result.decision.desired > 10
    assert result.decision.held_back_by is not None
    assert result.decision.held_back_by.startswith("forecast: ")


def test_a_forecast_looks_as_far_ahead_as_it_is_told_and_may_be_kept_from_starting_workers() -> None:
    start_s = 1_700_000_000.0 // DAY_S * DAY_S
    morning_s = start_s + 4 * DAY_S + 6 * 3600

    def wanted(**forecast: Any) -> tuple[int, float | None]:
        autoscaler = Autoscaler()
        past = [(start_s + at_s, rising(at_s)) for at_s in range(0, int(morning_s - start_s), 300)]
        autoscaler.learn("prod/a", past)
        given = step(rising(morning_s - start_s), 10, startup_s=3600.0, forecast=forecast)
        result = autoscaler.step([given], morning_s)["prod/a"]
        return result.decision.desired, result.forecast and result.forecast.demand

    as_measured, demand = wanted()
    near, near_demand = wanted(leadSeconds=600)
    assert demand is not None
    assert near_demand is not None
    assert (10 <= near < as_measured, near_demand < demand) == (True, True)
    assert wanted(mode="Observe") == (10, demand)
    assert wanted(mode="Off") == (10, None)


def test_an_untried_forecast_starts_nothing() -> None:
    autoscaler = Autoscaler()
    start_s = 1_700_000_000.0 // DAY_S * DAY_S
    morning_s = start_s + DAY_S + 6 * 3600
    autoscaler.learn("prod/a", [(start_s + at_s, rising(at_s)) for at_s in range(0, DAY_S, 300)])
    given = step(rising(morning_s - start_s), 10, startup_s=3600.0)
    result = autoscaler.step([given], morning_s)["prod/a"]
    assert result.forecast is not None
    assert (result.forecast.demand > 110, result.forecast.usable, result.decision.desired) == (True, False, 10)


def test_a_forecast_of_next_to_nothing_lets_a_pool_sleep() -> None:
    autoscaler = Autoscaler()
    start_s = 1_700_000_000.0 // DAY_S * DAY_S
    now_s = start_s + 4 * DAY_S
    past = [(start_s + at_s, rising(at_s)) for at_s in range(0, 4 * DAY_S, 300)]
    autoscaler.learn("prod/a", past)
    fields: dict[str, Any] = {
        "minReplicas": 0,
        "scaleToZero": {"idleSeconds": 60},
        "startup_s": 60.0,
    }
    wanted = []
    for tick in range(6):
        result = autoscaler.step([step(0.0, 1, **fields)], now_s + 15 * tick)["prod/a"]
        assert result.forecast is not None
        assert result.forecast.usable
        wanted.append(result.decision.desired)
    assert wanted == [1, 1, 1, 1, 0, 0]


def test_a_budget_rations_growth_and_says_so() -> None:
    pools = [step(100.0, 2, key="prod/a", gpus_per_worker=2), step(20.0, 2, key="prod/b", gpus_per_worker=2)]
    results = Autoscaler().step(pools, 0.0, Budget(gpus=10))
    assert {key: result.decision.desired for key, result in results.items()} == {"prod/a": 3, "prod/b": 2}
    decision = results["prod/a"].decision
    assert (decision.reason, decision.wish) == ("Budget", 10)
    assert decision.held_back_by == "GPU budget: 10 of 10 are used and a worker needs 2"
    assert results["prod/b"].decision.held_back_by is None


def test_a_pool_that_is_gone_is_forgotten() -> None:
    autoscaler = Autoscaler()
    autoscaler.step([step(100.0, 10)], 0.0)
    autoscaler.step([], 15.0)
    again = autoscaler.step([step(0.0, 10)], 400.0)["prod/a"].decision
    assert (again.desired, again.reason) == (10, "ScaleDownStabilized")


def test_the_condition_says_which_signals_are_missing() -> None:
    result = Autoscaler().step([step(30.0, 3, quality=Quality.STALE)], 0.0)["prod/a"]
    condition = scaling_active(result)
    assert (condition.type, condition.status, condition.reason) == ("ScalingActive", "False", "NoMetrics")
    assert condition.message == "concurrency: stale, why; the pool stays as it is"
    partial = scaling_active(Autoscaler().step([step(90.0, 3, quality=Quality.PARTIAL)], 0.0)["prod/a"])
    assert (partial.status, partial.reason) == ("False", "SomeMetrics")
    assert partial.message.endswith("until then no worker is removed")
    fresh = scaling_active(Autoscaler().step([step(30.0, 3)], 0.0)["prod/a"])
    assert (fresh.status, fresh.reason) == ("True", "ValidMetrics")


def test_the_status_names_the_binding_signal_and_keeps_the_last_scale_time() -> None:
    grows = Autoscaler().step([step(900.0, 3, startup_s=41.6)], 0.0)["prod/a"]
    first = status(grows, None, scaled=True, now="2024-06-03T08:00:00Z")
    assert first == AutoscalingStatus(
        desired_replicas=7,
        binding_signal="concurrency: 900 against 10",
        last_scale_time="2024-06-03T08:00:00Z",
        held_back_by="rate policies of scaleUp let it go to 7 for now",
        forecast="learning: 0% of a day seen",
        startup_seconds=42,
    )
    stays = Autoscaler().step([step(70.0, 7, forecast={"mode": "Off"})], 0.0)["prod/a"]
    second = status(stays, first, scaled=False, now="2024-06-03T08:00:15Z")
    assert (second.last_scale_time, second.held_back_by) == ("2024-06-03T08:00:00Z", None)
    assert (second.forecast, second.startup_seconds) == (None, None)


def test_a_status_is_never_longer_than_the_api_allows() -> None:
    long = Reading("concurrency", "AverageValue", Quality.FAILED, message="x" * 5000)
    given = step(5.0)
    result = Autoscaler().step([PoolStep("k", given.spec, Workers(3, 3), [long], given.busy, given.served)], 0.0)["k"]
    assert len(status(result, None, scaled=True, now="2024-06-03T08:00:00Z").held_back_by or "") == 1024


def test_a_pool_somebody_woke_without_a_request_stays_for_its_idle_seconds() -> None:
    fleet = Fleet(0, minReplicas=0, scaleToZero={"idleSeconds": 60})
    assert [fleet.tick(0.0) for _ in range(20)] == [0] * 20
    fleet.wanted = 1
    assert [fleet.tick(0.0) for _ in range(6)] == [1, 1, 1, 1, 0, 0]


def test_a_pool_with_a_signal_missing_does_not_go_to_zero_though_it_is_idle() -> None:
    fleet = Fleet(2, minReplicas=0, scaleToZero={"idleSeconds": 60})
    idle = step(0.0, 2, **fleet.fields)
    for _ in range(20):
        given = replace(idle, readings=[value(0.0, Quality.FAILED)])
        assert fleet.autoscaler.step([given], fleet.now_s)["prod/a"].decision.desired == 2
        fleet.now_s += 15
