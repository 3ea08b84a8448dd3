"""The load generator reports what a client saw, and calls nothing complete that is not."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from kvfleet.replay import Outcome, replay
from kvfleet_sim.traces import TraceRow

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nx-kvfleet-worker: w\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def usage(tokens: int, cached: int = 3) -> bytes:
    text = f'{{"choices":[],"usage":{{"prompt_tokens":9,"completion_tokens":{tokens},"prompt_tokens_details":{{"cached_tokens":{cached}}}}}}}'
    return chunk(f"data: {text}\n\n".encode())


TOKEN = chunk(b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n')
DONE = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


@asynccontextmanager
async def server(answer: Callable[[int], bytes]) -> AsyncIterator[str]:
    """Answers the n-th request with `answer(n)` and closes."""
    seen = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        writer.write(answer(seen))
        seen += 1
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"


async def one(answer: bytes, tokens: int = 2) -> Outcome:
    async with server(lambda n: answer) as url:
        [outcome] = await replay([TraceRow(0.0, 9, tokens)], url=url, model="m", timeout_s=5)
    return outcome


async def test_a_complete_stream_is_measured() -> None:
    outcome = await one(HEAD + TOKEN + TOKEN + usage(2) + DONE)
    assert (outcome.ok, outcome.error) == (True, "")
    assert (outcome.prompt_tokens, outcome.cached_tokens, outcome.output_tokens, outcome.worker) == (9, 3, 2, "w")
    assert 0 < outcome.ttft_s <= outcome.e2e_s


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (HEAD + TOKEN, "before [DONE]"),
        (HEAD + TOKEN + usage(2) + DONE[:-5], "before [DONE]"),
        (HEAD + TOKEN + usage(1) + DONE, "1 tokens instead of 2"),
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy", "HTTP 503: busy"),
        (b"not http at all\r\n\r\n", "HTTP 0"),
        (b"", "HTTP 0"),
    ],
)
async def test_what_is_not_complete_is_a_failure_with_its_reason(answer: bytes, words: str) -> None:
    outcome = await one(answer)
    assert not outcome.ok
    assert words in outcome.error


async def test_a_refused_connection_is_a_failure() -> None:
    async with server(lambda n: b"") as url:
        pass
    [outcome] = await replay([TraceRow(0.0, 9, 1)], url=url, model="m", timeout_s=5)
    assert "connection failed" in outcome.error


async def test_every_row_has_its_outcome_in_order_and_is_announced_once() -> None:
    rows = [TraceRow(index * 0.01, 9, index % 3 + 1) for index in range(20)]
    announced: list[Outcome] = []
    by_order = [HEAD + TOKEN * row.output_tokens + usage(row.output_tokens) + DONE for row in rows]
    async with server(lambda n: by_order[n]) as url:
        outcomes = await replay(rows, url=url, model="m", speed=0.5, timeout_s=5, on_done=announced.append)
    assert [outcome.row for outcome in outcomes] == rows
    assert sorted(map(id, announced)) == sorted(map(id, outcomes))
    assert all(outcome.ok for outcome in outcomes)
