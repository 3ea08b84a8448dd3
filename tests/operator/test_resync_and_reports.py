"""What watches missed, and what the router replicas say: both end up in the world."""

import asyncio
import json

import httpx
import pytest

from kvfleet_operator.api import ApiError
from kvfleet_operator.reconcile.dependents import Key
from kvfleet_operator.reconcile.routingpolicy import Loaded
from kvfleet_operator.reports import MAX_BYTES, Reports
from kvfleet_operator.resources import POOL, WATCHED
from kvfleet_operator.resync import Resync
from kvfleet_operator.world import World

KEY = Key("ModelPool", "default", "llama")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def world():
    return World()


@pytest.fixture
def resync(api, world, metrics, clock):
    return Resync(api, world, metrics, namespaces=None, period_s=60, grace_s=0, retry_s=0.001, clock=clock)


def missed(metrics, kind="ModelPool"):
    return metrics.registry.get_sample_value("kvfleet_operator_watch_missed_events_total", {"kind": kind})


async def test_the_first_listing_takes_over_everything(resync, world, cluster, make):
    cluster.put(make.profile())
    cluster.put(make.pool())
    await resync.first()
    assert world.get(KEY) and world.profile("h100")
    assert set(resync.ages()) == {resource.kind for resource in WATCHED}


async def test_the_first_listing_waits_for_the_crds(resync, world, cluster, make):
    path = "/apis/kvfleet.io/v1alpha1/modelpools"
    cluster[f"get {path}"][:3] << 404
    cluster.put(make.pool())
    await asyncio.wait_for(resync.first(), 10)
    assert len(cluster[path]) == 4
    assert world.get(KEY)


async def test_a_missing_optional_kind_is_nothing_to_wait_for(resync, cluster):
    del cluster.resources["leaderworkerset.x-k8s.io/v1/leaderworkersets"]
    await asyncio.wait_for(resync.first(), 5)


async def test_a_listing_that_is_forbidden_ends_the_start(resync, cluster):
    cluster["get /apis/kvfleet.io/v1alpha1/modelpools"] << 403
    with pytest.raises(ApiError):
        await resync.first()


async def test_only_what_we_made_is_listed_of_shared_kinds(resync, world, cluster, make):
    theirs = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "theirs"}, "spec": {}}
    cluster.put(theirs)
    cluster.put(make.router_pod())
    await resync.first()
    assert world.get(Key("Service", "default", "theirs")) is None
    assert world.keys("Pod") == [Key("Pod", "default", "router-0")]


async def test_a_change_the_watch_did_not_deliver_is_taken_over_and_counted(
    resync, world, cluster, metrics, make, clock
):
    cluster.put(make.pool(replicas=1))
    await resync.first()
    cluster.edit("ModelPool", "llama", lambda found: found["spec"].update(replicas=5))
    clock.now = 50
    assert await resync.check(POOL) == 1
    assert world.parsed(KEY).spec.replicas == 5
    assert missed(metrics) == 1
    assert resync.ages()["ModelPool"] == 50  # not proven fresh
    assert await resync.check(POOL) == 0
    assert resync.ages()["ModelPool"] == 0


async def test_a_deletion_the_watch_did_not_deliver_is_found(resync, world, cluster, metrics, make):
    cluster.put(make.pool())
    await resync.first()
    cluster.remove("ModelPool", "llama")
    assert await resync.check(POOL) == 1
    assert world.get(KEY) is None
    assert missed(metrics) == 1


async def test_an_event_that_is_merely_on_its_way_is_not_missed(api, world, cluster, metrics, make):
    resync = Resync(api, world, metrics, namespaces=None, period_s=60, grace_s=0.05)
    cluster.put(make.pool(replicas=1))
    await resync.first()
    checking = asyncio.create_task(resync.check(POOL))
    world.put(cluster.edit("ModelPool", "llama", lambda found: found["spec"].update(replicas=5)))
    assert await checking == 0
    assert missed(metrics) is None


async def test_ages_grow_until_an_event_arrives(resync, metrics, clock):
    resync.seen("ModelPool")
    clock.now = 7
    read = metrics.registry.get_sample_value
    assert read("kvfleet_operator_watch_age_seconds", {"kind": "ModelPool"}) == 7
    resync.seen("ModelPool")
    assert read("kvfleet_operator_watch_age_seconds", {"kind": "ModelPool"}) == 0


async def test_a_resync_goes_on_after_the_api_server_was_away(api, world, cluster, metrics, make):
    resync = Resync(api, world, metrics, namespaces={"default"}, period_s=0.001, grace_s=0)
    cluster.put(make.pool())
    turns = []
    done = asyncio.Event()

    def after():
        turns.append(world.get(KEY) is not None)
        if turns[-1]:
            done.set()

    cluster["get /apis/kvfleet.io/v1alpha1/namespaces/default/modelpools"][:2] << 500
    running = asyncio.create_task(resync.run(after))
    await asyncio.wait_for(done.wait(), 10)
    running.cancel()
    assert turns[0] is False


# Reports


@pytest.fixture
def fleet(world, make):
    """A router with two ready replicas, in the world; its wanted revision."""
    for version, manifest in enumerate(
        [make.router(), make.router_pod("a", "10.0.0.1"), make.router_pod("b", "fd00::1")]
    ):
        manifest["metadata"] |= {"uid": manifest["metadata"]["name"], "resourceVersion": str(version + 1)}
        world.put(manifest)
    router = make.parse(make.router())
    return world.fleet("default", router).config.revision


@pytest.fixture
def reports(world, clock):
    """Reports whose replicas are answered for by `reports.answers`: host → (status, text) or an exception."""
    answers, asked, told = {}, [], []

    def answer(request):
        asked.append(str(request.url))
        status, text = answers.get(request.url.host, (200, ""))
        return httpx.Response(status, text=text)

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    found = Reports(world, told.append, client=client, clock=clock)
    found.answers, found.asked, found.told = answers, asked, told
    return found


def says(revision, policies=None, refused=None):
    return 200, json.dumps({"revision": revision, "policies": policies or {}, "refused": refused})


async def test_replicas_are_asked_at_their_admin_port_and_believed(reports, world, fleet):
    policies = {"chat": {"generation": 3, "revision": "c4a7"}}
    reports.answers |= {"10.0.0.1": says(fleet, policies), "fd00::1": says("0ff", refused="strategy")}
    await reports.poll()
    assert sorted(reports.asked) == ["http://10.0.0.1:9090/loaded", "http://[fd00::1]:9090/loaded"]
    assert world.reports == {
        ("default", "a"): Loaded(fleet, {"chat": "c4a7"}), ("default", "b"): Loaded("0ff", {}, "strategy"),
    }  # fmt: skip
    assert reports.told == ["default", "default"]


async def test_what_replicas_know_the_caches_by_is_taken_over_and_asked_again_while_they_load(reports, world, fleet):
    known = {"mode": "Precise", "reason": "EventsFollowed", "message": "2 of 2"}
    loading = {"mode": "Approximate", "reason": "Loading", "message": ""}
    reports.answers |= {
        "10.0.0.1": (200, json.dumps({"revision": fleet, "policies": {}, "refused": None, "pools": {"llama": known}})),
        "fd00::1": (200, json.dumps({"revision": fleet, "policies": {}, "refused": None, "pools": {"llama": loading}})),
    }
    await reports.poll()
    assert world.reports["default", "a"].pools["llama"].mode == "Precise"
    reports.asked.clear()
    await reports.poll()
    assert reports.asked == ["http://[fd00::1]:9090/loaded"]


async def test_only_who_is_behind_is_asked_eagerly(reports, fleet, clock):
    reports.answers |= {"10.0.0.1": says(fleet), "fd00::1": says("0ff")}
    await reports.poll()
    reports.asked.clear()
    await reports.poll()
    assert reports.asked == ["http://[fd00::1]:9090/loaded"]
    reports.asked.clear()
    clock.now += 31
    await reports.poll()
    assert len(reports.asked) == 2
    assert reports.told == ["default", "default"]  # nothing new since


def energy(step_joules, **more):
    estimates = {"StepEnergy": {"value": step_joules, "standard_error": 0.1}}
    return {"source": "Measured", "trusted": True, "error": 0.03, "intervals": 50, "estimates": estimates, **more}


def says_of(revision, **energies):
    view = {"mode": "Approximate", "reason": "NoTokenizer"}
    pools = {name: {**view, "energy": told} for name, told in energies.items()}
    return 200, json.dumps({"revision": revision, "policies": {}, "refused": None, "pools": pools})


async def test_coefficients_are_news_only_when_they_move_noticeably(reports, world, fleet, clock):
    for step_joules in (3.0, 3.1, 3.05, 3.2, 3.3):  # 5 % of 3.0 are 0.15
        reports.answers |= {"10.0.0.1": says_of(fleet, llama=energy(step_joules)), "fd00::1": (500, "")}
        await reports.poll()
        clock.now += 31
    assert world.reports["default", "a"].energy["llama"].estimates["StepEnergy"].value == 3.2
    assert reports.told == ["default"] * 2


@pytest.mark.parametrize("told", [1, {}, energy(3.0, source="Guessed"), energy(3.0, intervals=-1), energy(None)])
async def test_energy_that_makes_no_sense_costs_nothing_but_itself(reports, world, fleet, told):
    reports.answers |= {"10.0.0.1": says_of(fleet, llama=energy(3.0), other=told)}
    await reports.poll()
    found = world.reports["default", "a"]
    assert (found.revision, set(found.energy), set(found.pools)) == (fleet, {"llama"}, {"llama", "other"})


@pytest.mark.parametrize(
    "answer",
    [
        (500, "x"),
        (404, says("abc")[1]),
        (200, "{}"),
        (200, says("not hex")[1]),
        (200, says("abc", {"chat": {"revision": "not hex"}})[1]),
        (200, says("abc", {"chat": 1})[1]),
        (200, says("abc")[1].replace("}", ', "pools": {"p": {"mode": "Sure", "reason": "x"}}}')),
        (200, says("abc", refused="x" * 1001)[1]),
        (200, " " * (MAX_BYTES + 1) + says("abc")[1]),
        (200, "\xff\x00"),
        (200, "[" * 100_000),
    ],
)
async def test_what_is_no_report_is_not_believed(reports, world, fleet, answer):
    reports.answers |= {"10.0.0.1": answer, "fd00::1": answer}
    await reports.poll()
    assert world.reports == {}
    assert reports.told == []


async def test_a_replica_that_does_not_answer_fails_nothing(world, fleet, clock):
    def refuse(request):
        raise httpx.ConnectError("refused")

    reports = Reports(world, print, client=httpx.AsyncClient(transport=httpx.MockTransport(refuse)), clock=clock)
    await reports.poll()
    assert world.reports == {}
