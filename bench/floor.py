"""The floor under any router on uvloop: bytes from each client straight to one worker, bytes from the worker straight back.

    python bench/floor.py PORT WORKER_PORT [WORKER_PORT…]

It reads nothing, decides nothing and counts nothing; what it costs is the kernel's TCP and the event loop's four steps for a
request (read, write, read, write). `dataplane.py` measures it beside the routers.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from typing import cast

import uvloop


class Upstream(asyncio.Protocol):
    def __init__(self, client: asyncio.Transport) -> None:
        self.client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.client.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.client.close()


class Client(asyncio.Protocol):
    def __init__(self, worker: int) -> None:
        self.worker = worker
        self.early: list[bytes] = []
        self.upstream: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.connecting = asyncio.ensure_future(self.connect())

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        _, upstream = await loop.create_connection(lambda: Upstream(self.transport), "127.0.0.1", self.worker)
        self.upstream = upstream.transport
        self.upstream.write(b"".join(self.early))

    def data_received(self, data: bytes) -> None:
        if self.upstream is None:
            self.early.append(data)
        else:
            self.upstream.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.upstream is not None:
            self.upstream.close()


async def main(port: int, workers: list[int]) -> None:
    turn = itertools.cycle(workers)
    server = await asyncio.get_running_loop().create_server(lambda: Client(next(turn)), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), [int(port) for port in sys.argv[2:]]))
