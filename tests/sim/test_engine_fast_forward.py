"""`advance`, which takes decode steps together, ends where single steps end: same times to the bit, same cache."""

from __future__ import annotations

from typing import Any

from engine_workloads import SCARCE_WORKLOADS, Workload, cost_model
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet_sim.engine import Engine
from kvfleet_sim.request import KvBatch, Request, StepResult


def drive(workload: Workload, *, single: bool, pauses: list[float]) -> tuple[Engine, list[Request], list[KvBatch]]:
    engine = workload.engine()
    requests: list[Request] = []
    batches: list[KvBatch] = []

    def run(until_s: float) -> None:
        results: list[StepResult] = []
        if single:
            while engine.has_work and engine.clock_s < until_s:
                result = engine.step(engine.clock_s)
                assert result is not None
                assert result.steps == 1
                results.append(result)
        else:
            results = engine.advance(until_s)
        for result in results:
            batches.extend(result.kv_batches)

    now_s = 0.0
    for number, arrival in enumerate(workload.arrivals):
        if not single:
            for pause in pauses:  # looking in between changes nothing
                run(now_s + arrival.gap_s * pause)
        now_s += arrival.gap_s
        run(now_s)
        requests.append(workload.request(number))
        engine.submit(requests[-1], now_s)
    run(float("inf"))
    return engine, requests, batches


def outcome(engine: Engine, requests: list[Request], batches: list[KvBatch]) -> dict[str, Any]:
    return {
        "clock": engine.clock_s,
        "joules": engine.meter.joules(),
        "steps": engine._decoding.steps,
        "stats": engine.stats,
        "times": [(r.scheduled_s, r.first_token_s, r.finish_s, r.cached_tokens, r.preemptions) for r in requests],
        "events": [(b.time_s, b.removed, [(s.request.id, s.first, s.count) for s in b.stored]) for b in batches],
        "lru": list(engine.cache._idle),
        "keys": engine.cache._primary,
    }


@given(SCARCE_WORKLOADS, st.lists(st.floats(0, 1), max_size=3).map(sorted))
@settings(max_examples=150, deadline=None)
def test_fast_forward_equals_single_steps(workload: Workload, pauses: list[float]) -> None:
    fast = outcome(*drive(workload, single=False, pauses=pauses))
    slow = outcome(*drive(workload, single=True, pauses=[]))
    assert fast == slow


def test_a_long_decode_is_one_run() -> None:
    engine = Engine(cost_model(kv_tokens=100_000, max_step_tokens=8192))
    engine.submit(Request("a", 100, 5000), 0.0)
    engine.submit(Request("b", 100, 4000), 0.0)
    results = engine.advance(float("inf"))
    assert [result.steps for result in results] == [1, 3999, 1000]
    assert [[request.id for request in result.finished] for result in results] == [[], ["b"], ["a"]]


def test_nothing_is_visible_before_its_time() -> None:
    engine = Engine(cost_model(kv_tokens=100_000, max_step_tokens=8192))
    request = Request("a", 1000, 10)
    engine.submit(request, 5.0)
    prefill_s = engine.cost.prefill_s(1000, 1000)
    assert engine.advance(5.0 + prefill_s * 0.99) == []
    (first,) = engine.advance(5.0 + prefill_s * 1.01)
    assert first.prefilled == [request]
    assert request.first_token_s == first.end_s
    finished: list[Request] = []
    while not finished:
        event_s = engine.next_event_s()
        seen = engine.advance(event_s - 1e-6)
        assert not [done for result in seen for done in result.finished]
        finished = [done for result in engine.advance(event_s) for done in result.finished]
    assert finished == [request]
    assert request.finish_s == event_s
    assert engine.next_event_s() == float("inf")


def test_an_aborted_request_is_not_reported_by_the_step_in_progress() -> None:
    engine = Engine(cost_model())
    request = Request("a", 10, 1)
    engine.submit(request, 0.0)
    assert engine.advance(1e-4) == []  # the only step has begun
    assert engine.abort(request)
    (result,) = engine.advance(1.0)
    assert result.finished == []
    assert engine.cache.free == engine.cache.capacity
    assert not engine.abort(request)
