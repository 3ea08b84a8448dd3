"""A dry run decides as a request that is sent would be decided, and leaves everything as it was."""

import pytest
from routing_fleet import Fleet, config, policy, pool, request

from kvfleet_api.fleetrouter import TelemetrySpec
from kvfleet_api.routingpolicy import AdmissionSpec, DeferSpec
from kvfleet_router.core.deferral import DEFER_HEADER
from kvfleet_router.policies import REGISTRY


@pytest.mark.parametrize("strategy", sorted(REGISTRY))
def test_it_is_the_decision_that_follows(strategy):
    fleet = Fleet(workers=4, strategy=strategy)
    for n in range(6):
        fleet.answer(fleet.sent(request(2000, prefix=n % 2)))
    fleet.sent(request(9000))
    told = fleet.dispatcher.dry_run(request(2000, prefix=1))
    sent = fleet.sent(request(2000, prefix=1))
    record = fleet.dispatcher.decisions.get(sent.id)
    assert told["would"] == "send"
    if strategy not in ("random", "power_of_two"):  # those draw their candidates
        costs = {one["worker"]: one["cost"] for one in told["tries"][0]["candidates"]}
        assert costs == {one["worker"]: one["cost"] for one in record["tries"][0]["candidates"]}


def test_it_leaves_no_trace():
    fleet = Fleet(workers=2)
    fleet.sent(request(5000))
    before = (fleet.dispatcher.replicas.loads(), fleet.dispatcher.indexed_blocks, fleet.dispatcher.decisions.recent(9))
    for n in range(20):
        fleet.dispatcher.dry_run(request(3000, prefix=n))
    assert (
        fleet.dispatcher.replicas.loads(),
        fleet.dispatcher.indexed_blocks,
        fleet.dispatcher.decisions.recent(9),
    ) == before


def test_it_says_that_the_request_would_wait():
    fleet = Fleet(workers=1)
    fleet.sent(request(60_000))
    told = fleet.dispatcher.dry_run(request(1000, prefix=1))
    assert told["would"] == "hold"
    assert "backlog" in told["why"]
    fleet.held(request(1000, prefix=2))
    assert "1 others wait" in fleet.dispatcher.dry_run(request(1000, prefix=3))["why"]
    full = Fleet(workers=1, admission=AdmissionSpec.model_validate({"maxInFlightPerWorker": 1}))
    full.sent(request(100))
    assert "no worker may have it now" in full.dispatcher.dry_run(request(100))["why"]


def test_it_tells_the_first_half_of_what_would_be_divided():
    pools = [pool("prefill", 1, role="Prefill"), pool("decode", 1, role="Decode")]
    fleet = Fleet(config(policy(pools=("prefill", "decode")), pools=pools))
    (made,) = fleet.dispatcher.dry_run(request(4000))["tries"]
    assert (made["phase"], made["worker"]) == ("prefill", "prefill-0")


def test_it_says_that_the_request_would_be_kept_for_later():
    telemetry = {"carbonByHour": [{"hour": 0, "gramsPerKilowattHour": 400}, {"hour": 3, "gramsPerKilowattHour": 100}]}
    defer = DeferSpec.model_validate({"maxSeconds": 86400, "maxRequests": 1})
    fleet = Fleet(config(policy(defer=defer)).model_copy(update={"telemetry": TelemetrySpec.model_validate(telemetry)}))

    def told(seconds):
        return fleet.dispatcher.dry_run(request(200, headers={DEFER_HEADER: seconds}))

    late = told(b"21600")
    assert (late["would"], late["why"]) == (
        "keep",
        "it may begin up to 21600 s from now: it would be kept for a cheaper time",
    )
    assert len(late["tries"]) == 1  # where it would go if it went now
    assert told(b"3600")["would"] == "send"  # no hour until then is cheaper
    assert told(b"soon")["would"] == "refuse"
    assert fleet.dispatcher.deferral.kept == {}
    fleet.held(request(200, headers={DEFER_HEADER: b"21600"}))
    assert told(b"21600")["would"] == "send"  # there is no place


def test_a_refusal_is_told():
    fleet = Fleet()
    assert fleet.dispatcher.dry_run(request(model="x"))["would"] == "refuse"
    assert fleet.dispatcher.decisions.recent(9) == []
