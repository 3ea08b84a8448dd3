"""Publishers over real sockets: heard, asked again, restarted, gone, hostile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import zmq
import zmq.asyncio

from kvfleet_router.core.kvevents.stream import Counts, Stream
from kvfleet_router.io.kvevents.feed import BUDGET_S, END_OF_REPLAY, Feed, Turns

TIMEOUT_S = 20.0


class Cache:
    def __init__(self) -> None:
        self.applied: list[bytes] = []
        self.changed = asyncio.Event()

    def apply(self, payload: bytes) -> bool:
        self.applied.append(payload)
        self.changed.set()
        return False

    def reset(self) -> None:
        self.applied = []
        self.changed.set()


class Publisher:
    """A PUB and a ROUTER that answer as recorded from vLLM: empty frame, topic, number, payload, and an end mark."""

    def __init__(
        self, events_port: int = 0, replay_port: int = 0, *, with_topic: bool = True, time_s: float = 1000.0
    ) -> None:
        self.context = zmq.asyncio.Context()
        self.events = self.context.socket(zmq.PUB)
        self.router = self.context.socket(zmq.ROUTER)
        self.events.bind(f"tcp://127.0.0.1:{events_port or '*'}")
        self.router.bind(f"tcp://127.0.0.1:{replay_port or '*'}")
        self.url, self.replay_url = (
            socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in (self.events, self.router)
        )
        self.batches: list[bytes] = []
        self.with_topic = with_topic
        self.time_s = time_s
        self.asked = 0
        self.serving = asyncio.create_task(self._serve())

    @property
    def ports(self) -> tuple[int, int]:
        return int(self.url.rpartition(":")[2]), int(self.replay_url.rpartition(":")[2])

    async def publish(self, *, lose: bool = False) -> None:
        self.time_s += 1.0
        payload = msgspec.msgpack.encode([self.time_s, [], len(self.batches)])
        self.batches.append(payload)
        if not lose:
            await self.events.send_multipart((b"kv@x", (len(self.batches) - 1).to_bytes(8, "big"), payload))

    async def _serve(self) -> None:
        while True:
            client, _, first = await self.router.recv_multipart()
            self.asked += 1
            topic = (b"kv@x",) if self.with_topic else ()
            for number in range(int.from_bytes(first, "big"), len(self.batches)):
                await self.router.send_multipart((client, b"", *topic, number.to_bytes(8, "big"), self.batches[number]))
            await self.router.send_multipart((client, b"", *((b"",) if self.with_topic else ()), END_OF_REPLAY, b""))

    async def close(self) -> None:
        self.serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.serving
        self.context.destroy(linger=0)


@asynccontextmanager
async def following(
    publisher: Publisher, *, replay: bool = True
) -> AsyncIterator[tuple[Stream, Cache, list[None], Counts]]:
    cache, counts, malformed = Cache(), Counts(), []
    stream = Stream(cache, counts, can_replay=replay)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    feed = Feed(
        context,
        Turns(),
        stream,
        publisher.url,
        publisher.replay_url if replay else None,
        lambda: malformed.append(None),
    )
    try:
        yield stream, cache, malformed, counts
    finally:
        feed.close()
        context.destroy(linger=0)


async def until(cache: Cache, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            cache.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(cache.changed.wait(), 0.05)


async def heard(publisher: Publisher, cache: Cache) -> None:
    """A subscription takes effect some time after it was made: publish until a batch comes without having been asked for."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            asked = publisher.asked
            await publisher.publish()
            deadline = asyncio.get_running_loop().time() + 0.1
            while cache.applied != publisher.batches and asyncio.get_running_loop().time() < deadline:
                cache.changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(cache.changed.wait(), 0.02)
            if cache.applied == publisher.batches and publisher.asked == asked:
                return


@pytest.mark.parametrize("with_topic", [True, False])
async def test_batches_from_before_are_asked_for_and_new_ones_heard(with_topic: bool) -> None:
    publisher = Publisher(with_topic=with_topic)
    try:
        for _ in range(3):
            await publisher.publish()
        async with following(publisher) as (stream, cache, malformed, _):
            await until(cache, lambda: stream.begun and cache.applied == publisher.batches)
            await heard(publisher, cache)
            assert stream.complete
            assert not malformed
    finally:
        await publisher.close()


async def test_a_batch_that_is_lost_is_asked_for() -> None:
    publisher = Publisher()
    try:
        async with following(publisher) as (stream, cache, _, counts):
            await heard(publisher, cache)
            gaps = counts.gaps
            await publisher.publish(lose=True)
            await publisher.publish()
            await until(cache, lambda: cache.applied == publisher.batches)
            assert counts.gaps == gaps + 1
            assert counts.resets == 0
            assert stream.complete
    finally:
        await publisher.close()


async def test_an_engine_restarted_at_the_same_address_is_found() -> None:
    first = Publisher()
    second: Publisher | None = None
    try:
        async with following(first) as (stream, cache, _, counts):
            await heard(first, cache)
            await first.close()
            second = Publisher(*first.ports, time_s=5000.0)
            while len(second.batches) < len(cache.applied):  # it has reached the number that is expected next
                await second.publish(lose=True)
            await until(cache, lambda: cache.applied == second.batches)
            assert counts.restarts == 1
            assert stream.complete
    finally:
        if second is not None:
            await second.close()


async def test_without_replays_what_is_heard_counts_and_is_known_to_be_partial() -> None:
    publisher = Publisher()
    try:
        await publisher.publish()
        async with following(publisher, replay=False) as (stream, cache, _, _counts):
            async with asyncio.timeout(TIMEOUT_S):
                while not cache.applied:
                    await publisher.publish()
                    await asyncio.sleep(0.01)
            assert stream.begun
            assert not stream.complete
    finally:
        await publisher.close()


async def test_frames_that_are_no_batch_are_counted() -> None:
    publisher = Publisher()
    try:
        async with following(publisher) as (stream, cache, malformed, _):
            await heard(publisher, cache)
            for frames in (
                [b"one"],
                [b"", b"short", b"x"],
                [b"", bytes(8), b"x", b"too many"],
                [b"", b"\xfe" * 8, b"\xc1"],
            ):
                await publisher.events.send_multipart(frames)
            await until(cache, lambda: len(malformed) >= 3)
            await heard(publisher, cache)
            assert stream.begun
    finally:
        await publisher.close()


async def test_a_feed_with_much_to_tell_lets_the_others_have_their_turn() -> None:
    turns = Turns()
    told: list[str] = []
    done = asyncio.Event()

    def endless() -> bool:
        told.append("endless")
        return not done.is_set()

    def short() -> bool:
        told.append("short")
        if told.count("short") == 3:
            done.set()
        return True

    def failing() -> bool:
        raise RuntimeError("this reader fails")

    failures: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(str(context["exception"])))
    for read in (endless, failing, short):
        turns.want(read)
        turns.want(read)  # said twice: counts once
    async with asyncio.timeout(TIMEOUT_S):
        await done.wait()
    assert told[:6] == ["endless", "short"] * 3
    assert failures == ["this reader fails"]


async def test_all_feeds_together_leave_the_loop_time_for_others() -> None:
    """However many have something to read, other callbacks run after at most the budget and one slice."""
    turns = Turns()
    read_at: list[float] = []

    def busy() -> bool:
        began = time.perf_counter()
        while time.perf_counter() < began + BUDGET_S / 4:
            pass
        read_at.append(began)
        return False

    readers = [lambda: busy() for _ in range(40)]
    for read in readers:
        turns.want(read)
    turns_of_the_loop = 0
    async with asyncio.timeout(TIMEOUT_S):
        while len(read_at) < len(readers):
            await asyncio.sleep(0)
            turns_of_the_loop += 1
    assert turns_of_the_loop >= 8  # a budget holds four or five slices of these
