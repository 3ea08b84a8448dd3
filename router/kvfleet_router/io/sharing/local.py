"""Between the processes of one pod: datagrams over Unix sockets in a directory that only they can enter.

Each process has one socket under its own name and sends to the others' names; one that is dead or not yet there is left out.
The kernel queues few datagrams (ten, by default), so what it does not take waits here, and goes first at the next `send`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, Metric

from kvfleet_router.core.sharewire import MAX_MESSAGE_BYTES
from kvfleet_router.io.sharing.sharer import PREFIX, Bus, Hear, connected
from kvfleet_router.io.sockets import bind_unix

MAX_WAITING = 512
"""Messages that wait for one process; the oldest go first."""
MAX_HEARD_AT_ONCE = 64
RECEIVE_BUFFER_BYTES = 1 << 20


class LocalBus(Bus):
    def __init__(self, directory: Path, name: str, others: Sequence[str], *, relay: str | None = None) -> None:
        """`relay`: one more, who passes on what it hears to other pods, and brings what they tell."""
        self._siblings, self._relayed = len(others), relay is not None
        self._path = directory / name
        self._others = {
            str(directory / other): deque[bytes](maxlen=MAX_WAITING) for other in (*others, *([relay] if relay else []))
        }
        self._lost = 0

    def start(self, hear: Hear) -> None:
        """Raises OSError where the socket cannot be had."""
        self._hear = hear
        self._socket = bind_unix(self._path, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._read)

    def send(self, messages: Sequence[bytes]) -> None:
        for path, waiting in self._others.items():
            self._lost += max(len(waiting) + len(messages) - MAX_WAITING, 0)
            waiting.extend(messages)
            try:
                while waiting:
                    self._socket.sendto(waiting[0], path)
                    waiting.popleft()
            except BlockingIOError:
                pass
            except OSError:  # not there: it will be told everything when it comes
                waiting.clear()

    def _read(self) -> None:
        heard: list[bytes] = []
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while len(heard) < MAX_HEARD_AT_ONCE:
                heard.append(self._socket.recv(MAX_MESSAGE_BYTES + 1))
        if heard:
            self._hear(heard)

    async def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._path.unlink(missing_ok=True)

    @property
    def reachable(self) -> bool:
        return True

    def others(self, routers: int) -> int:
        return max(routers - 1, self._siblings) if self._relayed else self._siblings

    def metrics(self) -> Iterable[Metric]:
        lost = CounterMetricFamily(
            PREFIX + "lost_messages", "Messages that a process of this pod did not take in time."
        )
        lost.add_metric((), self._lost)
        return [connected("processes", True), lost]
