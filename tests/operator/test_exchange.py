"""One HTTP request to a pod: bounded in time and size, with one kind of failure."""

import asyncio
import contextlib

import httpx
import pytest

from kvfleet_operator.exchange import NoAnswer, base_url, exchange


@contextlib.asynccontextmanager
async def pod(answer):
    """A pod that gives each request this answer; None: none at all."""
    asked, at_work = [], []

    async def serve(reader, writer):
        at_work.append(asyncio.current_task())
        with contextlib.suppress(ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            lengths = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")]
            asked.append(head + await reader.readexactly(sum(lengths)))
            if answer is None:
                await reader.read()
            else:
                writer.write(answer)
            writer.close()
            await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        async with httpx.AsyncClient(trust_env=False) as client:
            yield client, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
        await asyncio.gather(*at_work)


def ok(body, status=b"200 OK"):
    return b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


async def test_status_and_body_are_passed_on_whatever_they_are():
    async with pod(ok(b"no", b"500 Oops")) as (client, url, asked):
        assert await exchange(client, "POST", f"{url}/x", timeout_s=5, json={"a": "b"}) == (500, b"no")
    assert asked[0].startswith(b"POST /x ") and asked[0].endswith(b'{"a":"b"}')


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "did not answer within 0.05 s"),
        (ok(b"x" * 11), "more than 10 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\n" + b"x" * 1024, "more than 10 bytes"),
        (b"", "127.0.0.1"),
        (b"nonsense\r\n\r\n", "127.0.0.1"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", "127.0.0.1"),
    ],
)
async def test_what_is_no_answer_is_told_with_the_address(answer, words):
    async with pod(answer) as (client, url, _):
        with pytest.raises(NoAnswer, match=words):
            await exchange(client, "GET", url, timeout_s=0.05 if answer is None else 5, max_bytes=10)


async def test_nobody_listening_is_no_answer(unused_tcp_port):
    async with httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(NoAnswer, match=f"127.0.0.1:{unused_tcp_port}"):
            await exchange(client, "GET", base_url("127.0.0.1", unused_tcp_port), timeout_s=5)


def test_addresses_of_both_families_make_urls():
    assert base_url("10.0.0.1", 80) == "http://10.0.0.1:80"
    assert base_url("fd00::1", 80) == "http://[fd00::1]:80"
