"""Between pods: one pub/sub channel of a Redis server. Nothing is stored there, so a full, emptied or new server is as good.

One connection publishes, one listens. What is to be told waits in a bounded list, and all that waits goes out in one round
trip, so a slow server makes batches larger, not routers slower. A connection that fails, or over which nothing comes (a router
hears its own messages, too, several times a second), is given up and made anew after a pause of at most a second; until then
this router decides with what it knows itself.

The password is read from its file for each connection. It needs the rights `+publish +subscribe +ping &kvfleet:*`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis.asyncio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from kvfleet_router.core.sharewire import MAX_MESSAGE_BYTES
from kvfleet_router.io.files import read_bounded
from kvfleet_router.io.sharing.sharer import PREFIX, Bus, Hear, connected

log = logging.getLogger("kvfleet.router")

TIMEOUT_S = 1.0
SILENCE_S = 2.0
"""Own messages come back every quarter of a second: after so long without any the connection is dead."""
MAX_WAITING = 512
"""Messages waiting to be published; the oldest go first."""
MAX_OWN = 1024
PAUSE_S = (0.05, 0.5)
"""First and longest mean pause between tries to connect."""
MAX_PASSWORD_BYTES = 4096
CANCEL_AGAIN_S = 0.1
"""A library that waits for several things at once may take a cancellation for the end of one of them."""


class BadRedis(ValueError):
    """The server's address or what belongs to it cannot be used: says what, and the remedy."""


@dataclass(frozen=True, slots=True)
class Redis:
    """A server, and the channel of one fleet there."""

    url: str
    """`redis://`, `rediss://` (TLS) or `unix://`."""
    channel: str
    password_file: Path | None = None
    ca_file: Path | None = None
    """Certificates to trust."""

    def bus(self) -> RedisBus:
        """Raises BadRedis."""
        return RedisBus(self)


class RedisBus(Bus):
    def __init__(self, server: Redis) -> None:
        """Raises BadRedis."""
        self._url, self._channel = server.url, server.channel
        self._password_file, self._ca_file = server.password_file, server.ca_file
        parts = urlsplit(server.url)
        self.address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2] or parts.path}"
        """Fit to be logged."""
        if server.ca_file is not None and parts.scheme != "rediss":
            raise BadRedis(f"{self.address}: certificates to trust go with TLS: use rediss://, or leave them out")
        self._client_arguments()
        self._failures: Counter[str] = Counter()
        self._lost = 0
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._own: dict[bytes, None] = {}
        """Heads of those whose messages went out here: what comes back of them is no news."""
        self._publishing = self._listening = self._closed = False
        self._was_reachable = True
        self._probe: tuple[bytes, float] | None = None
        self._round_trip_s = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, hear: Hear) -> None:
        self._hear = hear
        self._wanted = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._tasks = [
            self._loop.create_task(self._keep(self._publish, "publishing")),
            self._loop.create_task(self._keep(self._listen, "listening")),
        ]

    def send(self, messages: Sequence[bytes]) -> None:
        if messages:
            for message in messages:
                self._remember(message[4:12])
            self._lost += max(len(self._waiting) + len(messages) - MAX_WAITING, 0)
            self._waiting.extend(messages)
            self._wanted.set()

    async def close(self) -> None:
        """What is still to be said is said, if that is quickly done."""
        if self._publishing:
            deadline = self._loop.time() + 0.2
            while self._waiting and self._loop.time() < deadline:  # noqa: ASYNC110 - bounded, and the last thing done
                await asyncio.sleep(0.005)
        self._closed = True
        left = set(self._tasks)
        while left:
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)

    @property
    def reachable(self) -> bool:
        return self._publishing and self._listening

    def others(self, routers: int) -> int:
        return max(routers - 1, 0)

    # Connections

    async def _keep(self, work: Callable[[redis.asyncio.Redis], Awaitable[None]], doing: str) -> None:
        """Do the work over a connection, over the next one when it fails, for ever."""
        pause_s = PAUSE_S[0]
        while not self._closed:
            client = None
            began = self._loop.time()
            try:
                client = redis.asyncio.Redis.from_url(self._url, **self._client_arguments())
                await work(client)
            except Exception as error:  # whatever a server or a library may come up with
                self._failures[_cause(error)] += 1
                self._report(f"{doing} at {self.address} failed: {type(error).__name__}: {error}")
            finally:
                setattr(self, f"_{doing}", False)
                if client is not None:
                    await _close(client)
            pause_s = PAUSE_S[0] if self._loop.time() - began > 5.0 else min(2 * pause_s, PAUSE_S[1])
            await asyncio.sleep(random.uniform(0.5, 1.5) * pause_s)

    async def _publish(self, client: redis.asyncio.Redis) -> None:
        await client.ping()
        self._publishing = True
        self._report("")
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            batch = [*self._waiting]
            self._waiting.clear()
            if self._probe is None or time.monotonic() - self._probe[1] > SILENCE_S:
                self._probe = (batch[-1], time.monotonic())
            try:
                pipeline = client.pipeline(transaction=False)
                for message in batch:
                    pipeline.publish(self._channel, message)
                await pipeline.execute()
            except BaseException:
                room = MAX_WAITING - len(self._waiting)
                self._waiting.extendleft(reversed(batch[max(len(batch) - room, 0) :]))  # twice is better than never
                self._wanted.set()
                raise

    async def _listen(self, client: redis.asyncio.Redis) -> None:
        subscription = client.pubsub()
        try:
            await subscription.subscribe(self._channel)
            while True:
                message: dict[str, Any] | None = await subscription.get_message(timeout=SILENCE_S)
                if message is None:
                    raise RedisTimeoutError(f"nothing came for {SILENCE_S:g} s")
                if message["type"] == "subscribe":
                    self._listening = True
                    self._report("")
                elif message["type"] == "message":
                    self._take(message["data"])
        finally:
            await _close(subscription)

    def _take(self, message: bytes) -> None:
        if self._probe is not None and message == self._probe[0]:
            self._round_trip_s = time.monotonic() - self._probe[1]
            self._probe = None
        if message[4:12] not in self._own:
            self._hear((message[: MAX_MESSAGE_BYTES + 1],))

    def _remember(self, sender: bytes) -> None:
        if sender not in self._own:
            if len(self._own) >= MAX_OWN:
                del self._own[next(iter(self._own))]
            self._own[sender] = None

    def _client_arguments(self) -> dict[str, Any]:
        """Raises BadRedis."""
        arguments: dict[str, Any] = {
            "socket_timeout": TIMEOUT_S,
            "socket_connect_timeout": TIMEOUT_S,
            "single_connection_client": False,
            "retry": None,
        }
        try:
            if self._password_file is not None:
                password = read_bounded(self._password_file, MAX_PASSWORD_BYTES).decode().strip()
                arguments["password"] = password
            if self._ca_file is not None:
                self._ca_file.read_bytes()
                arguments["ssl_ca_certs"] = str(self._ca_file)
            redis.asyncio.ConnectionPool.from_url(self._url)
        except (OSError, ValueError) as error:
            raise BadRedis(f"{self.address}: {error}") from None
        return arguments

    # What is told about it

    def _report(self, problem: str) -> None:
        """Log when it begins and when it ends, not each try."""
        if problem and self._was_reachable:
            self._was_reachable = False
            log.warning("replicas of the router are not told any more, each decides alone: %s", problem)
        elif not problem and self.reachable and not self._was_reachable:
            self._was_reachable = True
            log.info("replicas of the router are told again, over %s", self.address)

    def metrics(self) -> Iterable[Metric]:
        failures = CounterMetricFamily(PREFIX + "failures", "Redis connections that failed.", labels=("cause",))
        for cause, count in self._failures.items():
            failures.add_metric((cause,), count)
        lost = CounterMetricFamily(PREFIX + "lost_messages", "Messages dropped because too many waited for Redis.")
        lost.add_metric((), self._lost)
        round_trip = GaugeMetricFamily(
            PREFIX + "round_trip_seconds", "From publishing a message at Redis until it came back, the last time."
        )
        waited_s = 0.0 if self._probe is None else time.monotonic() - self._probe[1]
        round_trip.add_metric((), max(self._round_trip_s, waited_s))
        return [connected("redis", self.reachable), failures, lost, round_trip]


def _cause(error: Exception) -> str:
    """One of few words."""
    if isinstance(error, BadRedis):
        return "configuration"
    if isinstance(error, AuthenticationError | NoPermissionError):
        return "denied"
    if isinstance(error, RedisTimeoutError | TimeoutError):
        return "timeout"
    if isinstance(error, ResponseError):
        return "response"
    return "connection" if isinstance(error, RedisError | OSError) else "other"


async def _close(what: Any) -> None:
    """A connection that is dead already need not be closed well."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await what.aclose()
    except Exception as error:
        log.debug("closing: %s", error)
