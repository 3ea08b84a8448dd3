"""The decision for one pool, against what the Kubernetes documentation says of HorizontalPodAutoscaler.

"Horizontal Pod Autoscaling", sections "Algorithm details" and "Configurable scaling behavior":
https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/
"""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet_api.modelpool import AutoscalingSpec, ScalingRules
from kvfleet_operator.autoscale.behavior import ScalerState
from kvfleet_operator.autoscale.decide import Decision, Floor, Workers, decide
from kvfleet_operator.autoscale.readings import Quality, Reading, SignalKind


def spec(**fields: Any) -> AutoscalingSpec:
    return AutoscalingSpec.model_validate({"minReplicas": 1, "maxReplicas": 1000, **fields})


def reading(
    value: float | None,
    target: float = 10.0,
    kind: SignalKind = "AverageValue",
    quality: Quality = Quality.FRESH,
    signal: str = "concurrency",
) -> Reading:
    return Reading(signal, kind, quality, value, target, message="" if quality is Quality.FRESH else "why")


def total(value: float) -> Reading:
    return reading(value)


def once(
    given: AutoscalingSpec, readings: list[Reading], wanted: int, ready: int | None = None, **more: Any
) -> Decision:
    """One decision without stabilisation: its own rules are tested apart."""
    at_once = given.behavior.model_copy(update={"scale_down": ScalingRules(stabilization_window_seconds=0)})
    free = given if given.behavior.scale_down else given.model_copy(update={"behavior": at_once})
    return decide(free, readings, Workers(wanted, wanted if ready is None else ready), ScalerState(), 0.0, **more)


class Pool:
    """A pool that follows its decisions, one per `tick_s`."""

    def __init__(self, given: AutoscalingSpec, wanted: int, tick_s: float = 15.0) -> None:
        self.spec, self.wanted, self.tick_s = given, wanted, tick_s
        self.now_s = 0.0
        self.state = ScalerState()

    def tick(self, *readings: Reading) -> Decision:
        decision = decide(self.spec, readings, Workers(self.wanted, self.wanted), self.state, self.now_s)
        self.wanted, self.state = decision.desired, decision.state
        self.now_s += self.tick_s
        return decision

    def run(self, ticks: int, *readings: Reading) -> list[int]:
        return [self.tick(*readings).desired for _ in range(ticks)]


@pytest.mark.parametrize(
    ("replicas", "value", "target", "wanted"),
    [
        pytest.param(2, 200.0, 100.0, 4, id="ratio 2.0 doubles"),
        pytest.param(2, 50.0, 100.0, 1, id="ratio 0.5 halves"),
        pytest.param(50, 90.0, 75.0, 60, id="50 replicas at 90 of 75"),
        pytest.param(3, 150.0, 100.0, 5, id="rounded up"),
        pytest.param(10, 110.0, 100.0, 10, id="within the tolerance above"),
        pytest.param(10, 90.0, 100.0, 10, id="within the tolerance below"),
        pytest.param(10, 111.0, 100.0, 12, id="just above the tolerance"),
        pytest.param(10, 89.0, 100.0, 9, id="just below the tolerance"),
    ],
)
def test_a_value_scales_the_ready_workers_by_its_ratio(replicas: int, value: float, target: float, wanted: int) -> None:
    assert once(spec(), [reading(value, target, "Value")], replicas).desired == wanted


@pytest.mark.parametrize(
    ("replicas", "total_value", "wanted"),
    [
        pytest.param(2, 100.0, 10, id="a total is divided by the target, not by the replicas"),
        pytest.param(1, 100.0, 10, id="whatever the current number"),
        pytest.param(9, 95.0, 9, id="within the tolerance of 9 x 10"),
        pytest.param(10, 0.0, 1, id="the last worker stays"),
        pytest.param(4, 0.7, 1, id="upwards to a whole worker"),
    ],
)
def test_an_average_value_divides_the_total_by_the_target(replicas: int, total_value: float, wanted: int) -> None:
    rates = {
        "behavior": {
            "scaleUp": {"policies": [{"type": "Pods", "value": 100}]},
            "scaleDown": {"stabilizationWindowSeconds": 0},
        }
    }
    assert once(spec(**rates), [total(total_value)], replicas).desired == wanted


def test_arithmetic_does_not_add_a_worker() -> None:
    assert once(spec(), [reading(0.7, 0.1)], 5).desired == 7


def test_the_largest_wish_of_several_signals_wins() -> None:
    decision = once(spec(), [total(20.0), reading(1.4, 0.7, "Value", signal="timeToFirstToken")], 3)
    assert (decision.desired, decision.binding_signal, decision.value, decision.target) == (
        6,
        "timeToFirstToken",
        1.4,
        0.7,
    )


def test_workers_still_starting_do_not_make_a_value_overshoot() -> None:
    """Half of four are ready and carry twice their target: the four that are wanted are enough."""
    assert once(spec(), [reading(2.0, 1.0, "Value")], 4, ready=2).desired == 4


def test_a_value_above_its_target_never_removes_workers_that_are_starting() -> None:
    assert once(spec(), [reading(1.5, 1.0, "Value")], 4, ready=2).desired == 4


def test_a_value_says_nothing_while_no_worker_is_ready() -> None:
    decision = once(spec(), [reading(0.0, 1.0, "Value")], 4, ready=0)
    assert (decision.desired, decision.wish) == (4, None)


def test_a_total_does_not_care_how_many_workers_are_ready() -> None:
    assert [once(spec(), [total(40.0)], 4, ready=ready).desired for ready in (0, 2, 4)] == [4, 4, 4]


@pytest.mark.parametrize("quality", sorted(set(Quality) - {Quality.FRESH, Quality.SILENT}))
def test_without_fresh_data_nothing_is_removed(quality: Quality) -> None:
    value = 0.0 if quality is Quality.PARTIAL else None
    decision = once(spec(), [reading(value, quality=quality)], 7)
    assert (decision.desired, decision.reason) == (7, "MissingData")
    assert decision.held_back_by is not None
    assert "concurrency" in decision.held_back_by


def test_a_signal_without_a_figure_yet_leaves_the_decision_to_the_others() -> None:
    silent = reading(None, quality=Quality.SILENT, signal="timeToFirstToken", kind="Value")
    assert once(spec(), [total(20.0), silent], 7).desired == 2
    alone = once(spec(), [silent], 7)
    assert (alone.desired, alone.held_back_by) == (7, "missing data (no signal has a figure yet)")


def test_one_missing_signal_keeps_the_others_from_removing_workers() -> None:
    decision = once(spec(), [total(10.0), reading(None, quality=Quality.ABSENT, signal="kvUsage")], 7)
    assert (decision.desired, decision.wish, decision.reason) == (7, 1, "MissingData")


def test_one_missing_signal_does_not_keep_the_others_from_adding_workers() -> None:
    decision = once(spec(), [total(80.0), reading(None, quality=Quality.FAILED, signal="kvUsage")], 7)
    assert (decision.desired, decision.reason) == (8, "DesiredWithinRange")
    assert decision.blind == "kvUsage: failed, why"


def test_a_partial_total_is_a_lower_bound_that_may_add_workers() -> None:
    assert once(spec(), [reading(80.0, quality=Quality.PARTIAL)], 7).desired == 8


@pytest.mark.parametrize("quality", [Quality.STALE, Quality.INVALID, Quality.FAILED, Quality.ABSENT])
def test_a_value_that_says_nothing_about_now_adds_no_workers(quality: Quality) -> None:
    assert once(spec(), [reading(800.0, quality=quality)], 7).desired == 7


def test_no_signals_at_all_hold() -> None:
    decision = once(spec(), [], 7)
    assert (decision.desired, decision.reason, decision.blind) == (7, "MissingData", "no signal was read")


@pytest.mark.parametrize(
    ("current", "value", "wanted", "reason"),
    [
        (5, 1000.0, 9, "TooManyReplicas"),
        (5, 0.0, 3, "TooFewReplicas"),
        (20, 150.0, 9, "TooManyReplicas"),
        (1, 10.0, 3, "TooFewReplicas"),
    ],
)
def test_the_bounds_hold(current: int, value: float, wanted: int, reason: str) -> None:
    decision = once(spec(minReplicas=3, maxReplicas=9), [total(value)], current)
    assert (decision.desired, decision.reason) == (wanted, reason)


def test_the_bounds_hold_without_data() -> None:
    bounded = spec(minReplicas=3, maxReplicas=9)
    assert [once(bounded, [], current).desired for current in (0, 2, 5, 20)] == [3, 3, 5, 9]


def test_a_floor_is_reached_at_once_and_named() -> None:
    decision = once(spec(), [total(10.0)], 1, floor=Floor(12, "schedule '0 8 * * 1-5'"))
    assert (decision.desired, decision.held_back_by) == (12, "schedule '0 8 * * 1-5'")


def test_a_floor_does_not_pass_the_maximum() -> None:
    assert once(spec(maxReplicas=8), [total(10.0)], 1, floor=Floor(12, "forecast")).desired == 8


def test_an_empty_pool_stays_empty_without_demand_and_wakes_with_it() -> None:
    sleepy = spec(minReplicas=0)
    assert once(sleepy, [total(0.0)], 0).desired == 0
    assert once(sleepy, [total(1.0)], 0).desired == 1
    assert once(sleepy, [total(35.0)], 0).desired == 4
    assert once(sleepy, [], 0).desired == 0


def test_an_empty_pool_wakes_though_only_percent_policies_are_set() -> None:
    rules = {"scaleUp": {"policies": [{"type": "Percent", "value": 50}]}}
    assert once(spec(minReplicas=0, behavior=rules), [total(500.0)], 0).desired == 1


def test_signals_alone_do_not_take_the_last_worker() -> None:
    decision = once(spec(minReplicas=0), [total(0.0)], 3)
    assert (decision.desired, decision.held_back_by) == (1, "the last worker goes only when idle")


def test_by_default_a_pool_doubles_or_grows_by_four_every_15_seconds() -> None:
    assert Pool(spec(), 1).run(5, total(10_000.0)) == [5, 10, 20, 40, 80]


def test_by_default_a_pool_shrinks_only_after_five_minutes_then_at_once() -> None:
    assert Pool(spec(), 10).run(22, total(20.0)) == [10] * 20 + [2, 2]


def test_of_the_documented_scale_down_policies_the_larger_change_counts() -> None:
    """80 replicas, 10 % or 4 pods a minute: 8, then 7.2 rounded up to 8, and from 40 on 4 at a time."""
    rules = {
        "scaleDown": {
            "stabilizationWindowSeconds": 0,
            "policies": [
                {"type": "Pods", "value": 4, "periodSeconds": 60},
                {"type": "Percent", "value": 10, "periodSeconds": 60},
            ],
        }
    }
    counts = Pool(spec(behavior=rules), 80, tick_s=60.0).run(12, total(100.0))
    assert counts == [72, 64, 57, 51, 45, 40, 36, 32, 28, 24, 20, 16]


def test_a_rate_counts_over_its_period_not_per_decision() -> None:
    rules = {"scaleUp": {"policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}]}}
    assert Pool(spec(behavior=rules), 1).run(10, total(1000.0)) == [3, 3, 3, 3, 5, 5, 5, 5, 7, 7]


def test_select_policy_min_takes_the_smallest_change() -> None:
    policies = [
        {"type": "Pods", "value": 2, "periodSeconds": 15},
        {"type": "Percent", "value": 100, "periodSeconds": 15},
    ]
    smallest = spec(behavior={"scaleUp": {"selectPolicy": "Min", "policies": policies}})
    assert Pool(smallest, 10).run(2, total(1000.0)) == [12, 14]
    gently = {"scaleDown": {"stabilizationWindowSeconds": 0, "selectPolicy": "Min", "policies": policies}}
    assert Pool(spec(behavior=gently), 10).run(2, total(10.0)) == [8, 6]


@pytest.mark.parametrize(("direction", "value"), [("scaleUp", 1000.0), ("scaleDown", 10.0)])
def test_a_disabled_direction_is_not_taken(direction: str, value: float) -> None:
    rules = {"scaleDown": {"stabilizationWindowSeconds": 0}} | {
        direction: {"selectPolicy": "Disabled", "stabilizationWindowSeconds": 0}
    }
    pool = Pool(spec(behavior=rules), 10)
    assert pool.run(3, total(value)) == [10, 10, 10]


def test_a_scale_up_window_takes_the_smallest_wish_of_the_window() -> None:
    patient = spec(behavior={"scaleUp": {"stabilizationWindowSeconds": 60}})
    pool = Pool(patient, 2)
    assert pool.run(4, total(80.0)) == [2, 2, 2, 2]
    assert pool.tick(total(50.0)).desired == 5
    assert pool.tick(total(80.0)).desired == 5


def test_a_short_dip_does_not_remove_workers() -> None:
    pool = Pool(spec(), 8)
    pool.run(20, total(80.0))
    dipped = pool.run(10, total(20.0))
    assert dipped == [8] * 10
    assert pool.tick(total(20.0)).reason == "ScaleDownStabilized"


def test_a_scaler_that_just_started_waits_a_whole_window_before_it_removes() -> None:
    pool = Pool(spec(), 10)
    assert pool.run(20, total(10.0)) == [10] * 20
    assert pool.tick(total(10.0)).desired == 1


def test_blindness_restarts_the_scale_down_window() -> None:
    pool = Pool(spec(), 10)
    pool.run(21, total(100.0))
    pool.run(40, reading(None, quality=Quality.ABSENT))
    assert pool.run(19, total(10.0)) == [10] * 19
    assert pool.run(2, total(10.0)) == [1, 1]


def test_blindness_does_not_delay_a_scale_up() -> None:
    pool = Pool(spec(behavior={"scaleUp": {"stabilizationWindowSeconds": 60}}), 2)
    pool.run(8, total(40.0))
    pool.run(2, reading(None, quality=Quality.ABSENT))
    assert pool.run(2, total(60.0)) == [4, 6]


def test_a_long_sleep_of_the_scaler_restarts_its_windows() -> None:
    pool = Pool(spec(), 10)
    pool.run(3, total(100.0))
    pool.now_s += 1000.0
    assert pool.run(20, total(10.0)) == [10] * 20


def test_a_clock_set_back_restarts_its_windows() -> None:
    pool = Pool(spec(), 10)
    pool.run(3, total(100.0))
    pool.now_s -= 3600.0
    assert pool.run(21, total(10.0)) == [10] * 20 + [1]


def test_a_change_that_was_not_applied_does_not_count_against_the_rate() -> None:
    rules = spec(behavior={"scaleUp": {"policies": [{"type": "Pods", "value": 2, "periodSeconds": 600}]}})
    state = ScalerState()
    for now_s in (0.0, 15.0, 30.0):
        decision = decide(rules, [total(1000.0)], Workers(4, 4), state, now_s)
        state = decision.state
        assert decision.desired == 6


def test_a_change_by_hand_counts_against_the_rate() -> None:
    rules = spec(behavior={"scaleUp": {"policies": [{"type": "Pods", "value": 2, "periodSeconds": 600}]}})
    first = decide(rules, [total(40.0)], Workers(4, 4), ScalerState(), 0.0)
    after = decide(rules, [total(1000.0)], Workers(9, 9), first.state, 15.0)
    assert (after.desired, after.reason) == (9, "ScaleUpLimit")


def test_a_pool_at_zero_traffic_shrinks_to_its_minimum() -> None:
    pool = Pool(spec(minReplicas=2), 9)
    assert pool.run(21, total(0.0), reading(0.0, 0.7, "Value"))[-1] == 2


@pytest.mark.parametrize(
    ("value", "wanted", "words"),
    [
        (100.0, 10, "concurrency is 100 against a target of 10 per worker: asks for 10; stays at 10"),
        (120.0, 12, "asks for 12; goes from 10 to 12"),
        (900.0, 20, "asks for 90; goes from 10 to 20; held back by rate policies of scaleUp"),
    ],
)
def test_a_decision_explains_itself(value: float, wanted: int, words: str) -> None:
    decision = once(spec(), [total(value)], 10)
    assert decision.desired == wanted
    assert words in decision.message


def test_workers_are_on_their_way_out_once_half_a_window_could_do_without_them() -> None:
    pool = Pool(spec(), 4)
    told = [pool.tick(total(18)) for _ in range(20)]
    assert [decision.leaving for decision in told] == [0] * 10 + [2] * 10
    assert {decision.desired for decision in told} == {4}
    assert pool.tick(total(18)).desired == 2
    assert pool.tick(total(18)).leaving == 0, "they went"


def test_one_higher_wish_calls_it_off_and_another_half_window_must_pass() -> None:
    pool = Pool(spec(), 4)
    for _ in range(15):
        decision = pool.tick(total(18))
    assert decision.leaving == 2
    assert pool.tick(total(38)).leaving == 0
    assert [pool.tick(total(18)).leaving for _ in range(11)] == [0] * 9 + [2] * 2


@pytest.mark.parametrize(
    ("fields", "readings"),
    [
        ({"minReplicas": 4}, [total(1)]),
        ({"behavior": {"scaleDown": {"selectPolicy": "Disabled"}}}, [total(1)]),
        ({}, [total(1), reading(None, quality=Quality.STALE, signal="other")]),
    ],
)
def test_nobody_is_on_the_way_out_who_could_not_go(fields: dict[str, Any], readings: list[Reading]) -> None:
    pool = Pool(spec(**fields), 4)
    assert {pool.tick(*readings).leaving for _ in range(30)} == {0}
