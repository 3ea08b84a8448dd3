"""Routing: whether the router's predictions come true, and what its decisions cost."""

from __future__ import annotations

from grafana_foundation_sdk.models import units

from dashboards.panels import Board, Panel, Query, Row
from dashboards.queries import (
    BY_POOL,
    ENGINE,
    NAMESPACE,
    NAMESPACES,
    POOL,
    POOLS,
    quantile,
    quantiles,
    rate,
    total_rate,
)

CACHED = "kvfleet_router_cached_tokens_total"
DIFFERENCE = "kvfleet_router_cached_tokens_difference"
BY_VIEW = "by (namespace, pool, view, prediction)"
PROMPT = total_rate("kvfleet_router_prompt_tokens_total", POOL, BY_POOL)
RUNNING = f"vllm:num_requests_running{{{ENGINE}}}"


def board() -> Board:
    return Board(
        uid="kvfleet-routing",
        title="Routing",
        description="Where requests go, whether predictions come true, and what a decision costs.",
        variables=[NAMESPACES, POOLS],
        rows=[
            Row("Decisions", _decisions()),
            Row("Prefix caches", _caches()),
            Row("Predictions", _predictions()),
            Row("Balance", _balance()),
            Row("The router itself", _cost()),
        ],
    )


def _decisions() -> list[Panel]:
    return [
        Panel(
            "Requests by pool",
            "Where requests ended up. `kvfleet explain` tells of a single one why.",
            units.RequestsPerSecond,
            [
                Query(
                    total_rate("kvfleet_router_requests_total", POOL, "by (namespace, policy, pool)"),
                    "{{policy}} → {{pool}}",
                )
            ],
            stacked=True,
        ),
        Panel(
            "Retries",
            "Tries on another worker before the first byte, by cause. Clients do not see them.",
            units.RequestsPerSecond,
            [Query(total_rate("kvfleet_router_retries_total", POOL, "by (pool, cause)"), "{{pool}} {{cause}}")],
            stacked=True,
        ),
    ]


def _caches() -> list[Panel]:
    hits = []
    for source in ("predicted", "reported"):
        labels = f'{POOL},source="{source}"'
        hits.append(Query(f"{total_rate(CACHED, labels, BY_POOL)} / {PROMPT}", f"{{{{pool}}}} {source}"))
    engines = total_rate("vllm:prefix_cache_hits_total", ENGINE, "by (namespace, kvfleet_io_pool)")
    asked = total_rate("vllm:prefix_cache_queries_total", ENGINE, "by (namespace, kvfleet_io_pool)")
    return [
        Panel(
            "Prefix-cache hit ratio",
            "Share of prompt tokens found in the chosen worker's cache: as the router predicted and as engines reported in"
            " their answers (vLLM: --enable-prompt-tokens-details). Lines far apart: the router's picture of the caches is wrong.",
            units.PercentUnit,
            hits,
            maximum=1,
        ),
        Panel(
            "Prefix-cache hit ratio of the engines",
            "The engines' own count over all requests, retries and other clients included.",
            units.PercentUnit,
            [Query(f"{engines} / {asked}", "{{kvfleet_io_pool}}")],
            maximum=1,
        ),
        Panel(
            "Cached tokens, predicted against reported",
            "Mean distance per answer of what was expected of the chosen worker's cache from what its engine found: by KV events"
            " (precise) and by guess (approximate), above and below.",
            units.Short,
            [
                Query(
                    f"{total_rate(f'{DIFFERENCE}_sum', POOL, BY_VIEW)} / {total_rate(f'{DIFFERENCE}_count', POOL, BY_VIEW)}",
                    "{{pool}} {{view}} {{prediction}}",
                )
            ],
        ),
        Panel(
            "KV events",
            "What went wrong in following them: batches missed, caches forgotten because of it, engines that began anew, what could"
            " not be understood.",
            units.Short,
            [
                Query(f"sum by (namespace) ({rate(f'kvfleet_router_kv_event_{name}_total', NAMESPACE)})", name)
                for name in ("gaps", "resets", "restarts", "malformed")
            ],
        ),
    ]


def _predictions() -> list[Panel]:
    error = "kvfleet_router_ttft_prediction_error_seconds"
    return [
        Panel(
            "Prediction error",
            "Distance between predicted and observed time to first token, either way.",
            units.Seconds,
            quantiles(error, POOL, ", namespace, pool", " {{pool}}"),
        ),
        Panel(
            "Predicted and observed",
            "The last predicted time to first token beside the observed mean, by pool; the observed one includes the queue.",
            units.Seconds,
            [
                Query(f"avg {BY_POOL} (kvfleet_router_predicted_ttft_seconds{{{POOL}}})", "{{pool}} predicted"),
                Query(
                    f"{total_rate('kvfleet_router_ttft_seconds_sum', POOL, BY_POOL)}"
                    f" / {total_rate('kvfleet_router_ttft_seconds_count', POOL, BY_POOL)}",
                    "{{pool}} observed",
                ),
            ],
        ),
    ]


def _balance() -> list[Panel]:
    by_worker_pool = "by (namespace, kvfleet_io_pool)"
    return [
        Panel(
            "Running at each worker",
            "Requests in the engines' batches. With energy in the policy unequal is right: workers are filled to the pack target"
            " before others are used.",
            units.Short,
            [Query(RUNNING, "{{pod}}")],
        ),
        Panel(
            "Imbalance",
            "Largest over mean number of running requests within a pool: 1 is even, the number of workers is all at one.",
            units.Short,
            [
                Query(
                    f"max {by_worker_pool} ({RUNNING}) / (avg {by_worker_pool} ({RUNNING}) > 0)",
                    "{{kvfleet_io_pool}}",
                )
            ],
        ),
        Panel(
            "KV cache in use",
            "Of each worker. Near 1 engines preempt requests and compute them again.",
            units.PercentUnit,
            [Query(f"vllm:kv_cache_usage_perc{{{ENGINE}}}", "{{pod}}")],
            maximum=1,
        ),
        Panel(
            "Pack target",
            "Sequences a worker is filled to before another is used; the autoscaler's target for concurrency.",
            units.Short,
            [Query(f"min {BY_POOL} (kvfleet_router_pack_target_sequences{{{POOL}}})", "{{pool}}")],
        ),
    ]


def _cost() -> list[Panel]:
    decision = "kvfleet_router_decision_seconds"
    return [
        Panel(
            "Cost of a decision",
            "CPU time to parse a request and choose its worker.",
            units.Seconds,
            quantiles(decision, NAMESPACE),
            width=8,
        ),
        Panel(
            "Slowest router's decisions",
            "p99 of the router replica where it is largest.",
            units.Seconds,
            [Query(f"max({quantile(0.99, decision, NAMESPACE, ', instance')})", "p99")],
            width=8,
        ),
        Panel(
            "CPU of each router",
            "A router runs on one core: at 1 it is full, and more replicas are needed.",
            units.PercentUnit,
            [
                Query(
                    f"{rate('process_cpu_seconds_total', NAMESPACE)}"
                    f" and on (instance) kvfleet_router_client_connections{{{NAMESPACE}}}",
                    "{{instance}}",
                )
            ],
            width=8,
        ),
        Panel(
            "Client connections",
            "Open at each router.",
            units.Short,
            [Query(f"kvfleet_router_client_connections{{{NAMESPACE}}}", "{{instance}}")],
            width=8,
        ),
        Panel(
            "Request bodies held",
            "At each router; beyond 1 GiB it answers 503.",
            units.BytesIEC,
            [Query(f"kvfleet_router_request_body_bytes{{{NAMESPACE}}}", "{{instance}}")],
            width=8,
        ),
        Panel(
            "Configurations served",
            "Routers by the configuration they serve. More than one for long: a router is cut off or refuses the newer one.",
            units.Short,
            [Query(f"count by (namespace, revision) (kvfleet_router_config_info{{{NAMESPACE}}})", "{{revision}}")],
            width=8,
            stacked=True,
        ),
    ]
