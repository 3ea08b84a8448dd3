"""One leader at a time: taking over, being overtaken, stopping in time. Clocks are turned by hand."""

import asyncio
import random

import pytest

from kvfleet_operator.api import NotLeader
from kvfleet_operator.lease import Lease, LeaseOptions

PATH = "/apis/coordination.k8s.io/v1/namespaces/default/leases/op"


class Time:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def candidate(api, time):
    def make(identity, **options):
        return Lease(api, LeaseOptions("op", "default", identity, **options), clock=time, rng=random.Random(1))

    return make


def holder(cluster):
    return cluster.get("Lease", "op")["spec"]["holderIdentity"]


async def test_the_first_one_creates_the_lease_and_leads(candidate, cluster):
    lease = candidate("a")
    await lease.acquire()
    assert lease.held
    lease.fence()
    spec = cluster.get("Lease", "op")["spec"]
    assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("a", 15, 0)


async def test_a_standby_gets_nothing_while_the_holder_renews(candidate, cluster, time):
    first, second = candidate("a"), candidate("b")
    await first.acquire()
    for _ in range(20):
        time.now += 5
        assert await first._try()
        assert not await second._try()
    with pytest.raises(NotLeader, match="b does not hold Lease default/op"):
        second.fence()


async def test_a_standby_takes_over_a_lease_it_has_seen_unchanged_for_its_duration(candidate, cluster, time):
    first, second = candidate("a"), candidate("b")
    await first.acquire()
    assert not await second._try()
    time.now += 14.9
    assert not await second._try()
    time.now += 0.2
    assert await second._try()
    assert second.held and not first.held
    spec = cluster.get("Lease", "op")["spec"]
    assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("b", 1)


async def test_a_newcomer_counts_from_when_it_looked_first_whatever_the_wall_clock_says(candidate, cluster, time):
    await candidate("a").acquire()
    time.now += 1_000_000  # the holder has been gone for long; the newcomer cannot know
    newcomer = candidate("b")
    assert not await newcomer._try()
    time.now += 15
    assert await newcomer._try()


async def test_the_holder_is_fenced_before_anybody_may_take_over(candidate, time):
    first = candidate("a")
    await first.acquire()
    time.now += 9.9
    first.fence()
    time.now += 0.2
    with pytest.raises(NotLeader):
        first.fence()
    options = LeaseOptions("op", "default", "a")
    assert options.deadline_s + options.write_timeout_s < options.duration_s


async def test_of_two_that_take_over_at_once_one_wins(candidate, cluster, time):
    await candidate("old").acquire()
    rivals = [candidate("a"), candidate("b")]
    assert await asyncio.gather(*(rival._try() for rival in rivals)) == [False, False]
    time.now += 16
    won = await asyncio.gather(*(rival._try() for rival in rivals))
    assert sorted(won) == [False, True]
    assert holder(cluster) == ("a" if won[0] else "b")


async def test_a_released_lease_is_taken_over_at_once(candidate, cluster):
    first, second = candidate("a"), candidate("b")
    await first.acquire()
    await first.release()
    assert holder(cluster) == "" and not first.held
    assert await second._try()


async def test_releasing_leaves_a_successors_lease_alone(candidate, cluster, time):
    first, second = candidate("a"), candidate("b")
    await first.acquire()
    await second._try()
    time.now += 16
    assert await second._try()
    first._renewed_at = time.now  # as if it had not noticed
    await first.release()
    assert holder(cluster) == "b"


async def test_keeping_ends_when_the_api_server_is_away_for_too_long(candidate, cluster, time):
    lease = candidate("a", retry_s=0.001)
    await lease.acquire()
    keeping = asyncio.create_task(lease.keep())
    cluster[f"get {PATH}"] << 503
    time.now += 9
    assert lease.held and not keeping.done()
    time.now += 2
    await asyncio.wait_for(keeping, 5)
    assert not lease.held


async def test_keeping_survives_failures_shorter_than_the_deadline(candidate, cluster, time):
    lease = candidate("a", retry_s=0.001)
    await lease.acquire()
    outage = cluster[f"get {PATH}"][:3] << 503
    keeping = asyncio.create_task(lease.keep())
    time.now += 9
    await cluster.until(
        lambda: cluster.get("Lease", "op")["spec"].get("leaseTransitions") == 0 and len(cluster["put"]) >= 2
    )
    assert outage and lease.held and not keeping.done()
    keeping.cancel()


async def test_keeping_ends_when_somebody_else_has_taken_the_lease(candidate, cluster):
    lease = candidate("a", retry_s=0.001)
    await lease.acquire()
    keeping = asyncio.create_task(lease.keep())
    cluster.edit("Lease", "op", lambda found: found["spec"].update(holderIdentity="usurper"))
    await asyncio.wait_for(keeping, 5)
    assert not lease.held
    assert holder(cluster) == "usurper"


@pytest.mark.parametrize("times", [(10, 10, 2), (15, 1, 2), (5, 10, 2)])
def test_times_that_cannot_work_are_refused(times):
    with pytest.raises(ValueError, match="retry_s < deadline_s < duration_s"):
        LeaseOptions("op", "default", "a", *times)
