"""Router replicas and a real Redis server that is killed, stopped, filled, locked, and started again: requests never notice, and
as soon as it is well again the replicas know of each other."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import orjson
import pytest
from redis.exceptions import OutOfMemoryError
from redis_server import CHANNEL, RedisServer
from scripted import (
    PATIENCE_S,
    Bench,
    ScriptedWorker,
    Seen,
    chat_body,
    completion,
    eventually,
    fleet,
    json_answer,
    post,
)

from kvfleet_router.app import RouterApp
from kvfleet_router.core.sharewire import EVERYONE, Body, encode
from kvfleet_router.io.auth import ApiKeys
from kvfleet_router.io.sharing.redis_bus import BadRedis, Redis

CERTIFICATES = Path(__file__).parent / "certificates"


@pytest.fixture
async def server(tmp_path: Path, unused_tcp_port: int) -> AsyncIterator[RedisServer]:
    server = RedisServer(tmp_path, unused_tcp_port)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


class Slow:
    """A worker that answers when it may."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()

    async def behave(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.may_answer.wait()
        writer.write(json_answer(completion()))


class Replicas:
    """Routers before the same worker, all at one Redis server."""

    def __init__(self, bench: Bench, worker: ScriptedWorker, address: Redis) -> None:
        self._bench, self.worker, self.address = bench, worker, address
        self.routers: list[RouterApp] = []

    async def join(
        self, count: int = 1, *, address: Redis | None = None, strategy: str = "kvfleet", keys: Path | None = None
    ) -> RouterApp:
        config = fleet([self.worker], strategy=strategy).model_copy(update={"routers": 2})
        for _ in range(count):
            app = RouterApp(
                config, bus=(address or self.address).bus(), api_keys=None if keys is None else ApiKeys(keys)
            )
            await app.start()
            self._bench.on_close(app.stop, 0.0)
            self.routers.append(app)
        return self.routers[-1]

    async def know_each_other(self) -> None:
        others = len(self.routers) - 1
        await eventually(lambda: all(app.sharer.sharing.peers == others for app in self.routers))

    def elsewhere(self, app: RouterApp) -> int:
        return app.dispatcher.workers()[0].elsewhere.in_flight

    async def ask(self, app: RouterApp, text: str = "hi") -> int:
        body = chat_body(messages=[{"role": "user", "content": text}])
        return (await self._bench.ask(app, post(body))).status

    def asking(self, app: RouterApp) -> asyncio.Task[int]:
        return asyncio.create_task(self.ask(app))

    async def metrics(self, app: RouterApp) -> dict[str, float]:
        values = await self._bench.metrics(app)
        prefix = "kvfleet_router_sharing_"
        return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


@pytest.fixture
async def slow() -> Slow:
    return Slow()


@pytest.fixture
async def replicas(server: RedisServer, bench: Bench, slow: Slow) -> Replicas:
    return Replicas(bench, await bench.worker(slow.behave), server.address)


@pytest.fixture
async def pair(replicas: Replicas) -> Replicas:
    await replicas.join(2)
    await replicas.know_each_other()
    return replicas


async def test_a_keys_limit_holds_for_both_together(
    replicas: Replicas, bench: Bench, slow: Slow, tmp_path: Path
) -> None:
    slow.may_answer.set()
    file = tmp_path / "keys"
    file.write_text(f"alice:{sha256(b'secret').hexdigest()} requests-per-minute=3\n")
    await replicas.join(2, keys=file)
    await replicas.know_each_other()
    one, other = replicas.routers
    request = post(chat_body(), b"authorization: Bearer secret")
    assert [(await bench.ask(one, request)).status for _ in range(3)] == [200, 200, 200]
    async with asyncio.timeout(PATIENCE_S):
        while (account := other._api_keys._accounts["alice"])._requests._level >= 1.0:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.002)
    assert (await bench.ask(other, request)).status == 429
    assert (account.requests, account.limited_requests) == (0, 1)


async def test_what_one_has_in_flight_the_other_knows(pair: Replicas, slow: Slow) -> None:
    one, other = pair.routers
    asked = pair.asking(one)
    await eventually(lambda: pair.elsewhere(other) == 1)
    slow.may_answer.set()
    assert await asked == 200
    await eventually(lambda: pair.elsewhere(other) == 0)
    shown = await pair.metrics(other)
    assert (shown['connected{over="redis"}'], shown["peers"], shown["expected_peers"]) == (1, 1, 1)
    assert 0 < shown["round_trip_seconds"] < PATIENCE_S
    assert other.dispatcher.replicas.heard == 1


async def test_a_newcomer_is_told_loads_and_prefixes(pair: Replicas, slow: Slow) -> None:
    one, other = pair.routers
    slow.may_answer.set()
    text = "a long prompt, the same again and again " * 100
    assert await pair.ask(one, text) == 200
    blocks = len(one.dispatcher.workers()[0].cache)
    assert blocks > 10
    await eventually(lambda: len(other.dispatcher.workers()[0].cache) == blocks)
    slow.may_answer.clear()
    asked = pair.asking(one)
    late = await pair.join()
    await eventually(lambda: pair.elsewhere(late) == 1 and late.sharer.sharing.caught_up)
    assert len(late.dispatcher.workers()[0].cache) >= blocks
    slow.may_answer.set()
    await asked


async def test_a_router_that_dies_counts_no_more_and_one_that_leaves_says_so(pair: Replicas, slow: Slow) -> None:
    one, other = pair.routers
    asked = pair.asking(one)
    await eventually(lambda: pair.elsewhere(other) == 1)
    await one.sharer._bus.close()  # as if its network were gone
    await eventually(lambda: (pair.elsewhere(other), other.sharer.sharing.peers) == (0, 0))
    third = await pair.join()
    await eventually(lambda: other.sharer.sharing.peers == 1)
    await third.stop(0.0)
    await eventually(lambda: other.sharer.sharing.peers == 0)
    slow.may_answer.set()
    await asked


OUTAGES: dict[str, tuple[Callable[[RedisServer], object], Callable[[RedisServer], object]]] = {
    "killed": (RedisServer.stop, RedisServer.start),
    "stopped": (lambda server: server.signal(signal.SIGSTOP), lambda server: server.signal(signal.SIGCONT)),
}


@pytest.mark.parametrize("outage", OUTAGES)
async def test_requests_are_answered_while_redis_is_away_and_all_is_known_afterwards(
    pair: Replicas, server: RedisServer, slow: Slow, outage: str
) -> None:
    away, back = OUTAGES[outage]
    one, other = pair.routers
    slow.may_answer.set()
    await _done(away(server))
    text = "placed while nobody could be told " * 100
    for app in pair.routers:
        assert [await pair.ask(app, text if app is one else "hi") for _ in range(5)] == [200] * 5
    slow.may_answer.clear()
    asked = pair.asking(one)  # before anybody has noticed
    await eventually(lambda: not any(app.sharer._bus.reachable or app.sharer.sharing.peers for app in pair.routers))
    shown = await pair.metrics(one)
    assert (shown['connected{over="redis"}'], shown["peers"]) == (0, 0)
    assert sum(value for name, value in shown.items() if name.startswith("failures_total")) > 0
    await _done(back(server))
    await pair.know_each_other()
    await eventually(lambda: pair.elsewhere(other) == 1)
    blocks = len(one.dispatcher.workers()[0].cache)
    await eventually(lambda: len(other.dispatcher.workers()[0].cache) >= blocks)
    slow.may_answer.set()
    assert await asked == 200


async def _done(what: object) -> None:
    if asyncio.iscoroutine(what):
        await what


async def test_a_full_server_is_as_good(pair: Replicas, server: RedisServer, slow: Slow) -> None:
    async with server.client() as client:
        await client.config_set("maxmemory", "1mb")
        await client.config_set("maxmemory-policy", "noeviction")
        with pytest.raises(OutOfMemoryError):
            await client.set("x", b"x" * 4_000_000)
    one, other = pair.routers
    asked = pair.asking(one)
    await eventually(lambda: pair.elsewhere(other) == 1)
    late = await pair.join()
    await eventually(lambda: pair.elsewhere(late) == 1)
    slow.may_answer.set()
    assert await asked == 200


async def test_strangers_on_the_channel_are_counted_and_ignored(
    pair: Replicas, server: RedisServer, slow: Slow
) -> None:
    one, other = pair.routers
    worker = one.dispatcher.workers()[0].name
    hostile = [
        b"",
        b"garbage",
        b"kvf\x09" + bytes(40),
        bytes(100_000),
        encode(5, EVERYONE, Body(1, 1.0, {worker: (-5, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)})),
        encode(6, EVERYONE, Body(1, 1.0, {worker: (9, 0, 0, float("nan"), 0.0, 0.0, 0.0, 0.0, 0.0)})),
    ]
    async with server.client() as client:
        for message in hostile:
            assert await client.publish(CHANNEL, message) == 2
    await eventually(lambda: one.sharer.sharing.ignored.total() == len(hostile))
    assert one.sharer.sharing.ignored == {"malformed": 4, "other_version": 1, "too_large": 1}
    assert one.sharer.sharing.peers == 1
    asked = pair.asking(one)
    await eventually(lambda: pair.elsewhere(other) == 1)
    slow.may_answer.set()
    assert await asked == 200


async def test_the_password_comes_from_its_file_and_may_change(
    replicas: Replicas, server: RedisServer, slow: Slow, tmp_path: Path
) -> None:
    async with server.client() as client:
        await client.acl_setuser(
            "router", enabled=True, passwords=["+second"], commands=["-@all", "+publish", "+subscribe", "+ping"],
            channels=["kvfleet:*"],
        )  # fmt: skip
        await client.acl_setuser("default", enabled=False)
    file = tmp_path / "password"
    file.write_text("first\n")
    address = replace(server.address, url=f"redis://router@127.0.0.1:{server.port}", password_file=file)
    await replicas.join(2, address=address)
    one, other = replicas.routers
    slow.may_answer.set()
    assert await replicas.ask(one) == 200
    bus = one.sharer._bus
    await eventually(lambda: bus._failures["denied"] > 0)
    assert not bus.reachable
    file.write_text("second\n")
    await replicas.know_each_other()
    slow.may_answer.clear()
    asked = replicas.asking(one)
    await eventually(lambda: replicas.elsewhere(other) == 1)
    slow.may_answer.set()
    assert await asked == 200


async def test_over_tls_only_with_certificates_that_are_trusted(
    bench: Bench, slow: Slow, tmp_path: Path, unused_tcp_port: int
) -> None:
    secured = RedisServer(
        tmp_path, unused_tcp_port, "--port", "0", "--tls-port", str(unused_tcp_port), "--tls-auth-clients", "no",
        "--tls-cert-file", str(CERTIFICATES / "a.crt"), "--tls-key-file", str(CERTIFICATES / "a.key"),
        "--tls-ca-cert-file", str(CERTIFICATES / "a.crt"),
    )  # fmt: skip
    await secured.start()
    bench.on_close(secured.stop)
    good = Redis(f"rediss://localhost:{unused_tcp_port}", CHANNEL, ca_file=CERTIFICATES / "a.crt")
    replicas = Replicas(bench, await bench.worker(slow.behave), good)
    await replicas.join(2)
    await replicas.know_each_other()
    distrustful = await replicas.join(address=replace(good, ca_file=CERTIFICATES / "b.crt"))
    bus = distrustful.sharer._bus
    await eventually(lambda: bus._failures["connection"] > 1)
    assert (bus.reachable, distrustful.sharer.sharing.peers) == (False, 0)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (Redis("http://redis", CHANNEL), "http://redis: Redis URL must specify one of"),
        (Redis("redis://redis:sixty", CHANNEL), "redis"),
        (Redis("redis://redis", CHANNEL, ca_file=CERTIFICATES / "a.crt"), "use rediss://"),
        (Redis("redis://redis", CHANNEL, password_file=Path("/nowhere/at-all")), "/nowhere/at-all"),
    ],
)
def test_an_address_that_cannot_be_used_is_said_at_the_start(address: Redis, said: str) -> None:
    with pytest.raises(BadRedis) as error:
        address.bus()
    assert said in str(error.value)


async def test_nothing_answers_where_the_url_points(bench: Bench, slow: Slow, unused_tcp_port: int) -> None:
    replicas = Replicas(bench, await bench.worker(slow.behave), Redis(f"redis://127.0.0.1:{unused_tcp_port}", CHANNEL))
    app = await replicas.join()
    slow.may_answer.set()
    assert await replicas.ask(app) == 200
    ready = await bench.ask(app, b"GET /readyz HTTP/1.1\r\nHost: r\r\n\r\n", admin=True)
    assert ready.status == 200, orjson.dumps(ready.json())
    assert app.dispatcher._placement.near > 0
