"""Fleet: what users get. The page to open first."""

from __future__ import annotations

from grafana_foundation_sdk.models import units

from dashboards.panels import Board, Panel, Query, Row
from dashboards.queries import (
    BY_POOL,
    NAMESPACE,
    NAMESPACES,
    OUR_FAULT,
    POOL,
    POOLS,
    or_none,
    quantiles,
    total_rate,
)

REQUESTS = "kvfleet_router_requests_total"
TTFT = "kvfleet_router_ttft_seconds"
IN_TIME = total_rate(f"{TTFT}_bucket", f'{POOL},le="1.0"')
STREAMED = total_rate(f"{TTFT}_count", POOL)
REFUSED = or_none(total_rate("kvfleet_router_errors_total", f"{NAMESPACE},{OUR_FAULT}"))
FAILED = or_none(total_rate(REQUESTS, f'{NAMESPACE},outcome="failed"'))
NOT_CANCELLED = total_rate(REQUESTS, f'{NAMESPACE},outcome!="cancelled"')
BAD = f"({REFUSED} + {FAILED}) / {NOT_CANCELLED}"


def board() -> Board:
    return Board(
        uid="kvfleet-fleet",
        title="Fleet",
        description="What users get: traffic, time to first token, errors, and how fast the error budget burns.",
        variables=[NAMESPACES, POOLS],
        rows=[Row("Now", _now()), Row("Latency", _latency()), Row("Objectives", _objectives()), Row("Load", _load())],
    )


def _now() -> list[Panel]:
    return [
        Panel(
            "Requests",
            "Requests per second that came to an end, however they ended.",
            units.RequestsPerSecond,
            [Query(total_rate(REQUESTS, f'{NAMESPACE},pool=~"$pool|"'))],
            width=6,
            single=True,
        ),
        Panel(
            "Answers in time",
            "Share of streamed answers whose first token came within 1 s, the default of RoutingPolicy's ttftMilliseconds.",
            units.PercentUnit,
            [Query(f"{IN_TIME} / {STREAMED}")],
            width=6,
            single=True,
        ),
        Panel(
            "Failed or refused",
            "Share of requests that failed at workers or found none. Cancelled ones do not count.",
            units.PercentUnit,
            [Query(BAD)],
            width=6,
            single=True,
        ),
        Panel(
            "Workers ready",
            "Workers that get requests, as the router that sees most of them says.",
            units.Short,
            [
                Query(
                    f'sum(max by (namespace, pool) (kvfleet_router_workers{{{POOL},state="ready"}}))',
                )
            ],
            width=6,
            single=True,
        ),
    ]


def _latency() -> list[Panel]:
    return [
        Panel(
            "Time to first token",
            "Of streamed answers, the router's queue included, by pool.",
            units.Seconds,
            quantiles(TTFT, POOL, ", namespace, pool", " {{pool}}"),
        ),
        Panel(
            "Time between tokens",
            "Mean over each streamed answer, by pool.",
            units.Seconds,
            quantiles("kvfleet_router_itl_seconds", POOL, ", namespace, pool", " {{pool}}"),
        ),
        Panel(
            "Whole answer",
            "From a request's arrival to its answer's end, by model. Grows with the length of answers.",
            units.Seconds,
            quantiles("kvfleet_router_e2e_seconds", POOL, ", model", " {{model}}"),
        ),
        Panel(
            "Tokens",
            "Prompt and output tokens per second, as engines report them, else estimated.",
            units.Short,
            [
                Query(total_rate("kvfleet_router_prompt_tokens_total", POOL), "prompt"),
                Query(total_rate("kvfleet_router_output_tokens_total", POOL), "output"),
            ],
        ),
    ]


def _objectives() -> list[Panel]:
    return [
        Panel(
            "Goodput",
            "Streamed answers per second whose first token came within 1 s, beside all of them. The gap is what users wait for.",
            units.RequestsPerSecond,
            [Query(IN_TIME, "first token within 1 s"), Query(STREAMED, "all streamed")],
        ),
        Panel(
            "Burn rate of the error budget",
            "1 spends a month's budget in a month; the alerts fire at 14.4 (1 h) and 6 (6 h). Budgets: 1 % of streamed answers"
            " later than 1 s, 0.1 % of requests failed or refused.",
            units.Short,
            [
                Query(f"(1 - {IN_TIME} / {STREAMED}) / 0.01", "first token"),
                Query(f"{BAD} / 0.001", "availability"),
            ],
        ),
        Panel(
            "How requests end",
            "ok; client_error: the engine refused it; failed: a worker broke; refused: by the router; cancelled: the client left.",
            units.RequestsPerSecond,
            [Query(total_rate(REQUESTS, f'{NAMESPACE},pool=~"$pool|"', "by (outcome)"), "{{outcome}}")],
            stacked=True,
        ),
        Panel(
            "Errors by cause",
            "What the router refused and what broke. model_not_found and its like are mistakes of clients.",
            units.RequestsPerSecond,
            [Query(total_rate("kvfleet_router_errors_total", NAMESPACE, "by (cause)"), "{{cause}}")],
            stacked=True,
        ),
    ]


def _load() -> list[Panel]:
    return [
        Panel(
            "In flight",
            "Requests at workers, over all routers, by pool.",
            units.Short,
            [Query(f"sum {BY_POOL} (kvfleet_router_in_flight{{{POOL}}})", "{{pool}}")],
            width=8,
            stacked=True,
        ),
        Panel(
            "Queue",
            "Requests the routers hold until a worker has room, by policy.",
            units.Short,
            [Query(f"sum by (namespace, policy) (kvfleet_router_queue_depth{{{NAMESPACE}}})", "{{policy}}")],
            width=8,
            stacked=True,
        ),
        Panel(
            "Workers",
            "By state, as the router that sees most of each says. Ejected: broke several times in a row, on probation.",
            units.Short,
            [
                Query(
                    f"sum by (state) (max by (namespace, pool, state) (kvfleet_router_workers{{{POOL}}}))", "{{state}}"
                )
            ],
            width=8,
            stacked=True,
        ),
    ]
