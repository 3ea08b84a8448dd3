"""HTTP/1.1 as clients may speak it: kept-alive and pipelined connections, chunked bodies, 100-continue, HTTP/1.0, HEAD."""

import asyncio

import pytest
from scripted import (
    STREAM_END,
    STREAM_HEAD,
    Bench,
    Seen,
    chat_body,
    chunk,
    completion,
    event,
    eventually,
    fleet,
    json_answer,
    post,
)

from kvfleet_router.io import connection as connection_module


async def echo(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(json_answer({"echo": seen.body.decode()}))


def chunked(body: bytes, *cuts: int, trailer: bytes = b"") -> bytes:
    pieces = [body[a:b] for a, b in zip((0, *cuts), (*cuts, len(body)), strict=True)]
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(map(chunk, pieces)) + b"0\r\n" + trailer + b"\r\n"


async def test_requests_follow_each_other_on_one_connection(bench: Bench) -> None:
    router = await bench.router(await bench.worker(echo))
    client = await bench.client(router)
    for number in range(5):
        body = chat_body(number=number)
        await client.send(post(body))
        assert (await client.answer()).json() == {"echo": body.decode()}


async def test_pipelined_requests_are_answered_in_order(bench: Bench) -> None:
    """The first takes longest; health checks and refusals are answered at once, but not out of turn."""
    first_may_end = asyncio.Event()

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b'"number":0' in seen.body:
            await first_may_end.wait()
        await echo(seen, reader, writer)

    worker = await bench.worker(behave)
    router = await bench.router(worker)
    client = await bench.client(router)
    bodies = [chat_body(number=number) for number in range(3)]
    health = b"GET /health HTTP/1.1\r\nHost: r\r\n\r\n"
    await client.send(post(bodies[0]) + health + post(bodies[1]) + post(b"no json") + post(bodies[2]) + health)
    await eventually(lambda: worker.requests)
    assert len(worker.requests) == 1
    first_may_end.set()
    answers = [await client.answer() for _ in range(6)]
    assert [answer.status for answer in answers] == [200, 200, 200, 400, 200, 200]
    assert [answers[i].json()["echo"].encode() for i in (0, 2, 4)] == bodies


async def test_pipelined_requests_cut_anywhere(bench: Bench) -> None:
    bodies = [chat_body(number=number) for number in range(3)]
    data = b"".join(map(post, bodies))
    router = await bench.router(await bench.worker(echo))
    for size in (1, 5, 80, 333):
        client = await bench.client(router)
        for start in range(0, len(data), size):
            await client.send(data[start : start + size])
        for body in bodies:
            assert (await client.answer()).json() == {"echo": body.decode()}
        client.close()


async def test_a_client_that_pipelines_without_end_is_read_no_further(bench: Bench) -> None:
    may_answer = asyncio.Event()

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await may_answer.wait()
        writer.write(json_answer({}))

    router = await bench.router(await bench.worker(behave))
    client = await bench.client(router)
    request = post(chat_body(filler="x" * 10_000))
    sending = asyncio.create_task(client.send(*[request] * 2000))
    await eventually(lambda: any(connection.reading_paused for connection in router.server.connections))
    (connection,) = router.server.connections
    assert len(connection.buffer) < 2 * connection_module.MAX_PIPELINED_BYTES + 300_000
    assert not sending.done()
    may_answer.set()
    for _ in range(2000):
        assert (await client.answer()).status == 200
    await sending


async def test_many_pipelined_requests_answered_at_once_do_not_recurse(bench: Bench) -> None:
    router = await bench.router(await bench.worker())
    client = await bench.client(router)
    sending = asyncio.create_task(client.send(b"GET /health HTTP/1.1\r\nHost: r\r\n\r\n" * 5000))
    for _ in range(5000):
        assert (await client.answer()).status == 200
    await sending


@pytest.mark.parametrize("cuts", [(), (1,), (10, 11, 40), tuple(range(1, 60))])
async def test_chunked_bodies_go_on_with_a_length(bench: Bench, cuts: tuple[int, ...]) -> None:
    body = chat_body(text="\r\n\r\n0\r\n\r\n")
    worker = await bench.worker(echo)
    router = await bench.router(worker)
    client = await bench.client(router)
    data = chunked(body, *cuts, trailer=b"X-Trailer: 1\r\n")
    for size in (len(data), 1, 4):
        await client.send(*[data[i : i + size] for i in range(0, len(data), size)])
        assert (await client.answer()).json() == {"echo": body.decode()}
    seen = worker.requests[-1]
    assert seen.header("content-length") == b"%d" % len(body)
    assert seen.header("transfer-encoding") is None
    assert seen.header("x-trailer") is None
    assert router.server.body_bytes == 0


async def test_requests_pipelined_behind_a_chunked_body(bench: Bench) -> None:
    router = await bench.router(await bench.worker(echo))
    client = await bench.client(router)
    bodies = [chat_body(number=number) for number in range(4)]
    await client.send(chunked(bodies[0]) + chunked(bodies[1], 3) + post(bodies[2]) + chunked(bodies[3], 1, 2))
    for body in bodies:
        assert (await client.answer()).json() == {"echo": body.decode()}


async def test_100_continue_is_sent_before_the_body_is_asked_for(bench: Bench) -> None:
    router = await bench.router(await bench.worker(echo))
    client = await bench.client(router)
    body = chat_body()
    head, _, _ = post(body, b"Expect: 100-continue").partition(b"\r\n\r\n")
    await client.send(head + b"\r\n\r\n")
    assert (await client.answer()).status == 100
    await client.send(body)
    assert (await client.answer()).json() == {"echo": body.decode()}
    await client.send(post(body, b"Expect: 100-continue"))
    assert (await client.answer()).status == 200, "the body came with the head: nothing to wait for"


async def test_expectation_and_too_large_a_body_get_413_and_no_100(bench: Bench) -> None:
    router = await bench.router(await bench.worker(), max_body_bytes=2048)
    client = await bench.client(router)
    await client.send(
        b"POST /v1/completions HTTP/1.1\r\nHost: r\r\nContent-Length: 4096\r\nExpect: 100-continue\r\n\r\n"
    )
    assert (await client.answer()).status == 413


async def test_connection_close_is_honoured(bench: Bench) -> None:
    router = await bench.router(await bench.worker())
    client = await bench.client(router)
    await client.send(post(chat_body(), b"Connection: close"))
    answer = await client.answer()
    assert answer.header("connection") == "close"
    assert await client.closed() == b""


async def test_http_1_0_clients_may_keep_the_connection_if_they_ask(bench: Bench) -> None:
    router = await bench.router(await bench.worker())
    client = await bench.client(router)
    for _ in range(2):
        await client.send(post(chat_body(), b"Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0"))
        answer = await client.answer()
        assert (answer.json(), answer.header("connection")) == (completion(), "keep-alive")
    await client.send(post(chat_body()).replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert (await client.answer()).header("connection") == "close"
    assert await client.closed() == b""


async def test_head_is_answered_without_a_body(bench: Bench) -> None:
    router = await bench.router(await bench.worker(), config=fleet([], model="m"))
    client = await bench.client(router)
    for path in (b"/health", b"/v1/models", b"/nowhere", b"/v1/chat/completions"):
        await client.send(b"HEAD %b HTTP/1.1\r\nHost: r\r\n\r\n" % path)
        assert (await client.answer(head_only=True)).status == {b"/nowhere": 404, b"/v1/chat/completions": 405}.get(
            path, 200
        )
    await client.send(b"GET /health HTTP/1.1\r\nHost: r\r\n\r\n")
    assert (await client.answer()).status == 200


async def test_absolute_targets_and_upgrade_offers_are_understood(bench: Bench) -> None:
    worker = await bench.worker(echo)
    router = await bench.router(worker)
    client = await bench.client(router)
    await client.send(post(chat_body(), path=b"http://any.host:1/v1/chat/completions?a=1"))
    assert (await client.answer()).status == 200
    assert worker.requests[0].line == b"POST /v1/chat/completions?a=1 HTTP/1.1"
    await client.send(
        post(chat_body(), b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMA")
    )
    assert (await client.answer()).status == 200


async def test_empty_lines_before_a_request_are_ignored(bench: Bench) -> None:
    router = await bench.router(await bench.worker())
    client = await bench.client(router)
    for _ in range(2):
        await client.send(b"\r\n\r\n" + post(chat_body()))
        assert (await client.answer()).status == 200


async def test_a_stream_can_be_followed_by_another_request(bench: Bench) -> None:
    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + event("a") + STREAM_END)

    router = await bench.router(await bench.worker(behave))
    client = await bench.client(router)
    await client.send(post(chat_body(stream=True)) * 3)
    for _ in range(3):
        assert (await client.answer()).raw == event("a") + STREAM_END
