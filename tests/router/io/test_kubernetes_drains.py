"""Workers that are about to be taken away: what the ConfigMap's annotation says, and until when."""

from __future__ import annotations

import json
import time
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import pytest
from fake_api import CONFIG_MAPS, SLICES, FakeApi, config_map, endpoint_slice
from followers import Cluster, in_pool, served
from scripted import Bench, eventually

from kvfleet_api.fleetconfig import DRAINING_ANNOTATION
from kvfleet_router.io import kubernetes
from kvfleet_router.io.kubernetes_drains import MAX_AHEAD_S, Drains


def wish(until: float, *workers: str, pool: str = "a") -> str:
    return json.dumps({pool: {"until": until, "workers": list(workers)}})


def test_a_wish_holds_until_it_ends_or_is_taken_back() -> None:
    drains = Drains()
    assert drains.take(wish(200.0, "w-0", "w-1"), 100.0)
    assert not drains.take(wish(200.0, "w-0", "w-1"), 110.0), "no news"
    assert drains.of("a", 199.0) == {"w-0", "w-1"}
    assert drains.of("b", 199.0) == frozenset()
    assert drains.ends_in_s(150.0) == 50.0
    assert drains.of("a", 200.0) == frozenset()
    assert drains.ends_in_s(200.0) is None
    assert drains.take(None, 120.0)
    assert drains.of("a", 121.0) == frozenset()


def test_a_wish_that_is_over_is_told_of_once() -> None:
    drains = Drains()
    drains.take(wish(200.0, "w-0"), 100.0)
    assert not drains.end(199.9)
    assert drains.end(200.0)
    assert not drains.end(201.0)
    assert drains.of("a", 150.0) == frozenset()


def test_a_clock_far_ahead_does_not_drain_a_worker_for_ever() -> None:
    drains = Drains()
    drains.take(wish(1e12, "w-0"), 100.0)
    assert drains.ends_in_s(100.0) == MAX_AHEAD_S


@pytest.mark.parametrize("text", ["", "[]", '{"a": {"until": "soon", "workers": []}}', '{"a": {}}', "x" * 300_000])
def test_what_cannot_be_understood_says_nothing(text: str) -> None:
    drains = Drains()
    drains.take(wish(200.0, "w-0"), 100.0)
    with pytest.raises(ValueError):
        drains.take(text, 100.0)
    assert drains.of("a", 101.0) == frozenset()


def annotated(text: str | None) -> dict[str, Any]:
    found = config_map(in_pool())
    if text is not None:
        found["metadata"]["annotations"] = {DRAINING_ANNOTATION: text}
    return found


async def test_requests_keep_away_from_it_at_once_and_come_back_when_it_is_called_off(
    cluster: Cluster, api: FakeApi, bench: Bench
) -> None:
    workers = [await bench.worker(), await bench.worker()]
    api.put(CONFIG_MAPS, annotated(None))
    for number, worker in enumerate(workers):
        api.put(SLICES, endpoint_slice(f"w-{number}", worker.port))
    app = await cluster.router()
    await eventually(lambda: not app.unready and len(app.dispatcher.workers()) == 2)

    def draining() -> list[str]:
        return [worker.name for worker in app.dispatcher.workers() if worker.endpoint.draining]

    api.put(CONFIG_MAPS, annotated(wish(time.time() + 60, "w-0", pool="static")))
    await eventually(lambda: draining() == ["w-0"])
    assert {await served(bench, app) for _ in range(8)} == {"w-1"}
    api.put(CONFIG_MAPS, annotated("{"))
    await eventually(lambda: draining() == [])
    api.put(CONFIG_MAPS, annotated(wish(time.time() + 0.3, "w-1", pool="static")))
    await eventually(lambda: draining() == ["w-1"])
    await eventually(lambda: draining() == [])  # it was not renewed
    api.put(CONFIG_MAPS, annotated(wish(time.time() + 60, "w-0", pool="static")))
    await eventually(lambda: draining() == ["w-0"])
    assert {await served(bench, app) for _ in range(8)} == {"w-1"}, "it gets requests again"


async def test_a_wish_that_ends_while_workers_are_looked_at_is_over_all_the_same(
    cluster: Cluster, api: FakeApi, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await bench.worker()
    until = time.time() + 60
    api.put(CONFIG_MAPS, annotated(wish(until, "w-0", pool="static")))
    api.put(SLICES, endpoint_slice("w-0", worker.port))
    app = await cluster.router()
    await eventually(lambda: [each.endpoint.draining for each in app.dispatcher.workers()] == [True])
    readings = chain([until - 0.001], repeat(until + 1))  # the first is just before the end
    monkeypatch.setattr(kubernetes, "time", SimpleNamespace(time=lambda: next(readings), monotonic=time.monotonic))
    api.put(SLICES, endpoint_slice("w-1", worker.port))
    await eventually(lambda: [each.endpoint.draining for each in app.dispatcher.workers()] == [False, False])
