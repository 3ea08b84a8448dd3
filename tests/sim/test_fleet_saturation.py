"""Loads are named by the fleet's saturation rate; a policy's SLO capacity is found by bisection; figures add up."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from fleet_helpers import MODEL, small_fleet
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_sim.fleet import Run, simulate
from kvfleet_sim.outcomes import Slo, figures, unloaded_ttft_s
from kvfleet_sim.saturation import answered_rps, saturation_rps, slo_capacity_rps
from kvfleet_sim.variants import with_policy
from kvfleet_sim.workload import SharedPrefixLoad

LOAD = SharedPrefixLoad(600, prefixes=4, prefix_tokens=64, suffix_tokens=80, output_tokens=20)


def outcome(ttft_s: list[float], itl_s: list[float]) -> Run:
    """Requests with prompts of 100 tokens, 10 of them cached, and answers of 5; NaN: failed."""
    times = np.array(ttft_s)
    count = len(times)
    failed = np.isnan(times)
    return Run(
        sent_s=np.arange(count, dtype=float),
        ttft_s=times,
        itl_s=np.array(itl_s),
        prompt_tokens=np.full(count, 100.0),
        cached_tokens=np.where(failed, np.nan, 10.0),
        output_tokens=np.where(failed, np.nan, 5.0),
        finish_s=np.arange(count) + times + 1,
        joules=1000.0,
        failures=Counter(queue_full=int(failed.sum())),
        requests_by_worker=Counter(),
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_saturation_is_what_the_fleet_can_answer(workers: int) -> None:
    config = small_fleet(workers)
    saturation = saturation_rps(config, LOAD, MODEL)
    backlogs_s = []
    for share in (0.6, 1.5):
        rate = share * saturation
        run = simulate(config, LOAD.requests(rate, 1), model=MODEL, block_tokens=LOAD.block_tokens)
        assert run.completed.all()
        backlogs_s.append(float(run.finish_s.max() - run.sent_s.max()) * saturation / 600)
    kept_up, fell_behind = backlogs_s
    assert kept_up < 0.1
    assert fell_behind == pytest.approx(1 - 1 / 1.5, rel=0.3), (
        "what arrived beyond saturation is answered at saturation"
    )


def test_what_is_cached_need_not_be_computed() -> None:
    config, requests = small_fleet(1), LOAD.requests(1.0, 0)
    prompts = np.array([request.prompt_tokens for request in requests], dtype=float)
    nothing, half, all_but_one = (answered_rps(config, requests, prompts * share) for share in (0.0, 0.5, 0.99))
    assert nothing < half < all_but_one


def test_three_workers_take_three_times_as_much() -> None:
    one, three = (saturation_rps(small_fleet(workers), LOAD, MODEL) for workers in (1, 3))
    assert three == pytest.approx(3 * one, rel=0.15)


def test_more_load_means_later_first_tokens() -> None:
    config = with_policy(small_fleet(3), "kvfleet")
    saturation = saturation_rps(config, LOAD, MODEL)
    ttfts = []
    for share in (0.2, 0.6, 1.2):
        requests = LOAD.requests(share * saturation, 0)
        run = simulate(config, requests, model=MODEL, block_tokens=LOAD.block_tokens)
        ttfts.append(float(run.ttft_s.mean()))
    assert ttfts == sorted(ttfts)


def test_a_fleet_that_answers_nothing_has_no_saturation_rate() -> None:
    config = small_fleet(1)
    short = config.model_copy(update={"pools": [config.pools[0].model_copy(update={"max_context_tokens": 10})]})
    with pytest.raises(ValueError, match="no request of the load was answered: look at the fleet's context length"):
        saturation_rps(short, LOAD, MODEL)


@given(edge=st.floats(0.08, 15.0), first=st.just(1.0))
def test_the_capacity_is_found_wherever_it_is(edge: float, first: float) -> None:
    found = slo_capacity_rps(lambda rate: 0.96 if rate <= edge else 0.94, first)
    assert found <= edge
    assert found == pytest.approx(edge, rel=0.03)


def test_no_capacity_is_zero() -> None:
    assert slo_capacity_rps(lambda rate: 0.94, 10.0) == 0.0


def test_what_no_rate_can_break_ends_the_search() -> None:
    assert slo_capacity_rps(lambda rate: 1.0, 1.0) > 10


def test_figures_of_known_outcomes() -> None:
    run = outcome([0.1, 0.2, 0.3, 1.5], [0.01, 0.02, 0.06, 0.01])
    result = figures(run, small_fleet(1), Slo(1.0, 0.05), rate_rps=8.0)
    assert (result.completed, result.failed) == (4, 0)
    assert result.slo_attainment == 0.5, "one answer began too late, one was too slow"
    assert result.goodput_rps == 4.0
    assert result.ttft_mean_ms == pytest.approx(525)
    assert result.ttft_p50_ms == pytest.approx(250)
    assert result.prefix_hit_ratio == pytest.approx(0.1)
    assert result.joules_per_token == 50.0


def test_a_failed_request_misses_its_slo_and_has_no_latency() -> None:
    run = outcome([0.1, math.nan], [0.01, math.nan])
    result = figures(run, small_fleet(1), Slo(1.0, 0.05), rate_rps=2.0)
    assert (result.completed, result.failed, result.slo_attainment) == (1, 1, 0.5)
    assert result.ttft_p99_ms == pytest.approx(100)
    assert result.joules_per_token == 200.0


def test_nothing_completed_is_no_number() -> None:
    result = figures(outcome([math.nan], [math.nan]), small_fleet(1), Slo(1.0, 0.05), rate_rps=2.0)
    assert (result.completed, result.goodput_rps) == (0, 0.0)
    assert math.isnan(result.ttft_mean_ms)
    assert math.isnan(result.joules_per_token)


def test_a_long_prompt_may_take_three_times_its_unloaded_ttft() -> None:
    config: FleetConfig = small_fleet(1)
    unloaded_s = float(unloaded_ttft_s(config, np.array([100.0]))[0])
    slo = Slo(unloaded_s / 10, 0.05)
    within = outcome([2.9 * unloaded_s, 3.1 * unloaded_s], [0.01, 0.01])
    assert figures(within, config, slo, 1.0).slo_attainment == 0.5


def test_the_slo_is_that_of_the_models_policy() -> None:
    config = small_fleet(1)
    policy = config.policies[0].model_copy(update={"ttft_slo_s": 2.0, "itl_slo_s": 0.03})
    assert Slo.of(config.model_copy(update={"policies": [policy]}), MODEL) == Slo(2.0, 0.03)
