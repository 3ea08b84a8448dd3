"""One publisher followed: a SUB socket, and a DEALER for each replay, read as file descriptors of the event loop.

ZMQ's file descriptor only tells that something may have changed: each time, messages are read until there are none. All feeds
together take at most BUDGET_S of one turn of the loop, so that requests are not kept waiting, and among themselves take
turns of a few messages, so that one with much to tell does not let the others' queues run over (`Turns`). The socket's
monitor tells when a connection was made: from then on the publisher may be another process (see core/kvevents/stream.py).

Nothing that comes is trusted: message sizes and queues are bounded, and what has not the form of a batch is counted.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvfleet_router.core.kvevents.stream import Stream
from kvfleet_router.core.kvevents.wire import MAX_PAYLOAD_BYTES

BUDGET_S = 0.002
SLICE_MESSAGES = 4
"""That a feed reads before it is the next one's turn."""
QUEUE_MESSAGES = 4096
REPLAY_TIMEOUT_S = 3.0
"""Without a message of the answer."""
RECONNECT_MS, RECONNECT_MAX_MS = 100, 5000
END_OF_REPLAY = b"\xff" * 8
SEQUENCE_BYTES = 8
_CONNECTED = zmq.Event.HANDSHAKE_SUCCEEDED


class Turns:
    """Who has something to read, in the order in which they said so. Use within a running event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Callable[[], bool]] = deque()
        self._known: set[Callable[[], bool]] = set()
        self._scheduled = False

    def want(self, read: Callable[[], bool]) -> None:
        """Let `read` have a turn soon. It reads a slice and returns whether there may be more. Descriptors say so again and
        again until all is read: that counts once."""
        if read not in self._known:
            self._known.add(read)
            self._waiting.append(read)
            self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        waiting, until = self._waiting, time.perf_counter() + BUDGET_S
        try:
            while waiting:
                read = waiting.popleft()
                self._known.discard(read)
                if read():
                    self.want(read)
                if time.perf_counter() >= until:
                    break
        finally:  # also where one raised: the others go on
            if waiting:
                self._schedule()


class Feed:
    """Use within a running event loop; `close` ends it."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], turns: Turns, stream: Stream, events_url: str,
        replay_url: str | None, on_malformed: Callable[[], None],
    ) -> None:  # fmt: skip
        """Raises ValueError where a URL is none."""
        self._turns = turns
        self._context = context
        self._stream = stream
        self._replay_url = replay_url
        self._on_malformed = on_malformed
        self._loop = asyncio.get_running_loop()
        self._replay: zmq.Socket[bytes] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._closed = False
        self._events = self._socket(zmq.SUB)
        self._events.subscribe(b"")
        self._monitor = self._events.get_monitor_socket(int(_CONNECTED))
        self._add(self._events, self._hear)
        self._add(self._monitor, self._watch)
        try:
            self._events.connect(events_url)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"{events_url}: {error}") from None
        self._ask_if_wanted()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._end_replay()
        for socket in (self._events, self._monitor):
            self._loop.remove_reader(_descriptor(socket))
        self._events.disable_monitor()
        self._monitor.close(linger=0)
        self._events.close(linger=0)

    # -- what is published ------------------------------------------------------------------------------------------------

    def _hear(self) -> bool:
        stream = self._stream

        def take(frames: list[bytes]) -> None:
            if len(frames) == 3 and len(frames[1]) == SEQUENCE_BYTES:
                stream.heard(int.from_bytes(frames[1], "big"), frames[2])
            else:
                self._on_malformed()

        read = self._read(self._events, take)
        self._ask_if_wanted()
        return read == SLICE_MESSAGES

    def _watch(self) -> bool:
        def take(frames: list[bytes]) -> None:
            if parse_monitor_message(frames)["event"] == _CONNECTED:
                self._stream.connected()

        read = self._read(self._monitor, take)
        self._ask_if_wanted()
        return read == SLICE_MESSAGES

    # -- replays ----------------------------------------------------------------------------------------------------------

    def _ask_if_wanted(self) -> None:
        """Send the replay request that the stream wants, if none is under way."""
        first = self._stream.wants_replay
        if first is None or self._replay is not None or self._closed:
            return
        assert self._replay_url is not None
        socket = self._replay = self._socket(zmq.DEALER)
        try:
            socket.connect(self._replay_url)
            socket.send_multipart((b"", first.to_bytes(SEQUENCE_BYTES, "big")), zmq.NOBLOCK)
        except (zmq.ZMQError, OverflowError):
            self._replay_over(ok=False)
            return
        self._add(socket, self._hear_replay)
        self._wait()

    def _hear_replay(self) -> bool:
        socket = self._replay
        if socket is None:
            return False
        ended = False

        def take(frames: list[bytes]) -> None:
            nonlocal ended
            sequence = frames[-2] if len(frames) >= 3 else b""
            if sequence == END_OF_REPLAY:
                ended = True
            elif len(sequence) == SEQUENCE_BYTES and not ended:
                self._stream.replayed(int.from_bytes(sequence, "big"), frames[-1])
            else:
                self._on_malformed()

        read = self._read(socket, take)
        if ended:
            self._replay_over(ok=True)
        elif read:
            self._wait()
        return read == SLICE_MESSAGES

    def _wait(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self._loop.call_later(REPLAY_TIMEOUT_S, self._replay_over, False)

    def _replay_over(self, ok: bool) -> None:
        self._end_replay()
        self._stream.replay_ended(ok)
        if self._stream.wants_replay is not None:  # not from within itself: it may fail at once, again and again
            self._loop.call_soon(self._ask_if_wanted)

    def _end_replay(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        socket, self._replay = self._replay, None
        if socket is not None:
            self._loop.remove_reader(_descriptor(socket))
            socket.close(linger=0)

    # -- sockets ----------------------------------------------------------------------------------------------------------

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        return socket

    def _add(self, socket: zmq.Socket[bytes], read: Callable[[], bool]) -> None:
        self._loop.add_reader(_descriptor(socket), self._turns.want, read)
        self._turns.want(read)  # what came before the reader was there is not told again

    def _read(self, socket: zmq.Socket[bytes], take: Callable[[list[bytes]], None]) -> int:
        """Read a slice of what there is. Returns how many messages: fewer than a slice where that was all."""
        count = 0
        while count < SLICE_MESSAGES and not self._closed and not socket.closed:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:  # none is left (zmq.Again), or the socket fails
                break
            count += 1
            take(frames)
        return count


def _descriptor(socket: zmq.Socket[bytes]) -> int:
    return int(socket.getsockopt(zmq.FD))
