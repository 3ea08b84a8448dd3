"""Heads read by comparison give what parsing them would give, and only heads that parsing would accept."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import STREAM_END, STREAM_HEAD, Bench, Seen, chat_body, completion, event, json_answer, post

from kvfleet_router.io.request import BadRequest, Request
from kvfleet_router.io.templates import MAX_TEMPLATE_BYTES, HeadTemplate

HEAD = b"POST /v1/chat/completions?a=b HTTP/1.1\r\nHost: h\r\n%bAccept: */*\r\nX-Request-Id: 7\r\n\r\n"
FIELDS = (
    "method",
    "target",
    "path",
    "headers",
    "forward",
    "http10",
    "keep_alive",
    "expects_continue",
    "head_complete",
    "body",
    "parser",
)


def head(length):
    return HEAD % (b"Content-Length: %b\r\n" % length)


def parsed(data):
    request = Request()
    return request, request.read_head(data)


def template(data=None):
    data = head(b"11") if data is None else data
    request, _ = parsed(data)
    return HeadTemplate.of(data, request)


@given(st.integers(0, 10**9 - 1), st.binary(max_size=20))
def test_a_known_head_is_read_as_the_parser_reads_it(length, body):
    data = head(b"%d" % length)
    request, found, size = template().read(data + body)
    again, expected = parsed(data)
    assert (found, size) == (expected, len(data))
    assert [getattr(request, name) for name in FIELDS] == [getattr(again, name) for name in FIELDS]


@given(st.binary(max_size=12) | st.text("0123456789+-_x., \t", max_size=12).map(str.encode))
def test_a_length_that_the_parser_refuses_is_not_read_by_comparison(length):
    data = head(length)
    known = template().read(data)
    try:
        request, expected = parsed(data)
    except BadRequest:
        assert known is None
    else:
        if known is not None:
            assert (known[1], known[0].headers, known[2]) == (expected, request.headers, len(data))


@given(st.data())
def test_a_head_that_differs_anywhere_is_parsed(data):
    known = head(b"11")
    place = data.draw(st.integers(0, len(known) - 1))
    changed = bytearray(known)
    changed[place] = data.draw(st.integers(0, 255).filter(lambda value: value != known[place]))
    read = template().read(bytes(changed))
    if read is not None:
        assert known[place : place + 1].isdigit() and changed[place : place + 1].isdigit()
        assert read[1] == parsed(bytes(changed))[1]


@pytest.mark.parametrize("cut", [1, 20, 60, len(head(b"11")) - 1])
def test_a_part_of_a_head_waits_for_the_rest(cut):
    assert template().read(head(b"11")[:cut]) is None


@pytest.mark.parametrize(
    "data",
    [
        HEAD % b"Transfer-Encoding: chunked\r\n",
        HEAD % b"Content-Length: 5\r\nExpect: 100-continue\r\n",
        HEAD % b"",
        HEAD % (b"Content-Length: 5\r\nX: %b\r\n" % (b"x" * MAX_TEMPLATE_BYTES)),
    ],
)
def test_heads_that_are_better_parsed_each_time_make_no_template(data):
    assert template(data) is None


def test_what_one_request_does_to_its_headers_the_next_does_not_see():
    known = template()
    first, _, _ = known.read(head(b"1"))
    first.headers[b"x-tenant-id"] = b"one"
    first.drop({b"accept"})
    second, _, _ = known.read(head(b"2"))
    assert b"x-tenant-id" not in second.headers
    assert b"Accept" in second.forward


@pytest.mark.parametrize("cut", [1, 30, 63, 64, 65, 66, 70, 90])
async def test_answers_with_known_heads_are_passed_on_however_they_are_cut(bench: Bench, cut: int) -> None:
    texts = iter(["first", "second " * 30, "3"])

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = json_answer(completion(next(texts)))
        writer.write(data[:cut])
        await writer.drain()
        await asyncio.sleep(0.002)  # let the router read what came: there is nothing to wait for on this side
        writer.write(data[cut:])

    worker = await bench.worker(behave)
    app = await bench.router(worker)
    client = await bench.client(app)
    for text in ("first", "second " * 30, "3"):
        await client.send(post(chat_body()))
        answer = await client.answer()
        assert answer.json() == completion(text)
        assert answer.header("content-length") == str(len(answer.raw))
        assert answer.header("content-type") == "application/json"
    assert worker.connections == 1


@pytest.mark.parametrize("in_one_write", [True, False])
async def test_bytes_behind_an_answer_with_a_known_head_never_reach_a_client(bench: Bench, in_one_write: bool) -> None:
    smuggled = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbad"

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = json_answer(completion())
        if len(worker.requests) != 2:
            writer.write(data)
        elif in_one_write:
            writer.write(data + smuggled)
        else:
            writer.write(data[:-9])
            await writer.drain()
            await asyncio.sleep(0.002)  # as above
            writer.write(data[-9:] + smuggled)

    worker = await bench.worker(behave)
    app = await bench.router(worker)
    client = await bench.client(app)
    for _ in range(3):
        await client.send(post(chat_body()))
        answer = await client.answer()
        assert (answer.status, answer.json()) == (200, completion())
    assert worker.connections == 2


async def test_plain_chunks_are_passed_on_beside_odd_ones(bench: Bench) -> None:
    """Chunks that came whole are not shown to the parser, all else is; where one ends and the other begins, nothing is lost."""
    pieces = [
        event("a"),
        event("b"),
        event("c") + event("d"),
        event("e")[:10],
        event("e")[10:],
        b"5;x=y\r\nhello\r\n",
        event("f"),
        b"00A\r\n0123456789\r\n",
        event("g"),
        STREAM_END,
    ]

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.002)  # as above

    worker = await bench.worker(behave)
    app = await bench.router(worker)
    client = await bench.client(app)
    for _ in range(2):
        await client.send(post(chat_body(stream=True)))
        assert (await client.answer()).raw == b"".join(pieces)
    assert worker.connections == 1


@pytest.mark.parametrize(
    "wrong", [b"0x3\r\nabc\r\n", b"+3\r\nabc\r\n", b"3\r\nabcd\r\n", b"4\r\nabc\r\n\r\n", b"z\r\nabc\r\n"]
)
async def test_a_chunk_that_is_none_cuts_the_stream_and_is_not_passed_on(bench: Bench, wrong: bytes) -> None:
    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + event("a"))
        await writer.drain()
        await asyncio.sleep(0.002)  # as above
        writer.write(wrong)

    client = await bench.client(await bench.router(await bench.worker(behave)))
    await client.send(post(chat_body(stream=True)))
    await client.answer(head_only=True)
    assert await client.closed() == event("a")
