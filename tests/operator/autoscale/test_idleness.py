"""When a pool may go to zero: never unseen, never with a request held or in flight."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_api.modelpool import AutoscalingSpec
from kvfleet_operator.autoscale.idleness import Activity, idle_s, may_sleep, observe
from kvfleet_operator.autoscale.readings import Quality, Reading


def spec(**fields: Any) -> AutoscalingSpec:
    return AutoscalingSpec.model_validate({"minReplicas": 0, "maxReplicas": 4, **fields})


def seen(value: float, quality: Quality = Quality.FRESH) -> Reading:
    return Reading("busy", "Value", quality, value, 1.0)


def test_idleness_counts_from_the_last_request() -> None:
    activity = observe(None, seen(0), seen(7), 100.0)
    activity = observe(activity, seen(1), seen(7), 115.0)
    activity = observe(activity, seen(0), seen(7), 130.0)
    assert idle_s(activity, 145.0) == 30.0


def test_a_request_between_two_looks_is_activity() -> None:
    activity = observe(observe(None, seen(0), seen(7), 100.0), seen(0), seen(8), 115.0)
    assert idle_s(activity, 115.0) == 0.0


def test_a_router_that_restarted_is_activity() -> None:
    activity = observe(observe(None, seen(0), seen(7), 100.0), seen(0), seen(0), 115.0)
    assert idle_s(activity, 115.0) == 0.0


@pytest.mark.parametrize("quality", [quality for quality in Quality if quality is not Quality.FRESH])
def test_what_cannot_be_seen_is_activity(quality: Quality) -> None:
    before = Activity(0.0, 7)
    assert idle_s(observe(before, seen(0, quality), seen(7), 500.0), 500.0) == 0.0
    assert idle_s(observe(before, seen(0), seen(7, quality), 500.0), 500.0) == 0.0


@pytest.mark.parametrize(
    ("fields", "idle_for_s", "sleeps"),
    [
        ({"scaleToZero": {"idleSeconds": 60}}, 59.0, False),
        ({"scaleToZero": {"idleSeconds": 60}}, 60.0, True),
        ({}, 599.0, False),
        ({}, 600.0, True),
        ({"minReplicas": 1}, 1e6, False),
    ],
)
def test_a_pool_sleeps_after_its_idle_seconds(fields: dict[str, Any], idle_for_s: float, sleeps: bool) -> None:
    assert may_sleep(spec(**fields), Activity(1000.0, 0), 1000.0 + idle_for_s) is sleeps


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.sampled_from(list(Quality))), max_size=20))
def test_a_pool_never_sleeps_with_a_request_at_hand_or_unseen(steps: list[tuple[int, int, Quality]]) -> None:
    activity, served = None, 0
    for index, (busy, more, quality) in enumerate(steps):
        served += more
        now_s = index * 700.0
        activity = observe(activity, seen(busy, quality), seen(served), now_s)
        if busy or more or quality is not Quality.FRESH or index == 0:
            assert not may_sleep(spec(), activity, now_s)
