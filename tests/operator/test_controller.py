"""What a reconciliation leaves to be looked at again."""

from datetime import UTC, datetime

from kvfleet_operator.apply import Applier
from kvfleet_operator.controller import Controller
from kvfleet_operator.reconcile.dependents import Key
from kvfleet_operator.statuses import StatusWriter
from kvfleet_operator.workqueue import WorkQueue
from kvfleet_operator.world import World

FOREIGN = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "llama-workers"}, "spec": {"ports": []}}


async def worked_off(controller, queue, key):
    """Reconciles the key for as long as it comes back; False where it does not stop to."""
    queue.add(key)
    for _ in range(6):
        if not len(queue):
            return True
        assert await queue.get() == key
        await controller.reconcile(key)
        queue.done(key)
    return False


async def test_what_was_refused_is_tried_again_by_itself(cluster, api, make, metrics):
    world, queue = World(), WorkQueue(debounce_s=0.0)
    for manifest in (cluster.put(make.profile()), cluster.put(make.pool())):
        world.put(manifest)
    controller = Controller(
        world, queue, Applier(api, world), StatusWriter(api, world, instance="i"), metrics,
        now=lambda: datetime(2026, 1, 1, tzinfo=UTC), refused_s=0.0,
    )  # fmt: skip
    key = Key("ModelPool", "default", "llama")
    cluster.put(FOREIGN)
    assert not await worked_off(controller, queue, key)
    cluster.remove("Service", "llama-workers")
    assert await worked_off(controller, queue, key)
    assert cluster.get("Service", "llama-workers")["metadata"]["ownerReferences"]
