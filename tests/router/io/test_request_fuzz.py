"""Whatever bytes come, cut wherever: requests are read alike or refused, never misread, and the reader never fails.

Runs the connection on a transport that only records, so that thousands of cases take a second."""

import asyncio
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet_api.fleetrouter import LimitsSpec
from kvfleet_router.io.connection import ClientConnection
from kvfleet_router.io.request import Request
from kvfleet_router.io.server import Server


class Recorder(asyncio.Transport):
    """A transport without a network."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed
        self.written += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.closed = True

    def close(self) -> None:
        self.closed = True

    abort = close

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        """There is no reading to pause."""

    resume_reading = pause_reading


class Echo:
    """Remembers the requests and answers each with its number."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, str, bytes, dict[bytes, bytes]]] = []

    def handle(self, request: Request, connection: ClientConnection) -> None:
        self.seen.append((request.method, request.path, request.body, request.headers))
        connection.reply(200, b"%d" % len(self.seen))


def read(pieces: Sequence[bytes]) -> tuple[Echo, Recorder, Server]:
    echo = Echo()
    server = Server(echo, LimitsSpec(max_body_bytes=10_000, max_header_bytes=4096))
    connection, transport = ClientConnection(server), Recorder()
    connection.connection_made(transport)
    for piece in pieces:
        connection.data_received(piece)
    return echo, transport, server


TOKEN = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_", min_size=1, max_size=12)
VALUE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=0, max_size=30)
OWN = {"host", "content-length", "transfer-encoding", "connection", "expect", "upgrade", "te", "trailer", "keep-alive"}


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, tuple[bytes, str, bytes]]:
    """A proper request, and what should be read of it."""
    path = "/" + draw(TOKEN)
    query = draw(st.sampled_from(["", "?a=b"]))
    headers = draw(
        st.lists(
            st.tuples(
                TOKEN.filter(lambda name: name.lower() not in OWN and not name.lower().startswith("proxy")), VALUE
            ),
            max_size=5,
        )
    )
    body = draw(st.binary(max_size=200))
    lines = "".join(f"{name}:{draw(st.sampled_from(['', ' ', '  ']))}{value}\r\n" for name, value in headers)
    head = f"POST {path}{query} HTTP/1.1\r\nHost: r\r\n{lines}".encode()
    if draw(st.booleans()):
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body, (b"POST", path, body)
    cuts = sorted({0, len(body), *draw(st.lists(st.integers(0, len(body)), max_size=4))})
    chunks = b"".join(b"%x\r\n%b\r\n" % (b - a, body[a:b]) for a, b in itertools.pairwise(cuts) if b > a)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n", (b"POST", path, body)


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(requests(), min_size=1, max_size=4), st.lists(st.integers(0, 5000), max_size=12))
def test_proper_requests_are_read_alike_however_they_are_cut(
    sent: list[tuple[bytes, tuple[bytes, str, bytes]]], places: list[int]
) -> None:
    data = b"".join(request for request, _ in sent)
    echo, transport, server = read(cut(data, places))
    assert [seen[:3] for seen in echo.seen] == [expected for _, expected in sent]
    assert transport.written.count(b"HTTP/1.1 200 OK") == len(sent)
    assert not transport.closed
    assert server.body_bytes == 0


@given(
    st.lists(requests(), min_size=1, max_size=3),
    st.integers(0, 5000),
    st.binary(min_size=0, max_size=6),
    st.integers(0, 6),
)
def test_a_damaged_request_is_refused_or_read_but_never_fails(
    sent: list[tuple[bytes, tuple[bytes, str, bytes]]], place: int, inserted: bytes, removed: int
) -> None:
    data = b"".join(request for request, _ in sent)
    at = place % (len(data) + 1)
    check_bounds(data[:at] + inserted + data[at + removed :], [at, at + 1, at + len(inserted)])


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_any_bytes_are_refused_or_waited_for_but_never_fail(data: bytes, places: list[int]) -> None:
    check_bounds(data, places)


FRAGMENTS = [
    b"GET / HTTP/1.1\r\n", b"POST /v1/x HTTP/1.1\r\n", b"HEAD / HTTP/1.0\r\n", b"PRI * HTTP/2.0\r\n", b"Host: r\r\n",
    b"Content-Length: 3\r\n", b"Content-Length: 0\r\n", b"Content-Length: 99999\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n", b"Connection: upgrade\r\n", b"Upgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"\r\n", b"\n",
    b"\r", b"0\r\n\r\n", b"3\r\nabc\r\n", b"3;x=y\r\nabc\r\n", b"abc", b" folded\r\n", b": x\r\n", b"X" * 5000,
]  # fmt: skip


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.lists(st.integers(0, 5000), max_size=5))
@settings(max_examples=300)
def test_any_order_of_http_fragments(fragments: list[bytes], places: list[int]) -> None:
    check_bounds(b"".join(fragments), places)


def check_bounds(data: bytes, places: Sequence[int]) -> None:
    """Cut or whole the same requests come out; refused means closed; nothing is kept beyond the limits."""
    whole, transport, server = read([data] if data else [])
    pieces, cut_transport, cut_server = read(cut(data, places))
    assert whole.seen == pieces.seen
    assert transport.closed == cut_transport.closed
    for each in (server, cut_server):
        (connection,) = each.connections
        assert len(connection.buffer) <= 4096 + 4
        assert each.body_bytes == connection.request.reserved_bytes <= 10_000
    if b"HTTP/1.1 4" in transport.written:
        assert transport.closed


@pytest.mark.parametrize("size", [0, 1, 9_999, 10_000, 10_001])
def test_the_body_limit_is_exact(size: int) -> None:
    for data in (
        b"POST / HTTP/1.1\r\nHost: r\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size,
        b"POST / HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\n\r\n"
        + (b"%x\r\n%b\r\n" % (size, b"x" * size) if size else b"")
        + b"0\r\n\r\n",
    ):
        echo, transport, _ = read([data])
        assert len(echo.seen) == (size <= 10_000)
        assert (b"413" in transport.written) == (size > 10_000)
