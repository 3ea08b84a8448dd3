"""Compiling the four kinds into a FleetConfig: what is served, and what is said about the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_api.compile import (
    ANY_MODEL,
    GENERATED_POLICY,
    CompiledFleet,
    compile_fleet,
    static_fleet,
    workers_service_name,
)
from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_api.fleetrouter import FleetRouter
from kvfleet_api.manifests import bundled_profiles
from kvfleet_api.modelpool import ModelPool
from kvfleet_api.problems import Problem
from kvfleet_api.resolve import GENERIC_COST
from kvfleet_api.routingpolicy import RoutingPolicy

Json = dict[str, Any]


def pool(
    name: str = "llama",
    model: str | Json = "llama-8b",
    *,
    created: str | None = None,
    namespace: str = "default",
    **spec: Any,
) -> ModelPool:
    body = {
        "model": {"name": model} if isinstance(model, str) else model,
        "accelerator": {"profileRef": "nvidia-h100-80gb"},
        **spec,
    }
    metadata = {"name": name, "namespace": namespace, "creationTimestamp": created}
    return ModelPool.model_validate({"metadata": metadata, "spec": body})


def policy(
    name: str, *pools: str, created: str | None = None, namespace: str = "default", **spec: Any
) -> RoutingPolicy:
    metadata = {"name": name, "namespace": namespace, "creationTimestamp": created}
    return RoutingPolicy.model_validate({"metadata": metadata, "spec": {"pools": [{"name": p} for p in pools], **spec}})


def compiled(
    *objects: ModelPool | RoutingPolicy | FleetRouter | AcceleratorProfile, namespace: str = "default"
) -> CompiledFleet:
    return compile_fleet(
        next((o for o in objects if isinstance(o, FleetRouter)), None),
        [o for o in objects if isinstance(o, ModelPool)],
        [o for o in objects if isinstance(o, RoutingPolicy)],
        [o for o in objects if isinstance(o, AcceleratorProfile)] or bundled_profiles(),
        namespace=namespace,
    )


def names(fleet: CompiledFleet) -> list[str]:
    return [policy.name for policy in fleet.config.policies]


def only(fleet: CompiledFleet) -> Problem:
    (problem,) = fleet.problems
    return problem


# What is served


def test_a_lone_pool_is_served_with_a_generated_policy() -> None:
    fleet = compiled(pool(adapters=[{"name": "sql", "uri": "/a"}]))
    assert fleet.problems == []
    (policy,) = fleet.config.policies
    assert (policy.name, policy.models, policy.strategy) == (GENERATED_POLICY, ["llama-8b", "sql"], "kvfleet")
    assert (policy.ttft_slo_s, policy.itl_slo_s, policy.energy_mode) == (1.0, 0.05, "Off")


def test_a_pool_in_full() -> None:
    fleet = compiled(
        pool(
            "big",
            {"name": "llama-70b", "uri": "meta-llama/Llama-3.1-70B-Instruct", "maxContextTokens": 4096},
            parallelism={"tensor": 4, "pipeline": 2, "nodes": 2},
            role="Unified",
            engine={
                "port": 9000,
                "args": ["--max-model-len=8k", "--block-size", "32"],
                "kvEvents": {"port": 6000, "replayPort": 6001},
            },
            autoscaling={"minReplicas": 0, "maxReplicas": 3},
        )
    )
    assert fleet.problems == []
    (big,) = fleet.config.pools
    assert (big.model, big.accelerator, big.gpus_per_worker) == ("llama-70b", "nvidia-h100-80gb", 8)
    assert (big.max_context_tokens, big.block_tokens) == (8000, 32)  # the engine's own arguments win
    assert (big.service, big.port, big.kv_events_port, big.kv_replay_port) == ("big-workers", 9000, 6000, 6001)
    assert big.scales_to_zero


def test_events_that_are_off_have_no_ports() -> None:
    (config,) = compiled(pool(engine={"kvEvents": {"enabled": False}})).config.pools
    assert (config.kv_events_port, config.kv_replay_port) == (None, None)


def test_a_policy_in_full() -> None:
    fleet = compiled(
        pool("a"),
        pool("b"),
        policy(
            "p",
            match={
                "models": ["llama-8b"],
                "headers": [{"name": "x-class", "value": "batch"}],
                "contextTokens": {"min": 10},
            },
            pools=[{"name": "a", "weight": 3, "tier": 1}, {"name": "b", "weight": 0}],
            strategy="lmetric",
            slo={"ttftMilliseconds": 250, "itlMilliseconds": 20},
            energy={"mode": "Strict", "microsecondsPerJoule": 500, "maxWatts": 900, "defer": {"minPriority": 10}},
        ),
    )
    assert fleet.problems == []
    (config,) = fleet.config.policies
    assert [(p.name, p.weight, p.tier) for p in config.pools] == [("a", 3, 1)]
    assert (config.ttft_slo_s, config.itl_slo_s) == (0.25, 0.02)
    assert (config.energy_mode, config.energy_s_per_joule, config.max_watts) == ("Strict", 0.0005, 900.0)
    assert config.defer is not None
    assert (config.defer.max_seconds, config.defer.min_priority, config.defer.max_requests) == (3600, 10, 256)
    assert (config.strategy, config.headers[0].value) == ("lmetric", "batch")


def test_power_budgets() -> None:
    router = FleetRouter.model_validate({"metadata": {"name": "edge"}, "spec": {"maxWatts": 5000}})
    fleet = compiled(router, pool("a", maxWatts=900), pool("b"))
    assert fleet.problems == []
    assert (fleet.config.max_watts, [each.max_watts for each in fleet.config.pools]) == (5000.0, [900.0, None])


def test_budgets_under_which_no_request_could_run_are_warned_of() -> None:
    router = FleetRouter.model_validate({"metadata": {"name": "edge"}, "spec": {"maxWatts": 700}})
    small = policy("p", pools=[{"name": "a"}], energy={"mode": "Strict", "maxWatts": 100})
    fleet = compiled(router, pool("a", replicas=4, maxWatts=500), pool("b", autoscaling={"maxReplicas": 9}), small)
    assert [(found.kind, found.field, found.reason, found.severity) for found in fleet.problems] == [
        (kind, field, "BudgetTooSmall", "Warning")
        for kind, field in (
            ("ModelPool", "spec.maxWatts"),
            ("RoutingPolicy", "spec.energy.maxWatts"),
            ("FleetRouter", "spec.maxWatts"),
        )
    ]
    assert "no request can run; raise it, or have fewer workers" in fleet.problems[0].message
    assert fleet.errors == []


def test_router_settings() -> None:
    spec = {"limits": {"maxBodyBytes": 2048}, "replicas": 3, "processes": 2, "drainSeconds": 7}
    router = FleetRouter.model_validate({"metadata": {"name": "edge"}, "spec": spec})
    config = compiled(router, pool()).config
    assert (config.name, config.limits.max_body_bytes, config.routers, config.drain_s) == ("edge", 2048, 6, 7.0)
    alone = compiled(pool()).config
    assert (alone.name, alone.routers) == ("local", 1)


def test_only_objects_of_the_namespace_count() -> None:
    fleet = compiled(
        pool("a", namespace="one"), pool("b", namespace="two"), policy("p", "b", namespace="two"), namespace="one"
    )
    assert fleet.problems == []
    assert ([p.name for p in fleet.config.pools], names(fleet)) == (["a"], [GENERATED_POLICY])


def test_a_policy_without_models_takes_all_that_its_pools_serve() -> None:
    fleet = compiled(pool("a", adapters=[{"name": "sql", "uri": "/a"}]), pool("b", "qwen-8b"), policy("p", "a", "b"))
    assert fleet.config.policies[0].models == ["llama-8b", "sql", "qwen-8b"]


# What is wrong


def test_a_missing_profile_leaves_the_pool_in_service() -> None:
    fleet = compiled(pool(accelerator={"profileRef": "nvidia-h100"}))
    assert fleet.config.pools[0].cost == GENERIC_COST
    problem = only(fleet)
    assert (problem.condition, problem.reason, problem.severity) == ("ResolvedRefs", "ProfileNotFound", "Error")
    assert str(problem).startswith(
        "ModelPool default/llama: spec.accelerator.profileRef: no AcceleratorProfile 'nvidia-h100' (did you mean nvidia-h"
    )


def test_an_unknown_size_asks_for_it_and_hinders_nothing() -> None:
    fleet = compiled(pool("llama", "mystery"))
    assert fleet.config.pools[0].cost == GENERIC_COST
    assert (only(fleet).field, only(fleet).reason) == ("spec.model.parametersMillions", "CostUnknown")
    assert fleet.errors == []


def test_a_missing_pool_is_named_and_the_others_serve() -> None:
    fleet = compiled(pool("llama-a"), policy("p", "llama-b", "llama-a"))
    assert [p.name for p in fleet.config.policies[0].pools] == ["llama-a"]
    assert str(only(fleet)) == (
        "RoutingPolicy default/p: spec.pools[0].name: no ModelPool 'llama-b' in namespace default (did you mean llama-a?): "
        "create it or name one that exists (llama-a)"
    )


@pytest.mark.parametrize("pools", [[{"name": "gone"}], [{"name": "a", "weight": 0}]])
def test_a_policy_without_usable_pool_is_left_out(pools: list[Json]) -> None:
    fleet = compiled(pool("a"), policy("p", pools=pools))
    assert "p" not in names(fleet)
    assert fleet.problems[-1].reason == "NoUsablePool"


def test_models_that_no_pool_serves_are_named() -> None:
    fleet = compiled(pool("a"), policy("p", "a", match={"models": ["llama-8b", "llama-9b"]}))
    assert fleet.config.policies[0].models == ["llama-8b"]
    assert (only(fleet).field, only(fleet).reason) == ("spec.match.models[1]", "ModelNotServed")
    nothing = compiled(pool("a"), policy("p", "a", match={"models": ["gpt"]}))
    assert [problem.reason for problem in nothing.problems] == ["ModelNotServed", "NoUsablePool"]
    assert names(nothing) == []


def test_an_adapter_cannot_take_the_name_of_a_model_or_of_another_models_adapter() -> None:
    taken = [{"name": "qwen-8b", "uri": "/a"}, {"name": "sql", "uri": "/a"}]
    fleet = compiled(
        pool("a", adapters=taken, created="2026-01-02T00:00:00Z"),
        pool("b", "qwen-8b", adapters=[{"name": "sql", "uri": "/b"}], created="2026-01-01T00:00:00Z"),
        pool("c", "qwen-8b", adapters=[{"name": "sql", "uri": "/b"}]),
    )
    assert {p.name: p.adapters for p in fleet.config.pools} == {"a": [], "b": ["sql"], "c": ["sql"]}
    assert [(p.name, p.field, p.reason) for p in fleet.problems] == [
        ("a", "spec.adapters[0].name", "NameTaken"),
        ("a", "spec.adapters[1].name", "NameTaken"),
    ]
    assert "already an adapter of qwen-8b (ModelPool b)" in fleet.problems[1].message


def test_half_of_a_prefill_decode_pair_is_named() -> None:
    fleet = compiled(pool("a", role="Prefill"), policy("p", "a"))
    assert only(fleet).reason == "IncompletePair"
    assert compiled(pool("a", role="Prefill"), pool("b", role="Decode"), policy("p", "a", "b")).problems == []


# Precedence


def test_order_is_priority_then_specificity_then_age_then_name() -> None:
    fleet = compiled(
        pool("a"),
        policy("z-old", "a", created="2026-01-01T00:00:00Z"),
        policy("b-new", "a", created="2026-02-01T00:00:00Z"),
        policy("c-file", "a"),
        policy("a-file", "a"),
        policy("narrow", "a", match={"models": ["llama-8b"], "contextTokens": {"min": 9}}),
        policy(
            "narrower",
            "a",
            match={"models": ["llama-8b"], "headers": [{"name": "x", "value": "1"}, {"name": "y", "value": "1"}]},
        ),
        policy("first", "a", priority=1),
        policy("last", "a", priority=-1, match={"models": ["llama-8b"]}),
    )
    assert names(fleet) == ["first", "narrower", "narrow", "z-old", "b-new", "a-file", "c-file", "last"]


def test_a_conflict_names_winner_and_reason_and_is_a_warning() -> None:
    old, new = policy("b", "a", created="2026-01-01T00:00:00Z"), policy("a", "a", created="2026-02-01T00:00:00Z")
    fleet = compiled(pool("a"), old, new)
    problem = only(fleet)
    assert (problem.name, problem.condition, problem.severity, fleet.errors) == ("a", "Conflicted", "Warning", [])
    assert "RoutingPolicy b" in problem.message and "b wins because it is older" in problem.message
    assert (
        "b wins because its name comes first" in only(compiled(pool("a"), policy("b", "a"), policy("c", "a"))).message
    )


@pytest.mark.parametrize(
    ("first", "second", "conflict"),
    [
        ({"headers": [{"name": "X", "value": "1"}]}, {"headers": [{"name": "x", "value": "2"}]}, False),
        ({"headers": [{"name": "X", "value": "1"}]}, {"headers": [{"name": "y", "value": "2"}]}, True),
        ({"contextTokens": {"max": 10}}, {"contextTokens": {"min": 11}}, False),
        ({"contextTokens": {"max": 10}}, {"contextTokens": {"min": 10}}, True),
        ({"priority": {"max": 1}}, {"priority": {"min": 2}}, False),
        ({"priority": {"max": 1}}, {"contextTokens": {"min": 2}}, True),
        ({"models": ["llama-8b"]}, {"models": ["sql"]}, False),
        ({"models": ["llama-8b"]}, {"contextTokens": {"min": 2}}, True),
        ({"models": ["llama-8b"]}, {}, False),
    ],
)
def test_only_policies_that_some_request_matches_equally_conflict(first: Json, second: Json, conflict: bool) -> None:
    served = pool("a", adapters=[{"name": "sql", "uri": "/a"}])
    fleet = compiled(served, policy("p", "a", match=first), policy("q", "a", match=second))
    assert [problem.reason for problem in fleet.problems] == ["OverlappingMatch"] * conflict


# Service names


@given(
    st.from_regex(r"\A[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z"), st.from_regex(r"\A[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
)
@settings(derandomize=True, database=None, deadline=None)
def test_service_names_are_labels_and_do_not_collide(one: str, other: str) -> None:
    assert len(workers_service_name(one)) <= 63
    assert (workers_service_name(one) == workers_service_name(other)) == (one == other)


# Invariants


@st.composite
def fleets(draw: st.DrawFn) -> list[ModelPool | RoutingPolicy]:
    label, model = st.sampled_from(["a", "b", "c"]), st.sampled_from(["llama-8b", "qwen-8b", "sql"])
    pools = [
        pool(name, draw(model.filter(lambda m: m != "sql")), adapters=[{"name": n, "uri": "/a"} for n in draw(st.sets(st.just("sql")))],
             role=draw(st.sampled_from(["Unified", "Prefill"])), created=draw(st.sampled_from([None, "2026-01-01T00:00:00Z"])))
        for name in sorted(draw(st.sets(label)))
    ]  # fmt: skip
    policies = [
        policy(name, *draw(st.lists(label, min_size=1, max_size=3, unique=True)), priority=draw(st.integers(0, 1)),
               match={"models": draw(st.lists(model, max_size=2, unique=True))})
        for name in sorted(draw(st.sets(st.sampled_from(["p", "q", "r"]))))
    ]  # fmt: skip
    return draw(st.permutations([*pools, *policies]))


@settings(max_examples=150, derandomize=True, database=None, deadline=None)
@given(fleets())
def test_every_fleet_compiles_to_something_consistent(objects: list[ModelPool | RoutingPolicy]) -> None:
    fleet = compiled(*objects)
    config = fleet.config
    served = {p.name: {p.model, *p.adapters} for p in config.pools}
    assert sorted(served) == sorted(o.metadata.name for o in objects if isinstance(o, ModelPool))
    for one in config.policies:
        assert one.models and one.pools
        assert set(one.models) <= set().union(*(served[p.name] for p in one.pools))
    named = {p.name for o in objects if isinstance(o, RoutingPolicy) for p in o.spec.pools}
    generated = [p for p in config.policies if p.name == GENERATED_POLICY]
    assert {p.name for one in generated for p in one.pools} == served.keys() - named
    left_out = {o.metadata.name for o in objects if isinstance(o, RoutingPolicy)} - {p.name for p in config.policies}
    assert left_out == {p.name for p in fleet.problems if p.reason == "NoUsablePool"}
    assert compiled(*reversed(objects)).config.revision == config.revision  # the order of reading changes nothing
    assert FleetConfig.model_validate_json(config.to_json()) == config


# Without manifests


def test_static_fleet_serves_any_model_at_the_given_urls() -> None:
    config = static_fleet(["http://10.0.0.1:8000/", "host:81", "http://[::1]:8000", "host:81"], "round_robin")
    (static,) = config.pools
    assert [(e.name, e.url) for e in static.endpoints] == [
        ("10.0.0.1:8000", "http://10.0.0.1:8000"),
        ("host:81", "http://host:81"),
        ("[::1]:8000", "http://[::1]:8000"),
    ]
    assert (static.model, config.policies[0].models, config.policies[0].strategy) == (
        ANY_MODEL,
        [ANY_MODEL],
        "round_robin",
    )
    assert static_fleet(["h:1"], model="m").policies[0].models == ["m"]
    assert json.loads(config.to_json())["pools"][0]["cost"]["kvTokens"] == GENERIC_COST.kv_tokens


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://h:1", "scheme 'ftp' is not supported"),
        ("http://h:1/v1", "only a host and a port may be given"),
        ("http://user:secret@h:1", "only a host and a port may be given"),
        ("http://h:99999", "Port out of range"),
        ("http://", "only a host and a port may be given"),
        ("http://[::1", "Invalid IPv6 URL"),
    ],
)
def test_static_fleet_names_the_url_and_the_remedy(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"write it as http://host:port") as caught:
        static_fleet([url])
    assert message in str(caught.value)


def test_static_fleet_needs_a_worker() -> None:
    with pytest.raises(ValueError, match="give at least one"):
        static_fleet([])
