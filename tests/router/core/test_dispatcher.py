"""The dispatcher's promises to its callers, one by one."""

import pytest
from routing_fleet import COST, Fleet, config, cost, endpoints, policy, pool, request

from kvfleet_api.fleetconfig import Endpoint, WeightedPool
from kvfleet_router.core.dispatcher import ConfigError, Held, Refusal, Ticket, WorkerEndpoint

BUSY = {"max_in_flight_per_worker": 1}


def test_a_request_gets_a_worker_and_leaves_no_trace():
    fleet = Fleet()
    ticket = fleet.sent()
    assert ticket.worker.in_flight == 1
    assert ticket.predicted_ttft_s > 0
    assert ticket.policy.name == "policy"
    fleet.answer(ticket)
    fleet.assert_idle()
    assert fleet.called_back == []


def test_ending_twice_counts_once():
    fleet = Fleet(workers=1)
    ticket, other = fleet.sent(), fleet.sent()
    fleet.answer(ticket)
    fleet.dispatcher.finish(ticket, ok=False)
    fleet.dispatcher.abandon(ticket, "late")
    fleet.dispatcher.first_token(ticket)
    assert isinstance(fleet.retry(ticket), Refusal)
    assert other.worker.in_flight == 1
    fleet.answer(other)
    fleet.assert_idle()


def test_prompts_in_flight_count_as_cached():
    fleet = Fleet(workers=1)
    first = fleet.sent(tokens=2000)
    assert first.cached_tokens == 0
    second = fleet.sent(tokens=2000)
    assert second.cached_tokens == pytest.approx(1000, abs=64)


def test_a_prompt_that_was_never_computed_is_not_cached():
    fleet = Fleet(workers=2)
    fleet.dispatcher.abandon(fleet.sent(request(4000)), "client gone")
    assert fleet.dispatcher.indexed_blocks == 0
    ticket = fleet.sent(request(4000))
    fleet.dispatcher.first_token(ticket)
    fleet.dispatcher.abandon(ticket, "client gone")
    assert fleet.sent(request(4000)).cached_tokens > 3900


def test_equal_text_is_not_shared_across_models_or_salts():
    pools = [pool("one", 1, adapters=["lora"])]
    fleet = Fleet(config(policy(models=["m", "lora"], pools=["one"]), pools=pools))

    def cached(model, salt):
        body = {"model": model, "prompt": b"x" * 8000}
        parsed = request(2000, model=body["model"], cache_salt=salt)
        parsed.block_hashes, parsed.prompt, parsed.prompt_bytes = None, body["prompt"], 8000
        ticket = fleet.sent(parsed)
        fleet.answer(ticket)
        return ticket.cached_tokens

    assert cached("m", None) == 0
    assert cached("m", None) > 1000
    assert cached("lora", None) == 0
    assert cached("m", "tenant") == 0


def test_the_prompt_is_released_once_hashed():
    fleet = Fleet()
    parsed = request()
    parsed.block_hashes, parsed.prompt = None, b"x" * 4000
    fleet.sent(parsed)
    assert parsed.prompt == b""
    assert len(parsed.block_hashes) == 4000 // 256


# -- routing --------------------------------------------------------------------------------------------------------------


def test_an_unknown_model_is_not_found():
    refusal = Fleet().refused(model="nope")
    assert (refusal.status, refusal.code, refusal.param) == (404, "model_not_found", "model")
    assert "nope" in refusal.message
    assert "m" in refusal.message


def test_no_model_is_fine_where_there_is_but_one():
    assert isinstance(Fleet().submit(model=""), Ticket)
    two = Fleet(config(policy(models=["a", "b"], pools=["a", "b"]), pools=[pool("a", model="a"), pool("b", model="b")]))
    refusal = two.refused(model="")
    assert (refusal.status, refusal.param) == (400, "model")
    assert "a, b" in refusal.message


def test_a_pool_for_any_model_takes_any_name():
    fleet = Fleet(config(policy(models=["*"]), pools=[pool(model="*")]))
    assert isinstance(fleet.submit(model="whatever"), Ticket)
    assert isinstance(fleet.submit(model=""), Ticket)
    assert fleet.dispatcher.models() == []


def test_models_include_adapters_and_pools_at_zero():
    pools = [pool("a", 0, model="a", adapters=["a-lora"], scales_to_zero=True), pool("b", model="b")]
    fleet = Fleet(config(policy(models=["a", "a-lora", "b"], pools=["a", "b"]), pools=pools))
    assert fleet.dispatcher.models() == ["a", "a-lora", "b"]


def test_terminating_and_unready_workers_get_nothing_new():
    fleet = Fleet(workers=3)
    ticket = fleet.sent()
    name = ticket.worker.name
    others = [worker.endpoint for worker in fleet.dispatcher.workers() if worker.name != name]
    draining = WorkerEndpoint(name, ticket.worker.url, terminating=True)
    unready = WorkerEndpoint(others[0].name, others[0].url, ready=False)
    fleet.dispatcher.set_endpoints("pool", [draining, unready, others[1]])
    assert {fleet.sent(request(1000)).worker.name for _ in range(10)} == {others[1].name}
    assert sorted(worker.state for worker in fleet.dispatcher.workers()) == ["not_ready", "ready", "terminating"]
    fleet.answer(ticket)
    assert ticket.worker.in_flight == 0


def test_a_removed_worker_may_come_back_and_old_tickets_do_not_disturb_it():
    fleet = Fleet(workers=1)
    endpoint = fleet.dispatcher.workers()[0].endpoint
    old = fleet.sent(request(4000))
    fleet.dispatcher.set_endpoints("pool", [])
    assert fleet.refused().code == "no_worker"
    assert fleet.dispatcher.indexed_blocks == 0
    fleet.dispatcher.set_endpoints("pool", [endpoint])
    new = fleet.sent(request(4000))
    assert new.cached_tokens == 0
    fleet.answer(old)
    assert fleet.worker(new.worker.name).in_flight == 1
    fleet.answer(new)
    fleet.assert_idle()


def test_a_worker_with_another_address_is_another_worker():
    fleet = Fleet(workers=1)
    ticket = fleet.sent(request(4000))
    fleet.answer(ticket)
    name = ticket.worker.name
    fleet.dispatcher.set_endpoints("pool", [WorkerEndpoint(name, "http://10.9.9.9:8000")])
    moved = fleet.sent(request(4000))
    assert (moved.worker.host, moved.cached_tokens) == ("10.9.9.9", 0)


def test_a_bad_endpoint_changes_nothing():
    fleet = Fleet(workers=2)
    with pytest.raises(ValueError, match="endpoint x"):
        fleet.dispatcher.set_endpoints("pool", [WorkerEndpoint("x", "http://h:99999")])
    assert len(fleet.dispatcher.workers()) == 2


# -- admission ------------------------------------------------------------------------------------------------------------


def test_requests_beyond_the_limit_wait_and_go_in_order():
    fleet = Fleet(workers=1, admission=BUSY)
    running = fleet.sent()
    first, second = fleet.held(), fleet.held()
    assert fleet.dispatcher.queue_depths() == {("policy", "m"): 2}
    fleet.answer(running)
    assert [ticket.request_id for ticket in fleet.called_back] == [first.arrival.request_id]
    fleet.answer(fleet.called_back[0])
    assert [ticket.request_id for ticket in fleet.called_back][1:] == [second.arrival.request_id]
    fleet.answer(fleet.called_back[1])
    fleet.assert_idle()
    assert fleet.dispatcher.queue_depths() == {("policy", "m"): 0}


def test_urgent_requests_go_first():
    fleet = Fleet(workers=1, admission=BUSY)
    running = fleet.sent()
    fleet.held(priority=5)
    urgent = fleet.held(priority=-1)
    fleet.answer(running)
    assert fleet.called_back[0].request_id == urgent.arrival.request_id


def test_a_newcomer_does_not_overtake_the_queue():
    fleet = Fleet(workers=1, admission=BUSY)
    running = fleet.sent()
    waiting = fleet.held()
    fleet.dispatcher.abandon(running, "gone")
    assert fleet.called_back[0].request_id == waiting.arrival.request_id
    assert isinstance(fleet.submit(), Held)


def test_cancelled_requests_are_never_called_back():
    fleet = Fleet(workers=1, admission=BUSY)
    running = fleet.sent()
    fleet.dispatcher.cancel(held := fleet.held())
    fleet.dispatcher.cancel(held)
    fleet.answer(running)
    assert fleet.called_back == []
    assert fleet.dispatcher.tick() is None


def test_waiting_too_long_is_503_with_retry_after():
    fleet = Fleet(workers=1, admission={**BUSY, "queue_timeout_seconds": 10})
    running = fleet.sent()
    fleet.held()
    fleet.now += 9.9
    assert fleet.dispatcher.tick() <= 0.1
    assert fleet.called_back == []
    fleet.now += 0.2
    assert fleet.dispatcher.tick() is None
    refusal = fleet.called_back[0]
    assert (refusal.status, refusal.code) == (503, "queue_timeout")
    assert refusal.retry_after_s >= 1
    fleet.answer(running)
    assert len(fleet.called_back) == 1


def test_a_full_queue_is_429_with_retry_after():
    fleet = Fleet(workers=1, admission={**BUSY, "max_queue": 2})
    fleet.sent()
    fleet.held()
    fleet.held()
    refusal = fleet.refused()
    assert (refusal.status, refusal.code, refusal.type) == (429, "queue_full", "rate_limit_exceeded")
    assert refusal.retry_after_s >= 1


def test_a_full_queue_makes_room_for_a_more_urgent_request():
    fleet = Fleet(workers=1, admission={**BUSY, "max_queue": 2})
    fleet.sent()
    fleet.held(priority=1)
    last = fleet.held(priority=2)
    fleet.held(priority=0)
    assert [(refusal.status, refusal.code) for refusal in fleet.called_back] == [(429, "queue_full")]
    assert not last.waiting
    assert isinstance(fleet.submit(priority=9), Refusal)


def test_a_full_queue_is_shared_between_tenants():
    fleet = Fleet(workers=1, admission={**BUSY, "max_queue": 6})
    fleet.sent()
    for _ in range(6):
        fleet.held(tenant="greedy")
    outcomes = [fleet.submit(tenant="modest") for _ in range(5)]
    assert [type(outcome) for outcome in outcomes] == [Held] * 3 + [Refusal] * 2
    assert [refusal.status for refusal in fleet.called_back] == [429] * 3
    assert isinstance(fleet.submit(tenant="greedy"), Refusal)


def test_without_a_queue_there_is_no_waiting():
    fleet = Fleet(workers=1, admission={**BUSY, "max_queue": 0})
    fleet.sent()
    assert fleet.refused().status == 429


def test_a_long_backlog_holds_the_request_until_there_is_room():
    fleet = Fleet(workers=1)
    running = fleet.sent(tokens=20_000)
    held = fleet.held(request(1000, prefix=9))
    fleet.now += 0.7
    fleet.dispatcher.tick()
    assert fleet.called_back == []
    fleet.now += 0.25
    fleet.dispatcher.tick()
    assert [ticket.request_id for ticket in fleet.called_back] == [held.arrival.request_id]
    assert fleet.dispatcher.decisions.recent(1)[0]["held_s"] == pytest.approx(0.95)
    fleet.answer(running)


def test_hopeless_requests_wait_behind_those_that_can_still_make_it():
    fleet = Fleet(workers=1, admission=BUSY, ttft_slo_s=1.0)
    running = fleet.sent()
    fleet.held()
    fleet.now += 5.0
    fresh = fleet.held()
    fleet.answer(running)
    assert fleet.called_back[0].request_id == fresh.arrival.request_id


def test_nobody_is_passed_over_until_there_is_no_time_left_and_few_at_a_time():
    """Under a load that always has somebody fresh, the hopeless would wait until they are refused."""
    fleet = Fleet(workers=1, admission={**BUSY, "queue_timeout_seconds": 40}, ttft_slo_s=1.0)
    running = fleet.sent()
    late, later = fleet.held(), fleet.held()
    names = {late.arrival.request_id: "late", later.arrival.request_id: "later"}

    def turn():
        """Somebody comes, the running one ends: who is next?"""
        nonlocal running
        fleet.held()
        fleet.answer(running)
        running = fleet.called_back.pop()
        return names.get(running.request_id, "fresh")

    fleet.now += 5.0  # late they are, from now on
    while fleet.now < late.held_since + 19.0:
        assert turn() == "fresh"
    fleet.now = late.held_since + 20.0
    assert fleet.dispatcher.tick() is not None
    assert [turn() for _ in range(9)] == ["late", *["fresh"] * 7, "later"]
    fleet.now += 100.0
    fleet.dispatcher.tick()
    fleet.called_back.clear()
    fleet.answer(running)
    fleet.assert_idle()


def test_urgent_requests_come_before_those_that_have_waited_long():
    fleet = Fleet(workers=1, admission={**BUSY, "queue_timeout_seconds": 40})
    running = fleet.sent()
    fleet.held(priority=1)
    fleet.now += 25.0
    fleet.dispatcher.tick()
    urgent = [fleet.held(priority=0) for _ in range(9)]
    for held in urgent:
        fleet.answer(running, seconds=0.1)
        running = fleet.called_back.pop()
        assert running.request_id == held.arrival.request_id


def test_a_request_for_a_pool_at_zero_waits_for_its_first_worker():
    fleet = Fleet(config(pools=[pool(workers=0, scales_to_zero=True)]))
    held = fleet.held()
    assert fleet.dispatcher.queue_depths() == {("policy", "m"): 1}
    fleet.dispatcher.set_endpoints("pool", [WorkerEndpoint("w", "http://127.0.0.1:9")])
    assert fleet.called_back[0].request_id == held.arrival.request_id


def test_the_first_pool_asleep_is_to_be_woken_while_a_request_waits_that_nobody_else_can_take():
    asleep = [pool("a", 0, scales_to_zero=True), pool("b", 0, scales_to_zero=True), pool("c", 0)]
    fleet = Fleet(config(policy(pools=("c", "b", "a")), pools=asleep))
    assert fleet.dispatcher.pools_to_wake() == []
    held = fleet.held()
    assert fleet.dispatcher.pools_to_wake() == ["b"]
    fleet.dispatcher.cancel(held)
    assert fleet.dispatcher.pools_to_wake() == []
    fleet.held()
    fleet.dispatcher.set_endpoints("b", [WorkerEndpoint("w", "http://127.0.0.1:9", ready=False)])
    assert fleet.dispatcher.pools_to_wake() == ["b"]
    fleet.dispatcher.set_endpoints("b", [WorkerEndpoint("w", "http://127.0.0.1:9")])
    assert fleet.dispatcher.pools_to_wake() == []


def test_a_request_held_by_busy_workers_wakes_nothing():
    pools = [pool("awake", 1), pool("asleep", 0, scales_to_zero=True)]
    busy = policy(pools=("awake", "asleep"), admission=BUSY)
    fleet = Fleet(config(busy, pools=pools))
    fleet.sent()
    fleet.held()
    assert fleet.dispatcher.pools_to_wake() == []


def test_the_predicted_ttft_of_a_pool_grows_with_its_backlog_and_shrinks_with_what_is_cached():
    fleet = Fleet(config(pools=[pool(workers=1), pool("none", 0)]))
    ttft = fleet.dispatcher.predicted_ttft_s
    idle = ttft("pool", 0.0)
    assert 0 < ttft("pool", 0.9) < idle
    assert 0 < ttft("none", 0.0) <= idle
    fleet.sent(request(8000))
    busy = ttft("pool", 0.0)
    assert busy > idle
    fleet.now += 1000.0
    assert idle <= ttft("pool", 0.0) < busy


def test_no_worker_at_all_is_503_with_retry_after():
    refusal = Fleet(config(pools=[pool(workers=0)])).refused()
    assert (refusal.status, refusal.code, refusal.type) == (503, "no_worker", "service_unavailable")
    assert refusal.retry_after_s >= 1


def test_callbacks_may_call_the_dispatcher_again():
    fleet = Fleet(workers=1, admission={**BUSY, "max_queue": 3000})
    order = []

    def assigned(ticket):
        order.append(ticket.request_id)
        fleet.dispatcher.finish(ticket)  # fails or ends at once: the next one is assigned from within

    running = fleet.sent()
    for number in range(2500):
        fleet.dispatcher.submit(request(tail=number), request_id=f"h{number}", on_assigned=assigned)
    fleet.dispatcher.finish(running)
    assert order == [f"h{number}" for number in range(2500)]
    fleet.assert_idle()


def test_nobody_is_called_back_before_submit_has_told_that_they_are_held():
    """The second request is held, then assigned because the first, called back meanwhile, leaves at once."""
    fleet = Fleet(workers=1)
    fleet.sent(tokens=20_000)
    leaves = lambda ticket: fleet.dispatcher.abandon(ticket, "gone")  # noqa: E731
    first = fleet.dispatcher.submit(request(5000, prefix=1), request_id="first", on_assigned=leaves)
    assert isinstance(first, Held)
    fleet.now += 0.95
    assert isinstance(fleet.submit(request(1000, prefix=2)), Ticket)
    assert fleet.called_back == []
    assert not first.waiting


# -- failures -------------------------------------------------------------------------------------------------------------


def test_a_retry_goes_to_another_worker_and_keeps_the_decision():
    fleet = Fleet(workers=2)
    ticket = fleet.sent()
    again = fleet.retry(ticket, "connection refused")
    assert again.worker is not ticket.worker
    assert (again.id, again.attempt) == (ticket.id, 1)
    assert ticket.worker.in_flight == 0
    record = fleet.dispatcher.decisions.get(ticket.id)
    assert [made["worker"] for made in record["tries"]] == [ticket.worker.name, again.worker.name]
    assert record["tries"][0]["given_up"] == "connection refused"
    fleet.answer(again)
    fleet.assert_idle()


def test_retries_end_with_a_refusal():
    fleet = Fleet(workers=4, resilience={"retries": 2})
    ticket = fleet.sent()
    ticket = fleet.retry(ticket)
    ticket = fleet.retry(ticket)
    refusal = fleet.retry(ticket)
    assert (refusal.status, refusal.code) == (503, "worker_failed")
    assert refusal.retry_after_s == 1
    fleet.assert_idle()


def test_the_only_worker_is_tried_again():
    fleet = Fleet(workers=1)
    ticket = fleet.sent()
    assert fleet.retry(ticket).worker is ticket.worker


def fail(fleet, name, times=3):
    for _ in range(times):
        ticket = next(t for t in iter(fleet.sent, None) if t.worker.name == name)
        fleet.dispatcher.finish(ticket, ok=False)


def test_a_failing_worker_is_ejected_probed_and_taken_back():
    fleet = Fleet(workers=2, strategy="random")
    fail(fleet, "pool-0")
    assert fleet.worker("pool-0").state == "ejected"
    assert {fleet.sent().worker.name for _ in range(20)} == {"pool-1"}
    assert fleet.dispatcher.tick() == pytest.approx(1.0)
    fleet.now += 1.0
    probe = next(t for t in iter(fleet.sent, None) if t.worker.name == "pool-0")
    assert {fleet.sent().worker.name for _ in range(20)} == {"pool-1"}
    fleet.answer(probe)
    assert {fleet.sent().worker.name for _ in range(40)} == {"pool-0", "pool-1"}


def test_an_ejected_workers_cache_view_is_dropped():
    fleet = Fleet(workers=1)
    fleet.answer(fleet.sent(request(4000)))
    assert fleet.dispatcher.indexed_blocks > 0
    fail(fleet, "pool-0")
    assert fleet.dispatcher.indexed_blocks == 0


def test_when_all_are_ejected_they_are_tried_all_the_same():
    fleet = Fleet(workers=2, strategy="random")
    fail(fleet, "pool-0")
    fail(fleet, "pool-1")
    assert [worker.state for worker in fleet.dispatcher.workers()] == ["ejected", "ejected"]
    ticket = fleet.sent()
    fleet.answer(ticket)
    assert ticket.worker.state == "ready"


def test_clients_that_leave_do_not_eject_a_worker():
    fleet = Fleet(workers=1)
    for _ in range(20):
        fleet.dispatcher.abandon(fleet.sent(), "client gone")
    assert fleet.worker("pool-0").state == "ready"


# -- answers that do not stream -------------------------------------------------------------------------------------------


def test_a_whole_answer_is_presumed_to_decode_once_its_prefill_is_due():
    fleet = Fleet(workers=1)
    ticket = fleet.sent(tokens=5000, stream=False)
    worker = ticket.worker
    assert (worker.pending, worker.decoding) == (1, 0)
    fleet.now += ticket.predicted_ttft_s + 0.001
    fleet.dispatcher.tick()
    assert (worker.pending, worker.decoding, worker.backlog_s) == (0, 1, 0.0)
    fleet.now += 3
    fleet.dispatcher.first_token(ticket)
    assert ticket.first_token_at == fleet.now
    fleet.dispatcher.finish(ticket, output_tokens=100, prompt_tokens=5000)
    fleet.assert_idle()
    assert worker.pool_state.calibration.prefill_samples == worker.pool_state.calibration.decode_samples == 0


def test_a_later_first_token_tells_that_an_earlier_whole_answer_decodes():
    fleet = Fleet(workers=1)
    whole, streamed = fleet.sent(tokens=2000, stream=False), fleet.sent(tokens=2000)
    fleet.now += 0.001
    fleet.dispatcher.first_token(streamed)
    assert (whole.worker.pending, whole.worker.decoding) == (0, 2)


# -- learning -------------------------------------------------------------------------------------------------------------


def test_slow_prefill_is_learned_and_predicted():
    fleet = Fleet(workers=1)
    for number in range(200):
        ticket = fleet.sent(request(4000, prefix=number))
        fleet.answer(ticket, ttft=3 * COST.prefill_s(4000, 4000) + 0.008)
        fleet.now += 1
    assert ticket.worker.prefill_factor == pytest.approx(3.0, rel=0.1)
    assert ticket.predicted_ttft_s == pytest.approx(3 * COST.prefill_s(4000, 4000) + 0.008, rel=0.15)


def test_chunks_stand_for_tokens_where_the_engine_reports_none():
    fleet = Fleet(workers=1)
    for _ in range(200):
        ticket = fleet.sent()
        ticket.chunks = 1002
        fleet.answer(ticket, output_tokens=None)
    assert ticket.arrival.expected_output_tokens == pytest.approx(1000, rel=0.1)


def test_prompt_lengths_are_learned_from_reports():
    fleet = Fleet(workers=1)
    for _ in range(200):
        parsed = request()
        parsed.prompt_tokens, parsed.prompt_bytes = None, 4000
        ticket = fleet.sent(parsed)
        fleet.answer(ticket, prompt_tokens=2000)
    assert ticket.prompt_tokens == pytest.approx(2000, rel=0.05)
    assert ticket.worker.cache.capacity_blocks == pytest.approx(COST.kv_tokens / 128, rel=0.1)


def test_a_cache_view_that_reports_contradict_is_dropped():
    fleet = Fleet(workers=1)
    for _ in range(4):
        fleet.answer(fleet.sent(request(4000)), cached_tokens=0)
    assert fleet.dispatcher.indexed_blocks == 0


def test_the_engine_may_speak_for_its_own_cache():
    fleet = Fleet(workers=2)
    parsed = request(4000)
    worker = fleet.worker("pool-1")
    fleet.dispatcher.cache_stored(worker, parsed.block_hashes)
    ticket = fleet.sent(request(4000))
    assert ticket.worker is worker
    assert ticket.cached_tokens > 3900
    fleet.answer(ticket)
    fleet.dispatcher.cache_removed(worker, parsed.block_hashes[10:])
    assert fleet.sent(request(4000)).cached_tokens == pytest.approx(640)
    fleet.dispatcher.cache_cleared(worker)
    assert fleet.dispatcher.indexed_blocks == 0


# -- configuration --------------------------------------------------------------------------------------------------------


def test_reloading_keeps_accounting_and_cache_of_workers_that_stay():
    fleet = Fleet(workers=3)
    ticket = fleet.sent(request(2000))
    fleet.dispatcher.configure(config(workers=4, ttft_slo_s=3.0))
    assert ticket.worker.in_flight == 1
    assert ticket.policy.ttft_slo_s == 1.0
    again = fleet.sent(request(2000))
    assert (again.worker, again.policy.ttft_slo_s) == (ticket.worker, 3.0)
    assert again.cached_tokens > 1900
    fleet.answer(ticket)
    fleet.answer(again)
    fleet.assert_idle()


def test_held_requests_move_to_the_policy_that_now_takes_them():
    fleet = Fleet(workers=1, admission=BUSY)
    running = fleet.sent()
    held = fleet.held()
    fleet.dispatcher.configure(config(policy("other"), workers=1))
    assert fleet.called_back[0].request_id == held.arrival.request_id
    assert fleet.called_back[0].policy.name == "other"
    fleet.answer(running)


def test_held_requests_that_nobody_takes_any_more_are_refused():
    fleet = Fleet(workers=1, admission=BUSY)
    fleet.sent()
    fleet.held()
    fleet.dispatcher.configure(config(policy(models=["x"]), pools=[pool(model="x")]))
    assert [refusal.code for refusal in fleet.called_back] == ["model_not_found"]
    assert fleet.dispatcher.queue_depths() == {("policy", "x"): 0}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (config(policy(strategy="magic")), "strategy 'magic' is unknown"),
        (config(policy(pools=["nowhere"])), "pools nowhere are not defined"),
        (config(policy(), policy()), "policies: policy defined more than once"),
        (config(pools=[pool(), pool()]), "pools: pool defined more than once"),
        (config(pools=[pool(endpoints=[Endpoint(name="x", url="ftp://x")], workers=0)]), "pool pool: endpoint x"),
        (config(pools=[pool(endpoints=endpoints(1) * 2, workers=0)]), "endpoints: pool-0"),
    ],
)
def test_a_bad_configuration_is_refused_and_changes_nothing(bad, message):
    fleet = Fleet()
    before = fleet.dispatcher.config
    with pytest.raises(ConfigError, match=message):
        fleet.dispatcher.configure(bad)
    assert fleet.dispatcher.config is before
    assert isinstance(fleet.submit(), Ticket)


def test_another_cost_model_starts_learning_anew():
    fleet = Fleet(workers=1)
    for number in range(50):
        fleet.answer(fleet.sent(request(4000, prefix=number)), ttft=2.0)
    assert fleet.worker("pool-0").prefill_factor > 2
    fleet.dispatcher.configure(config(pools=[pool(workers=1, cost=cost(prefill_s_per_token=4e-4))]))
    assert fleet.worker("pool-0").prefill_factor == 1.0
    assert fleet.sent(request(4000, prefix=99)).predicted_ttft_s > 1.5


def test_decision_records_explain_themselves():
    fleet = Fleet(workers=3)
    ticket = fleet.sent(request(2000))
    fleet.answer(ticket, output_tokens=20, prompt_tokens=2010, cached_tokens=0)
    record = fleet.dispatcher.decisions.get(ticket.id)
    assert record == fleet.dispatcher.decisions.get("r1")
    assert (record["strategy"], record["policy"], record["model"]) == ("kvfleet", "policy", "m")
    made = record["tries"][0]
    assert made["predicted_ttft_s"] == ticket.predicted_ttft_s
    assert made["predicted_joules"] == ticket.joules
    assert made["candidate_count"] == len(made["candidates"]) == 3
    for candidate in made["candidates"]:
        assert sum(candidate["parts"].values()) == pytest.approx(candidate["cost"])
        assert set(candidate["parts"]) >= {"backlog", "prefill", "step", "harm", "slo", "energy"}
    assert record["outcome"]["result"] == "ok"
    assert record["outcome"]["ttft_s"] == pytest.approx(0.05)


def test_weights_share_traffic_between_pools_for_strategies_blind_to_cost():
    pools = [pool("a", 1), pool("b", 1), pool("c", 1)]
    refs = [WeightedPool(name="a", weight=300), WeightedPool(name="b", weight=100), WeightedPool(name="c", weight=0)]
    fleet = Fleet(config(policy(pools=refs, strategy="round_robin"), pools=pools))
    names = [fleet.sent().worker.pool for _ in range(400)]
    assert names.count("a") == pytest.approx(300, abs=40)
    assert names.count("c") == 0


def test_a_decision_costs_bounded_memory():
    fleet = Fleet(workers=1)
    first = fleet.sent()
    fleet.answer(first)
    for _ in range(100):
        fleet.answer(fleet.sent())
    assert fleet.dispatcher.decisions.get(first.id) is None
    assert len(fleet.dispatcher.decisions.recent(1000)) == 64


def test_an_idle_slow_worker_is_used_where_waiting_for_a_fast_one_takes_longer():
    """Weighing a prefill more than its time would leave the slow one idle while the request waits at the router."""
    slow = cost(prefill_s_per_token=COST.prefill_s_per_token * 2, prefill_s_per_token_pair=0.0)
    fast = cost(prefill_s_per_token_pair=0.0)
    pools = [pool("fast", 1, cost=fast), pool("slow", 1, cost=slow)]
    for ahead, expected in ((30_000, "slow-0"), (8_000, None)):
        fleet = Fleet(config(policy(pools=("fast", "slow")), pools=pools))
        assert fleet.sent(request(ahead, prefix="ahead")).worker.name == "fast-0"
        result = fleet.submit(request(20_000, prefix="next"))  # 0.8 s on the fast one, 1.6 s on the slow one
        assert (result.worker.name if expected else isinstance(result, Held)) == (expected or True)
