"""Whatever the load, the engine leaks no block, loses no token and no joule, and starves nobody."""

from __future__ import annotations

from collections import Counter

import pytest
from engine_workloads import SCARCE_WORKLOADS, Workload
from hypothesis import given, settings

from kvfleet_sim.engine import Engine
from kvfleet_sim.request import Request, State, StepResult

MOST_STEPS = 20_000


def check_blocks(engine: Engine) -> None:
    """Reference counts are exactly what running requests hold; every other block is free."""
    held = Counter(block for request in engine._scheduler.running for block in request.blocks)
    cache = engine.cache
    assert {block: count for block in range(cache.blocks) if (count := cache.references(block))} == dict(held)
    assert cache.free == cache.capacity - len(held)
    assert 0 not in held, "block 0 is reserved"
    for request in engine._scheduler.running:
        assert len(set(request.blocks)) == len(request.blocks)


def check_step(engine: Engine, result: StepResult, tokens_before: dict[Request, int]) -> None:
    """The step kept to its budget, gave at most one token to each, and lasted as long as the model says."""
    cost = engine.cost
    assert 0 < result.tokens <= cost.max_step_tokens
    assert engine.num_running <= cost.max_sequences
    gained = {request: engine.generated(request) - before for request, before in tokens_before.items()}
    assert set(gained.values()) <= {0, 1}
    assert sum(gained.values()) == result.decode_tokens + len(result.prefilled)
    least = cost.step_s if not result.decode_tokens else cost.decode_step_s(result.decode_tokens, 0)
    assert result.duration_s >= least * (1 - 1e-9)


def run_to_the_end(workload: Workload, engine: Engine) -> list[Request]:
    requests: list[Request] = []
    now_s, steps = 0.0, 0
    joules = 0.0

    def one_step() -> None:
        nonlocal steps, joules
        before = {request: engine.generated(request) for request in requests}
        result = engine.step(engine.clock_s)
        assert result is not None
        steps += 1
        assert steps < MOST_STEPS, "somebody starves"
        joules += result.joules
        check_blocks(engine)
        check_step(engine, result, before)

    for number, arrival in enumerate(workload.arrivals):
        now_s += arrival.gap_s
        while engine.has_work and engine.clock_s < now_s:
            one_step()
        for earlier, request in enumerate(requests):
            if workload.arrivals[earlier].abort_after == number - earlier:
                engine.abort(request)
                check_blocks(engine)
        request = workload.request(number)
        engine.submit(request, now_s)
        requests.append(request)
    while engine.has_work:
        one_step()
    assert engine.meter.joules() == pytest.approx(joules + engine.cost.idle_watts * engine.meter.idle_s)
    return requests


@given(SCARCE_WORKLOADS)
@settings(max_examples=120, deadline=None)
def test_blocks_tokens_and_joules_are_conserved(workload: Workload) -> None:
    engine = workload.engine()
    requests = run_to_the_end(workload, engine)

    assert engine.cache.free == engine.cache.capacity, "blocks leaked"
    assert engine.cache.usage == 0
    assert (engine.num_running, engine.num_waiting, engine.num_decoding, engine.context_tokens) == (0, 0, 0, 0)
    assert not engine.running_loras
    for request in requests:
        assert request.state in (State.FINISHED, State.ABORTED)
        if request.state is State.FINISHED:
            assert request.generated == request.output_tokens
            assert request.scheduled_s is not None
            assert request.first_token_s is not None
            assert request.finish_s is not None
            assert request.arrival_s <= request.scheduled_s < request.first_token_s <= request.finish_s
    stats = engine.stats
    assert stats.generation_tokens == sum(request.generated for request in requests)
    assert stats.finished + stats.aborted == len(requests)
    assert stats.prefix_hits <= stats.prefix_queries
    assert engine.clock_s == pytest.approx(engine.meter.busy_s() + engine.meter.idle_s)


@given(SCARCE_WORKLOADS)
@settings(max_examples=60, deadline=None)
def test_events_mirror_the_prefix_cache(workload: Workload) -> None:
    """Who counts stores minus removals per key, as a router's index does, knows exactly what can be hit."""
    engine = workload.engine()
    copies: Counter[int] = Counter()
    now_s = 0.0
    for number, arrival in enumerate(workload.arrivals):
        now_s += arrival.gap_s
        for result in engine.advance(now_s):
            apply_events(copies, result)
        engine.submit(workload.request(number), now_s)
    for result in engine.advance(float("inf")):
        apply_events(copies, result)
    assert engine.cache.cached_keys == len(copies)
    assert all(key in engine.cache for key in copies)


def apply_events(copies: Counter[int], result: StepResult) -> None:
    for batch in result.kv_batches:
        for key in batch.removed:
            copies[key] -= 1
            assert copies[key] >= 0, "removed what was never stored"
            if not copies[key]:
                del copies[key]
        for stored in batch.stored:
            assert stored.parent_key is None or copies[stored.parent_key] > 0, "a block without its predecessor"
            copies.update(stored.keys)


@given(SCARCE_WORKLOADS)
@settings(max_examples=60, deadline=None)
def test_first_come_first_scheduled(workload: Workload) -> None:
    """Without priorities and adapters, requests leave the queue in the order they came."""
    plain = Workload(workload.block_tokens, workload.blocks, False, None, workload.context_s, workload.arrivals)
    requests = run_to_the_end(plain, plain.engine())
    scheduled = [request.scheduled_s for request in requests if request.scheduled_s is not None]
    assert scheduled == sorted(scheduled)
