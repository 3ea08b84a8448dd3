"""Answers travel as they came; heads are rewritten only where HTTP asks for it, or to say who answered and why."""

import asyncio
import os
from itertools import pairwise

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
    json_answer,
    post,
)


def writes(*pieces: bytes, close: bool = False):
    """A behaviour that writes these pieces, each in a segment of its own as far as TCP lets it."""

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            writer.close()

    return behave


async def test_a_complete_answer_is_passed_on_unchanged(bench: Bench) -> None:
    data = json_answer(completion(), headers=b"X-Engine: 1\r\nServer: uvicorn\r\n")
    router = await bench.router(await bench.worker(writes(data)))
    answer = await bench.ask(router, post(chat_body()))
    assert answer.status == 200
    assert answer.raw == data.partition(b"\r\n\r\n")[2]
    assert answer.header("x-engine") == "1"
    assert answer.header("server") == "uvicorn"


async def test_a_stream_is_passed_on_unchanged_framing_included(bench: Bench) -> None:
    body = b"".join(event(f"token {i}") for i in range(50)) + STREAM_END
    router = await bench.router(await bench.worker(writes(STREAM_HEAD + body)))
    answer = await bench.ask(router, post(chat_body(stream=True)))
    assert answer.header("content-type") == "text/event-stream; charset=utf-8"
    assert answer.raw == body


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 64])
async def test_where_the_network_cuts_an_answer_makes_no_difference(bench: Bench, cut: int) -> None:
    body = event("a") + chunk(b'data: {"odd": "\r\n0\r\n\r\n"}\n\n') + event("b") + STREAM_END
    data = STREAM_HEAD + body
    pieces = [data[i : i + cut] for i in range(0, len(data), cut)]
    worker = await bench.worker(writes(*pieces))
    router = await bench.router(worker)
    client = await bench.client(router)
    for _ in range(2):
        await client.send(post(chat_body(stream=True)))
        assert (await client.answer()).raw == body
    assert worker.connections == 1


@pytest.mark.parametrize("size", [0, 1, 65_535, 262_144, 262_145, 3_000_000])
async def test_binary_answers_of_any_size(bench: Bench, size: int) -> None:
    body = os.urandom(size)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: %d\r\n\r\n" % size
    router = await bench.router(await bench.worker(writes(head + body)))
    answer = await bench.ask(router, post(chat_body()))
    assert answer.raw == body


async def test_trailers_and_chunk_extensions_travel_too(bench: Bench) -> None:
    body = b"4;name=value\r\nabcd\r\n0\r\nx-checksum: 1\r\n\r\n"
    router = await bench.router(await bench.worker(writes(STREAM_HEAD + body)))
    client = await bench.client(router)
    await client.send(post(chat_body(stream=True)))
    assert (await client.closed()).endswith(body)


async def test_the_request_travels_verbatim(bench: Bench) -> None:
    body = b'{ "model":"m",\n "unknown": [1, {"deep": null}],  "messages":[{"role":"user","content":"h\\u0069"}] }'
    worker = await bench.worker()
    router = await bench.router(worker)
    headers = (b"Authorization: Bearer sk-1", b"X-Custom: a", b"x-custom: b", b"Accept-Language: \xe9")
    await bench.ask(router, post(body, *headers, path=b"/v1/chat/completions?debug=1&x=%2F"))
    seen = worker.requests[0]
    assert seen.line == b"POST /v1/chat/completions?debug=1&x=%2F HTTP/1.1"
    assert seen.body == body
    assert seen.header("host") == worker.url.removeprefix("http://").encode()
    assert seen.header("content-length") == b"%d" % len(body)
    assert seen.header("authorization") == b"Bearer sk-1"
    assert seen.header("accept-language") == b"\xe9"
    assert [value for name, value in seen.headers if name.lower() == b"x-custom"] == [b"a", b"b"]


async def test_headers_of_the_hop_are_not_passed_on(bench: Bench) -> None:
    worker = await bench.worker()
    router = await bench.router(worker)
    await bench.ask(
        router,
        post(
            chat_body(),
            b"Connection: keep-alive, X-Secret, upgrade",
            b"X-Secret: 1",
            b"Keep-Alive: timeout=5",
            b"TE: trailers",
            b"Upgrade: h2c",
            b"Proxy-Authorization: Basic x",
            b"X-Kept: 1",
        ),
    )
    names = {name.lower() for name, _ in worker.requests[0].headers}
    assert names == {b"host", b"content-length", b"content-type", b"x-request-id", b"x-kept"}


async def test_headers_of_the_workers_hop_are_not_passed_back(bench: Bench) -> None:
    data = json_answer(
        completion(), headers=b"Connection: keep-alive\r\nKeep-Alive: timeout=5\r\nX-Request-Id: theirs\r\n"
    )
    router = await bench.router(await bench.worker(writes(data)))
    answer = await bench.ask(router, post(chat_body(), b"X-Request-Id: mine"))
    assert answer.header("connection") is None
    assert answer.header("keep-alive") is None
    assert answer.header("x-request-id") == "mine"


async def test_the_answer_says_who_answered_and_which_decision_it_was(bench: Bench) -> None:
    worker = await bench.worker()
    router = await bench.router(worker)
    answer = await bench.ask(router, post(chat_body()))
    assert answer.header("x-kvfleet-worker") == worker.url.removeprefix("http://")
    decision = router.dispatcher.decisions.get(answer.header("x-kvfleet-decision") or "")
    assert decision is not None
    assert decision["outcome"]["output_tokens"] == 7


async def test_request_ids_are_echoed_made_and_sent_on(bench: Bench) -> None:
    worker = await bench.worker()
    router = await bench.router(worker)
    given = await bench.ask(router, post(chat_body(), b"X-Request-ID: abc-1"))
    made = await bench.ask(router, post(chat_body()))
    odd = await bench.ask(router, post(chat_body(), b"X-Request-Id: " + b"x" * 200))
    ids = [answer.header("x-request-id") for answer in (given, made, odd)]
    assert ids[0] == "abc-1"
    assert len(ids[1] or "") == len(ids[2] or "") == 32
    assert [seen.header("x-request-id") for seen in worker.requests] == [(value or "").encode() for value in ids]


async def test_connections_to_workers_are_kept_alive(bench: Bench) -> None:
    worker = await bench.worker()
    router = await bench.router(worker)
    for _ in range(5):
        assert (await bench.ask(router, post(chat_body()))).status == 200
    assert [seen.connection for seen in worker.requests] == [1] * 5


async def test_a_connection_the_worker_closes_is_not_used_again(bench: Bench) -> None:
    worker = await bench.worker(writes(json_answer(completion(), headers=b"Connection: close\r\n"), close=True))
    router = await bench.router(worker)
    for _ in range(3):
        assert (await bench.ask(router, post(chat_body()))).status == 200
    assert worker.connections == 3


async def test_interim_answers_are_swallowed(bench: Bench) -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\n" + b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + json_answer(completion())
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
        router = await bench.router(await bench.worker(writes(*pieces)))
        answer = await bench.ask(router, post(chat_body()))
        assert (answer.status, answer.header("link"), answer.json()) == (200, None, completion())


async def test_an_answer_that_ends_with_its_connection(bench: Bench) -> None:
    data = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n" + b"x" * 100_000
    router = await bench.router(await bench.worker(writes(data, close=True)))
    answer = await bench.ask(router, post(chat_body()))
    assert answer.header("connection") == "close"
    assert answer.body == b"x" * 100_000


async def test_an_answer_without_a_body(bench: Bench) -> None:
    router = await bench.router(await bench.worker(writes(b"HTTP/1.1 204 No Content\r\n\r\n")))
    client = await bench.client(router)
    for _ in range(2):
        await client.send(post(chat_body()))
        assert (await client.answer()).status == 204


async def test_an_http_1_0_client_gets_streams_without_framing(bench: Bench) -> None:
    body = event("a") + event("b") + STREAM_END
    router = await bench.router(
        await bench.worker(writes(*[STREAM_HEAD, *(body[i : i + 5] for i in range(0, len(body), 5))]))
    )
    client = await bench.client(router)
    request = post(chat_body(stream=True)).replace(b"HTTP/1.1", b"HTTP/1.0")
    await client.send(request)
    head, _, rest = (await client.closed()).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert rest == b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n' + (
        b'data: {"choices":[{"index":0,"delta":{"content":"b"}}]}\n\ndata: [DONE]\n\n'
    )


async def test_client_errors_of_the_engine_are_passed_on(bench: Bench) -> None:
    error = {
        "error": {"message": "max_tokens must be at least 1", "type": "BadRequestError", "param": None, "code": 400}
    }
    worker = await bench.worker(writes(json_answer(error, b"400 Bad Request")))
    router = await bench.router(worker)
    answer = await bench.ask(router, post(chat_body(stream=True)))
    assert (answer.status, answer.json()) == (400, error)
    assert len(worker.requests) == 1


async def test_large_requests_arrive_whole(bench: Bench) -> None:
    body = chat_body(filler="x" * 5_000_000)
    worker = await bench.worker()
    router = await bench.router(worker)
    assert (await bench.ask(router, post(body))).status == 200
    assert worker.requests[0].body == body
    assert router.server.body_bytes == 0


async def test_tokens_arrive_one_by_one(bench: Bench) -> None:
    """Nothing waits for more: each event is seen by the client before the worker writes the next."""
    may_go_on = asyncio.Event()

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        for number in range(5):
            may_go_on.clear()
            writer.write(event(str(number)))
            await may_go_on.wait()
        writer.write(STREAM_END)

    router = await bench.router(await bench.worker(behave))
    client = await bench.client(router)
    await client.send(post(chat_body(stream=True)))
    await client.answer(head_only=True)
    for number in range(5):
        assert await client.reader.readexactly(len(event(str(number)))) == event(str(number))
        may_go_on.set()
    assert await client.reader.readexactly(len(STREAM_END)) == STREAM_END


async def test_many_clients_at_once_get_their_own_answers(bench: Bench) -> None:
    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json_answer({"echo": seen.body.decode()}))

    workers = [await bench.worker(behave) for _ in range(3)]
    router = await bench.router(*workers)

    async def one(number: int) -> None:
        body = chat_body(number=number, filler="x" * (number * 300))
        assert (await bench.ask(router, post(body))).json() == {"echo": body.decode()}

    await asyncio.gather(*(one(number) for number in range(100)))
    counts = [len(worker.requests) for worker in workers]
    assert sum(counts) == 100
    assert all(abs(a - b) <= 1 for a, b in pairwise(counts))
    await eventually(lambda: not router.server.connections)
