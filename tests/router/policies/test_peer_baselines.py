"""The baselines named after other routers, each as a table of small situations whose choice is computed by hand.

A worker is (load, cached share of the prompt in percent) and what else the formula reads; the prompt has 1000 tokens.
"""

import ast
import copy
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from routing_fleet import Fleet, config, policy, pool, request

import kvfleet_router.policies
from kvfleet_router.core.columns import Table
from kvfleet_router.core.index import PrefixIndex
from kvfleet_router.core.policy import RULED_OUT, RelativePolicy
from kvfleet_router.core.pool import ModelStats, Pool
from kvfleet_router.core.worker import Worker, WorkerEndpoint
from kvfleet_router.policies import REGISTRY

ROOT = Path(__file__).parents[3]
POOL = Pool(pool(), ModelStats(), PrefixIndex(), 256, 0.05)
PEERS = [
    "aibrix_preble",
    "aibrix_prefix_cache",
    "dynamo_kv",
    "kubeai_prefix_hash",
    "llmd_default",
    "llmd_token_load",
    "sglang_cache_aware",
]


@dataclass
class Placed:
    """A worker, and the share of the prompt it has cached, in percent."""

    worker: Worker
    percent: float


def worker(load=0, cached=0, *, name="w", tree=0, **figures):
    """A worker that prefills 1000 tokens in 1 s, decodes a step in 10 ms, and holds 10,000 KV tokens; `tree`: blocks it caches."""
    cache = PrefixIndex().add_worker(POOL.capacity_blocks)
    cache.store(list(range(tree)), 0.0)
    made = Worker(WorkerEndpoint(name, "http://127.0.0.1:8000"), POOL, cache, Table(), 0.0)
    derived = {
        "in_flight": load,
        "pending": 0,
        "decoding": load,
        "max_sequences": 10**6,
        "pending_uncached_tokens": 0.0,
        "kv_tokens": 10_000.0,
        "kv_used_tokens": 0.0,
        "backlog_s": 0.0,
        "head_since": 0.0,
        "head_prefill_s": 0.0,
        "inflation": 1.0,
        "step_now_s": 0.01,
        "prefill_s_per_token": 0.001,
        "prefill_s_per_token_pair": 0.0,
        **figures,
    }
    for figure, value in derived.items():
        setattr(made, figure, value)
    return Placed(made, cached)


def arrival_of(blocks=(7,), output_tokens=100.0):
    """A request of 1000 tokens."""
    arrival = Fleet(config(policy())).sent(request(1000)).arrival
    arrival.prompt_tokens = 1000.0
    arrival.expected_output_tokens = output_tokens
    arrival.blocks = list(blocks)
    return arrival


def scored(strategy, arrival, placed):
    return strategy.score_all(arrival, [p.worker for p in placed], [p.percent * 10.0 for p in placed], 0.0)


def costs(strategy, workers, *, blocks=(7,)):
    """Every worker's cost by part."""
    strategy = REGISTRY[strategy](policy())
    scores = scored(strategy, arrival_of(blocks), workers)
    assert all(len(score) == len(strategy.parts) for score in scores)
    return [dict(zip(strategy.parts, score, strict=True)) for score in scores]


def winners(strategy, workers, **fields):
    sums = [sum(parts.values()) for parts in costs(strategy, workers, **fields)]
    return {place for place, cost in enumerate(sums) if cost == min(sums)}


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        pytest.param([worker(0, 31), worker(0, 40), worker(0)], {1}, id="best match above the threshold"),
        pytest.param([worker(0, 30, tree=9), worker(0, 10, tree=5)], {1}, id="no match above it: smallest tree"),
        pytest.param([worker(64, 90), worker(0)], {0}, id="64 apart is balanced"),
        pytest.param([worker(65, 90), worker(0)], {1}, id="65 apart is not: shortest queue"),
        pytest.param([worker(300, 90), worker(200)], {0}, id="nor is it imbalance at 1.5 times"),
        pytest.param([worker(301, 90), worker(200)], {1}, id="more than 1.5 times is"),
        pytest.param([worker(tree=3), worker(tree=3)], {0, 1}, id="equals"),
    ],
)
def test_sglang_cache_aware(workers, expected):
    assert winners("sglang_cache_aware", workers) == expected


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        pytest.param([worker(3, 50), worker(3, 80), worker(3)], {1}, id="best match"),
        pytest.param([worker(4, 50), worker(3, 50), worker(3)], {1}, id="equal matches: fewest requests"),
        # loads 8 1 1 2: mean 3, sigma 2.9; the best match is overloaded, the second is not
        pytest.param([worker(8, 90), worker(1, 20), worker(1), worker(2)], {1}, id="above mean + sigma"),
        pytest.param([worker(8, 90), worker(1), worker(1), worker(2)], {1, 2}, id="no other match: least requests"),
        pytest.param([worker(8, 90), worker(0)], {0}, id="8 apart is balanced"),
        pytest.param([worker(9, 90), worker(0)], {1}, id="9 apart: only the least loaded"),
        pytest.param([worker(9, 90), worker(0, 10), worker(0)], {1}, id="the best match among those"),
        pytest.param([worker(2), worker(1)], {1}, id="nothing cached"),
        pytest.param([worker(2, 0.1), worker(2)], {0}, id="any match is a match"),
    ],
)
def test_aibrix_prefix_cache(workers, expected):
    assert winners("aibrix_prefix_cache", workers) == expected


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        pytest.param([worker(9, 60), worker(0, 51)], {0}, id="exploit: the longest match, however loaded"),
        pytest.param([worker(9, 60), worker(3, 60), worker(0)], {1}, id="least loaded among the longest"),
        # prefill 0.5 s + 5 sequences of 100 steps of 10 ms = 5.5 s, against 1 s + 4 s
        pytest.param([worker(4, 50), worker(3)], {1}, id="explore: prefill and decode"),
        pytest.param([worker(4, 50), worker(4)], {0}, id="explore: the cached part is not prefilled"),
        pytest.param([worker(0, backlog_s=3.0, head_prefill_s=1.0), worker(1)], {1}, id="explore: the backlog counts"),
    ],
)
def test_aibrix_preble(workers, expected):
    assert winners("aibrix_preble", workers) == expected


def test_aibrix_preble_explores_in_seconds():
    assert costs("aibrix_preble", [worker(4, 50)]) == [
        {"shorter_match": 0.0, "in_flight": 0.0, "prefill": 0.5, "decode": 5.0}
    ]


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ([worker(pending=4), worker(pending=2), worker()], [(2.0, 0, 3.0), (1.0, 0, 3.0), (0.0, 0, 3.0)]),
        ([worker(pending=4), worker(pending=4)], [(0.0, 0, 3.0)] * 2),
        ([worker(0, 50, kv_used_tokens=2500.0)], [(0.0, 0.5, 1.5)]),
        ([worker(kv_used_tokens=20_000.0)], [(0.0, 2.0, 3.0)]),
        ([worker(kv_tokens=0.0)], [(0.0, 0.0, 3.0)]),
    ],
    ids=["queues are normalised", "equal queues", "KV use and match", "KV use is at most 1", "unknown capacity"],
)
def test_llmd_default(workers, expected):
    assert [tuple(parts.values()) for parts in costs("llmd_default", workers)] == expected


SLOW = {"backlog_s": 19.0, "pending_uncached_tokens": 19_000.0}


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        pytest.param([worker(0, 80, pending_uncached_tokens=9000.0), worker()], {0}, id="sticky, whatever the load"),
        pytest.param([worker(0, 79, pending_uncached_tokens=9000.0), worker()], {1}, id="below 0.80 nothing sticks"),
        pytest.param(
            [worker(0, 80, pending_uncached_tokens=9000.0), worker(0, 90)], {1}, id="fewest tokens among the sticky"
        ),
        # TTFT 19.2 + 0.01 s against 1.01 s: 18.2 s more
        pytest.param([worker(0, 80, **SLOW), worker()], {1}, id="18.2 s more is too long"),
        pytest.param([worker(0, 80, **(SLOW | {"backlog_s": 18.7})), worker()], {0}, id="17.9 s more is not"),
        pytest.param([worker(0, 80, **SLOW), worker(0, 80), worker()], {1}, id="another sticky one is fast"),
        pytest.param(
            [worker(pending_uncached_tokens=5e6), worker(pending_uncached_tokens=6e6)], {0, 1}, id="full is full"
        ),
    ],
)
def test_llmd_token_load(workers, expected):
    assert winners("llmd_token_load", workers) == expected


def test_dynamo_kv_adds_blocks_to_prefill_and_blocks_in_use():
    workers = [worker(0, 20, kv_used_tokens=1600.0), worker(pending_uncached_tokens=320.0, kv_used_tokens=320.0)]
    assert costs("dynamo_kv", workers) == [
        {"new": 50.0, "queued": 0.0, "active": 100.0},
        {"new": 62.5, "queued": 20.0, "active": 20.0},
    ]
    assert winners("dynamo_kv", workers) == {1}


def ring(*loads):
    return [worker(load, name=f"w{n}") for n, load in enumerate(loads)]


def test_kubeai_prefix_hash_sends_equal_beginnings_to_one_worker_and_spreads_others():
    owners = Counter()
    for block in range(1000):
        (owner,) = winners("kubeai_prefix_hash", ring(0, 0, 0, 0), blocks=(block,))
        assert winners("kubeai_prefix_hash", ring(0, 0, 0, 0), blocks=(block, 10**6)) == {owner}
        owners[owner] += 1
    assert all(180 < owners[n] < 330 for n in range(4)), owners


def test_kubeai_prefix_hash_moves_only_the_share_of_a_worker_that_leaves():
    for block in range(200):
        (before,) = winners("kubeai_prefix_hash", ring(0, 0, 0, 0), blocks=(block,))
        (after,) = winners("kubeai_prefix_hash", ring(0, 0, 0), blocks=(block,))
        assert after == before or before == 3


@pytest.mark.parametrize(
    ("load", "stays"),
    [
        (4, True),  # bound 1.25 x (4+4+4+4+1)/4 = 5.3
        (5, False),  # 1.25 x (5+4+4+4+1)/4 = 5.6 < 6
    ],
)
def test_kubeai_prefix_hash_bounds_the_load(load, stays):
    (owner,) = winners("kubeai_prefix_hash", ring(0, 0, 0, 0))
    workers = ring(4, 4, 4, 4)
    workers[owner].worker.in_flight = load
    (chosen,) = winners("kubeai_prefix_hash", workers)
    assert (chosen == owner) == stays
    assert (costs("kubeai_prefix_hash", workers)[owner]["overload"] == 0.0) == stays


def test_kubeai_prefix_hash_stays_with_the_owner_where_all_are_over_the_bound():
    (owner,) = winners("kubeai_prefix_hash", ring(0, 0, 0))
    crowded = ring(1, 1, 1)  # bound 1.25 x 4/3 = 1.67 < 2
    assert {parts["overload"] for parts in costs("kubeai_prefix_hash", crowded)} == {RULED_OUT}
    assert winners("kubeai_prefix_hash", crowded) == {owner}


def test_kubeai_prefix_hash_takes_the_least_load_for_a_prompt_without_a_block():
    assert winners("kubeai_prefix_hash", ring(2, 1, 3), blocks=()) == {1}


@pytest.mark.parametrize("strategy", PEERS)
def test_a_candidate_alone_is_never_ruled_out_beyond_choice(strategy):
    fleet = Fleet(config(policy(strategy=strategy), workers=1))
    for _ in range(30):
        assert fleet.sent(request(2000, prefix=1)).worker.name == "pool-0"


@pytest.mark.parametrize("strategy", PEERS)
def test_peers_follow_a_cached_prefix(strategy):
    """The index, the accounting and the policy together: a conversation comes back to its worker in an idle fleet."""
    fleet = Fleet(config(policy(strategy=strategy), workers=4))
    first = fleet.sent(request(4000, prefix=1, tail=1))
    fleet.answer(first)
    for _ in range(5):
        ticket = fleet.sent(request(4000, prefix=1, tail=1))
        assert ticket.worker is first.worker
        fleet.answer(ticket)
    fleet.assert_idle()


@pytest.mark.parametrize("strategy", PEERS)
def test_a_policy_keeps_nothing_between_decisions(strategy):
    rng = random.Random(5)
    made = REGISTRY[strategy](policy())
    before = state_of(made)
    arrival = arrival_of([3], 9.0)
    for _ in range(20):
        workers = [worker(rng.randrange(100), rng.randrange(100), name=f"w{n}") for n in range(4)]
        once = scored(made, arrival, workers)
        assert scored(made, arrival, workers) == once
        if isinstance(made, RelativePolicy):
            first = workers[0]
            assert made.score(arrival, first.worker, first.percent * 10.0, 0.0) == scored(made, arrival, workers[:1])[0]
    assert state_of(made) == before


def state_of(made):
    """All attributes that are no code; compiled classes have no __dict__."""
    named = {name: getattr(made, name) for name in dir(made) if not name.startswith(("__", "_abc_"))}
    return {name: copy.deepcopy(value) for name, value in named.items() if not callable(value)}


def documented():
    """Rows of the tables of docs/policies.md whose first cell is a name in backticks."""
    lines = (ROOT / "docs" / "policies.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")]
    return {row[0].strip("` "): row[1:] for row in rows}


def test_the_registry_holds_the_peers_and_every_strategy_is_documented():
    assert set(PEERS) <= set(REGISTRY)
    rows = documented()
    assert set(rows) == set(REGISTRY)
    for name, cells in rows.items():
        assert len(cells) == 3, name
        assert all(cells), name


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {"kvfleet_latency"}))
def test_every_strategy_has_a_header_of_formula_intent_and_inputs(name):
    source = (Path(kvfleet_router.policies.__file__).parent / f"{name}.py").read_text()
    header = ast.get_docstring(ast.parse(source)) or ""
    assert header.startswith(f"{name}: ")
    assert "cost = " in header
    assert "Intent" in header
    assert "Inputs" in header
    if name in PEERS:
        assert "Differs from the original" in header
