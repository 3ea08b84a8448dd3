"""PromQL that several dashboards share."""

from __future__ import annotations

from typing import Final

from dashboards.panels import Query, Variable

POOL: Final = 'namespace=~"$namespace",pool=~"$pool"'
"""Of the router's series that speak of a pool."""
NAMESPACE: Final = 'namespace=~"$namespace"'
"""Of the router's series that do not: requests refused before a pool was chosen have none."""
ENGINE: Final = 'namespace=~"$namespace",kvfleet_io_pool=~"$pool"'
"""Of the engines' series: the PodMonitor adds the pod's pool."""
OUR_FAULT: Final = 'cause=~"no_worker|queue_full|queue_timeout|worker_failed"'
"""Refusals for want of a worker; the other causes are the client's."""
BY_POOL: Final = "by (namespace, pool)"

NAMESPACES: Final = Variable("namespace", "Namespace", "label_values(kvfleet_router_workers, namespace)")
POOLS: Final = Variable("pool", "Pool", 'label_values(kvfleet_router_workers{namespace=~"$namespace"}, pool)')


def rate(metric: str, labels: str) -> str:
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def total_rate(metric: str, labels: str, by: str = "") -> str:
    return f"sum {by} ({rate(metric, labels)})" if by else f"sum({rate(metric, labels)})"


def quantile(fraction: float, metric: str, labels: str, by: str = "") -> str:
    """Of a histogram, given without `_bucket`; `by`: further labels, each after a comma."""
    return f"histogram_quantile({fraction:g}, sum by (le{by}) ({rate(metric + '_bucket', labels)}))"


def quantiles(metric: str, labels: str, by: str = "", legend: str = "") -> list[Query]:
    return [Query(quantile(q / 100, metric, labels, by), f"p{q}{legend}") for q in (50, 99)]


def or_none(expr: str) -> str:
    """`expr`, and 0 where nothing of the kind ever happened."""
    return f"({expr} or vector(0))"
