"""What routers know workers' caches by: from their reports into the condition of the pool."""

import pytest

from kvfleet_operator.controller import Controller
from kvfleet_operator.reconcile import cacheview, modelpool
from kvfleet_operator.reconcile.cacheview import CacheView
from kvfleet_operator.reconcile.plan import Applied
from kvfleet_operator.reconcile.routingpolicy import Loaded
from kvfleet_operator.world import World

PRECISE = CacheView("Precise", "EventsFollowed", "3 of 3 workers tell what they hold.")
BROKEN = CacheView("Approximate", "TokenizerNormalizes", "the normalizer Lowercase changes text")
LOADING = CacheView("Approximate", "Loading", "The tokenizer is being read.")
TOKENIZER = {"name": "llama-8b", "tokenizer": {"configMapRef": "llama-tokenizer"}}


@pytest.mark.parametrize(
    ("replicas", "status", "reason"),
    [
        ({}, "Unknown", "NoRouterReady"),
        ({"a": None}, "Unknown", "Pending"),
        ({"a": PRECISE, "b": None}, "Unknown", "Pending"),
        ({"a": PRECISE, "b": PRECISE}, "True", "EventsFollowed"),
        ({"a": PRECISE, "b": BROKEN}, "False", "TokenizerNormalizes"),
        ({"a": LOADING}, "False", "Loading"),
    ],
)
def test_every_replica_has_to_know(replicas, status, reason):
    finding = cacheview.finding(replicas)
    assert (finding.type, finding.status, finding.reason) == ("CacheKnown", status, reason)


def test_who_guesses_and_why_is_told():
    finding = cacheview.finding({"a": BROKEN, "b": BROKEN, "c": PRECISE})
    assert finding.message == "Cached prefixes are guessed. a, b: the normalizer Lowercase changes text"


def conditions_of(pool, views):
    given = modelpool.PoolInput(pool, None, (), None, {}, views)
    status = modelpool.status(given, Applied([], {}), "2026-01-01T00:00:00Z")
    return {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}


def test_only_pools_with_a_tokenizer_speak_of_it(make):
    assert "CacheKnown" not in conditions_of(make.parse(make.pool()), {"a": PRECISE})
    conditions = conditions_of(make.parse(make.pool(model=TOKENIZER)), {"a": PRECISE})
    assert conditions["CacheKnown"] == ("True", "EventsFollowed")


def test_a_tokenizer_without_events_is_told(make):
    pool = make.parse(make.pool(model=TOKENIZER, engine={"kvEvents": {"enabled": False}}))
    assert conditions_of(pool, {"a": PRECISE})["CacheKnown"] == ("False", "EventsDisabled")


def test_guessing_does_not_make_a_pool_less_ready(make):
    pool = make.parse(make.pool(model=TOKENIZER))
    assert conditions_of(pool, {"a": BROKEN})["Ready"] == conditions_of(pool, {"a": PRECISE})["Ready"]


def test_the_world_tells_what_the_namespaces_routers_said(make):
    world = World()
    for version, manifest in enumerate([make.router(), make.router_pod("a"), make.router_pod("b", "10.0.0.2")]):
        manifest["metadata"] |= {"uid": manifest["metadata"]["name"], "resourceVersion": str(version + 1)}
        world.put(manifest)
    world.reports["default", "a"] = Loaded("abc", {}, "", {"llama": PRECISE})
    assert world.cache_views(make.parse(make.pool())) == {"a": PRECISE, "b": None}


def test_a_new_report_brings_pools_with_a_tokenizer_up(make, monkeypatch):
    world = World()
    for number, manifest in enumerate([make.pool(model=TOKENIZER), make.pool(name="plain")]):
        manifest["metadata"] |= {"uid": str(number), "resourceVersion": str(number + 1)}
        world.put(manifest)
    added = []
    controller = object.__new__(Controller)
    controller._world = world
    controller._queue = type("Queue", (), {"add": staticmethod(added.append)})()
    controller.routers_reported("default")
    assert [key.name for key in added if key.kind == "ModelPool"] == ["llama"]
