"""Kubernetes' own HorizontalPodAutoscaler and kvfleet's decision on the same series: the same number of replicas.

Whenever HPA's controller asks for a metric, the decision is taken too, on the same figure at the same moment; each then acts
on a scale of its own. So both see the same series, and what is compared is what they make of it: rounding, tolerance,
bounds, stabilisation, rate policies, missing data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
from harness.cluster import Cluster
from harness.kube import Object
from harness.sentences import Given, Story, Then
from support.external_metrics import external_metrics

from kvfleet_api.modelpool import AutoscalingSpec
from kvfleet_operator.autoscale.behavior import ScalerState
from kvfleet_operator.autoscale.decide import Workers, decide
from kvfleet_operator.autoscale.readings import Quality, Reading, SignalKind

TARGET = 10.0
LEAST, MOST = 1, 8
WINDOW_S = 12
BEHAVIOR = {
    "scaleDown": {"stabilizationWindowSeconds": WINDOW_S},
    "scaleUp": {"policies": [{"type": "Pods", "value": 3, "periodSeconds": 4}]},
}
LOOKS = 6
"""The controller looks every second. So often it must have looked before a number counts as its answer."""
SERIES: tuple[tuple[float | None, bool, str], ...] = (
    (5, False, "one is enough"),
    (35, False, "rounded up"),
    (43, False, "within the tolerance"),
    (46, False, "beyond it"),
    (400, False, "as far as maxReplicas"),
    (15, False, "a dip: held by the window"),
    (400, False, "and back"),
    (None, True, "no data for longer than the window: nothing is removed"),
    (15, True, "low for longer than the window"),
    (0, True, "as far as minReplicas"),
    (400, True, "as fast as the rate policy allows"),
)
"""(demand, whether a whole window passes, what it shows)"""


@dataclass
class Pair:
    """An HPA and its twin."""

    kind: SignalKind
    scale_of_hpa: Callable[[], tuple[int, int]]
    """(replicas wanted, those ready)"""
    demand: float | None = 0.0
    asked: int = 0
    ours: int = LEAST
    state: ScalerState = field(default_factory=ScalerState)
    path: list[tuple[int, int]] = field(default_factory=list)
    """(HPA's replicas, ours) at each look."""

    def figure(self, replicas: int) -> float | None:
        """What is measured with so many replicas: a total does not depend on them, a latency does."""
        if self.demand is None or self.kind == "AverageValue":
            return self.demand
        return self.demand / max(replicas, 1)

    def look(self) -> float | None:
        """HPA's controller asks: what it is told. Ours decides on the same demand."""
        self.asked += 1
        wanted, ready = self.scale_of_hpa()
        self.path.append((wanted, self.ours))
        found = self.figure(self.ours)
        quality = Quality.ABSENT if found is None else Quality.FRESH
        reading = Reading("figure", self.kind, quality, found, TARGET)
        decision = decide(SPEC, [reading], Workers(self.ours, self.ours), self.state, time.time())
        self.ours, self.state = decision.desired, decision.state
        return self.figure(ready)


SPEC = AutoscalingSpec.model_validate(
    {
        "minReplicas": LEAST,
        "maxReplicas": MOST,
        "behavior": BEHAVIOR,
    }
)


def deployment(name: str) -> Object:
    labels = {"app": name}
    container = {"name": "main", "image": "busybox:1", "command": ["sleep", "3600"]}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container], "terminationGracePeriodSeconds": 0}}
    spec = {"replicas": LEAST, "selector": {"matchLabels": labels}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}


def hpa(name: str, kind: SignalKind) -> Object:
    target = {"type": kind, "averageValue" if kind == "AverageValue" else "value": f"{TARGET:g}"}
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
        "minReplicas": LEAST,
        "maxReplicas": MOST,
        "metrics": [{"type": "External", "external": {"metric": {"name": name}, "target": target}}],
        "behavior": BEHAVIOR,
    }
    return {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": name}, "spec": spec}


@pytest.fixture
def pairs(cluster: Cluster, story: Story, given: Given, tmp_path: Path) -> Iterator[dict[str, Pair]]:
    """By the name of Deployment, HPA and metric alike."""
    if not cluster.reaches_pods:
        pytest.skip("the HPA controller of this cluster cannot be given metrics, nor told to look every second")
    names: dict[str, SignalKind] = {"total": "AverageValue", "latency": "Value"}
    guard = Lock()

    def scale(name: str) -> tuple[int, int]:
        live = story.kube.get("Deployment", name)
        return int(live["spec"]["replicas"]), int(live["status"].get("readyReplicas", 0))

    found = {name: Pair(kind, partial(scale, name)) for name, kind in names.items()}

    def figures(namespace: str, metric: str) -> float | None:
        with guard:
            return found[metric].look() if namespace == story.kube.namespace and metric in found else None

    with external_metrics(cluster, story.kube, figures, tmp_path):
        for name, kind in names.items():
            given.applied(deployment(name), hpa(name, kind))
        yield found


def test_hpa_and_kvfleet_want_the_same_replicas(
    pairs: dict[str, Pair], then: Then, story: Story, tells: Callable[[str], None]
) -> None:
    then.eventually("HPA's controller looks", lambda: all(pair.asked for pair in pairs.values()), within_s=60)
    said: dict[str, list[tuple[int, int]]] = {name: [] for name in pairs}
    for demand, whole_window, what in SERIES:
        begun = time.monotonic()
        before = {name: pair.asked for name, pair in pairs.items()}
        for pair in pairs.values():
            pair.demand = demand

        def both_have_answered(begun: float = begun, long: bool = whole_window, before: Any = before) -> bool:
            looked = all(pair.asked >= before[name] + LOOKS for name, pair in pairs.items())
            return looked and (not long or time.monotonic() > begun + WINDOW_S + 2)

        then.eventually(f"both have looked at {demand}: {what}", both_have_answered, within_s=60)
        for name, pair in pairs.items():
            if not what.startswith("a dip"):  # whose end must not wait for what it would not show
                then.is_so("Deployment", name, f"has {pair.ours}", lambda at, n=pair.ours: at["spec"]["replicas"] == n)  # type: ignore[misc]
            said[name].append((int(story.kube.get("Deployment", name)["spec"]["replicas"]), pair.ours))
    for name, answers in said.items():
        theirs, ours = zip(*answers, strict=True)
        tells(f"{name}: demand {[demand for demand, _, _ in SERIES]}, HPA {list(theirs)}, kvfleet {list(ours)}")
        assert theirs == ours
    assert [ours for _, ours in said["total"]] == [1, 4, 4, 5, 8, 8, 8, 8, 2, 1, 8]
    theirs, ours = ([key for key, _ in groupby(side)] for side in zip(*pairs["total"].path, strict=True))
    tells(f"total: HPA went {theirs}, kvfleet {ours}")
    assert theirs == ours
