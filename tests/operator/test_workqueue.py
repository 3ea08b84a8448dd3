"""The keyed queue: one worker a key, bursts gathered, failures later, changes at once."""

import asyncio
import random

import pytest

from kvfleet_operator.workqueue import LAST_RETRY_S, WorkQueue


class Clock:
    """A loop's clock that jumps to the next timer instead of waiting for it."""

    def __init__(self, loop):
        self.now = 0.0
        loop.time = lambda: self.now
        select = loop._selector.select

        def jump(timeout=None):
            if timeout:
                self.now += timeout
            return select(0 if timeout is not None else None)

        loop._selector.select = jump


@pytest.fixture
async def clock():
    return Clock(asyncio.get_running_loop())


@pytest.fixture
def queue(clock):
    return WorkQueue(debounce_s=0.1, rng=random.Random(1))


async def test_a_burst_is_handled_once_after_the_debounce(queue, clock):
    for _ in range(5):
        queue.add("a")
    assert await queue.get() == "a"
    assert clock.now == pytest.approx(0.1)
    queue.done("a")
    assert queue.idle


async def test_keys_come_in_the_order_in_which_they_are_due(queue):
    queue.add("late", 5)
    queue.add("soon", 1)
    queue.add("now", 0)
    assert [await queue.get() for _ in range(3)] == ["now", "soon", "late"]


async def test_adding_a_waiting_key_can_bring_it_forward_but_never_back(queue, clock):
    queue.add("a", 100)
    queue.add("a", 1)
    queue.add("a", 50)
    assert await queue.get() == "a"
    assert clock.now == pytest.approx(1)
    queue.done("a")
    assert len(queue) == 0


async def test_a_key_in_work_comes_back_only_when_it_is_done(queue):
    queue.add("a", 0)
    assert await queue.get() == "a"
    queue.add("a", 0)
    other = asyncio.create_task(queue.get())
    queue.add("b", 0)
    assert await other == "b"
    queue.done("a")
    assert await queue.get() == "a"


async def test_failures_wait_longer_and_longer_up_to_a_bound(queue, clock):
    queue.add("a", 0)
    waits = []
    for _ in range(15):
        before = clock.now
        await queue.get()
        waits.append(clock.now - before)
        queue.done("a", failed=True)
    assert waits[1] < waits[3] < waits[6]
    assert max(waits) <= LAST_RETRY_S * 1.25
    assert min(waits[12:]) >= LAST_RETRY_S * 0.75


async def test_success_ends_the_back_off(queue, clock):
    queue.add("a", 0)
    for _ in range(8):
        await queue.get()
        queue.done("a", failed=True)
    await queue.get()
    queue.done("a")
    queue.add("a", 0)
    await queue.get()
    queue.done("a", failed=True)
    before = clock.now
    await queue.get()
    assert clock.now - before < 1


async def test_a_failed_key_that_changed_meanwhile_is_tried_at_once(queue, clock):
    queue.add("a", 0)
    for _ in range(8):
        await queue.get()
        queue.done("a", failed=True)
    await queue.get()
    queue.add("a")
    before = clock.now
    queue.done("a", failed=True)
    await queue.get()
    assert clock.now - before == pytest.approx(0.1)


async def test_several_workers_share_the_keys_and_none_is_lost(queue):
    handled = []

    async def work():
        while True:
            key = await queue.get()
            handled.append(key)
            await asyncio.sleep(1)
            queue.done(key)
            if len(handled) == 20:
                finished.set()

    finished = asyncio.Event()
    workers = [asyncio.create_task(work()) for _ in range(4)]
    for key in range(20):
        queue.add(key)
    await finished.wait()
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    assert sorted(handled) == list(range(20))
