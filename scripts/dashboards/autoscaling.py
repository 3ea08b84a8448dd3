"""Autoscaling: what the signals say, what was decided, and what holds a pool back."""

from __future__ import annotations

from grafana_foundation_sdk.models import units

from dashboards.panels import Board, Panel, Query, Row, Variable
from dashboards.queries import NAMESPACE, POOL, quantiles, total_rate

# Prometheus' own `namespace` is that of the operator's pod.
SCALED = 'pool_namespace=~"$namespace",pool=~"$pool"'
NAMESPACES = Variable("namespace", "Namespace", "label_values(kvfleet_operator_pool_desired_replicas, pool_namespace)")
POOLS = Variable(
    "pool", "Pool", 'label_values(kvfleet_operator_pool_desired_replicas{pool_namespace=~"$namespace"}, pool)'
)
BY_POOL = "by (pool_namespace, pool)"
BY_SIGNAL = "by (pool_namespace, pool, signal)"
PREFIX = "kvfleet_operator_pool_"
VALUE = f"max {BY_SIGNAL} ({PREFIX}signal_value{{{SCALED}}})"
TARGET = f"max {BY_SIGNAL} ({PREFIX}signal_target{{{SCALED}}})"


def board() -> Board:
    return Board(
        uid="kvfleet-autoscaling",
        title="Autoscaling",
        description="What the signals say, how many workers are wanted and there, and what holds a pool back.",
        variables=[NAMESPACES, POOLS],
        rows=[
            Row("Workers", _workers()),
            Row("Signals", _signals()),
            Row("Load", _load()),
            Row("The autoscaler itself", _rounds()),
        ],
    )


def _workers() -> list[Panel]:
    return [
        Panel(
            "Replicas",
            "Wished: what the signals ask for. Desired: what is left of it after stabilisation, rates, bounds and budget."
            " Ready: workers that get requests.",
            units.Short,
            [
                Query(f"max {BY_POOL} ({PREFIX}{kind}_replicas{{{SCALED}}})", f"{{{{pool}}}} {kind}")
                for kind in ("wished", "desired", "ready")
            ],
        ),
        Panel(
            "Reason of the last decision",
            "DesiredWithinRange: the pool gets what it wishes. TooManyReplicas: maxReplicas. MissingData: a signal cannot be"
            " read, so nothing is removed.",
            units.Short,
            [Query(f"max by (pool_namespace, pool, reason) ({PREFIX}decision{{{SCALED}}})", "{{pool}} {{reason}}")],
            stacked=True,
        ),
        Panel(
            "Changes",
            "Times the autoscaler changed a pool's replicas, per interval.",
            units.Short,
            [
                Query(
                    f"sum by (pool_namespace, pool, direction) (increase({PREFIX}scalings_total{{{SCALED}}}[$__rate_interval]))",
                    "{{pool}} {{direction}}",
                )
            ],
            stacked=True,
        ),
        Panel(
            "Wishes not granted",
            "Workers wished for beyond those desired. Lasting: maxReplicas or a budget is too small.",
            units.Short,
            [
                Query(
                    f"clamp_min(max {BY_POOL} ({PREFIX}wished_replicas{{{SCALED}}})"
                    f" - max {BY_POOL} ({PREFIX}desired_replicas{{{SCALED}}}), 0)",
                    "{{pool}}",
                )
            ],
        ),
    ]


def _signals() -> list[Panel]:
    return [
        Panel(
            "Signal",
            "As last read; each in its own unit (requests, seconds, share).",
            units.Short,
            [Query(VALUE, "{{pool}} {{signal}}")],
            width=8,
        ),
        Panel(
            "Target",
            "What a signal is compared with; per worker where the signal is a total.",
            units.Short,
            [Query(TARGET, "{{pool}} {{signal}}")],
            width=8,
        ),
        Panel(
            "Complete",
            "1: everything was read. 0: some routers or workers are missing, or the data is old, invalid or absent; then no"
            " worker is removed.",
            units.Short,
            [Query(f"min {BY_SIGNAL} ({PREFIX}signal_complete{{{SCALED}}})", "{{pool}} {{signal}}")],
            width=8,
            maximum=1,
        ),
        Panel(
            "Signal over target",
            "For a total this is the number of workers asked for; for a latency, the factor by which it misses its target.",
            units.Short,
            [Query(f"{VALUE} / {TARGET}", "{{pool}} {{signal}}")],
            width=24,
        ),
    ]


def _load() -> list[Panel]:
    return [
        Panel(
            "In flight and queued",
            "The load itself, from the routers: requests at workers by pool, requests held by policy.",
            units.Short,
            [
                Query(f"sum by (namespace, pool) (kvfleet_router_in_flight{{{POOL}}})", "{{pool}}"),
                Query(f"sum by (namespace, policy) (kvfleet_router_queue_depth{{{NAMESPACE}}})", "queue of {{policy}}"),
            ],
            width=24,
            stacked=True,
        ),
        Panel(
            "Forecast",
            "The demand expected until a worker started now would be ready, beside the demand there is. It starts workers only"
            " once it has proved itself: see the pool's status.autoscaling.forecast.",
            units.Short,
            [
                Query(f"max {BY_POOL} ({PREFIX}forecast_demand{{{SCALED}}})", "{{pool}} expected"),
                Query(f'max {BY_POOL} ({PREFIX}signal_value{{{SCALED},signal="concurrency"}})', "{{pool}} now"),
            ],
            width=8,
        ),
        Panel(
            "Start-up time",
            "From creating a worker until it is ready: how far a forecast looks ahead.",
            units.Seconds,
            [Query(f"max {BY_POOL} ({PREFIX}startup_seconds{{{SCALED}}})", "{{pool}}")],
            width=8,
        ),
        Panel(
            "Time to first token",
            "By pool, while it scales.",
            units.Seconds,
            quantiles("kvfleet_router_ttft_seconds", POOL, ", namespace, pool", " {{pool}}"),
            width=8,
        ),
    ]


def _rounds() -> list[Panel]:
    return [
        Panel(
            "Rounds",
            "Of the autoscaler over all pools, by result.",
            units.OpsPerSecond,
            [Query(total_rate("kvfleet_operator_autoscaling_rounds_total", "", "by (result)"), "{{result}}")],
        ),
        Panel(
            "Time of a round",
            "Reading the signals included.",
            units.Seconds,
            quantiles("kvfleet_operator_autoscaling_round_seconds", ""),
        ),
    ]
