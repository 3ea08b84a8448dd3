"""The decision log is a ring: ids find their decision until it is overwritten."""

import json

from hypothesis import given
from hypothesis import strategies as st

from kvfleet_router.core.decisions import DecisionLog, Outcome, Scores, Try


@given(st.integers(1, 20), st.integers(0, 60))
def test_the_last_ones_are_kept_and_found(capacity, count):
    log = DecisionLog(capacity, prefix="abc")
    opened = [log.open(f"r{n}", float(n)) for n in range(count)]
    for number, decision in enumerate(opened):
        found = log.get(decision.id)
        assert (found is None) == (number < count - capacity)
        assert found == log.get(f"r{number}")
    assert [record["request_id"] for record in log.recent(1000)] == [f"r{n}" for n in reversed(range(count))][:capacity]
    assert len(log.recent(2)) == min(2, count, capacity)


def test_odd_ids_find_nothing():
    log = DecisionLog(4, prefix="abc")
    log.open("r", 0.0)
    for odd in ("", "-", "abc-", "abc-zz", "abc--1", "abc-1", "xyz-0", "0" * 5000):
        assert log.get(odd) is None
    assert log.recent(-5) == []


def test_a_record_is_json_with_unix_times_and_the_cheapest_candidate_first():
    log = DecisionLog(4, prefix="abc", epoch_s=1000.0)
    decision = log.open("r", 5.0)
    decision.parts = ("backlog", "prefill")
    decision.tries += (Try(6.0, "w2", Scores.of([("w1", 0.0, (3.0, 1.0)), ("w2", 64.0, (0.5, 1.0))]), 2, 0.25, 12.0),)
    decision.outcome = Outcome(8.0, "ok", "", 6.5, 100, 64, 20)
    record = json.loads(json.dumps(log.get(decision.id)))
    assert (record["time"], record["held_s"]) == (1005.0, 1.0)
    made = record["tries"][0]
    assert [candidate["worker"] for candidate in made["candidates"]] == ["w2", "w1"]
    assert made["candidates"][0] == {
        "worker": "w2",
        "cached_tokens": 64,
        "cost": 1.5,
        "parts": {"backlog": 0.5, "prefill": 1.0},
    }
    assert record["outcome"] == {
        "result": "ok",
        "detail": "",
        "ttft_s": 0.5,
        "ttft_with_queue_s": 1.5,
        "duration_s": 3.0,
        "prompt_tokens": 100,
        "cached_tokens": 64,
        "output_tokens": 20,
        "joules": None,
    }
