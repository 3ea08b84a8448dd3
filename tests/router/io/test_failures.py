"""Workers that die, refuse, lie or stall: before the first byte the client never notices, after it the client is told."""

import asyncio
import socket
import struct
import time
from collections.abc import Callable

import pytest
from scripted import (
    PATIENCE_S,
    STREAM_END,
    STREAM_HEAD,
    Behaviour,
    Bench,
    Seen,
    answer_ok,
    chat_body,
    chunk,
    completion,
    event,
    eventually,
    json_answer,
    post,
)

from kvfleet_router.app import RouterApp
from kvfleet_router.io import upstream as upstream_module

ENGINE_ERROR = {
    "error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "param": None, "code": 500}
}
LEAVING = {
    "error": {"message": "cannot schedule new futures after shutdown", "type": "InternalServerError", "code": 500}
}
ABORTED = completion() | {"choices": [{"index": 0, "message": {"content": "hel"}, "finish_reason": "abort"}]}


def reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def sends(data: bytes, *, then_reset: bool = True) -> Behaviour:
    """Write this, and reset (or end) the connection."""

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if then_reset:
            reset(writer)
        else:
            writer.close()

    return behave


async def never(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    raise ConnectionResetError


async def streams(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + event("a") + STREAM_END)


def assert_nothing_is_left(router: RouterApp) -> None:
    assert all(worker.in_flight == 0 for worker in router.dispatcher.workers())
    assert router.server.body_bytes == 0


FAILURES_BEFORE_THE_FIRST_BYTE: dict[str, Behaviour] = {
    "reset": sends(b""),
    "end": sends(b"", then_reset=False),
    "reset inside the head": sends(b"HTTP/1.1 200 OK\r\nconte"),
    "reset after a stream's head": sends(STREAM_HEAD),
    "end after a stream's head": sends(STREAM_HEAD, then_reset=False),
    "end inside a complete answer": sends(json_answer(completion())[:-10], then_reset=False),
    "no HTTP": sends(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "too large a head": sends(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000),
    "length and chunked": sends(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc"),
    "two lengths": sends(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc"),
    "a coding": sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"),
    "a folded line": sends(b"HTTP/1.1 200 OK\r\nX: y\r\n z\r\nContent-Length: 0\r\n\r\n"),
    "a protocol switch": sends(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"),
    "a second answer": sends(json_answer(completion()) + json_answer(completion("smuggled"))),
    "leaving": sends(json_answer(LEAVING, b"500 Internal Server Error"), then_reset=False),
    "engine gone": sends(json_answer(ENGINE_ERROR, b"500 Internal Server Error"), then_reset=False),
    "engine gone in a stream": sends(
        STREAM_HEAD
        + chunk(b'data: {"error":{"message":"EngineCore encountered an issue","code":500}}\n\n')
        + STREAM_END,
        then_reset=False,
    ),
    "overloaded": sends(json_answer({}, b"503 Service Unavailable"), then_reset=False),
    "bad gateway": sends(json_answer({}, b"502 Bad Gateway"), then_reset=False),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", FAILURES_BEFORE_THE_FIRST_BYTE)
async def test_a_failure_before_the_first_byte_costs_the_client_nothing(bench: Bench, name: str, stream: bool) -> None:
    bad = await bench.worker(FAILURES_BEFORE_THE_FIRST_BYTE[name])
    good = await bench.worker(streams if stream else answer_ok)
    router = await bench.router(bad, good)
    while not bad.requests:
        answer = await bench.ask(router, post(chat_body(stream=stream)))
        assert answer.status == 200
        if stream:
            assert answer.raw == event("a") + STREAM_END
        else:
            assert answer.json() == completion()
        assert answer.header("x-kvfleet-worker") == good.url.removeprefix("http://")
    (decision,) = router.dispatcher.decisions.recent(1)
    assert decision["retries"] == 1
    assert_nothing_is_left(router)


async def test_an_aborted_answer_is_asked_for_again(bench: Bench) -> None:
    """vLLM, told to leave, ends what runs with finish_reason "abort": 200, and half an answer."""
    leaving = await bench.worker(sends(json_answer(ABORTED), then_reset=False))
    good = await bench.worker()
    router = await bench.router(leaving, good)
    while not leaving.requests:
        assert (await bench.ask(router, post(chat_body()))).json() == completion()


async def test_killing_one_of_four_under_load_loses_no_request(bench: Bench) -> None:
    workers = [await bench.worker() for _ in range(4)]
    router = await bench.router(*workers)
    statuses: list[int] = []

    async def load() -> None:
        client = await bench.client(router)
        for _ in range(50):
            await client.send(post(chat_body()))
            statuses.append((await client.answer()).status)

    loads = [asyncio.create_task(load()) for _ in range(8)]
    await eventually(lambda: len(statuses) > 100)
    await workers[2].stop()
    await asyncio.gather(*loads)
    assert statuses == [200] * 400
    assert_nothing_is_left(router)


async def test_with_every_worker_dead_clients_are_told_to_come_back(bench: Bench) -> None:
    workers = [await bench.worker() for _ in range(2)]
    router = await bench.router(*workers)
    for worker in workers:
        await worker.stop()
    for _ in range(10):
        answer = await bench.ask(router, post(chat_body()))
        assert answer.status == 503
        assert int(answer.header("retry-after") or 0) >= 1
        assert answer.json()["error"]["type"] == "server_error" or answer.json()["error"]["code"]
    assert_nothing_is_left(router)


async def test_a_worker_that_comes_back_is_used_again(bench: Bench) -> None:
    worker = await bench.worker()
    router = await bench.router(worker, speed=100.0)  # the circuit breaker's minutes are fractions of a second
    await worker.stop()
    for _ in range(10):
        assert (await bench.ask(router, post(chat_body()))).status == 503
    await worker.start()
    async with asyncio.timeout(PATIENCE_S):
        while (await bench.ask(router, post(chat_body()))).status == 503:
            pass


async def test_retries_are_bounded_by_the_policy(bench: Bench) -> None:
    workers = [await bench.worker(sends(b"")) for _ in range(4)]
    router = await bench.router(*workers, retries=1)
    answer = await bench.ask(router, post(chat_body()))
    assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_failed")
    assert sum(len(worker.requests) for worker in workers) == 2
    samples = await bench.metrics(router)
    assert samples['kvfleet_router_retries_total{cause="worker_reset",pool="static"}'] == 1
    assert samples['kvfleet_router_errors_total{cause="worker_reset"}'] == 2


async def test_without_retries_a_workers_own_error_is_passed_on(bench: Bench) -> None:
    worker = await bench.worker(sends(json_answer(LEAVING, b"500 Internal Server Error"), then_reset=False))
    router = await bench.router(worker, retries=0)
    answer = await bench.ask(router, post(chat_body()))
    assert (answer.status, answer.json()) == (500, LEAVING)


async def test_other_errors_of_the_engine_are_not_repeated(bench: Bench) -> None:
    """A request that breaks one engine may break the next: only what says that the engine is gone is repeated."""
    error = {"error": {"message": "list index out of range", "type": "InternalServerError", "code": 500}}
    workers = [
        await bench.worker(sends(json_answer(error, b"500 Internal Server Error"), then_reset=False)) for _ in range(2)
    ]
    router = await bench.router(*workers)
    answer = await bench.ask(router, post(chat_body()))
    assert (answer.status, answer.json()) == (500, error)
    assert sum(len(worker.requests) for worker in workers) == 1


async def test_a_kept_alive_connection_that_was_just_closed_is_replaced(bench: Bench) -> None:
    """The worker closes an idle connection in the moment it is used: another connection to the same worker, and no failure."""
    requests = 0

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        requests += 1
        if seen.connection == 1 and requests == 2:
            reset(writer)
            return
        writer.write(json_answer(completion()))

    worker = await bench.worker(behave)
    router = await bench.router(worker, retries=0)
    for _ in range(3):
        assert (await bench.ask(router, post(chat_body()))).status == 200
    assert worker.connections == 2
    assert router.metrics.errors == {}


async def test_a_fresh_connection_that_fails_is_the_workers_failure(bench: Bench) -> None:
    router = await bench.router(await bench.worker(sends(b"")), retries=0)
    assert (await bench.ask(router, post(chat_body()))).status == 502


async def test_idle_connections_are_given_up_before_the_engine_does(bench: Bench) -> None:
    worker = await bench.worker()
    router = await bench.router(worker)
    await bench.ask(router, post(chat_body()))
    router.upstreams.sweep(time.monotonic() + upstream_module.IDLE_KEEP_S + 0.1)
    await eventually(lambda: worker.lost == 1)
    await bench.ask(router, post(chat_body()))
    assert worker.connections == 2


# After the first byte

BREAKS: dict[str, Callable[[asyncio.StreamWriter], None]] = {
    "reset": reset,
    "end": lambda writer: writer.close(),
    "nonsense": lambda writer: writer.write(b"zzz\r\n"),
}


@pytest.mark.parametrize("name", BREAKS)
async def test_a_stream_that_breaks_ends_with_an_error_event(bench: Bench, name: str) -> None:
    may_break = asyncio.Event()

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + event("a") + event("b"))
        await may_break.wait()
        BREAKS[name](writer)

    router = await bench.router(await bench.worker(behave))
    client = await bench.client(router)
    await client.send(post(chat_body(stream=True)))
    await client.answer(head_only=True)
    tokens = event("a") + event("b")
    assert await client.reader.readexactly(len(tokens)) == tokens
    may_break.set()
    rest = await client.closed()
    if name == "nonsense":
        assert rest == b"", "what was no HTTP is not passed on, and where it stands is not known"
    else:
        error, done, end = rest.split(b"\r\n", 1)[1].partition(b"\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        assert done
        assert not end
        assert error.startswith(b'data: {"error":{"message":')
        assert b'"code":"upstream_failed"' in error
    assert_nothing_is_left(router)


@pytest.mark.parametrize(
    "data",
    [STREAM_HEAD + event("a") + b"20\r\ndata: half an ev", STREAM_HEAD + event("a") + chunk(b"data: half an event")],
    ids=["inside a chunk", "inside an event"],
)
async def test_where_an_error_event_would_not_be_one_the_stream_is_cut(bench: Bench, data: bytes) -> None:
    router = await bench.router(await bench.worker(sends(data, then_reset=False)))
    client = await bench.client(router)
    await client.send(post(chat_body(stream=True)))
    await client.answer(head_only=True)
    assert await client.closed() == data.removeprefix(STREAM_HEAD)


async def test_a_long_complete_answer_that_breaks_is_cut(bench: Bench) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n"
    router = await bench.router(await bench.worker(sends(head + b"x" * 900_000, then_reset=False)))
    client = await bench.client(router)
    await client.send(post(chat_body()))
    await client.answer(head_only=True)
    assert await client.closed() == b"x" * 900_000


async def test_bytes_behind_an_answer_never_reach_a_client(bench: Bench) -> None:
    data = STREAM_HEAD + event("a")
    junk = STREAM_END + b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nsmuggled"
    may_go_on = asyncio.Event()

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await may_go_on.wait()
        writer.write(junk)

    router = await bench.router(await bench.worker(behave))
    client = await bench.client(router)
    await client.send(post(chat_body(stream=True)))
    await client.answer(head_only=True)
    await client.reader.readexactly(len(event("a")))
    may_go_on.set()
    rest = await client.closed()
    assert rest == b"", "cut: what came in the same piece as the junk is not passed on either"


async def test_bytes_between_answers_close_the_connection(bench: Bench) -> None:
    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json_answer(completion()))
        await writer.drain()
        await asyncio.sleep(0)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nsmuggled")

    worker = await bench.worker(behave)
    router = await bench.router(worker)
    for _ in range(4):
        assert (await bench.ask(router, post(chat_body()))).json() == completion()
        await eventually(lambda: worker.lost == worker.connections)


# Time limits


async def test_no_first_byte_in_time_is_504(bench: Bench) -> None:
    worker = await bench.worker(never)
    router = await bench.router(worker, await bench.worker(never), timeout_seconds=5)
    client = await bench.client(router)
    await client.send(post(chat_body()))
    await eventually(lambda: sum(len(w.requests) for w in (worker,)) or router.server.connections)
    await eventually(lambda: any(c.answer and c.answer.upstream for c in router.server.connections))
    router.server.sweep(time.monotonic() + 4)
    router.server.sweep(time.monotonic() + 8)
    answer = await client.answer()
    assert (answer.status, answer.json()["error"]["code"]) == (504, "upstream_timeout")
    assert_nothing_is_left(router)


async def test_a_stream_that_stalls_gets_an_error_event(bench: Bench) -> None:
    """An engine killed over its time to leave keeps connections open and silent."""

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + event("a"))
        await never(seen, reader, writer)

    worker = await bench.worker(behave)
    router = await bench.router(worker, timeout_seconds=5)
    client = await bench.client(router)
    await client.send(post(chat_body(stream=True)))
    await client.answer(head_only=True)
    await client.reader.readexactly(len(event("a")))
    now = time.monotonic()
    for second in (0, 4, 6, 12):
        router.server.sweep(now + second)
    assert b"upstream_failed" in await client.closed()
    await eventually(lambda: worker.lost == 1)


async def test_a_worker_that_accepts_no_connection_in_time(bench: Bench) -> None:
    router = await bench.router(bench.unreachable(), await bench.worker(), connect_timeout_milliseconds=20)
    for _ in range(20):
        assert (await bench.ask(router, post(chat_body()))).status == 200
        if router.metrics.errors:
            break
    assert router.metrics.errors == {"connect_timeout": 1}


async def test_a_stream_the_engine_aborted_is_passed_on_and_counted_as_failed(bench: Bench) -> None:
    abort = chunk(b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"abort"}]}\n\n')
    may_end = asyncio.Event()

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + event("a"))
        await may_end.wait()
        writer.write(abort + STREAM_END)

    router = await bench.router(await bench.worker(behave))
    client = await bench.client(router)
    await client.send(post(chat_body(stream=True)))
    await client.answer(head_only=True)
    await client.reader.readexactly(len(event("a")))
    may_end.set()
    assert await client.reader.readuntil(STREAM_END) == abort + STREAM_END
    await eventually(lambda: router.metrics.errors == {"engine_aborted": 1})
    assert router.dispatcher.decisions.recent(1)[0]["outcome"]["result"] == "failed"
