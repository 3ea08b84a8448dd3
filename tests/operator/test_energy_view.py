"""What routers say of a pool's energy: from their reports into conditions, the pool's status and the profile's estimates."""

from dataclasses import replace

import pytest

from kvfleet_operator.controller import Controller
from kvfleet_operator.reconcile import acceleratorprofile, energyview, modelpool
from kvfleet_operator.reconcile.energyview import EnergyView, Learned, PoolEnergy
from kvfleet_operator.reconcile.plan import Applied
from kvfleet_operator.reconcile.routingpolicy import Loaded
from kvfleet_operator.world import World

NOW = "2026-01-01T00:00:00Z"
LATER = "2026-01-02T00:00:00Z"
STEP = Learned(3.1234, 0.21)
MEASURED = EnergyView("Measured", True, "50 intervals", 0.031, 50, {"StepEnergy": STEP})
LEARNING = EnergyView("Learning", True)
STALE = EnergyView("Stale", False, "telemetry of 2 of 3 workers is stale", 0.031, 50, {"StepEnergy": STEP})
DOUBTFUL = EnergyView("LowConfidence", False, "off by 40%", 0.4, 50, {"StepEnergy": STEP})


def with_step(value=STEP.value, error=STEP.standard_error, intervals=50):
    return replace(MEASURED, intervals=intervals, estimates={"StepEnergy": Learned(value, error)})


@pytest.mark.parametrize(
    ("replicas", "status", "reason"),
    [
        ({}, "Unknown", "NoRouterReady"),
        ({"a": None}, "Unknown", "Pending"),
        ({"a": MEASURED, "b": None}, "Unknown", "Pending"),
        ({"a": STALE, "b": None}, "False", "Stale"),
        ({"a": MEASURED, "b": MEASURED}, "True", "Measured"),
        ({"a": MEASURED, "b": LEARNING}, "True", "Learning"),
        ({"a": EnergyView("Profile", True)}, "True", "Profile"),
        ({"a": DOUBTFUL, "b": STALE, "c": MEASURED}, "False", "Stale"),
    ],
)
def test_every_replica_has_to_trust_it(replicas, status, reason):
    finding = energyview.finding(replicas)
    assert (finding.type, finding.status, finding.reason) == ("EnergyTrusted", status, reason)


def test_who_does_not_trust_it_and_why_is_told():
    message = energyview.finding({"a": MEASURED, "b": STALE}).message
    assert message == "Joules do not steer requests. b: telemetry of 2 of 3 workers is stale"


@pytest.mark.parametrize(
    ("after", "news"),
    [
        (with_step(3.1234 * 1.04), False),
        (with_step(3.1234 * 1.06), True),
        (with_step(3.1234 * 0.94), True),
        (with_step(error=0.11), False),
        (with_step(error=0.1), True),
        (with_step(error=0.43), True),
        (with_step(intervals=99), False),
        (with_step(intervals=101), True),
        (with_step(intervals=0), True),
        (replace(MEASURED, message="51 intervals", error=0.05), False),
        (STALE, True),
        (replace(MEASURED, estimates={}), True),
    ],
)
def test_only_what_moved_noticeably_is_news(after, news):
    assert energyview.moved(MEASURED, after) is news
    assert energyview.steady({"p": MEASURED}, {"p": after}) == {"p": after if news else MEASURED}


def reported(make, views, status=None):
    pool = make.parse({**make.pool(), "status": status})
    given = modelpool.PoolInput(pool, None, energy_views=views)
    return modelpool.status(given, Applied([], {}), NOW)


def test_a_pool_tells_what_was_learned_rounded_to_what_is_known(make):
    status = reported(make, {"a": MEASURED, "b": with_step(9.0, intervals=8), "c": None})
    coefficient = {
        "coefficient": "StepEnergy",
        "valueMicrounits": 3_120_000,
        "standardErrorMicrounits": 210_000,
    }
    assert status["energy"] == {
        "source": "Measured",
        "errorPercent": 3,
        "samples": 50,
        "coefficients": [coefficient],
    }


def test_a_status_is_kept_while_nothing_noticeable_is_new_or_nobody_speaks(make):
    before = reported(make, {"a": MEASURED})
    assert reported(make, {"a": with_step(3.2)}, before)["energy"] == before["energy"]
    assert reported(make, {"a": None}, before)["energy"] == before["energy"]
    assert reported(make, {"a": with_step(3.4)}, before)["energy"] != before["energy"]
    assert reported(make, {"a": STALE}, before)["energy"]["source"] == "Stale"


def test_without_telemetry_nothing_is_said_and_what_was_said_goes(make):
    before = reported(make, {"a": MEASURED})
    assert any(condition["type"] == "EnergyTrusted" for condition in before["conditions"])
    after = reported(make, None, before)
    assert after["energy"] is None
    assert all(condition["type"] != "EnergyTrusted" for condition in after["conditions"])


def test_a_pool_whose_joules_are_not_believed_is_not_less_ready(make):
    def ready(views):
        return [c for c in reported(make, views)["conditions"] if c["type"] == "Ready"]

    assert ready({"a": STALE}) == ready({"a": MEASURED}) == ready(None)


def test_the_world_tells_what_routers_with_telemetry_said(make):
    world = World()
    manifests = [make.router(telemetry={}), make.router_pod("a"), make.router_pod("b", "10.0.0.2"), make.router("bare")]
    manifests += [make.router_pod("c", "10.0.0.3", router="bare"), make.pool()]
    for version, manifest in enumerate(manifests):
        manifest["metadata"] |= {"uid": manifest["metadata"]["name"], "resourceVersion": str(version + 1)}
        world.put(manifest)
    world.reports["default", "a"] = Loaded("abc", energy={"llama": MEASURED})
    pool = make.parse(make.pool())
    assert world.energy_views(pool) == {"a": MEASURED, "b": None}
    source = "meta-llama/Llama-3.1-8B-Instruct"
    assert world.pool_energies("h100") == [PoolEnergy("default/llama", source, 1, MEASURED)]
    assert world.pool_energies("a100") == []
    world.remove(manifests[0])
    assert world.energy_views(pool) is None


# The profile's estimates


def estimates(make, *pools, before=(), namespaces=None, now=NOW):
    profile = make.parse({**make.profile(), "status": {"estimates": list(before)}})
    return acceleratorprofile.status(profile, [], namespaces, now, pools)["estimates"]


def learned_by(pool="default/a", value=3.0, intervals=50, tensor_parallel=1, model="m"):
    return PoolEnergy(pool, model, tensor_parallel, with_step(value, intervals=intervals))


def test_the_pool_that_learned_most_speaks_for_its_model(make):
    found = estimates(
        make,
        learned_by("default/a", 3.0, 20),
        learned_by("default/b", 4.0, 80),
        learned_by("default/c", 7.0, 10, tensor_parallel=2),
        learned_by("default/d", 9.0, 0, model="unmeasured"),
    )
    assert [(e["tensorParallel"], e["pool"], e["valueMicrounits"], e["samples"]) for e in found] == [
        (1, "default/b", 4_000_000, 80),
        (2, "default/c", 7_000_000, 10),
    ]
    assert {e["lastUpdateTime"] for e in found} == {NOW}


@pytest.mark.parametrize(
    ("pool", "replaced"),
    [
        (learned_by(value=3.1, intervals=60), False),  # nothing noticeable
        (learned_by(value=4.0, intervals=60), True),
        (learned_by(value=4.0, intervals=49), False),  # a router that begins anew
        (learned_by(value=3.0, intervals=101), True),
    ],
)
def test_what_was_learned_is_replaced_by_what_is_as_well_founded(make, pool, replaced):
    before = estimates(make, learned_by())
    (after,) = estimates(make, pool, before=before, now=LATER)
    assert (after != before[0], after["lastUpdateTime"] == LATER) == (replaced, replaced)


def test_routers_forget_so_the_past_does_not_outweigh_the_present_for_ever(make):
    before = estimates(make, learned_by(intervals=100_000))
    (after,) = estimates(make, learned_by(value=4.0, intervals=200), before=before)
    assert after["valueMicrounits"] == 4_000_000


def test_what_was_learned_outlives_the_pool_and_is_another_operators_matter_in_other_namespaces(make):
    before = estimates(make, learned_by("elsewhere/a"))
    assert estimates(make, before=before) == before
    better = learned_by("default/a", 4.0, 100)
    assert estimates(make, better, before=before, namespaces={"default"}) == before
    assert estimates(make, better, before=before)[0]["pool"] == "default/a"


def test_a_new_report_brings_pools_and_profiles_with_telemetry_up(make):
    world = World()
    metered = make.pool(metadata={"namespace": "metered"})
    router = make.router(telemetry={}, metadata={"namespace": "metered"})
    for number, manifest in enumerate([make.pool(), metered, router]):
        manifest["metadata"] |= {"uid": str(number), "resourceVersion": str(number + 1)}
        world.put(manifest)
    added = []
    controller = object.__new__(Controller)
    controller._world = world
    controller._queue = type("Queue", (), {"add": staticmethod(added.append)})()
    for namespace in ("default", "metered"):
        controller.routers_reported(namespace)
    brought_up = [(key.kind, key.namespace) for key in added if key.kind in ("ModelPool", "AcceleratorProfile")]
    assert brought_up == [("ModelPool", "metered"), ("AcceleratorProfile", None)]
