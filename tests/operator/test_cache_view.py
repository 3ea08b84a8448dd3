"""What routers know workers' caches by: from their reports into the condition of the pool."""

import pytest

from kvfleet_operator.controller import Controller
from kvfleet_operator.reconcile import cacheview, modelpool, routingpolicy
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
    assert finding.message == (
        "Cached prefixes are guessed. a, b: the normalizer Lowercase changes text. "
        "Take spec.model.tokenizer out of the ModelPool: guesses serve as well."
    )


def test_the_remedy_goes_by_the_reason_and_what_passes_needs_none():
    told = CacheView("Approximate", "EventsNotHeard", "0 of 3 workers tell what they hold.")
    assert cacheview.finding({"a": told}).message == (
        "Cached prefixes are guessed. a: 0 of 3 workers tell what they hold. "
        "Let engines publish KV events (spec.engine.kvEvents), and routers reach their ports."
    )
    assert cacheview.finding({"a": LOADING}).message == "Cached prefixes are guessed. a: The tokenizer is being read."


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


# Policies


def policy_caches(make, pools, views, **prefix):
    """Of a policy over `pools` (name → its parts), of which routers say `views` (name → replica → view)."""
    policy = make.parse(make.policy(pools=[*pools], prefix=prefix))
    parsed = {name: make.parse(make.pool(name, **parts)) for name, parts in pools.items()}
    return cacheview.of_policy(
        policy, {name: cacheview.of_pool(pool, views.get(name, {})) for name, pool in parsed.items()}
    )


KNOWN, PLAIN = {"model": TOKENIZER}, {}


def test_a_policy_says_which_of_its_pools_is_guessed_why_and_what_to_do(make):
    views = {"known": {"a": PRECISE}, "broken": {"a": PRECISE, "b": BROKEN}}
    found = policy_caches(make, {"known": KNOWN, "broken": KNOWN}, views)
    assert (found.type, found.status, found.reason) == ("CacheKnown", "False", "TokenizerNormalizes")
    assert found.message == f"pool broken: {cacheview.finding(views['broken']).message}"
    assert "Take spec.model.tokenizer out" in found.message


@pytest.mark.parametrize(
    ("pools", "views", "status", "reason"),
    [
        ({"one": KNOWN}, {"one": {"a": PRECISE}}, "True", "EventsFollowed"),
        ({"one": KNOWN, "other": KNOWN}, {"one": {"a": PRECISE}, "other": {"a": None}}, "Unknown", "Pending"),
        ({"one": KNOWN}, {}, "Unknown", "NoRouterReady"),
        ({"one": KNOWN, "plain": PLAIN}, {"one": {"a": PRECISE}}, "False", "NoTokenizer"),
        ({"off": KNOWN | {"engine": {"kvEvents": {"enabled": False}}}}, {}, "False", "EventsDisabled"),
    ],
)
def test_a_policy_knows_what_all_its_pools_know(make, pools, views, status, reason):
    found = policy_caches(make, pools, views)
    assert (found.status, found.reason) == (status, reason)


@pytest.mark.parametrize(
    ("pools", "prefix"),
    [
        ({"plain": PLAIN}, {}),
        ({"one": KNOWN}, {"source": "Approximate"}),
        ({"one": KNOWN}, {"enabled": False}),
    ],
)
def test_a_policy_that_asks_for_guesses_does_not_speak_of_it(make, pools, prefix):
    assert policy_caches(make, pools, {}, **prefix) is None


def test_a_policy_whose_pools_are_missing_has_nothing_to_say_of_caches(make):
    assert cacheview.of_policy(make.parse(make.policy(pools=["gone"])), {}) is None


def test_a_policy_that_asks_for_events_is_told_what_is_missing(make):
    found = policy_caches(make, {"plain": PLAIN}, {}, source="Events")
    assert (found.status, found.reason) == ("False", "NoTokenizer")
    assert "pool plain: " in found.message and "spec.model.tokenizer" in found.message


def test_guessing_does_not_make_a_policy_less_ready_and_is_forgotten_once_it_is_asked_for(make):
    policy = make.policy(prefix={})
    caches = cacheview.Finding("CacheKnown", "False", "NoTokenizer", "pool llama: …")

    def status(manifest, caches):
        parsed = make.parse(manifest)
        return routingpolicy.status(parsed, [], True, [], "2026-01-01T00:00:00Z", caches)

    told = status(policy, caches)
    types = [c["type"] for c in told["conditions"]]
    assert types == ["Accepted", "ResolvedRefs", "Conflicted", "Programmed", "CacheKnown", "Ready"]
    assert told["conditions"][-1] == status(policy, None)["conditions"][-1]
    again = status({**policy, "status": told}, None)
    assert "CacheKnown" not in [c["type"] for c in again["conditions"]]


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
