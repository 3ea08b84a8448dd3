"""Many engines and the router's core in virtual time: deterministic, complete, and for one worker the engine itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from engine_workloads import cost_model
from fleet_helpers import BLOCK_TOKENS, MODEL, small_fleet, steady_load
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet_api.fleetconfig import FleetConfig, WeightedPool
from kvfleet_api.routingpolicy import DisaggregationSpec
from kvfleet_router.policies import REGISTRY
from kvfleet_sim.engine import Engine
from kvfleet_sim.fleet import Options, Run, simulate
from kvfleet_sim.request import Request
from kvfleet_sim.variants import policy_names, with_policy, with_simulated_workers
from kvfleet_sim.workload import LoadRequest


def run(config: FleetConfig, load: list[LoadRequest], *, seed: int = 0, **options: object) -> Run:
    return simulate(
        config,
        load,
        model=MODEL,
        block_tokens=BLOCK_TOKENS,
        seed=seed,
        options=Options(**options),  # type: ignore[arg-type]
    )


def same(one: Run, other: Run) -> bool:
    arrays = ("sent_s", "ttft_s", "itl_s", "cached_tokens", "finish_s")
    return one.joules == other.joules and all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True) for name in arrays
    )


@pytest.mark.parametrize("strategy", sorted(REGISTRY))
def test_equal_seeds_give_equal_runs(strategy: str) -> None:
    config, load = small_fleet(3, strategy=strategy), steady_load(60, 0.02)
    first = run(config, load, seed=4)
    assert same(first, run(config, load, seed=4))
    assert first.completed.all()


def test_other_seeds_give_other_runs() -> None:
    config, load = small_fleet(3, strategy="random"), steady_load(60)
    assert not same(run(config, load, seed=0), run(config, load, seed=1))


@pytest.mark.parametrize("kv_events", [False, True])
def test_one_worker_is_a_bare_engine(kv_events: bool) -> None:
    load = steady_load(80, 0.01)
    engine = Engine(cost_model(), block_tokens=BLOCK_TOKENS)
    requests = [Request(i, r.prompt_tokens, r.output_tokens, r.block_keys) for i, r in enumerate(load)]
    for request, sent in zip(requests, load, strict=True):
        assert sent.start_s is not None
        engine.advance(sent.start_s)
        engine.submit(request, sent.start_s)
    engine.advance(float("inf"))

    simulated = run(small_fleet(1), load, kv_events=kv_events)
    assert simulated.finish_s.tolist() == [request.finish_s for request in requests]
    assert simulated.cached_tokens.tolist() == [request.cached_tokens for request in requests]
    for ttft_s, request in zip(simulated.ttft_s, requests, strict=True):
        assert request.first_token_s is not None
        assert ttft_s == request.first_token_s - request.arrival_s
    assert simulated.joules == engine.meter.joules()


REQUESTS = st.builds(
    LoadRequest,
    prompt_tokens=st.integers(1, 400),
    output_tokens=st.integers(1, 60),
    block_keys=st.just(()),
    start_s=st.floats(0, 2),
)


@st.composite
def loads(draw: st.DrawFn) -> list[LoadRequest]:
    """Requests with shared prefixes, some of them follow-ups, some of them longer than any worker takes."""
    requests: list[LoadRequest] = []
    for number, request in enumerate(draw(st.lists(REQUESTS, min_size=1, max_size=25))):
        family = draw(st.integers(0, 3))
        tokens = 5000 if draw(st.integers(0, 15)) == 0 else request.prompt_tokens
        keys = range(family * 1000, family * 1000 + tokens // BLOCK_TOKENS)
        follows = number > 0 and draw(st.booleans())
        if follows:
            requests[-1] = replace(requests[-1], next_turn=number)
        requests.append(
            replace(request, prompt_tokens=tokens, block_keys=keys, start_s=None if follows else request.start_s)
        )
    return requests


@given(
    load=loads(),
    workers=st.integers(1, 3),
    policy=st.sampled_from(policy_names()),
    replicas=st.integers(1, 2),
    share_s=st.sampled_from([None, 0.01, 1.0]),
    kv_events=st.booleans(),
    most=st.sampled_from([None, 1, 4]),
    queue=st.sampled_from([0, 2, 1024]),
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_every_request_completes_or_fails_exactly_once(
    load: list[LoadRequest],
    workers: int,
    policy: str,
    replicas: int,
    share_s: float | None,
    kv_events: bool,
    most: int | None,
    queue: int,
    seed: int,
) -> None:
    limits = {"queue": queue} if most is None else {"queue": queue, "most": most}
    config = with_policy(small_fleet(workers, **limits), policy)
    ended = run(config, load, seed=seed, replicas=replicas, share_s=share_s, kv_events=kv_events)

    done = ended.completed
    assert done.sum() + ended.failures.total() == len(load)
    assert ended.requests_by_worker.total() == done.sum()
    assert not np.isnan(ended.sent_s).any(), "every turn was sent"
    for number, request in enumerate(load):
        assert done[number] or np.isnan(ended.ttft_s[number])
        if request.prompt_tokens == 5000:
            assert not done[number]
    assert (ended.ttft_s[done] > 0).all()
    assert (ended.itl_s[done] >= 0).all()
    assert (ended.cached_tokens[done] < ended.prompt_tokens[done]).all()
    assert ended.joules >= 0


def test_a_turn_waits_for_the_answer_before_it() -> None:
    load = [
        LoadRequest(100, 20, range(6), 0.5, next_turn=1),
        LoadRequest(150, 20, range(9), None, think_s=2.0, next_turn=2),
        LoadRequest(5000, 20, (), None, think_s=1.0, next_turn=3),
        LoadRequest(160, 20, range(10), None, think_s=0.25),
    ]
    ended = run(small_fleet(2), load)
    assert ended.failures == Counter(too_long=1)
    assert ended.sent_s[1] == pytest.approx(ended.finish_s[0] + 2.0)
    assert ended.sent_s[2] == pytest.approx(ended.finish_s[1] + 1.0)
    assert ended.sent_s[3] == pytest.approx(ended.sent_s[2] + 0.25), "a refusal is an answer, too"
    assert ended.cached_tokens[3] == 144, "the turn found its conversation"


def test_requests_beyond_a_workers_limit_wait_at_the_router() -> None:
    ended = run(small_fleet(1, most=1), steady_load(10, 0.0))
    assert ended.completed.all()
    order = np.argsort(ended.finish_s)
    for earlier, later in pairwise(order):
        first_token_s = ended.sent_s[later] + ended.ttft_s[later]
        assert first_token_s > ended.finish_s[earlier], "one at a time"


def test_requests_beyond_the_queue_are_refused() -> None:
    ended = run(small_fleet(1, most=1, queue=3), steady_load(10, 0.0))
    assert ended.completed.sum() == 4
    assert ended.failures == Counter(queue_full=6)


def test_an_error_of_calibration_is_the_routers_not_the_workers() -> None:
    load = steady_load(40, 0.01)
    assert same(run(small_fleet(1), load), run(small_fleet(1), load, calibration_error=3.0))
    config = with_policy(small_fleet(3), "kvfleet")
    assert not same(run(config, load), run(config, load, calibration_error=10.0))


def test_routers_that_do_not_know_each_other_place_worse() -> None:
    """Each of eight routers sees few of the requests, so least_request is little better than chance."""
    config, load = small_fleet(4, strategy="least_request"), steady_load(300, 0.008, families=300)
    alone, many = run(config, load), run(config, load, replicas=8)
    assert many.completed.all()
    assert np.mean(many.ttft_s) > 1.2 * np.mean(alone.ttft_s)


def test_routers_that_tell_each_other_place_better() -> None:
    config, load = small_fleet(4, strategy="least_request"), steady_load(300, 0.008, families=300)
    apart, together = run(config, load, replicas=8), run(config, load, replicas=8, share_s=0.002)
    assert together.completed.all()
    assert np.mean(together.ttft_s) < 0.9 * np.mean(apart.ttft_s)


def test_a_lone_router_has_nobody_to_tell() -> None:
    config, load = small_fleet(2, strategy="kvfleet"), steady_load(40)
    assert same(run(config, load), run(config, load, share_s=0.01))


def test_an_idle_fleet_draws_its_idle_power() -> None:
    ended = run(small_fleet(4), [LoadRequest(100, 1, (), 99.0)])
    assert ended.joules == pytest.approx(4 * 115.0 * 99.0, rel=0.01)


def test_a_variant_changes_the_energy_mode_only() -> None:
    config = small_fleet(2)
    (plain,), (energy,) = with_policy(config, "kvfleet").policies, with_policy(config, "kvfleet:energy").policies
    assert (plain.energy_mode, energy.energy_mode) == ("Off", "Prefer")
    assert energy.model_copy(update={"energy_mode": "Off"}) == plain
    assert with_policy(config, "manifests") == config


@pytest.mark.parametrize("name", ["best", "", "lmetric:energy", "kvfleet:Energy", "manifests:energy"])
def test_an_unknown_policy_names_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not known: use one of .*kvfleet, kvfleet:energy, .*round_robin"):
        with_policy(small_fleet(2), name)


def test_a_fleet_without_workers_cannot_be_simulated() -> None:
    with pytest.raises(ValueError, match=r"no worker that answers: set spec\.replicas"):
        with_simulated_workers(small_fleet(2), {"a": 0})


def test_a_fleet_of_prefill_workers_alone_cannot_be_simulated() -> None:
    config = small_fleet(2)
    prefill = config.model_copy(update={"pools": [config.pools[0].model_copy(update={"role": "Prefill"})]})
    with pytest.raises(ValueError, match="no worker that answers"):
        with_simulated_workers(prefill, {"a": 2})


def divided_fleet(strategy: str = "kvfleet", least: int = 100) -> FleetConfig:
    """Two Prefill and two Decode workers; prompts of `least` uncached tokens or more are divided."""
    config = small_fleet(2, strategy=strategy)
    pools = [config.pools[0].model_copy(update={"name": role.lower(), "role": role}) for role in ("Prefill", "Decode")]
    policy = config.policies[0].model_copy(
        update={
            "pools": [WeightedPool(name=pool.name) for pool in pools],
            "disaggregation": DisaggregationSpec.model_validate({"minUncachedTokens": least}),
        }
    )
    return with_simulated_workers(FleetConfig(pools=pools, policies=[policy]), {"prefill": 2, "decode": 2})


@pytest.mark.parametrize("strategy", ["kvfleet", "lmetric", "round_robin", "dynamo_kv"])
def test_long_prompts_are_computed_apart(strategy: str) -> None:
    load = [replace(request, block_keys=()) for request in steady_load(80, 0.02)]
    result = run(divided_fleet(strategy), load)
    assert result.completed.all()
    assert list(result.output_tokens) == [request.output_tokens for request in load]
    by_pool = Counter[str]()
    for worker, count in result.requests_by_worker.items():
        by_pool[worker.rpartition("-")[0]] += count
    long = sum(request.prompt_tokens >= 100 and request.output_tokens > 1 for request in load)
    assert 0 < long < len(load)
    assert by_pool["decode"] == len(load)
    assert by_pool["prefill"] >= long


def test_nothing_is_divided_below_the_threshold() -> None:
    result = run(divided_fleet(least=10_000), steady_load(40))
    assert result.completed.all()
    assert not any(worker.startswith("prefill") for worker in result.requests_by_worker)


def test_a_long_prompt_elsewhere_does_not_interrupt_decoding() -> None:
    """The reason for all this: one sequence decodes, long prompts come by; its time between tokens stays as it was alone."""
    alone = [LoadRequest(48, 200, (), 0.0)]
    disturbed = alone + [LoadRequest(1500, 2, (), 0.2 + 0.3 * number) for number in range(4)]
    slowed = []
    for fleet in (divided_fleet(), with_simulated_workers(small_fleet(1, strategy="kvfleet"), {"a": 1})):
        itl_alone, itl_disturbed = run(fleet, alone).itl_s[0], run(fleet, disturbed).itl_s[0]
        slowed.append(itl_disturbed / itl_alone)
    assert slowed[0] == pytest.approx(1.0, abs=0.02)
    assert slowed[1] > 1.1


@pytest.mark.parametrize("rate_rps", [20.0, 160.0])
def test_a_hot_prefix_is_replicated_where_one_worker_is_not_enough(rate_rps: float) -> None:
    """Everybody sends the same beginning: one worker has it while that is enough, several once it is not."""
    beginning = list(range(100))
    load = [LoadRequest(1700, 4, [*beginning, *range(1000 + 10 * n, 1006 + 10 * n)], n / rate_rps) for n in range(200)]
    result = run(small_fleet(4, strategy="kvfleet"), load)
    assert result.completed.all()
    shares = sorted(result.requests_by_worker.values(), reverse=True)
    crowded = rate_rps > 100
    assert (len(shares) == 4 and shares[0] < 100) if crowded else shares[0] > 150, shares
    hits = result.cached_tokens.sum() / result.prompt_tokens.sum()
    assert hits > 0.85
