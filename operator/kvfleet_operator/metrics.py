"""The operator's own Prometheus metrics. One object per process (or per test), passed to whoever measures."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily

from kvfleet_operator.scaling.metrics import ScalingMetrics


class _WatchAges:
    """Ages are computed when they are read, so that a stalled loop still shows them growing."""

    def __init__(self) -> None:
        self.read: Callable[[], dict[str, float]] = dict

    def collect(self) -> list[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "kvfleet_operator_watch_age_seconds",
            "Seconds since an event arrived, or since a listing proved that none was missed.",
            labels=["kind"],
        )
        for kind, age_s in sorted(self.read().items()):
            family.add_metric([kind], age_s)
        return [family]


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(
            "kvfleet_operator_reconciles",
            "Reconciliations by kind and result: unchanged, changed, error.",
            ["kind", "result"],
            registry=self.registry,
        )
        self.reconcile_seconds = Histogram(
            "kvfleet_operator_reconcile_seconds",
            "Time one reconciliation takes, API requests included.",
            ["kind"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=self.registry,
        )
        self.api_requests = Counter(
            "kvfleet_operator_api_requests",
            "Requests to the API server by verb, resource and status code (0: no answer; NamespaceTerminating: a 403 that needs no right).",
            ["verb", "resource", "code"],
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "kvfleet_operator_queue_depth", "Keys waiting to be reconciled.", registry=self.registry
        )
        self.missed_events = Counter(
            "kvfleet_operator_watch_missed_events",
            "Changes that a listing showed and no watch had delivered.",
            ["kind"],
            registry=self.registry,
        )
        self.leader = Gauge("kvfleet_operator_leader", "1 while this replica holds the Lease.", registry=self.registry)
        self.scaling_rounds = Counter(
            "kvfleet_operator_autoscaling_rounds",
            "Rounds of the autoscaler over all pools by result: ok, error.",
            ["result"],
            registry=self.registry,
        )
        self.scaling_seconds = Histogram(
            "kvfleet_operator_autoscaling_round_seconds",
            "Time one round of the autoscaler takes, reading the signals included.",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=self.registry,
        )
        self.scalings = Counter(
            "kvfleet_operator_pool_scalings",
            "Changes of a pool's replicas by the autoscaler, by direction: up, down.",
            ["pool_namespace", "pool", "direction"],
            registry=self.registry,
        )
        self.scaling = ScalingMetrics()
        self.registry.register(self.scaling)
        self.watch_ages = _WatchAges()
        self.registry.register(self.watch_ages)

    def time_reconcile(self, kind: str, started: float) -> None:
        self.reconcile_seconds.labels(kind).observe(time.monotonic() - started)
