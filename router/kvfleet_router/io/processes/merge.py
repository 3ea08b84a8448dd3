"""One answer of the admin port out of those of several processes. Pure.

Counters and histograms are summed, those of processes that died included: a sum never falls. What is in flight is the sum of
what each has in flight; of other gauges, which every process reports of the same thing, the worst or the mean is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import orjson
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

Key = tuple[str, tuple[tuple[str, str], ...]]
"""A sample's name and labels."""
CUMULATIVE = ("counter", "histogram", "summary")

_ROUTER = "kvfleet_router_"
SUMMED = frozenset(
    (
        *(
            _ROUTER + name
            for name in ("in_flight", "packed_sequences", "worker_in_flight", "queue_depth", "client_connections")
        ),
        *(_ROUTER + name for name in ("request_body_bytes",)),
        "kvfleet_energy_saved_joules_stderr",  # all price with about the same coefficients: their errors add up
        *("process_resident_memory_bytes", "process_virtual_memory_bytes", "process_open_fds"),
    )
)
LEAST = frozenset(
    (
        *(_ROUTER + name for name in ("kubernetes_connected", "sharing_connected", "sharing_peers")),
        *("process_start_time_seconds", "process_max_fds"),
    )
)
MEAN = frozenset(_ROUTER + name for name in ("predicted_ttft_seconds", "pack_target_sequences"))


class Family:
    """A metric as the processes together have it."""

    def __init__(self, metric: Metric) -> None:
        self.name, self.text, self.type = metric.name, metric.documentation, metric.type
        self.values: dict[Key, list[float]] = {}

    def merged(self) -> Metric:
        metric = Metric(self.name, self.text, self.type)
        for (name, labels), values in self.values.items():
            metric.add_sample(name, dict(labels), self._one(name, labels, values))
        return metric

    def _one(self, name: str, labels: tuple[tuple[str, str], ...], values: list[float]) -> float:
        if self.type in CUMULATIVE or name in SUMMED:
            return sum(values)
        if name in LEAST or (name == _ROUTER + "workers" and ("state", "ready") in labels):
            return min(values)
        return fmean(values) if name in MEAN else max(values)


class MetricsMerge:
    """Merges scrape after scrape, and remembers what processes that died had counted."""

    def __init__(self) -> None:
        self._last: dict[str, dict[Key, float]] = {}  # by process: what it has counted
        self._carried: dict[str, dict[Key, float]] = {}  # and what its predecessors had
        self._known: dict[str, Metric] = {}

    def merge(self, texts: Mapping[str, str | None]) -> bytes:
        """The exposition of all, given that of each process by its name; none where it does not answer."""
        families: dict[str, Family] = {}
        for process, text in texts.items():
            counted: dict[Key, float] = {}
            for metric in text_string_to_metric_families(text) if text is not None else ():
                family = families.setdefault(metric.name, Family(metric))
                for sample in metric.samples:
                    key = (sample.name, tuple(sorted(sample.labels.items())))
                    if metric.type in CUMULATIVE:
                        counted[key] = float(sample.value)
                        self._known.setdefault(sample.name, metric)
                    else:
                        family.values.setdefault(key, []).append(float(sample.value))
            self._remember(process, counted if text is not None else None)
        for process, counts in self._last.items():
            carried = self._carried[process]
            for key in {**carried, **counts}:
                metric = self._known[key[0]]
                family = families.setdefault(metric.name, Family(metric))
                family.values.setdefault(key, []).append(counts.get(key, 0.0) + carried.get(key, 0.0))
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Shown([family.merged() for family in families.values()]))
        return generate_latest(registry)

    def _remember(self, process: str, counted: dict[Key, float] | None) -> None:
        """A process that counts from zero again is a new one."""
        last = self._last.setdefault(process, {})
        carried = self._carried.setdefault(process, {})
        if counted is None:
            return
        if any(counted.get(key, 0.0) < value for key, value in last.items()):
            for key, value in last.items():
                carried[key] = carried.get(key, 0.0) + value
        self._last[process] = counted


class _Shown(Collector):
    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


Documents = Sequence[Any]
"""The JSON of each process that answered; at least one."""


def ready(documents: Documents, missing: int, *, complete: bool) -> tuple[int, bytes]:
    """Ready when all that answer are. `missing` are being started again, and get no connections that cannot wait; before
    all have been there once (`complete`), they must."""
    reasons = [document["status"] for document in documents if document["status"] != "ready"]
    if not documents:
        reasons = ["no process answers"]
    elif missing and not complete:
        reasons.append(f"{missing} processes are starting")
    revision = documents[0]["revision"] if documents else ""
    body = {"status": reasons[0] if reasons else "ready", "revision": revision, "processes": len(documents)}
    return (503 if reasons else 200), orjson.dumps(body)


def decisions(documents: Documents, limit: int) -> bytes:
    """The latest of all, newest first."""
    every = [decision for document in documents for decision in document["decisions"]]
    every.sort(key=lambda decision: decision["time"], reverse=True)
    return orjson.dumps({"decisions": every[:limit]})


def workers(documents: Documents) -> bytes:
    """What is in flight from all; ready only where all say so."""
    found: dict[str, dict[str, Any]] = {}
    for document in documents:
        for worker in document["workers"]:
            known = found.setdefault(worker["name"], {**worker, "in_flight": 0})
            # A process also counts what the others told it: the highest is the one that knows best.
            known["in_flight"] = max(known["in_flight"], worker["in_flight"])
            if worker["state"] != "ready":
                known["state"] = worker["state"]
    return orjson.dumps({"workers": list(found.values())})


def loaded(documents: Documents) -> bytes:
    """What all serve with. Where they differ for a moment, nothing is said to be served."""
    first = documents[0]
    refused = next((document["refused"] for document in documents if document["refused"]), None)
    same = all(document["revision"] == first["revision"] for document in documents)
    policies = {
        name: policy
        for name, policy in first["policies"].items()
        if all(document["policies"].get(name) == policy for document in documents)
    }
    told = {"revision": first["revision"] if same else "", "policies": policies, "refused": refused}
    pools = {name: _pool(name, documents) for name in first["pools"]}
    return orjson.dumps({**first, **told, "pools": pools})


def _pool(name: str, documents: Documents) -> dict[str, Any]:
    """The first's words; of energy the words of one that does not trust it, else of the one that has learned most."""
    pools = [document["pools"][name] for document in documents if name in document["pools"]]
    energies = [pool["energy"] for pool in pools if "energy" in pool]
    worst = min(energies, key=lambda energy: (energy["trusted"], -energy["intervals"]), default=None)
    return {**pools[0], "energy": worst} if worst else dict(pools[0])
