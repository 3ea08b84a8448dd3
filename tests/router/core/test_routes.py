"""Which policy takes a request and which workers may get it, as tables."""

import pytest
from routing_fleet import COST, Fleet, config, cost, policy, pool, request

from kvfleet_api.fleetconfig import WeightedPool
from kvfleet_router.core.dispatcher import Refusal, Ticket, WorkerEndpoint


def header(name, value):
    return [{"name": name, "value": value}]


POLICIES = [
    policy("by-header", headers=header("X-Team", "search")),
    policy("long", context_tokens={"min": 5000}),
    policy("urgent", priority={"max": 1}, context_tokens={"max": 100}),
    policy("medium", context_tokens={"min": 101, "max": 4999}),
    policy("lora-only", models=["lora"]),
]


@pytest.mark.parametrize(
    ("tokens", "fields", "expected"),
    [
        (10, {"headers": {b"x-team": b"search"}}, "by-header"),
        (9000, {"headers": {b"x-team": b"search"}}, "by-header"),
        (10, {"headers": {b"x-team": b"ads"}}, "urgent"),
        (5000, {}, "long"),
        (4999, {}, "medium"),
        (101, {}, "medium"),
        (100, {}, "urgent"),
        (100, {"priority": 7}, "no_matching_policy"),
        (10, {"model": "lora", "priority": 7}, "lora-only"),
    ],
)
def test_the_first_policy_that_matches_takes_the_request(tokens, fields, expected):
    fleet = Fleet(config(*POLICIES, pools=[pool(adapters=["lora"])]))
    result = fleet.submit(request(tokens, **fields))
    assert (result.code if isinstance(result, Refusal) else result.policy.name) == expected


def test_a_policy_whose_pools_do_not_serve_the_model_is_passed_over():
    pools = [pool("a", model="a"), pool("b", model="b")]
    fleet = Fleet(
        config(
            policy("first", models=["a", "b"], pools=["a"]), policy("second", models=["b"], pools=["b"]), pools=pools
        )
    )
    assert fleet.sent(model="b").policy.name == "second"


def tiers(*names, **fields):
    pools = [pool(name, 1, **fields.get(name, {})) for name in names]
    refs = [WeightedPool(name=name, tier=tier) for tier, name in enumerate(names)]
    return config(policy(pools=refs, strategy="least_request", admission=fields.get("admission", {})), pools=pools)


def test_a_higher_tier_is_for_overflow():
    fleet = Fleet(tiers("near", "far", admission={"max_in_flight_per_worker": 2}))
    assert [fleet.sent().worker.pool for _ in range(4)] == ["near", "near", "far", "far"]


def test_a_higher_tier_takes_over_when_the_lower_has_no_worker():
    fleet = Fleet(tiers("near", "far"))
    fleet.dispatcher.set_endpoints("near", [])
    assert fleet.sent().worker.pool == "far"


def test_long_prompts_go_where_they_fit_and_the_engine_judges_the_longest():
    short, long = {"max_context_tokens": 1000}, {"max_context_tokens": 8000}
    fleet = Fleet(tiers("short", "long", short=short, long=long))
    assert fleet.sent(request(900)).worker.pool == "short"
    assert fleet.sent(request(1500)).worker.pool == "long"
    assert fleet.sent(request(9000)).worker.pool == "long"


def test_prefill_pools_take_no_whole_requests():
    fleet = Fleet(config(policy(pools=["p", "d"]), pools=[pool("p", role="Prefill"), pool("d", role="Decode")]))
    assert {fleet.sent(request(10)).worker.pool for _ in range(10)} == {"d"}


def test_cost_measuring_strategies_compare_pools_themselves():
    slow = cost(prefill_s_per_token=4e-3)
    pools = [pool("slow", 1, cost=slow), pool("fast", 1)]
    refs = [WeightedPool(name="slow", weight=1_000_000), WeightedPool(name="fast", weight=1)]
    fleet = Fleet(config(policy(pools=refs), pools=pools))
    assert {fleet.sent(request(100, prefix=n)).worker.pool for n in range(5)} == {"fast"}


def test_the_finest_block_size_of_any_policy_holds_for_all():
    policies = [policy("a", prefix={"block_bytes": 512}), policy("b", models=["lora"], prefix={"block_bytes": 128})]
    fleet = Fleet(config(*policies, pools=[pool(adapters=["lora"])]))
    parsed = request()
    parsed.block_hashes, parsed.prompt = None, b"x" * 1024
    fleet.sent(parsed)
    assert len(parsed.block_hashes) == 8


def test_a_policy_without_prefix_hashes_nothing():
    fleet = Fleet(prefix={"enabled": False})
    parsed = request()
    parsed.block_hashes, parsed.prompt = None, b"x" * 1024
    ticket = fleet.sent(parsed)
    assert isinstance(ticket, Ticket)
    assert parsed.block_hashes is None
    assert (fleet.dispatcher.indexed_blocks, ticket.worker.kv_used_tokens) == (0, 1000)


def test_pools_at_zero_of_one_model_do_not_delay_another():
    pools = [pool("asleep", 0, model="a", scales_to_zero=True), pool("awake", 1, model="b")]
    fleet = Fleet(config(policy(models=["a", "b"], pools=["asleep", "awake"]), pools=pools))
    for _ in range(40):
        fleet.held(model="a")
    assert isinstance(fleet.submit(model="b"), Ticket)
    fleet.dispatcher.set_endpoints("asleep", [WorkerEndpoint("w", "http://127.0.0.1:1")])
    assert fleet.called_back


def drain(fleet, *names, count=2):
    endpoints = [
        WorkerEndpoint(f"pool-{n}", f"http://127.0.0.1:{8000 + n}", draining=f"pool-{n}" in names) for n in range(count)
    ]
    fleet.dispatcher.set_endpoints("pool", endpoints)


@pytest.mark.parametrize("strategy", ["kvfleet", "lmetric", "least_request", "round_robin", "power_of_two"])
def test_a_worker_that_is_to_be_taken_away_gets_nothing_new(strategy):
    fleet = Fleet(workers=2, strategy=strategy)
    drain(fleet, "pool-0")
    assert {fleet.sent(tokens=100).worker.name for _ in range(12)} == {"pool-1"}
    drain(fleet)
    assert "pool-0" in {fleet.sent(tokens=100).worker.name for _ in range(12)}, "it was called off"


def test_it_is_used_where_no_other_worker_can_have_the_request():
    fleet = Fleet(workers=2, strategy="least_request", admission={"max_in_flight_per_worker": 1})
    drain(fleet, "pool-0")
    assert [fleet.sent().worker.name for _ in range(2)] == ["pool-1", "pool-0"]
    failed = Fleet(workers=2)
    drain(failed, "pool-0")
    ticket = failed.sent()
    assert failed.retry(ticket).worker.name == "pool-0"
    everybody = Fleet(workers=2)
    drain(everybody, "pool-0", "pool-1")
    assert isinstance(everybody.submit(), Ticket)


def test_neither_a_session_nor_a_cached_prompt_brings_a_request_to_it():
    fleet = Fleet(workers=2)
    first = fleet.sent(request(4000, prefix=1, tail=1, session_id="s"))
    fleet.answer(first)
    other = ({"pool-0", "pool-1"} - {first.worker.name}).pop()
    assert fleet.sent(request(4000, prefix=1, tail=1, session_id="s")).worker.name == first.worker.name
    drain(fleet, first.worker.name)
    assert fleet.sent(request(4000, prefix=1, tail=1, session_id="s")).worker.name == other


def test_a_pool_is_as_busy_as_those_of_its_workers_that_get_requests():
    """Else the price of joules would stay while the others are full."""
    fleet, half = Fleet(workers=1), Fleet(workers=2)
    drain(half, "pool-0")
    for each in (fleet, half):
        for n in range(40):
            each.dispatcher.first_token(each.sent(tokens=100, prefix=n))
        each.now += 1.0
        each.dispatcher.tick()
    [alone], [spared] = fleet.dispatcher.pools(), half.dispatcher.pools()
    assert alone.load > 0.1
    assert (spared.load, spared.capacity_rps) == (alone.load, alone.capacity_rps)
    drain(half)
    half.now += 1.0
    half.dispatcher.tick()
    assert spared.load == pytest.approx(alone.load / 2, rel=0.1)


def test_an_idle_worker_that_gets_nothing_is_no_comfort_to_the_autoscaler():
    """The predicted TTFT is that of the workers that get requests."""
    fleet = Fleet(workers=2)
    drain(fleet, "pool-0")
    assert fleet.sent(request(8000)).worker.name == "pool-1"
    spared = fleet.dispatcher.predicted_ttft_s("pool", 0.0)
    drain(fleet)
    assert fleet.dispatcher.predicted_ttft_s("pool", 0.0) < spared / 2


@pytest.mark.parametrize("pools", [("fast", "slow"), ("slow", "fast")])
def test_a_long_prompt_is_due_by_the_fastest_pool_in_whatever_order_they_are_named(pools):
    slow = cost(prefill_s_per_token=3 * COST.prefill_s_per_token)
    fleet = Fleet(config(policy(pools=pools, ttft_slo_s=0.5), pools=[pool("fast", 1), pool("slow", 1, cost=slow)]))
    arrival = fleet.sent(request(50_000)).arrival
    unloaded = COST.prefill_s(50_000, 50_000) + COST.step_s
    assert arrival.deadline == pytest.approx(arrival.arrived_at + 3 * unloaded)
