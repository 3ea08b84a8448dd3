"""Operator: whether the control loop runs. `job` chooses among several operators of one Prometheus."""

from __future__ import annotations

from grafana_foundation_sdk.models import units

from dashboards.panels import Board, Panel, Query, Row, Variable
from dashboards.queries import or_none, quantiles, total_rate

OPERATOR = 'namespace=~"$namespace"'
NAMESPACES = Variable("namespace", "Operator's namespace", "label_values(kvfleet_operator_leader, namespace)")
ROUTERS = Variable("router_namespace", "Routers' namespace", "label_values(kvfleet_router_workers, namespace)")
RECONCILES = "kvfleet_operator_reconciles_total"
REQUESTS = "kvfleet_operator_api_requests_total"
ROUTED = 'namespace=~"$router_namespace"'


def board() -> Board:
    return Board(
        uid="kvfleet-operator",
        title="Operator",
        description="Whether the operator reconciles, what it asks of the API server, and how fresh its picture is.",
        variables=[NAMESPACES, ROUTERS],
        rows=[
            Row("Now", _now()),
            Row("Reconciliation", _reconciliation()),
            Row("API server", _api()),
            Row("The routers' view of the API server", _routers()),
        ],
    )


def _now() -> list[Panel]:
    errors = or_none(total_rate(RECONCILES, f'{OPERATOR},result="error"'))
    return [
        Panel(
            "Leaders",
            "Replicas that hold the Lease. Always 1, but for seconds of a takeover.",
            units.Short,
            [Query(f"sum(kvfleet_operator_leader{{{OPERATOR}}})")],
            width=6,
            single=True,
        ),
        Panel(
            "Oldest watch",
            "Time since a kind was last proven to be watched, by an event or a listing, at the leader.",
            units.Seconds,
            [
                Query(
                    f"max(kvfleet_operator_watch_age_seconds{{{OPERATOR}}}"
                    f" and on (instance) kvfleet_operator_leader{{{OPERATOR}}} == 1)"
                )
            ],
            width=6,
            single=True,
        ),
        Panel(
            "Reconciliations that fail",
            "Share that ended in an error; each is tried again.",
            units.PercentUnit,
            [Query(f"{errors} / {total_rate(RECONCILES, OPERATOR)}")],
            width=6,
            single=True,
        ),
        Panel(
            "Waiting",
            "Objects waiting to be reconciled.",
            units.Short,
            [Query(f"sum(kvfleet_operator_queue_depth{{{OPERATOR}}})")],
            width=6,
            single=True,
        ),
    ]


def _reconciliation() -> list[Panel]:
    return [
        Panel(
            "Reconciliations",
            "By kind and result. Changed all the time: something else writes the same objects.",
            units.OpsPerSecond,
            [Query(total_rate(RECONCILES, OPERATOR, "by (kind, result)"), "{{kind}} {{result}}")],
            stacked=True,
        ),
        Panel(
            "Time of a reconciliation",
            "API requests included, by kind.",
            units.Seconds,
            quantiles("kvfleet_operator_reconcile_seconds", OPERATOR, ", kind", " {{kind}}"),
        ),
        Panel(
            "Queue",
            "Objects waiting to be reconciled, at each replica.",
            units.Short,
            [Query(f"kvfleet_operator_queue_depth{{{OPERATOR}}}", "{{instance}}")],
        ),
        Panel(
            "Leader",
            "Which replica holds the Lease.",
            units.Short,
            [Query(f"kvfleet_operator_leader{{{OPERATOR}}}", "{{instance}}")],
            maximum=1,
        ),
    ]


def _api() -> list[Panel]:
    return [
        Panel(
            "Requests by code",
            "0: no answer. 409: another writer was faster. 403: a right is missing.",
            units.RequestsPerSecond,
            [Query(total_rate(REQUESTS, OPERATOR, "by (code)"), "{{code}}")],
            width=8,
            stacked=True,
        ),
        Panel(
            "Requests by resource",
            "By verb and resource.",
            units.RequestsPerSecond,
            [Query(total_rate(REQUESTS, OPERATOR, "by (verb, resource)"), "{{verb}} {{resource}}")],
            width=8,
            stacked=True,
        ),
        Panel(
            "Age of watches",
            "Since an event arrived or a listing proved that none was missed, by kind. A restart follows if one stays stalled.",
            units.Seconds,
            [Query(f"max by (kind) (kvfleet_operator_watch_age_seconds{{{OPERATOR}}})", "{{kind}}")],
            width=8,
        ),
    ]


def _routers() -> list[Panel]:
    return [
        Panel(
            "Connected",
            "Whether each router hears the API server; at 0 it serves with what it knew last.",
            units.Short,
            [
                Query(
                    f"min by (namespace, instance, resource) (kvfleet_router_kubernetes_connected{{{ROUTED}}})",
                    "{{instance}} {{resource}}",
                )
            ],
            width=8,
            maximum=1,
        ),
        Panel(
            "Last contact",
            "Time since the API server last said something to a router; it does so about every minute.",
            units.Seconds,
            [
                Query(
                    f"max by (namespace, instance) (kvfleet_router_kubernetes_last_contact_age_seconds{{{ROUTED}}})",
                    "{{instance}}",
                )
            ],
            width=8,
        ),
        Panel(
            "Configurations refused",
            "Routers that know a newer configuration and cannot serve it.",
            units.Short,
            [Query(f"sum by (namespace) (kvfleet_router_config_refused{{{ROUTED}}})", "{{namespace}}")],
            width=8,
        ),
        Panel(
            "Routers that do not share",
            "Ways to other replicas, over Redis or in the pod, that are closed; without spec.redis and spec.processes there are none.",
            units.Short,
            [Query(or_none(f"sum(kvfleet_router_sharing_connected{{{ROUTED}}} == bool 0)"))],
            width=8,
        ),
        Panel(
            "Replicas not heard",
            "Router processes that should be heard by others and are not; each chooses as if those were not there.",
            units.Short,
            [
                Query(
                    or_none(
                        f"max(kvfleet_router_sharing_expected_peers{{{ROUTED}}} - kvfleet_router_sharing_peers{{{ROUTED}}})"
                    )
                )
            ],
            width=8,
        ),
        Panel(
            "Time to tell others",
            "From publishing a message at Redis until it came back; 10 ms are enough for replicas to act as one.",
            units.Seconds,
            [Query(or_none(f"max(kvfleet_router_sharing_round_trip_seconds{{{ROUTED}}})"))],
            width=8,
        ),
    ]
