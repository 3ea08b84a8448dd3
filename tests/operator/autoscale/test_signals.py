"""What is read for a pool: the queries, the same arithmetic over scraped samples, and nothing escaping its quotes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_api.compile import static_fleet
from kvfleet_api.fleetconfig import FleetConfig, PolicyConfig, PoolConfig, WeightedPool
from kvfleet_api.modelpool import AutoscalingSpec
from kvfleet_operator.autoscale.expressions import (
    Least,
    Samples,
    Selector,
    Sum,
    SumOfMeans,
    WeightedMean,
    WeightedSum,
    quote,
)
from kvfleet_operator.autoscale.signals import (
    PoolScope,
    QueueShare,
    Signal,
    activity_signals,
    metrics_of,
    query_of,
    scope_of,
    signals_of,
)

SCOPE = PoolScope("prod", "llama-h100", ("llama-8b",), (QueueShare("chat", 0.5),), 2.0)
IN_FLIGHT = 'kvfleet_router_in_flight{namespace="prod",pool="llama-h100"}'
PACKED = 'kvfleet_router_packed_sequences{namespace="prod",pool="llama-h100"}'
QUEUE = 'kvfleet_router_queue_depth{namespace="prod",policy="chat",model=~"llama-8b|"}'


def signals(*specs: dict[str, Any], scope: PoolScope = SCOPE) -> list[Signal]:
    return signals_of(AutoscalingSpec.model_validate({"maxReplicas": 4, "signals": list(specs)}), scope)


def parts(query: str) -> dict[str, str]:
    found = re.findall(r'label_replace\((.*?), "part", "(\w+)", "", ""\)', query)
    assert query == " or ".join(f'label_replace({promql}, "part", "{part}", "", "")' for promql, part in found)
    return {part: promql for promql, part in found}


def page(**series: float) -> Samples:
    """One router's metrics for the pool, by short name."""
    names = {
        "in_flight": ("kvfleet_router_in_flight", {"pool": "llama-h100"}),
        "packed": ("kvfleet_router_packed_sequences", {"pool": "llama-h100"}),
        "queue": ("kvfleet_router_queue_depth", {"policy": "chat"}),
        "other_queue": ("kvfleet_router_queue_depth", {"policy": "batch"}),
        "queue_other_model": ("kvfleet_router_queue_depth", {"policy": "chat", "model": "qwen"}),
        "ttft": ("kvfleet_router_predicted_ttft_seconds", {"pool": "llama-h100"}),
        "pack": ("kvfleet_router_pack_target_sequences", {"pool": "llama-h100"}),
    }
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for short, value in series.items():
        metric, labels = names[short]
        samples.setdefault(metric, []).append((labels, value))
    return samples


def test_without_signals_a_pool_scales_on_concurrency_and_time_to_first_token() -> None:
    assert [signal.name for signal in signals()] == ["concurrency", "timeToFirstToken"]


def test_concurrency_is_a_total_with_the_pool_s_share_of_the_queue() -> None:
    (signal,) = signals({"concurrency": {}})
    assert signal.kind == "AverageValue"
    assert parts(query_of(signal)) == {
        "value": f"(sum({PACKED}) or vector(0)) + 0.5 * (sum({QUEUE}) or vector(0))",
        "target": '0.8 * min(kvfleet_router_pack_target_sequences{namespace="prod",pool="llama-h100"})',
        "sources": f"count(count by (instance) ({PACKED}))",
        "age": f"time() - min(timestamp({PACKED}))",
    }


def test_how_full_of_the_pack_target_workers_are_to_be_can_be_said() -> None:
    (signal,) = signals({"concurrency": {"targetPercentOfPackTarget": 60}})
    assert not isinstance(signal.target, float)
    assert signal.target.evaluate([page(pack=50), page(pack=40)]) == pytest.approx(24)
    assert signal.target.evaluate([{}]) is None


def test_routers_that_do_not_know_the_figure_yet_are_missing_and_not_idle() -> None:
    (signal,) = signals({"concurrency": {}})
    assert signal.anchor is not None
    assert not signal.anchor.values(page(in_flight=30, pack=48))


def test_concurrency_with_a_target_of_its_own_does_not_ask_for_one() -> None:
    (signal,) = signals({"concurrency": {"targetPerReplica": 48}})
    assert signal.target == 48.0
    assert parts(query_of(signal))["value"].startswith(f"(sum({IN_FLIGHT}) or vector(0))")
    assert "target" not in parts(query_of(signal))


def test_the_queue_alone() -> None:
    (signal,) = signals({"queueDepth": {"targetPerReplica": 3}})
    assert (signal.kind, signal.target) == ("AverageValue", 3.0)
    assert parts(query_of(signal))["value"] == f"0.5 * (sum({QUEUE}) or vector(0))"


def test_predicted_time_to_first_token_is_weighted_by_what_is_in_flight() -> None:
    (signal,) = signals({"timeToFirstToken": {"targetPercentOfSlo": 70}})
    ttft = 'kvfleet_router_predicted_ttft_seconds{namespace="prod",pool="llama-h100"}'
    assert (signal.kind, signal.target) == ("Value", pytest.approx(1.4))
    assert parts(query_of(signal))["value"] == (
        f"(sum({IN_FLIGHT}) == 0) or sum({ttft} * {IN_FLIGHT}) / sum({IN_FLIGHT})"
    )


def test_kv_usage_counts_each_worker_once() -> None:
    (signal,) = signals({"kvUsage": {"targetPercent": 80}})
    usage = 'vllm:kv_cache_usage_perc{namespace="prod",kvfleet_io_pool="llama-h100"}'
    assert (signal.kind, signal.target, signal.source) == ("AverageValue", 0.8, "worker")
    assert parts(query_of(signal))["value"] == f"sum(avg by (instance) ({usage}))"


def test_a_query_of_the_user_is_sent_as_it_is() -> None:
    query = 'sum(rate(http_requests_total{job="x"}[1m]))'
    (signal,) = signals({"prometheus": {"query": query, "targetMilli": 1500, "type": "Value"}})
    assert (query_of(signal), signal.kind, signal.target) == (query, "Value", 1.5)


def test_two_signals_of_one_kind_can_be_told_apart() -> None:
    query = {"query": "x", "targetMilli": 1}
    names = [signal.name for signal in signals({"prometheus": query}, {"kvUsage": {}}, {"prometheus": query})]
    assert names == ["prometheus[0]", "kvUsage", "prometheus[2]"]


def test_the_same_arithmetic_over_scraped_routers() -> None:
    concurrency, ttft = signals({"concurrency": {}}, {"timeToFirstToken": {}})
    routers = [
        page(in_flight=30, packed=33, queue=8, other_queue=100, ttft=0.2, pack=48),
        page(in_flight=10, packed=12, queue=0, queue_other_model=50, ttft=1.0, pack=40),
    ]
    assert concurrency.expression is not None
    assert ttft.expression is not None
    assert concurrency.expression.evaluate(routers) == 33 + 12 + 0.5 * 8
    assert not isinstance(concurrency.target, float)
    assert concurrency.target.evaluate(routers) == 0.8 * 40
    assert ttft.expression.evaluate(routers) == pytest.approx((30 * 0.2 + 10 * 1.0) / 40)


def test_a_router_without_traffic_has_no_say_in_the_time_to_first_token() -> None:
    (ttft,) = signals({"timeToFirstToken": {}})
    assert ttft.expression is not None
    assert ttft.expression.evaluate([page(in_flight=5, ttft=0.1), page(in_flight=0, ttft=30.0)]) == pytest.approx(0.1)
    assert ttft.expression.evaluate([page(in_flight=0, ttft=30.0)]) == 0.0
    assert ttft.expression.evaluate([page(in_flight=5)]) is None
    assert ttft.expression.evaluate([]) is None


def test_means_and_sums_where_there_is_nothing() -> None:
    selector = Selector("m")
    assert [Sum(selector).evaluate([]), Least(selector).evaluate([]), SumOfMeans(selector).evaluate([{}])] == [None] * 3
    assert WeightedSum(()).evaluate([]) == 0.0
    assert WeightedSum(()).promql() == "vector(0)"


def test_a_worker_of_several_engines_counts_once() -> None:
    worker: Samples = {"m": [({"engine": "0"}, 0.2), ({"engine": "1"}, 0.4)]}
    single: Samples = {"m": [({"engine": "0"}, 0.5)]}
    assert SumOfMeans(Selector("m")).evaluate([worker, single, {}]) == pytest.approx(0.8)


def test_the_metrics_to_scrape_are_those_of_value_target_and_anchor() -> None:
    assert metrics_of(signals({"concurrency": {}})) == {
        "kvfleet_router_packed_sequences",
        "kvfleet_router_queue_depth",
        "kvfleet_router_pack_target_sequences",
    }
    assert metrics_of(signals({"prometheus": {"query": "x", "targetMilli": 1}})) == set()


def test_activity_counts_queued_requests_whole() -> None:
    busy, served = activity_signals(SCOPE)
    assert busy.expression is not None
    assert served.expression is not None
    assert busy.expression.evaluate([page(in_flight=0, queue=1)]) == 1
    assert served.expression.evaluate([page(in_flight=0)]) == 0


def test_the_scope_comes_from_the_fleet_s_configuration() -> None:
    base = static_fleet(["http://127.0.0.1:8000"])
    pool = base.pools[0]

    def named(name: str, model: str) -> PoolConfig:
        return pool.model_copy(update={"name": name, "model": model, "adapters": [f"{model}-lora"]})

    def policy(name: str, pools: list[str], slo_s: float) -> PolicyConfig:
        return PolicyConfig(name=name, models=["m"], pools=[WeightedPool(name=ref) for ref in pools], ttft_slo_s=slo_s)

    config = FleetConfig(
        namespace="prod",
        pools=[named("a", "llama"), named("b", "llama"), named("c", "qwen")],
        policies=[policy("chat", ["a", "b", "c"], 2.0), policy("batch", ["a"], 30.0), policy("else", ["c"], 0.1)],
    )
    scope = scope_of(config, config.pools[0])
    assert scope == PoolScope(
        "prod", "a", ("llama", "llama-lora"), (QueueShare("chat", 0.5), QueueShare("batch", 1.0)), 2.0
    )
    assert scope.key == "prod/a"


def unquoted(literal: str) -> str:
    """What a Go/PromQL double-quoted literal means."""
    assert literal[0] == literal[-1] == '"'
    escapes = {"n": "\n", "r": "\r", '"': '"', "\\": "\\"}
    text, index = "", 1
    while index < len(literal) - 1:
        if literal[index] == "\\":
            index += 1
            text += escapes[literal[index]]
        else:
            assert literal[index] not in '"\n'
            text += literal[index]
        index += 1
    assert index == len(literal) - 1
    return text


@given(st.text())
def test_no_text_leaves_its_quotes(text: str) -> None:
    assert unquoted(quote(text)) == text


@given(st.lists(st.text(st.characters(codec="ascii", exclude_characters="\n\r")), min_size=2, max_size=3), st.text())
def test_a_matcher_of_several_values_matches_exactly_those(values: list[str], other: str) -> None:
    promql = Selector("m", (("label", tuple(values)),)).promql()
    pattern = unquoted(promql.removeprefix("m{label=~").removesuffix("}"))
    matching = {text for text in [*values, other] if re.fullmatch(pattern, text)}
    assert matching == {text for text in [*values, other] if text in values}


def test_a_selector_without_labels_is_the_bare_metric() -> None:
    assert Sum(Selector("up")).promql() == "sum(up)"


def test_a_mean_skips_processes_that_lack_one_of_its_parts() -> None:
    of, weight = Selector("of"), Selector("weight")
    processes: list[Samples] = [{"of": [({}, 3.0)], "weight": [({}, 2.0)]}, {"weight": [({}, 2.0)]}]
    assert WeightedMean(of, weight).evaluate(processes) == pytest.approx(6.0 / 4.0)
