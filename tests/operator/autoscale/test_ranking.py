"""Which pool of a model is filled first, and who is sized for what part of the demand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_api.resolve import GENERIC_COST
from kvfleet_operator.autoscale.ranking import (
    PoolCapacity,
    RequestShape,
    joules_per_token,
    pack_target,
    rank_pools,
    share_demand,
    watts_per_worker,
)

SHAPE = RequestShape(uncached_prompt_tokens=0.0, prompt_tokens=1000.0, output_tokens=200.0)
H100 = replace(
    GENERIC_COST,
    step_s=0.0067,
    step_s_per_sequence=8.9e-5,
    step_s_per_context_token=0.0,
    step_joules=3.16,
    token_joules=0.067,
    context_token_joules=0.0,
    idle_watts=115.0,
)
"""Llama-3.1-8B on one H100, fitted to ML.ENERGY v3 rows."""


def test_joules_per_token_follow_the_fit() -> None:
    assert joules_per_token(H100, SHAPE, 1) == pytest.approx(3.16 + 0.067)
    assert joules_per_token(H100, SHAPE, 64) == pytest.approx(3.16 / 64 + 0.067)


def test_the_prefill_is_part_of_an_output_token_s_joules() -> None:
    shape = replace(SHAPE, uncached_prompt_tokens=1000.0)
    extra = joules_per_token(H100, shape, 64) - joules_per_token(H100, SHAPE, 64)
    assert extra == pytest.approx(H100.prefill_token_joules * 1000 / 200)


@pytest.mark.parametrize(
    ("cost", "itl_slo_s", "sequences"),
    [
        pytest.param(H100, 0.05, 94, id="the energy knee 2 E0/E1"),
        pytest.param(H100, 0.01, 37, id="the ITL objective"),
        pytest.param(replace(H100, kv_tokens=11_000), 0.05, 10, id="KV memory"),
        pytest.param(replace(H100, max_sequences=32), 0.05, 32, id="max sequences"),
        pytest.param(H100, 0.001, 1, id="at least one"),
    ],
)
def test_a_worker_is_filled_to_the_first_limit_it_meets(cost: object, itl_slo_s: float, sequences: int) -> None:
    assert isinstance(cost, type(H100))
    assert pack_target(cost, SHAPE, itl_slo_s) == sequences


def test_a_full_worker_draws_what_its_steps_cost() -> None:
    assert watts_per_worker(H100, SHAPE, 64) == pytest.approx((3.16 + 64 * 0.067) / (0.0067 + 64 * 8.9e-5))
    assert watts_per_worker(replace(H100, step_joules=0.0, token_joules=0.0), SHAPE, 64) == 115.0


def test_fewer_joules_first_and_an_unmet_objective_last() -> None:
    frugal = replace(H100, token_joules=0.05)
    slow = replace(H100, step_s=0.2, step_joules=0.1, token_joules=0.001)
    ranked = rank_pools({"slow": slow, "b": H100, "a": H100, "frugal": frugal}, SHAPE, 0.05)
    assert [pool.name for pool in ranked] == ["frugal", "a", "b", "slow"]
    assert [pool.meets_itl_slo for pool in ranked] == [True, True, True, False]
    assert ranked[1].explanation == "0.101 J/token with 94 sequences a worker"
    assert "a step takes 200 ms, more than the SLO's 50 ms" in ranked[3].explanation


def capacity(name: str, ready: int, most: int, sequences: float = 10.0) -> PoolCapacity:
    return PoolCapacity(name, sequences, ready, most)


@pytest.mark.parametrize(
    ("demand", "ready", "shares"),
    [
        pytest.param(25.0, (4, 0), {"best": 25.0, "next": 0.0}, id="the best pool takes all it can"),
        pytest.param(55.0, (4, 0), {"best": 40.0, "next": 15.0}, id="the next takes what is too much for it"),
        pytest.param(25.0, (0, 3), {"best": 25.0, "next": 25.0}, id="the next is kept until the best is ready"),
        pytest.param(25.0, (1, 3), {"best": 25.0, "next": 15.0}, id="and let go as the best gets ready"),
        pytest.param(0.0, (4, 4), {"best": 0.0, "next": 0.0}, id="no demand"),
        pytest.param(500.0, (4, 4), {"best": 40.0, "next": 460.0}, id="too much for all is the last one's wish"),
    ],
)
def test_pools_are_filled_in_order(demand: float, ready: tuple[int, int], shares: dict[str, float]) -> None:
    ranked = [capacity("best", ready[0], 4), capacity("next", ready[1], 4)]
    assert share_demand(demand, ranked) == shares


def test_without_pools_there_are_no_shares() -> None:
    assert share_demand(10.0, []) == {}


@given(
    st.floats(0, 1000),
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.floats(1, 50)), min_size=1, max_size=5),
)
def test_the_shares_cover_the_demand_even_with_the_workers_ready_now(
    demand: float, pools: list[tuple[int, int, float]]
) -> None:
    ranked = [capacity(str(i), ready, most, sequences) for i, (ready, most, sequences) in enumerate(pools)]
    shares = share_demand(demand, ranked)
    assert sum(shares.values()) >= demand - 1e-6
    carried = [min(pool.ready, pool.max_replicas) * pool.sequences_per_worker for pool in ranked]
    kept = sum(min(shares[pool.name], most) for pool, most in zip(ranked, carried, strict=True))
    assert kept >= min(demand, sum(carried)) - 1e-6
