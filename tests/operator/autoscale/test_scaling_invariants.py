"""What holds for the decision whatever the signals do: bounds, monotony, windows, rates, bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvfleet_api.modelpool import AutoscalingSpec
from kvfleet_operator.autoscale.behavior import DEFAULT_DOWN, MAX_ENTRIES, ScalerState, behavior_of
from kvfleet_operator.autoscale.decide import Decision, Floor, Workers, decide
from kvfleet_operator.autoscale.readings import Quality, Reading

TARGET = 10.0

policies = st.lists(
    st.builds(
        lambda type_, value, period: {"type": type_, "value": value, "periodSeconds": period},
        st.sampled_from(["Pods", "Percent"]),
        st.integers(1, 200),
        st.integers(1, 120),
    ),
    max_size=3,
)
rules = st.builds(
    lambda window, select, limits: {
        "stabilizationWindowSeconds": window,
        "selectPolicy": select,
        "policies": limits,
    },
    st.sampled_from([0, 30, 90, 300]),
    st.sampled_from(["Max", "Min", "Disabled"]),
    policies,
)
behaviors = st.fixed_dictionaries({}, optional={"scaleUp": rules, "scaleDown": rules})


@st.composite
def specs(draw: st.DrawFn) -> AutoscalingSpec:
    least = draw(st.integers(0, 5))
    fields: dict[str, Any] = {
        "minReplicas": least,
        "maxReplicas": draw(st.integers(max(least, 1), 60)),
        "tolerancePercent": draw(st.integers(0, 30)),
        "behavior": draw(behaviors),
    }
    return AutoscalingSpec.model_validate(fields)


values = st.floats(0, 2000, allow_nan=False)
qualities = st.sampled_from(list(Quality))
readings = st.builds(
    lambda kind, quality, value: Reading("s", kind, quality, value, TARGET, message="m"),
    st.sampled_from(["AverageValue", "Value"]),
    qualities,
    values,
)
totals = st.builds(lambda value: Reading("s", "AverageValue", Quality.FRESH, value, TARGET), values)
gaps = st.sampled_from([1.0, 7.5, 15.0, 15.0, 15.0, 40.0])


class History:
    """A pool that follows its decisions; remembers (time, replicas wanted before, decision)."""

    def __init__(self, spec: AutoscalingSpec, wanted: int) -> None:
        self.spec, self.wanted = spec, wanted
        self.now_s = 1000.0
        self.state = ScalerState()
        self.past: list[tuple[float, int, Decision]] = []

    def step(self, signals: Sequence[Reading], gap_s: float = 15.0, floor: Floor = Floor()) -> Decision:
        decision = decide(self.spec, signals, Workers(self.wanted, self.wanted), self.state, self.now_s, floor=floor)
        self.past.append((self.now_s, self.wanted, decision))
        self.wanted, self.state = decision.desired, decision.state
        self.now_s += gap_s
        return decision


@given(specs(), st.integers(0, 80), st.lists(st.tuples(st.lists(readings, max_size=3), gaps), min_size=1, max_size=30))
def test_the_bounds_hold_over_any_history(
    spec: AutoscalingSpec, wanted: int, steps: list[tuple[list[Reading], float]]
) -> None:
    pool = History(spec, wanted)
    for signals, gap_s in steps:
        before = pool.wanted
        desired = pool.step(signals, gap_s).desired
        assert spec.min_replicas <= desired <= spec.max_replicas
        assert desired >= 1 or before == 0


@given(
    specs(),
    st.integers(0, 60),
    st.integers(0, 60),
    st.lists(totals, max_size=8),
    st.lists(readings, max_size=2),
    st.sampled_from(["AverageValue", "Value"]),
    values,
    values,
)
def test_more_of_a_signal_never_means_fewer_workers(
    spec: AutoscalingSpec,
    wanted: int,
    ready: int,
    past: list[Reading],
    others: list[Reading],
    kind: Any,
    one: float,
    other: float,
) -> None:
    pool = History(spec, wanted)
    for reading in past:
        pool.step([reading])
    less, more = (
        decide(
            spec,
            [*others, Reading("x", kind, Quality.FRESH, value, TARGET)],
            Workers(pool.wanted, ready),
            pool.state,
            pool.now_s,
        ).desired
        for value in sorted((one, other))
    )
    assert less <= more


@given(specs(), st.integers(1, 60), st.lists(st.lists(readings, max_size=3), min_size=1, max_size=30))
def test_nothing_is_removed_unless_every_signal_is_known(
    spec: AutoscalingSpec, wanted: int, steps: list[list[Reading]]
) -> None:
    pool = History(spec, min(wanted, spec.max_replicas))
    for signals in steps:
        before = pool.wanted
        decision = pool.step(signals)
        if not signals or not all(reading.complete for reading in signals):
            assert decision.desired >= before


@given(specs(), st.integers(1, 60), st.lists(st.tuples(totals, gaps), min_size=1, max_size=40))
def test_stabilisation_stays_within_the_wishes_of_its_window(
    spec: AutoscalingSpec, wanted: int, steps: list[tuple[Reading, float]]
) -> None:
    behavior = behavior_of(spec)
    pool = History(spec, min(max(wanted, spec.min_replicas), spec.max_replicas))
    for reading, gap_s in steps:
        decision = pool.step([reading], gap_s)
        now_s, before, _ = pool.past[-1]
        assert decision.wish is not None
        wishes = {
            window_s: _wishes(pool, now_s, window_s) for window_s in (behavior.up_window_s, behavior.down_window_s)
        }
        if decision.desired > before:
            assert decision.desired <= max(min(wishes[behavior.up_window_s]), spec.min_replicas, 1)
        if decision.desired < before:
            assert decision.desired >= min(max(wishes[behavior.down_window_s]), spec.max_replicas)


def _wishes(pool: History, now_s: float, window_s: int) -> list[int]:
    """What was wished within a window, now included; at the start, what was there."""
    start_s, start, _ = pool.past[0]
    wished = [decision.wish or 0 for at_s, _, decision in pool.past if at_s > now_s - window_s or at_s == now_s]
    return [*wished, start] if start_s > now_s - window_s else wished


@given(
    st.sampled_from(["Pods", "Percent"]),
    st.integers(1, 20),
    st.sampled_from([15, 60, 200]),
    st.lists(st.tuples(totals, gaps), min_size=1, max_size=60),
)
def test_a_rate_policy_holds_over_any_history(
    type_: str, value: int, period_s: int, steps: list[tuple[Reading, float]]
) -> None:
    rate = {"stabilizationWindowSeconds": 0, "policies": [{"type": type_, "value": value, "periodSeconds": period_s}]}
    spec = AutoscalingSpec.model_validate(
        {"minReplicas": 1, "maxReplicas": 500, "behavior": {"scaleUp": rate, "scaleDown": rate}}
    )
    pool = History(spec, 10)
    for reading, gap_s in steps:
        desired = pool.step([reading], gap_s).desired
        now_s, before, _ = pool.past[-1]
        start = next(wanted for at_s, wanted, _ in pool.past if at_s > now_s - period_s)
        if desired > before:
            assert desired <= (start + value if type_ == "Pods" else -(-start * (100 + value) // 100))
        if desired < before:
            assert desired >= (start - value if type_ == "Pods" else start * (100 - value) // 100)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.sampled_from([30, 90, 300]), gaps)
def test_what_is_kept_of_a_window_is_enough_to_know_its_extremes(
    wishes: list[int], window_s: int, gap_s: float
) -> None:
    window = {"stabilizationWindowSeconds": window_s}
    spec = AutoscalingSpec.model_validate({"maxReplicas": 50, "behavior": {"scaleUp": window, "scaleDown": window}})
    behavior, state = behavior_of(spec), ScalerState()
    for index, wish in enumerate(wishes):
        now_s = index * gap_s
        recent = [old for at, old in enumerate(wishes[:index]) if at * gap_s > now_s - window_s]
        for current in (0, 25, 50):
            naive = min(max(current, min([wish, *recent])), max([wish, *recent]))
            assert state.stabilised(wish, current, now_s, behavior) == naive
        state = state.recommended(wish, now_s, behavior)


def test_memory_is_bounded_however_often_it_is_asked() -> None:
    window = {"stabilizationWindowSeconds": 3600, "policies": [{"type": "Pods", "value": 1, "periodSeconds": 1800}]}
    spec = AutoscalingSpec.model_validate({"maxReplicas": 10_000, "behavior": {"scaleUp": window, "scaleDown": window}})
    behavior, state = behavior_of(spec), ScalerState()
    for second in range(3000):
        state = state.observed(5000 + second % 7, float(second), behavior)
        falling = second < 1500
        state = state.recommended(9000 - second if falling else second, float(second), behavior)
        assert max(len(state.highs), len(state.lows), len(state.changes)) <= MAX_ENTRIES
    assert state.stabilised(0, 10_000, 2999.0, behavior) >= 9000 - 1500


def test_thinned_out_windows_err_to_the_cautious_side() -> None:
    behavior, state = behavior_of(AutoscalingSpec.model_validate({"maxReplicas": 1})), ScalerState()
    assert behavior.down == DEFAULT_DOWN
    for second in range(290):
        state = state.recommended(1000 - second, float(second), behavior)
    assert state.stabilised(0, 1000, 290.0, behavior) == 1000
