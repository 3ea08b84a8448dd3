"""What the router refuses by itself: every time with OpenAI's error body, and before it costs memory or a worker's time."""

import asyncio
import time

import pytest
from scripted import Bench, chat_body, completion, eventually, fleet, json_answer, post

from kvfleet_router.io import connection as connection_module

GOOD = b"GET /health HTTP/1.1\r\nHost: r\r\n\r\n"

SMUGGLING = {
    "length and chunked": b"POST / HTTP/1.1\r\nHost: r\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": b"POST / HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two equal lengths": b"POST / HTTP/1.1\r\nHost: r\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: r\r\nContent-Length: 0\r\nContent-Length: 9\r\n\r\n",
    "a list of lengths": b"POST / HTTP/1.1\r\nHost: r\r\nContent-Length: 0, 0\r\n\r\n",
    "a signed length": b"POST / HTTP/1.1\r\nHost: r\r\nContent-Length: +0\r\n\r\n",
    "a negative length": b"POST / HTTP/1.1\r\nHost: r\r\nContent-Length: -1\r\n\r\n",
    "a hexadecimal length": b"POST / HTTP/1.1\r\nHost: r\r\nContent-Length: 0x0\r\n\r\n",
    "an empty length": b"POST / HTTP/1.1\r\nHost: r\r\nContent-Length:\r\n\r\n",
    "an overflowing length": b"POST / HTTP/1.1\r\nHost: r\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "an unknown coding": b"POST / HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: xchunked\r\n\r\n",
    "a coding before chunked": b"POST / HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a coding after chunked": b"POST / HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
    "chunked twice": b"POST / HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked, then identity": b"POST / HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
    "a vertical tab before chunked": b"POST / HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: \x0bchunked\r\n\r\n",
    "chunked in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: r\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bare line feeds": b"GET /health HTTP/1.1\nHost: r\n\n\r\n\r\n",
    "one bare line feed": b"GET /health HTTP/1.1\r\nHost: r\nX: y\r\n\r\n",
    "a bare carriage return": b"GET /health HTTP/1.1\r\nHost: r\rX: y\r\n\r\n",
    "a folded line": b"GET /health HTTP/1.1\r\nHost: r\r\n folded: yes\r\n\r\n",
    "a blank before the colon": b"GET /health HTTP/1.1\r\nHost: r\r\nContent-Length : 5\r\n\r\n",
    "a blank before the first header": b"GET /health HTTP/1.1\r\n Host: r\r\n\r\n",
    "a nameless header": b"GET /health HTTP/1.1\r\nHost: r\r\n: x\r\n\r\n",
    "a line without colon": b"GET /health HTTP/1.1\r\nHost: r\r\nnonsense\r\n\r\n",
    "NUL in a value": b"GET /health HTTP/1.1\r\nHost: r\r\nX: a\x00b\r\n\r\n",
    "NUL in a name": b"GET /health HTTP/1.1\r\nHost: r\r\nX\x00: b\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: r\r\nHost: s\r\n\r\n",
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "HTTP/2 in the clear": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2.0": b"GET /health HTTP/2.0\r\nHost: r\r\n\r\n",
    "another protocol": b"GET /health RTSP/1.1\r\nHost: r\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a fragment": b"GET /health#x HTTP/1.1\r\nHost: r\r\n\r\n",
    "a control byte in the target": b"GET /heal\x01th HTTP/1.1\r\nHost: r\r\n\r\n",
    "a broken absolute target": b"GET http://[::1/health HTTP/1.1\r\nHost: r\r\n\r\n",
    "a blank in the target": b"GET /health x HTTP/1.1\r\nHost: r\r\n\r\n",
    "an unmet expectation": b"POST / HTTP/1.1\r\nHost: r\r\nExpect: cake\r\nContent-Length: 1\r\n\r\n",
}
CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\n\r\n"
BAD_CHUNKS = {
    "a hexadecimal prefix": b"0x3\r\nabc\r\n0\r\n\r\n",
    "a sign": b"+3\r\nabc\r\n0\r\n\r\n",
    "a blank": b"3 \r\nabc\r\n0\r\n\r\n",
    "a bare line feed": b"3\nabc\n0\n\n",
    "a bare line feed in an extension": b"3;a\nabc\r\n0\r\n\r\n",
    "an overflow": b"fffffffffffffffff\r\nabc",
    "a negative size": b"-1\r\n",
    "too much data": b"3\r\nabcd\r\n0\r\n\r\n",
    "no line end after data": b"3\r\nabcX0\r\n\r\n",
    "a length in the trailer": b"0\r\nContent-Length: 5\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLING)
async def test_ambiguous_heads_are_refused_and_end_the_connection(bench: Bench, name: str) -> None:
    worker = await bench.worker()
    router = await bench.router(worker)
    client = await bench.client(router)
    await client.send(SMUGGLING[name] + GOOD)
    answer = await client.answer()
    assert 400 <= answer.status < 506
    assert answer.json()["error"]["message"]
    assert answer.header("connection") == "close"
    assert await client.closed() == b"", "nothing behind it may be answered"
    assert not worker.requests


@pytest.mark.parametrize("name", BAD_CHUNKS)
async def test_ambiguous_chunks_are_refused_and_end_the_connection(bench: Bench, name: str) -> None:
    worker = await bench.worker()
    router = await bench.router(worker)
    client = await bench.client(router)
    await client.send(CHUNKED + BAD_CHUNKS[name] + GOOD)
    assert (await client.answer()).status == 400
    assert await client.closed() == b""
    assert not worker.requests
    assert router.server.body_bytes == 0


async def test_too_large_a_body_is_refused_before_it_is_read(bench: Bench) -> None:
    router = await bench.router(await bench.worker(), max_body_bytes=1_000_000)
    client = await bench.client(router)
    await client.send(b"POST /v1/completions HTTP/1.1\r\nHost: r\r\nContent-Length: 600000000\r\n\r\n")
    answer = await client.answer()
    assert (answer.status, answer.json()["error"]["code"]) == (413, "request_too_large")
    await client.send(*[b"x" * 65536] * 20)
    assert router.server.body_bytes == 0


async def test_a_chunked_body_that_grows_too_large_is_refused(bench: Bench) -> None:
    router = await bench.router(await bench.worker(), max_body_bytes=100_000)
    client = await bench.client(router)
    await client.send(CHUNKED, *[b"4000\r\n" + b"x" * 0x4000 + b"\r\n"] * 10)
    assert (await client.answer()).status == 413
    assert router.server.body_bytes == 0


async def test_too_large_a_head_is_refused(bench: Bench) -> None:
    router = await bench.router(await bench.worker(), max_header_bytes=4096)
    fits = await bench.ask(router, post(chat_body(), b"X: " + b"x" * 3900))
    whole = await bench.ask(router, post(chat_body(), b"X: " + b"x" * 4096))
    assert (fits.status, whole.status) == (200, 431)
    client = await bench.client(router)
    await client.send(b"GET /health HTTP/1.1\r\n", *[b"X: %b\r\n" % (b"x" * 500)] * 10)
    assert (await client.answer()).status == 431
    assert await client.closed() == b""


async def test_bodies_share_one_budget(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "MAX_BUFFERED_BODY_BYTES", 100_000)
    router = await bench.router(await bench.worker())
    slow = await bench.client(router)
    await slow.send(post(b"x" * 80_000)[:1000])
    await eventually(lambda: router.server.body_bytes == 80_000)
    refused = await bench.ask(router, post(chat_body(filler="x" * 30_000)))
    assert (refused.status, refused.header("retry-after")) == (503, "1")
    slow.close()
    await eventually(lambda: router.server.body_bytes == 0)
    assert (await bench.ask(router, post(chat_body(filler="x" * 30_000)))).status == 200


async def test_more_connections_than_allowed_are_turned_away(bench: Bench) -> None:
    router = await bench.router(await bench.worker(), max_connections=2)
    clients = [await bench.client(router) for _ in range(2)]
    for client in clients:
        await client.send(GOOD)
        assert (await client.answer()).status == 200
    third = await bench.client(router)
    answer = await third.answer()
    assert (answer.status, answer.header("retry-after")) == (503, "1")
    clients[0].close()
    await eventually(lambda: len(router.server.connections) == 1)
    assert (await bench.ask(router, GOOD)).status == 200


@pytest.mark.parametrize(
    ("sent", "limit_s", "status"),
    [
        (b"", connection_module.IDLE_TIMEOUT_S, None),
        (b"GET /hea", connection_module.HEAD_TIMEOUT_S, 408),
        (post(b"x" * 100)[:-50], connection_module.BODY_TIMEOUT_S + 1, 408),
        (CHUNKED + b"5\r\nab", connection_module.BODY_TIMEOUT_S + 1024, 408),
    ],
    ids=["nothing", "a head's beginning", "half a body", "half a chunk"],
)
async def test_slow_clients_are_ended(bench: Bench, sent: bytes, limit_s: float, status: int | None) -> None:
    router = await bench.router(await bench.worker())
    client = await bench.client(router)
    await client.send(sent)
    await eventually(lambda: router.server.connections)
    (connection,) = router.server.connections
    await eventually(lambda: not sent or connection.buffer or connection.state == connection_module.BODY)
    router.server.sweep(time.monotonic() + limit_s - 2)
    assert connection.state in (connection_module.HEAD, connection_module.BODY)
    router.server.sweep(time.monotonic() + limit_s + 2)
    if status is not None:
        assert (await client.answer()).status == status
    assert await client.closed() == b""


async def test_a_head_that_drips_in_does_not_extend_its_time(bench: Bench) -> None:
    router = await bench.router(await bench.worker())
    client = await bench.client(router)
    start = time.monotonic()
    for number in range(5):
        await client.send(b"X: %d\r\n" % number if number else b"GET /health HTTP/1.1\r\n")
        await eventually(lambda: any(len(c.buffer) >= number * 5 for c in router.server.connections))  # noqa: B023
        router.server.sweep(start + number * 3)
    router.server.sweep(start + connection_module.HEAD_TIMEOUT_S + 1)
    assert (await client.answer()).status == 408


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (post(b"{"), 400, "invalid_json"),
        (post(b""), 400, "invalid_json"),
        (post(b'{"model": "m"}'), 400, "missing_required_parameter"),
        (post(b'{"model": 1, "messages": []}'), 400, "invalid_type"),
        (post(b'{"model": "other", "messages": [{"role":"user","content":"x"}]}'), 404, "model_not_found"),
        (post(chat_body(), path=b"/v1/nothing"), 404, "unknown_path"),
        (post(chat_body(), path=b"/sleep"), 404, "unknown_path"),
        (post(chat_body(), path=b"/v1/load_lora_adapter"), 404, "unknown_path"),
        (post(chat_body(), path=b"/v1/chat/../../sleep"), 404, "unknown_path"),
        (b"GET /v1/chat/completions HTTP/1.1\r\nHost: r\r\n\r\n", 405, "method_not_allowed"),
        (post(chat_body(), path=b"/v1/models"), 405, "method_not_allowed"),
        (b"OPTIONS * HTTP/1.1\r\nHost: r\r\n\r\n", 404, "unknown_path"),
        (b"CONNECT r:80 HTTP/1.1\r\nHost: r\r\n\r\n", 404, "unknown_path"),
    ],
)
async def test_errors_have_openais_shape_and_keep_the_connection(
    bench: Bench, request_bytes: bytes, status: int, code: str
) -> None:
    worker = await bench.worker()
    router = await bench.router(worker, model="m")
    client = await bench.client(router)
    for _ in range(2):
        await client.send(request_bytes)
        answer = await client.answer()
        assert answer.status == status
        assert answer.header("content-type") == "application/json"
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.json()["error"]["code"] == code
    assert not worker.requests


async def test_a_405_says_what_is_allowed(bench: Bench) -> None:
    router = await bench.router(await bench.worker())
    answer = await bench.ask(router, b"DELETE /v1/completions HTTP/1.1\r\nHost: r\r\n\r\n")
    assert (answer.status, answer.header("allow")) == (405, "POST")


async def test_models_are_listed_from_the_pools(bench: Bench) -> None:
    config = fleet([], model="llama/8b")
    pool = config.pools[0].model_copy(update={"adapters": ["lora-1"], "max_context_tokens": 4096, "endpoints": []})
    router = await bench.router(config=config.model_copy(update={"pools": [pool]}))
    client = await bench.client(router)
    await client.send(b"GET /v1/models HTTP/1.1\r\nHost: r\r\n\r\n")
    listed = (await client.answer()).json()
    assert listed["object"] == "list"
    assert [(m["id"], m["object"], m["parent"], m["max_model_len"]) for m in listed["data"]] == [
        ("llama/8b", "model", None, 4096),
        ("lora-1", "model", "llama/8b", 4096),
    ]
    await client.send(b"GET /v1/models/llama%2F8b HTTP/1.1\r\nHost: r\r\n\r\n")
    assert (await client.answer()).json()["id"] == "llama/8b"
    await client.send(b"GET /v1/models/llama/8b HTTP/1.1\r\nHost: r\r\n\r\n")
    assert (await client.answer()).json()["id"] == "llama/8b"
    await client.send(b"GET /v1/models/none HTTP/1.1\r\nHost: r\r\n\r\n")
    missing = await client.answer()
    assert (missing.status, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_bare_workers_are_asked_for_their_models(bench: Bench) -> None:
    async def behave(seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json_answer({"object": "list", "data": [{"id": "m1", "object": "model"}]}))

    async def broken(seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json_answer({"data": completion()}))

    workers = [await bench.worker(behave), await bench.worker(behave), await bench.worker(broken)]
    router = await bench.router(*workers)
    for _ in range(2):
        answer = await bench.ask(router, b"GET /v1/models HTTP/1.1\r\nHost: r\r\n\r\n")
        assert [model["id"] for model in answer.json()["data"]] == ["m1"]
    assert [len(worker.requests) for worker in workers] == [1, 1, 1]
