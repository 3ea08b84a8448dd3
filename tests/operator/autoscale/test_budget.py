"""Several pools under one budget: who gets how much, and what the others are told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_operator.autoscale.budget import Budget, Claim, Grant, allocate


def granted(claims: list[Claim], budget: Budget, *, shrink: bool = False) -> list[int]:
    return [grant.replicas for grant in allocate(claims, budget, shrink=shrink)]


def test_without_a_budget_everyone_gets_what_it_wants() -> None:
    assert allocate([Claim("a", 1, 500), Claim("b", 9, 2)], Budget()) == [Grant("a", 500, None), Grant("b", 2, None)]


def test_what_runs_and_is_still_wanted_is_kept() -> None:
    assert granted([Claim("a", 6, 6), Claim("b", 0, 6)], Budget(gpus=8)) == [6, 2]


def test_equal_claims_get_equal_shares() -> None:
    assert granted([Claim("a", 0, 8), Claim("b", 0, 4)], Budget(gpus=6)) == [4, 2]


def test_lower_bounds_come_before_wishes() -> None:
    assert granted([Claim("a", 0, 9), Claim("b", 0, 2, least=2)], Budget(gpus=4)) == [2, 2]


def test_higher_priority_goes_first() -> None:
    assert granted([Claim("a", 0, 4), Claim("b", 0, 4, priority=1)], Budget(gpus=5)) == [1, 4]


def test_among_equals_fewer_joules_per_token_go_first() -> None:
    claims = [Claim("a", 0, 2, joules_per_token=0.2), Claim("b", 0, 2, joules_per_token=0.1)]
    assert granted(claims, Budget(gpus=1)) == [0, 1]


def test_large_workers_leave_room_to_small_ones() -> None:
    claims = [Claim("big", 0, 2, gpus_per_worker=8), Claim("small", 0, 3, gpus_per_worker=1)]
    assert granted(claims, Budget(gpus=11)) == [1, 3]


def test_the_smaller_of_two_limits_counts() -> None:
    claims = [Claim("a", 0, 10, watts_per_worker=500.0)]
    assert allocate(claims, Budget(gpus=8, watts=1700.0)) == [
        Grant("a", 3, "power budget: 1500 of 1700 W are used and a worker draws 500")
    ]
    assert allocate(claims, Budget(gpus=2, watts=1700.0)) == [
        Grant("a", 2, "GPU budget: 2 of 2 are used and a worker needs 1")
    ]


def test_an_exceeded_budget_stops_growth_but_takes_nothing() -> None:
    assert granted([Claim("a", 6, 8), Claim("b", 6, 4)], Budget(gpus=8)) == [6, 4]


def test_shrinking_takes_back_the_excess_from_the_largest_share() -> None:
    claims = [Claim("a", 6, 6, priority=1), Claim("b", 6, 6, least=2)]
    assert granted(claims, Budget(gpus=8), shrink=True) == [6, 2]
    assert granted(claims, Budget(gpus=3), shrink=True) == [1, 2]
    assert granted(claims, Budget(gpus=0), shrink=True) == [0, 0]


def test_shrinking_leaves_alone_what_the_exceeded_limit_does_not_count() -> None:
    claims = [Claim("cpu", 5, 5, gpus_per_worker=0), Claim("gpu", 5, 5)]
    assert granted(claims, Budget(gpus=2), shrink=True) == [5, 2]


def test_a_pool_is_named_once() -> None:
    with pytest.raises(ValueError, match="name each pool once"):
        allocate([Claim("a", 0, 1), Claim("a", 0, 1)], Budget(gpus=1))


claims = st.lists(
    st.builds(
        Claim,
        pool=st.text("abcdef", min_size=1, max_size=2),
        current=st.integers(0, 12),
        wanted=st.integers(0, 12),
        least=st.integers(0, 6),
        gpus_per_worker=st.integers(0, 8),
        watts_per_worker=st.sampled_from([0.0, 300.0, 700.0]),
        joules_per_token=st.sampled_from([0.05, 0.1]),
        priority=st.integers(0, 2),
    ),
    unique_by=lambda claim: claim.pool,
    max_size=6,
)
budgets = st.builds(
    Budget, gpus=st.none() | st.integers(0, 120), watts=st.none() | st.floats(0, 20_000, allow_nan=False)
)


@given(claims, budgets, st.booleans())
def test_no_grant_breaks_the_rules(given_claims: list[Claim], budget: Budget, shrink: bool) -> None:
    grants = allocate(given_claims, budget, shrink=shrink)
    rows = list(zip(given_claims, grants, strict=True))
    for claim, grant in rows:
        assert 0 <= grant.replicas <= claim.wanted
        assert (grant.held_back_by is None) == (grant.replicas == claim.wanted)
        assert shrink or grant.replicas >= min(claim.current, claim.wanted)
    for limit, costs in (
        (budget.gpus, [claim.gpus_per_worker for claim in given_claims]),
        (budget.watts, [claim.watts_per_worker for claim in given_claims]),
    ):
        used = sum(cost * grant.replicas for cost, grant in zip(costs, grants, strict=True))
        if limit is not None and used > limit * (1 + 1e-6):
            assert not shrink
            assert not any(
                cost and grant.replicas > min(claim.current, claim.wanted)
                for cost, (claim, grant) in zip(costs, rows, strict=True)
            )


@given(claims, budgets, st.booleans())
def test_the_order_of_the_claims_does_not_matter(given_claims: list[Claim], budget: Budget, shrink: bool) -> None:
    forward, backward = (
        {grant.pool: grant.replicas for grant in allocate(order, budget, shrink=shrink)}
        for order in (given_claims, given_claims[::-1])
    )
    assert forward == backward
