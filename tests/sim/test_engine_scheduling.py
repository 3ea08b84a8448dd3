"""Scheduling, caching and eviction, case by case, as recorded from vLLM or stated by its scheduler."""

from __future__ import annotations

import pytest
from engine_workloads import cost_model

from kvfleet_sim.engine import Engine
from kvfleet_sim.request import Request, State, StepResult


def engine(**options: object) -> Engine:
    defaults: dict[str, object] = {"block_tokens": 32, "record_events": True}
    return Engine(cost_model(max_step_tokens=8192), **{**defaults, **options})  # type: ignore[arg-type]


def finish(engine: Engine, *requests: Request) -> list[StepResult]:
    for request in requests:
        engine.submit(request, engine.clock_s)
    results = []
    while engine.has_work:
        result = engine.step(engine.clock_s)
        assert result is not None
        results.append(result)
    return results


def events(results: list[StepResult]) -> list[tuple[bool, list[int], list[tuple[int | None, list[int]]]]]:
    return [
        (batch.cleared, batch.removed, [(stored.parent_key, list(stored.keys)) for stored in batch.stored])
        for result in results
        for batch in result.kv_batches
    ]


def test_a_prompt_stores_all_its_full_blocks_in_one_event() -> None:
    assert events(finish(engine(), Request("a", 100, 1, [1, 2, 3]))) == [(False, [], [(None, [1, 2, 3])])]


def test_a_full_prefix_hit_makes_no_event() -> None:
    it = engine()
    finish(it, Request("a", 100, 1, [1, 2, 3]))
    again = Request("b", 100, 1, [1, 2, 3])
    assert events(finish(it, again)) == []
    assert again.cached_tokens == 96


def test_a_longer_prompt_stores_the_rest_below_the_hit() -> None:
    it = engine()
    finish(it, Request("a", 100, 1, [1, 2, 3]))
    longer = Request("b", 164, 1, [1, 2, 3, 4, 5])
    assert events(finish(it, longer)) == [(False, [], [(3, [4, 5])])]
    assert longer.cached_tokens == 96


def test_the_last_block_of_a_fully_cached_prompt_is_computed_and_stored_again() -> None:
    it = engine()
    finish(it, Request("a", 100, 1, [1, 2, 3]))
    exact = Request("b", 96, 1, [1, 2, 3])
    assert events(finish(it, exact)) == [(False, [], [(2, [3])])]
    assert exact.cached_tokens == 64


def test_a_key_stored_twice_survives_the_loss_of_one_copy() -> None:
    it = engine(blocks=6)
    finish(it, Request("a", 96, 1, [1, 2, 3]), Request("b", 96, 1, [1, 2, 3]))
    assert it.cache.free == 5
    # Blocks: 1, 2, 3 twice (b's copy), one never used. A prompt of two blocks takes that one and the oldest, a's copy of 3.
    assert events(finish(it, Request("c", 64, 1, [8, 9]))) == [(False, [3], [(None, [8, 9])])]
    assert 3 in it.cache
    probe = Request("d", 97, 1, [1, 2, 3])
    finish(it, probe)
    assert probe.cached_tokens == 96


def test_eviction_takes_the_tail_of_the_oldest_chain_first() -> None:
    it = engine(blocks=7)
    finish(it, Request("old", 96, 1, [1, 2, 3]))
    finish(it, Request("new", 96, 1, [11, 12, 13]))
    ((_, removed, _),) = events(finish(it, Request("c", 64, 1, [21, 22])))
    assert removed == [3, 2]


def test_decoding_stores_a_block_when_its_last_token_is_computed() -> None:
    results = finish(engine(), Request("a", 30, 70, [1, 2, 3]))
    assert events(results) == [
        (False, [], [(None, [1])]),
        (False, [], [(1, [2])]),
        (False, [], [(2, [3])]),
    ]
    at = [index for index, result in enumerate(results) if result.kv_batches]
    assert at == [2, 34, 66]  # steps 1 and 2 compute tokens 31 and 32; the last of 100 tokens is never computed


def test_a_cleared_cache_is_reported_with_the_next_change() -> None:
    it = engine()
    finish(it, Request("a", 100, 1, [1, 2, 3]))
    assert it.clear_prefix_cache()
    assert events(finish(it, Request("short", 10, 1))) == []
    after = Request("b", 100, 1, [1, 2, 3])
    assert events(finish(it, after)) == [(True, [], [(None, [1, 2, 3])])]
    assert after.cached_tokens == 0


def test_clearing_is_refused_while_requests_run_unless_they_may_be_preempted() -> None:
    it = engine()
    request = Request("a", 100, 50, [1, 2, 3])
    it.submit(request, 0.0)
    it.step(0.0)
    it.step(0.0)
    assert not it.clear_prefix_cache()
    assert it.clear_prefix_cache(preempt=True)
    assert request.state is State.WAITING
    finish(it)
    assert (request.generated, request.preemptions) == (50, 1)


def test_prompts_in_one_step_share_what_the_first_of_them_stores() -> None:
    first, second = Request("a", 100, 1, [1, 2, 3]), Request("b", 100, 1, [1, 2, 3])
    (only,) = finish(engine(), first, second)
    assert only.prefill_tokens == 104
    assert (first.cached_tokens, second.cached_tokens) == (0, 96)


def test_without_prefix_caching_nothing_is_found_or_reported() -> None:
    it = engine(prefix_caching=False)
    results = finish(it, Request("a", 100, 1, [1, 2, 3]))
    again = Request("b", 100, 40, [1, 2, 3, 4])
    assert events(results + finish(it, again)) == []
    assert again.cached_tokens == 0


def test_a_long_prompt_is_cut_into_chunks_beside_decoding() -> None:
    it = Engine(cost_model(max_step_tokens=64, kv_tokens=4096))
    it.submit(Request("running", 10, 100), 0.0)
    it.step(0.0)
    long = Request("long", 150, 2)
    it.submit(long, it.clock_s)
    sizes = []
    while long.first_token_s is None:
        result = it.step(it.clock_s)
        assert result is not None
        assert result.decode_tokens == 1
        sizes.append(result.prefill_tokens)
    assert sizes == [63, 63, 24]


def test_step_time_and_energy_follow_the_cost_model() -> None:
    it = Engine(cost_model(max_step_tokens=8192, kv_tokens=100_000))
    cost = it.cost
    it.submit(Request("a", 1000, 3), 0.0)
    first, second, third = (it.step(it.clock_s) for _ in range(3))
    assert first and second and third
    assert first.duration_s == pytest.approx(cost.prefill_s(1000, 1000))
    assert first.joules == pytest.approx(cost.prefill_token_joules * 1000)
    assert second.duration_s == pytest.approx(cost.decode_step_s(1, 1001))
    assert second.joules == pytest.approx(cost.decode_step_joules(1, 1001))
    assert third.duration_s == pytest.approx(cost.decode_step_s(1, 1002))
    assert it.joules_at(10.0) == pytest.approx(it.meter.busy_joules() + cost.idle_watts * (10.0 - it.clock_s))


def test_a_short_prompt_takes_at_least_one_reading_of_the_weights() -> None:
    it = engine()
    (result,) = finish(it, Request("a", 3, 1))
    assert result.duration_s == pytest.approx(it.cost.step_s)
    assert result.joules == pytest.approx(it.cost.step_joules)


def test_energy_of_a_step_in_progress_grows_with_time() -> None:
    it = engine()
    it.submit(Request("a", 500, 1), 2.0)
    result = it.step(2.0)
    assert result is not None
    middle_s = (result.start_s + result.end_s) / 2
    assert it.joules_at(middle_s) == pytest.approx(2.0 * it.cost.idle_watts + result.joules / 2)
    assert it.joules_at(result.end_s) == pytest.approx(2.0 * it.cost.idle_watts + result.joules)


def test_out_of_blocks_the_youngest_is_preempted_and_resumes() -> None:
    it = engine(block_tokens=16, blocks=8)  # 7 blocks = 112 tokens
    old, young = Request("old", 40, 60, []), Request("young", 40, 60, list(range(7)))
    results = finish(it, old, young)
    assert [request.id for result in results for request in result.preempted] == ["young"]
    assert (old.preemptions, young.preemptions, it.stats.preemptions) == (0, 1, 1)
    assert (old.generated, young.generated) == (60, 60)
    assert old.finish_s is not None
    assert young.finish_s is not None
    assert old.finish_s < young.finish_s


def test_what_a_resumed_request_finds_cached_is_not_counted_as_a_prefix_hit() -> None:
    it = engine(block_tokens=16, blocks=8)
    young = Request("young", 40, 60, list(range(7)))
    finish(it, Request("old", 40, 60), young)
    assert young.preemptions == 1
    assert young.cached_tokens == 0
    assert (it.stats.prefix_queries, it.stats.prefix_hits) == (80, 0)


def test_the_longest_request_fills_the_cache() -> None:
    it = engine(block_tokens=16, blocks=8)
    longest = Request("longest", 100, 13)  # the last token of the output is never cached
    assert it.capacity_tokens == 113
    finish(it, longest)
    assert (longest.generated, longest.preemptions) == (13, 0)
    with pytest.raises(ValueError, match="KV cache holds 113"):
        it.submit(Request("longer", 100, 14), it.clock_s)


def test_priority_goes_before_arrival() -> None:
    it = Engine(cost_model(max_sequences=2, max_step_tokens=64), priority_scheduling=True)
    waiting = [("low10", 10), ("low10b", 10), ("default0", 0), ("high-5", -5)]
    results = finish(
        it,
        Request("blocker0", 5, 50, priority=-9),
        Request("blocker1", 5, 50, priority=-9),
        *(Request(name, 5, 40, priority=priority) for name, priority in waiting),
    )
    order = [request.id for result in results for request in result.finished]
    assert order == ["blocker0", "blocker1", "high-5", "default0", "low10", "low10b"]


def test_under_priority_the_least_important_is_preempted() -> None:
    it = engine(block_tokens=16, blocks=8, priority_scheduling=True)
    least = Request("least", 40, 60, priority=5)
    finish(it, least, Request("most", 40, 60, priority=-5))
    assert least.preemptions == 1


def test_adapters_beyond_the_limit_wait_and_others_pass_them() -> None:
    it = engine(max_loras=1)
    for name, lora in (("a1", "a"), ("b1", "b"), ("plain", None), ("a2", "a")):
        it.submit(Request(name, 10, 5, lora=lora), 0.0)
    it.step(0.0)
    assert it.running_loras == ["a"]
    assert it.waiting_loras == ["b"]
    assert (it.num_running, it.num_waiting) == (3, 1)
    finish(it)
    assert it.stats.finished == 4


def test_a_prompt_starts_only_when_all_of_it_fits() -> None:
    it = Engine(cost_model(max_step_tokens=32), block_tokens=16, blocks=11)  # 160 tokens
    it.submit(Request("a", 100, 20), 0.0)
    big = Request("big", 120, 2)
    it.submit(big, 0.0)
    for _ in range(10):
        it.step(it.clock_s)
    assert big.state is State.WAITING
    finish(it)
    assert big.state is State.FINISHED


def test_aborting_frees_blocks_in_every_state() -> None:
    it = Engine(cost_model(max_step_tokens=64, max_sequences=2))
    decoding, prefilling, waiting = Request("d", 10, 50), Request("p", 500, 5), Request("w", 10, 5)
    for request in (decoding, prefilling, waiting):
        it.submit(request, 0.0)
    it.step(0.0)
    assert [request.state for request in (decoding, prefilling, waiting)] == [
        State.DECODE,
        State.PREFILL,
        State.WAITING,
    ]
    for request in (decoding, prefilling, waiting):
        assert it.abort(request)
        assert not it.abort(request)
    assert not it.has_work
    assert it.cache.free == it.cache.capacity
    assert it.stats.aborted == 3


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("r", 0, 5), "at least one prompt token"),
        (Request("r", 5, 0), "one output token"),
        (Request("r", 4000, 200), "KV cache holds"),
    ],
)
def test_what_can_never_be_served_is_refused(request_: Request, words: str) -> None:
    it = engine(blocks=128)
    with pytest.raises(ValueError, match=words):
        it.submit(request_, 0.0)
    assert not it.has_work


def test_a_budget_below_the_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match="max-num-batched-tokens"):
        Engine(cost_model(max_step_tokens=4, max_sequences=6))
