"""The retry budget: a share of the requests of the last minute, and a few that are free."""

from hypothesis import given
from hypothesis import strategies as st

from kvfleet_router.core.budget import RESERVE, SLOT_S, RetryBudget


def spend(budget: RetryBudget, now: float) -> int:
    """Retries until it is exhausted."""
    count = 0
    while budget.allows(now):
        budget.retry()
        count += 1
        assert count < 1_000_000
    return count


def test_without_requests_a_few_are_free() -> None:
    assert spend(RetryBudget(0.2), 5.0) == RESERVE


def test_requests_allow_a_share_of_retries() -> None:
    budget = RetryBudget(0.2)
    for _ in range(1000):
        budget.request(1.0)
    assert spend(budget, 1.0) == RESERVE + 200


def test_a_worker_that_dies_with_all_it_had_is_within_a_whole_budget() -> None:
    budget = RetryBudget(1.0)
    for number in range(5000):
        budget.request(number * 0.01)
    assert spend(budget, 50.0) >= 5000


def test_what_is_long_ago_does_not_count() -> None:
    budget = RetryBudget(1.0)
    for _ in range(1000):
        budget.request(0.0)
    assert spend(budget, 1.0) == RESERVE + 1000
    assert not budget.allows(SLOT_S - 0.1)
    assert spend(budget, 3 * SLOT_S) == RESERVE


@given(
    share=st.sampled_from([0.0, 0.2, 1.0]),
    steps=st.lists(st.tuples(st.floats(0.0, 40.0), st.booleans()), max_size=300),
)
def test_over_any_minute_retries_are_bounded(share: float, steps: list[tuple[float, bool]]) -> None:
    budget, now = RetryBudget(share), 0.0
    requests: list[float] = []
    retries: list[float] = []
    for pause_s, is_request in steps:
        now += pause_s / 10
        if is_request:
            budget.request(now)
            requests.append(now)
        elif budget.allows(now):
            budget.retry()
            retries.append(now)
            recent = [at for at in retries if at > now - SLOT_S]
            counted = [at for at in requests if at > now - 3 * SLOT_S]
            assert len(recent) <= share * len(counted) + RESERVE + 1
