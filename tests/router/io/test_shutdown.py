"""Leaving: what runs may end, nothing new is taken, and the time for it is bounded."""

import asyncio
import os
import signal
import sys

import httpx
from scripted import (
    PATIENCE_S,
    STREAM_END,
    STREAM_HEAD,
    Bench,
    Seen,
    chat_body,
    completion,
    event,
    eventually,
    fleet,
    json_answer,
    post,
)

RUN = """
import sys, logging
from pathlib import Path
from kvfleet_router.app import run_router
from kvfleet_router.io.config_source import read_config
logging.basicConfig(level="INFO", format="%(message)s")
path = Path(sys.argv[1])
sys.exit(run_router(read_config(path), host="127.0.0.1", port=0, admin_host="127.0.0.1", admin_port=0, config_path=path))
"""


class Gate:
    """A worker that streams one token, waits, and ends."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()

    async def behave(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + event("a"))
        await self.may_end.wait()
        writer.write(event("b") + STREAM_END)


async def test_streams_finish_and_nothing_new_is_taken(bench: Bench) -> None:
    gate = Gate()
    router = await bench.router(await bench.worker(gate.behave))
    streaming, idle = await bench.client(router), await bench.client(router)
    await streaming.send(post(chat_body(stream=True)))
    await streaming.answer(head_only=True)
    await idle.send(b"GET /health HTTP/1.1\r\nHost: r\r\n\r\n")
    assert (await idle.answer()).status == 200

    stopping = asyncio.create_task(router.stop(drain_s=30))
    assert await idle.closed() == b"", "an idle connection is closed at once"
    ready = await bench.ask(router, b"GET /readyz HTTP/1.1\r\nHost: r\r\n\r\n", admin=True)
    assert (ready.status, ready.json()["status"]) == (503, "draining")
    try:
        await bench.client(router)
    except ConnectionRefusedError:
        pass
    else:
        raise AssertionError("the port should be closed")
    assert not stopping.done()

    gate.may_end.set()
    assert (await streaming.closed()).endswith(event("b") + STREAM_END)
    async with asyncio.timeout(PATIENCE_S):
        await stopping


async def test_answers_that_begin_while_leaving_tell_the_client_to_reconnect(bench: Bench) -> None:
    may_answer = asyncio.Event()

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await may_answer.wait()
        writer.write(json_answer(completion()))

    worker = await bench.worker(behave)
    router = await bench.router(worker)
    client = await bench.client(router)
    await client.send(post(chat_body()))
    await eventually(lambda: worker.requests)
    stopping = asyncio.create_task(router.stop(drain_s=30))
    await eventually(lambda: router.server.draining)
    may_answer.set()
    answer = await client.answer()
    assert (answer.json(), answer.header("connection")) == (completion(), "close")
    await stopping


async def test_the_time_to_leave_is_bounded(bench: Bench) -> None:
    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + event("a"))
        await reader.read()

    worker = await bench.worker(behave)
    router = await bench.router(worker)
    client = await bench.client(router)
    await client.send(post(chat_body(stream=True)))
    await client.answer(head_only=True)
    async with asyncio.timeout(PATIENCE_S):
        await router.stop(drain_s=0.05)
    assert await client.closed() == event("a")
    await eventually(lambda: worker.lost == 1)


async def test_stopping_twice_is_harmless(bench: Bench) -> None:
    router = await bench.router(await bench.worker())
    await router.stop(0.0)
    await router.stop(0.0)


async def test_sigterm_lets_a_stream_finish(bench: Bench, tmp_path) -> None:
    gate = Gate()
    worker = await bench.worker(gate.behave)
    path = tmp_path / "fleet.json"
    path.write_text(fleet([worker]).to_json())
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        RUN,
        str(path),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stderr is not None
        line = ""
        async with asyncio.timeout(30):
            while "serving on" not in line:
                line = (await process.stderr.readline()).decode()
                assert line, "the router ended"
        port = int(line.split("127.0.0.1:")[1].split(",")[0])
        async with (
            httpx.AsyncClient(timeout=PATIENCE_S) as client,
            client.stream(
                "POST", f"http://127.0.0.1:{port}/v1/chat/completions", content=chat_body(stream=True)
            ) as answer,
        ):
            pieces = answer.aiter_bytes()
            assert b'"a"' in await anext(pieces)
            process.send_signal(signal.SIGTERM)
            while "leaving" not in line:
                line = (await process.stderr.readline()).decode()
            gate.may_end.set()
            rest = b"".join([piece async for piece in pieces])
            assert rest.endswith(b"data: [DONE]\n\n")
        async with asyncio.timeout(PATIENCE_S):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        process._transport.close()  # type: ignore[attr-defined]
