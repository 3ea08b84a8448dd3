"""Limits of a key: over any minute it gets what it may, and not a request more than a bucket's worth on top."""

from hypothesis import given
from hypothesis import strategies as st

from kvfleet_router.core.ratelimit import Account, Charge, Limits, OverLimit


def account(**limits: int) -> Account:
    return Account("a", "t", Limits(**limits), 0.0)


def admitted(outcome: Charge | OverLimit) -> Charge:
    assert isinstance(outcome, Charge)
    return outcome


def test_without_limits_everything_is_admitted_and_counted() -> None:
    unlimited = account()
    for _ in range(1000):
        admitted(unlimited.admit(10**9, 0.0)).settle(5, 7)
    assert (unlimited.requests, unlimited.prompt_tokens, unlimited.output_tokens) == (1000, 5000, 7000)


def test_requests_come_back_one_by_one() -> None:
    limited = account(requests_per_minute=60)
    for _ in range(60):
        admitted(limited.admit(0, 0.0))
    assert limited.admit(0, 0.0) == OverLimit("requests", 60, 1)
    assert limited.admit(0, 0.5) == OverLimit("requests", 60, 1)
    admitted(limited.admit(0, 1.0))
    assert isinstance(limited.admit(0, 1.0), OverLimit)
    assert (limited.requests, limited.limited_requests) == (61, 3)


def test_tokens_are_charged_as_used() -> None:
    limited = account(tokens_per_minute=6000)
    charge = admitted(limited.admit(4000, 0.0))  # 1,000 estimated
    charge.settle(2000, 6000)  # 2,000 more than there were
    assert limited.admit(4, 0.0) == OverLimit("tokens", 6000, 21)
    assert isinstance(limited.admit(4, 19.0), OverLimit)
    admitted(limited.admit(4, 21.0))


def test_what_was_not_used_is_given_back() -> None:
    limited = account(tokens_per_minute=1000)
    charge = admitted(limited.admit(40_000, 0.0))  # larger than the limit: admitted once
    assert isinstance(limited.admit(4, 0.0), OverLimit)
    charge.settle(0, 0)
    admitted(limited.admit(4, 0.0))


def test_new_limits_hold_at_once_and_the_same_ones_change_nothing() -> None:
    limited = account(requests_per_minute=2)
    admitted(limited.admit(0, 0.0))
    limited.limit(Limits(requests_per_minute=2), 0.0)
    admitted(limited.admit(0, 0.0))
    assert isinstance(limited.admit(0, 0.0), OverLimit)
    limited.limit(Limits(requests_per_minute=100), 0.0)
    admitted(limited.admit(0, 0.0))
    limited.limit(Limits(), 0.0)
    for _ in range(1000):
        admitted(limited.admit(0, 0.0))


@given(
    limit=st.integers(1, 200),
    pauses=st.lists(st.floats(0.0, 5.0), max_size=300),
)
def test_over_any_minute_no_more_than_twice_the_limit(limit: int, pauses: list[float]) -> None:
    """A full bucket and a minute's refill."""
    limited, now = account(requests_per_minute=limit), 0.0
    times: list[float] = []
    for pause_s in pauses:
        now += pause_s
        outcome = limited.admit(0, now)
        if isinstance(outcome, Charge):
            times.append(now)
            assert sum(at > now - 60.0 for at in times) <= 2 * limit + 1
        else:
            later = now + outcome.retry_after_s
            assert Account.admit(limited, 0, later).__class__ is Charge  # Retry-After tells the truth
            now = later
            times.append(later)
