"""What the autoscaler last decided, as Prometheus series: of each pool those of its last round, none of pools that went.

The namespace is a label of its own name, `pool_namespace`: Prometheus's own `namespace` is that of the operator's pod.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvfleet_operator.autoscale.autoscaler import PoolResult
from kvfleet_operator.autoscale.decide import Workers
from kvfleet_operator.autoscale.readings import Reading
from kvfleet_operator.autoscale.signals import PoolScope

PREFIX = "kvfleet_operator_pool_"


@dataclass(frozen=True, slots=True)
class _Shown:
    scope: PoolScope
    workers: Workers
    result: PoolResult
    readings: Sequence[Reading]


class ScalingMetrics(Collector):
    def __init__(self) -> None:
        self._shown: dict[str, _Shown] = {}

    def show(self, scope: PoolScope, workers: Workers, result: PoolResult, readings: Sequence[Reading]) -> None:
        self._shown[scope.key] = _Shown(scope, workers, result, readings)

    def keep(self, pools: Collection[str]) -> None:
        """Forget all pools but these."""
        self._shown = {key: shown for key, shown in self._shown.items() if key in pools}

    def describe(self) -> list[Metric]:
        """Names are known without collecting."""
        return []

    def collect(self) -> Iterator[Metric]:
        shown = list(self._shown.values())
        yield _family(
            "desired_replicas",
            "Workers the autoscaler wants.",
            ((each, each.result.decision.desired) for each in shown),
        )
        yield _family(
            "ready_replicas", "Workers that are ready, of an autoscaled pool.", ((s, s.workers.ready) for s in shown)
        )
        wishes = ((each, each.result.decision.wish) for each in shown)
        yield _family(
            "wished_replicas", "Workers the signals ask for, before anything holds that back.",
            ((each, wish) for each, wish in wishes if wish is not None),
        )  # fmt: skip
        forecasts = ((each, each.result.forecast) for each in shown)
        yield _family(
            "forecast_demand", "The demand expected until a worker started now would be ready, in the unit of the signal.",
            ((each, found.demand) for each, found in forecasts if found is not None),
        )  # fmt: skip
        startups = ((each, each.result.startup_s) for each in shown)
        yield _family(
            "startup_seconds", "From creating a worker until it is ready, of the last workers the slower ones.",
            ((each, took_s) for each, took_s in startups if took_s is not None),
        )  # fmt: skip
        yield from _signals(shown)
        held = GaugeMetricFamily(
            PREFIX + "decision", "The last decision's reason.", labels=["pool_namespace", "pool", "reason"]
        )
        for each in shown:
            held.add_metric([*_names(each), each.result.decision.reason], 1)
        yield held


def _names(shown: _Shown) -> list[str]:
    return [shown.scope.namespace, shown.scope.pool]


def _family(name: str, text: str, values: Iterator[tuple[_Shown, float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, text, labels=["pool_namespace", "pool"])
    for shown, value in values:
        family.add_metric(_names(shown), value)
    return family


def _signals(shown: Sequence[_Shown]) -> Iterator[Metric]:
    labels = ["pool_namespace", "pool", "signal"]
    value = GaugeMetricFamily(PREFIX + "signal_value", "A signal as it was last read.", labels=labels)
    target = GaugeMetricFamily(PREFIX + "signal_target", "What a signal is compared with.", labels=labels)
    usable = GaugeMetricFamily(PREFIX + "signal_complete", "Whether all there is to know was read.", labels=labels)
    for each in shown:
        for reading in each.readings:
            where = [*_names(each), reading.signal]
            usable.add_metric(where, reading.complete)
            if reading.value is not None:
                value.add_metric(where, reading.value)
            if reading.target is not None:
                target.add_metric(where, reading.target)
    yield from (value, target, usable)
