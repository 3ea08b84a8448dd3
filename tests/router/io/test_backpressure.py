"""Slow readers and clients that leave: memory stays bounded, and workers stop computing what nobody reads."""

import asyncio
import time

import pytest
from scripted import STREAM_END, STREAM_HEAD, Bench, Seen, answer_ok, chat_body, chunk, event, eventually, fleet, post

from kvfleet_router.app import RouterApp
from kvfleet_router.io import connection as connection_module
from kvfleet_router.io import proxy as proxy_module

MIB = 1 << 20


def in_flight(router: RouterApp) -> int:
    return sum(worker.in_flight for worker in router.dispatcher.workers())


async def test_a_slow_reader_slows_the_worker_down_and_loses_nothing(bench: Bench) -> None:
    piece = chunk(b"x" * 65_000)
    count = 1000  # 62 MiB
    written = 0

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(STREAM_HEAD)
        for _ in range(count):
            writer.write(piece)
            await writer.drain()
            written += 1
        writer.write(STREAM_END)

    router = await bench.router(await bench.worker(behave))
    client = await bench.client(router)
    client.writer.transport.pause_reading()
    await client.send(post(chat_body(stream=True)))
    await eventually(lambda: any(connection.write_paused for connection in router.server.connections))
    (connection,) = router.server.connections
    seen_before = -1
    while written != seen_before:  # until it stands still
        seen_before = written
        await asyncio.sleep(0.05)
    assert connection.transport.get_write_buffer_size() < MIB
    assert written < count / 2
    client.writer.transport.resume_reading()
    answer = await client.answer()
    assert answer.raw == piece * count + STREAM_END


async def test_a_client_that_reads_nothing_is_ended_in_time(bench: Bench) -> None:
    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        while True:
            writer.write(chunk(b"x" * 65_000))
            await writer.drain()

    worker = await bench.worker(behave)
    router = await bench.router(worker)
    client = await bench.client(router)
    client.writer.transport.pause_reading()
    await client.send(post(chat_body(stream=True)))
    await eventually(lambda: any(connection.write_paused for connection in router.server.connections))
    router.server.sweep(time.monotonic() + connection_module.WRITE_STALL_TIMEOUT_S + 1)
    await eventually(lambda: worker.lost == 1)
    await eventually(lambda: not router.server.connections)
    assert in_flight(router) == 0


async def test_a_client_that_leaves_stops_the_worker(bench: Bench) -> None:
    """Before the first byte and inside the stream."""

    async def before(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        raise ConnectionResetError

    async def inside(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + event("a"))
        await before(seen, reader, writer)

    for behave in (before, inside):
        worker = await bench.worker(behave)
        router = await bench.router(worker)
        client = await bench.client(router)
        await client.send(post(chat_body(stream=True)))
        await eventually(lambda: worker.requests)  # noqa: B023
        if behave is inside:
            await client.answer(head_only=True)
        assert in_flight(router) == 1
        client.close()
        await eventually(lambda: worker.lost == 1)  # noqa: B023
        assert in_flight(router) == 0
        (decision,) = router.dispatcher.decisions.recent(1)
        assert decision["outcome"]["result"] == "abandoned"
        samples = await bench.metrics(router)
        name = 'kvfleet_router_requests_total{model="m",outcome="cancelled",policy="kvfleet.default",pool="static"}'
        assert samples[name] == 1


async def test_a_client_that_leaves_while_the_worker_is_being_reached(bench: Bench) -> None:
    router = await bench.router(bench.unreachable(), connect_timeout_milliseconds=50)
    client = await bench.client(router)
    await client.send(post(chat_body()))
    await eventually(lambda: in_flight(router) == 1)
    client.close()
    await eventually(lambda: in_flight(router) == 0)
    await eventually(lambda: not router.proxy._tasks)
    assert router.metrics.errors == {}, "the attempt ends, and is nobody's failure any more"


async def test_a_connection_that_comes_too_late_for_its_client_serves_the_next(bench: Bench) -> None:
    worker = await bench.worker()
    router = await bench.router(worker)
    client = await bench.client(router)
    await client.send(post(chat_body()))
    while not router.proxy._tasks:  # noqa: ASYNC110 - every turn of the loop counts here
        await asyncio.sleep(0)
    for connection in list(router.server.connections):
        connection.abort()  # in the very turn in which connecting began
    assert in_flight(router) == 0
    await eventually(lambda: worker.connections == 1 and not router.proxy._tasks)
    assert (await bench.ask(router, post(chat_body()))).status == 200
    assert [seen.connection for seen in worker.requests] == [1]


async def test_a_client_that_leaves_the_queue(bench: Bench) -> None:
    may_answer = asyncio.Event()

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await may_answer.wait()
        await answer_ok(seen, reader, writer)

    worker = await bench.worker(behave)
    router = await bench.router(worker, max_in_flight_per_worker=1)
    running, leaving, waiting = [await bench.client(router) for _ in range(3)]
    await running.send(post(chat_body()))
    await eventually(lambda: in_flight(router) == 1)
    for client in (leaving, waiting):
        await client.send(post(chat_body()))
    await eventually(lambda: sum(router.dispatcher.queue_depths().values()) == 2)
    leaving.close()
    await eventually(lambda: sum(router.dispatcher.queue_depths().values()) == 1)
    may_answer.set()
    for client in (running, waiting):
        assert (await client.answer()).status == 200
    assert len(worker.requests) == 2


async def test_a_full_queue_sheds_with_retry_after(bench: Bench) -> None:
    may_answer = asyncio.Event()

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await may_answer.wait()
        await answer_ok(seen, reader, writer)

    router = await bench.router(await bench.worker(behave), max_in_flight_per_worker=1, max_queue=1)
    clients = [await bench.client(router) for _ in range(2)]
    for number, client in enumerate(clients):
        await client.send(post(chat_body()))
        await eventually(lambda: in_flight(router) + sum(router.dispatcher.queue_depths().values()) == number + 1)  # noqa: B023
    shed = await bench.ask(router, post(chat_body()))
    assert shed.status in (429, 503)
    assert int(shed.header("retry-after") or 0) >= 1
    assert shed.json()["error"]["code"]
    may_answer.set()
    for client in clients:
        assert (await client.answer()).status == 200


async def test_many_requests_held_at_once_are_all_answered(bench: Bench) -> None:
    """Every one asks the dispatcher's clockwork to be looked at soon, some for no later than now."""
    worker = await bench.worker()
    router = await bench.router(worker, max_in_flight_per_worker=1)
    clients = [await bench.client(router) for _ in range(50)]
    for _ in range(3):
        for client in clients:
            client.writer.write(post(chat_body()))
        assert {(await client.answer()).status for client in clients} == {200}
    assert len(worker.requests) == 150


@pytest.mark.parametrize("delays_s", [(0.0, 0.0), (0.2, 0.0), (0.0, 0.2), (0.0001, 0.0004, 0.0)])
async def test_ticks_come_at_the_earliest_time_asked_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, delays_s: tuple[float, ...]
) -> None:
    monkeypatch.setattr(proxy_module, "_MIN_TICK_S", 0.0)  # a busy loop is late for a millisecond: then it is "now"
    router = await bench.router(await bench.worker())
    ticks = 0

    def tick() -> float | None:
        nonlocal ticks
        ticks += 1
        return None

    router.proxy.dispatcher_tick = tick
    for delay_s in delays_s:
        router.proxy._schedule(delay_s)
    start = asyncio.get_running_loop().time()
    await eventually(lambda: ticks)
    assert asyncio.get_running_loop().time() - start < 0.15


async def test_a_tick_that_fails_is_not_the_last(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    router = await bench.router(await bench.worker())
    tick, failures = router.dispatcher.tick, 0

    def failing() -> float | None:
        nonlocal failures
        failures += 1
        if failures < 3:
            raise RuntimeError("a fault")
        return tick()

    router.proxy.dispatcher_tick = failing
    await eventually(lambda: failures >= 3)
    assert "a tick failed" in caplog.text


async def test_a_request_for_a_pool_at_zero_waits_for_its_first_worker(bench: Bench) -> None:
    worker = await bench.worker()
    config = fleet([worker], model="m")
    pool = config.pools[0].model_copy(update={"endpoints": [], "scales_to_zero": True})
    router = await bench.router(config=config.model_copy(update={"pools": [pool]}))
    client = await bench.client(router)
    await client.send(post(chat_body()))
    await eventually(lambda: sum(router.dispatcher.queue_depths().values()) == 1)
    router.take_config(config)
    assert (await client.answer()).status == 200


async def test_a_stream_of_small_reads_keeps_little(bench: Bench) -> None:
    """What is kept of a long stream for its usage is its last pieces alone."""
    may_end = asyncio.Event()

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        for number in range(2000):
            writer.write(event(f"token {number}"))
            await writer.drain()
        for _ in range(2000):
            writer.write(chunk(b"."))
            await writer.drain()
        await may_end.wait()
        writer.write(STREAM_END)

    router = await bench.router(await bench.worker(behave))
    client = await bench.client(router)
    await client.send(post(chat_body(stream=True)))
    await client.answer(head_only=True)
    (connection,) = router.server.connections
    exchange = connection.answer
    assert exchange is not None
    total = 0
    while not total or client.reader._buffer:  # type: ignore[attr-defined]
        total += len(await client.reader.read(1 << 20))
        await asyncio.sleep(0.01)
    upstream = exchange.upstream  # type: ignore[attr-defined]
    assert sum(map(len, upstream.tail)) < 300_000
    assert upstream.held == []
    may_end.set()
    assert (await client.reader.readuntil(STREAM_END)).endswith(STREAM_END)
