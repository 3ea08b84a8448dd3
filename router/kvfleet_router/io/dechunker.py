"""Takes the chunked framing off an answer, for HTTP/1.0 clients, which do not know it."""

from __future__ import annotations

from collections.abc import Callable

import httptools


class Dechunker:
    """`feed` takes the body as it came; the bytes inside go to `write`."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        parser = httptools.HttpResponseParser(self)
        parser.feed_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        self.feed = parser.feed_data

    def close(self) -> None:
        """Let go of whoever was written to: parser and this hold each other until the garbage collector comes."""
        self._write = len

    def on_body(self, body: bytes) -> None:
        self._write(body)
