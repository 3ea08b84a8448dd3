"""Limits of API keys over several replicas: totals are told, what they grow by is charged."""

import pytest

from kvfleet_router.core.ratelimit import Account, Limits, OverLimit
from kvfleet_router.core.shareduse import USED_S, SharedUse
from kvfleet_router.core.sharewire import EVERYONE, MAX_USED, Body, Garbled, body_of, encode


class Keys:
    """The keys of one replica."""

    def __init__(self, *names, **limits):
        self.changed = set()
        self.accounts = {name: Account(name, name, Limits(**limits), 0.0, self.changed) for name in names}

    def changed_use(self):
        told = {account.name: (float(account.used_requests), account.used_tokens) for account in self.changed}
        self.changed.clear()
        return told

    def used_elsewhere(self, name, requests, tokens):
        if name in self.accounts:
            self.accounts[name].used_elsewhere(requests, tokens)


def pair(**limits):
    here, there = Keys("alice", **limits), Keys("alice", **limits)
    return here, there, SharedUse(here), SharedUse(there)


def told(use, now):
    (portion,) = use.to_tell(now)
    return portion


def test_requests_of_two_replicas_share_a_limit():
    here, there, out, into = pair(requests_per_minute=3)
    for _ in range(2):
        here.accounts["alice"].admit(0, 0.0)
    into.hear(1, told(out, 0.0), from_its_start=True)
    assert not isinstance(there.accounts["alice"].admit(0, 0.0), OverLimit)
    assert isinstance(there.accounts["alice"].admit(0, 0.0), OverLimit)
    assert there.accounts["alice"].requests == 1  # metrics count one's own


def test_tokens_are_corrected_when_a_request_has_ended():
    here, there, out, into = pair(tokens_per_minute=100)
    charge = here.accounts["alice"].admit(400, 0.0)
    into.hear(1, told(out, 0.0), from_its_start=True)
    assert isinstance(there.accounts["alice"].admit(0, 0.0), OverLimit)
    charge.settle(10, 5)
    into.hear(1, told(out, 1.0), from_its_start=True)
    assert not isinstance(there.accounts["alice"].admit(0, 0.0), OverLimit)


def test_a_message_that_is_lost_or_comes_twice_does_no_harm():
    here, there, out, into = pair(requests_per_minute=4)
    for n in range(3):
        here.accounts["alice"].admit(0, 0.0)
        message = told(out, n)
    for _ in range(3):
        into.hear(1, message, from_its_start=True)
    assert not isinstance(there.accounts["alice"].admit(0, 0.0), OverLimit)
    assert isinstance(there.accounts["alice"].admit(0, 0.0), OverLimit)


def test_of_one_that_was_there_before_only_growth_counts():
    _, there, _, into = pair(requests_per_minute=2)
    into.hear(1, {"alice": (500.0, 0.0)}, from_its_start=False)
    assert not isinstance(there.accounts["alice"].admit(0, 0.0), OverLimit)
    into.hear(1, {"alice": (501.0, 0.0)}, from_its_start=False)
    assert isinstance(there.accounts["alice"].admit(0, 0.0), OverLimit)


def test_what_was_missed_costs_no_more_than_a_minute():
    _, there, _, into = pair(requests_per_minute=60)
    into.hear(1, {"alice": (1e9, 0.0)}, from_its_start=True)
    over = there.accounts["alice"].admit(0, 0.0)
    assert isinstance(over, OverLimit)
    assert over.retry_after_s == 1


def test_keys_without_limits_and_unknown_ones_are_nobodys_business():
    keys = Keys("free")
    keys.accounts["free"].admit(10, 0.0)
    assert SharedUse(keys).to_tell(0.0) == []
    SharedUse(keys).hear(1, {"unknown": (1.0, 1.0)}, from_its_start=True)


def test_telling_is_rare_and_in_portions():
    keys = Keys(*(f"k{n}" for n in range(MAX_USED + 1)), requests_per_minute=5)
    use = SharedUse(keys)
    for account in keys.accounts.values():
        account.admit(0, 0.0)
    assert [len(portion) for portion in use.to_tell(0.0)] == [MAX_USED, 1]
    keys.accounts["k0"].admit(0, 0.0)
    assert use.to_tell(USED_S / 2) == []
    assert use.to_tell(USED_S) == [{"k0": (2.0, 0.0)}]


@pytest.mark.parametrize(
    "used", [{"a": (-1.0, 0.0)}, {"a": (0.0, 1e19)}, {str(n): (0.0, 0.0) for n in range(MAX_USED + 1)}]
)
def test_what_nobody_says_is_not_believed(used):
    with pytest.raises(Garbled):
        body_of(encode(1, EVERYONE, Body(1, 0.0, used=used)))


def test_it_travels():
    used = {"alice": (3.0, 12.5)}
    assert body_of(encode(1, EVERYONE, Body(1, 0.0, used=used))).used == used
