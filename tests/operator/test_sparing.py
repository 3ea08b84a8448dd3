"""Routers are told which workers will go: taken back at once, renewed while it holds, never for ever."""

import json

from kvfleet_operator.scaling.sparing import LASTS_S, RENEW_BEFORE_S, Spared


def test_it_is_told_once_renewed_before_it_ends_and_taken_back():
    spared = Spared()
    assert not spared.want("ns", "a", [], 100.0), "nothing to take back"
    assert spared.want("ns", "a", ["w-1", "w-0"], 100.0)
    told = {"a": {"until": 100 + LASTS_S, "workers": ["w-0", "w-1"]}}
    assert json.loads(spared.annotation("ns", 100.0)) == told
    assert not spared.want("ns", "a", ["w-0", "w-1"], 100.0 + LASTS_S - RENEW_BEFORE_S - 1)
    assert spared.want("ns", "a", ["w-0", "w-1"], 100.0 + LASTS_S - RENEW_BEFORE_S)
    assert spared.want("ns", "a", ["w-0"], 201.0)
    assert spared.of("ns", "a", 202.0) == {"w-0"}
    assert spared.want("ns", "a", [], 203.0)
    assert spared.annotation("ns", 203.0) is None


def test_pools_of_other_namespaces_and_wishes_that_are_over_are_left_out():
    spared = Spared()
    spared.want("ns", "a", ["w-0"], 100.0)
    spared.want("ns", "b", ["v-0"], 150.0)
    spared.want("other", "a", ["u-0"], 150.0)
    assert set(json.loads(spared.annotation("ns", 100.0 + LASTS_S))) == {"b"}
    assert spared.of("ns", "a", 100.0 + LASTS_S) == frozenset()


def test_what_could_not_be_told_is_told_again():
    spared = Spared()
    spared.want("ns", "a", ["w-0"], 100.0)
    spared.forget("ns", "a")
    assert spared.want("ns", "a", ["w-0"], 101.0)
