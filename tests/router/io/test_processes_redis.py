"""Two routers of two processes each, and a real Redis server between them: each pod's hub passes on what its processes tell, and
brings what the other pod's do."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from redis_server import RedisServer
from router_processes import MODEL, Router, running, until

from kvfleet_sim.config import parse
from kvfleet_sim.server import Server

PROCESSES = 2
TEXT = "a long prompt, the same again and again " * 100


@pytest.fixture
async def worker() -> AsyncIterator[Server]:
    server = Server(parse([MODEL, "--host", "127.0.0.1", "--port", "0", "--speed", "20"]))
    await server.start()
    yield server
    await server.close()


@pytest.fixture
async def redis(tmp_path: Path, unused_tcp_port: int) -> AsyncIterator[RedisServer]:
    server = RedisServer(tmp_path, unused_tcp_port)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@pytest.fixture
async def pods(
    worker: Server, redis: RedisServer, tmp_path: Path, unused_tcp_port_factory: Callable[[], int]
) -> AsyncIterator[tuple[Router, Router]]:
    arguments = ("--workers", f"http://127.0.0.1:{worker.port}", "--speed", "20", "--redis-url", redis.address.url)
    one = running(tmp_path / "one", unused_tcp_port_factory, *arguments, processes=PROCESSES)
    other = running(tmp_path / "other", unused_tcp_port_factory, *arguments, processes=PROCESSES)
    async with one as first, other as second:
        await until(lambda: know_each_other(first, second))
        yield first, second


async def know_each_other(*pods: Router) -> bool:
    """Every process hears all others, of both pods."""
    for pod in pods:
        if await pod.metric("sharing_peers") != 2 * PROCESSES - 1:
            return False
    return True


async def of_all(pods: tuple[Router, Router], path: str) -> list[Any]:
    return [await pod.get_of(number, path) for pod in pods for number in range(PROCESSES)]


async def in_flight_everywhere(pods: tuple[Router, Router], count: int) -> bool:
    told = await of_all(pods, "/workers")
    return all(each is not None and each["workers"][0]["in_flight"] == count for each in told)


async def cached_in(pod: Router, number: int) -> float:
    """Tokens of TEXT's worker that the process believes cached."""
    import httpx

    transport = httpx.AsyncHTTPTransport(uds=str(pod.sockets() / f"admin-{number}"))
    async with httpx.AsyncClient(transport=transport) as client:
        body = {"model": MODEL, "messages": [{"role": "user", "content": TEXT}]}
        record = (await client.post("http://router/explain", json=body)).json()
    return float(record["tries"][0]["candidates"][0]["cached_tokens"])


async def test_loads_and_prefixes_of_one_pod_are_known_in_every_process_of_the_other(
    pods: tuple[Router, Router],
) -> None:
    one, other = pods
    assert (await one.ask(messages=[{"role": "user", "content": TEXT}])).status_code == 200
    for number in range(PROCESSES):
        await until(lambda number=number: _is_cached(other, number))
    running_one = asyncio.create_task(one.ask(max_tokens=20_000, min_tokens=20_000))
    await until(lambda: in_flight_everywhere(pods, 1))
    running_one.cancel()
    await until(lambda: in_flight_everywhere(pods, 0))
    assert await other.metric('sharing_connected{over="redis"') == 1


async def _is_cached(pod: Router, number: int) -> bool:
    return await cached_in(pod, number) > 500


async def test_while_redis_is_away_requests_are_answered_and_afterwards_all_know_each_other(
    pods: tuple[Router, Router], redis: RedisServer
) -> None:
    one, other = pods
    await redis.stop()
    for pod in pods:
        assert {answer.status_code for answer in await asyncio.gather(*(pod.ask() for _ in range(8)))} == {200}

    async def alone() -> bool:
        """Only a pod's own processes know each other."""
        return [await pod.metric("sharing_peers") for pod in pods] == [PROCESSES - 1] * 2

    await until(alone)
    assert await one.metric('sharing_connected{over="redis"') == 0
    await redis.start()
    await until(lambda: know_each_other(*pods))
    running_one = asyncio.create_task(other.ask(max_tokens=20_000, min_tokens=20_000))
    await until(lambda: in_flight_everywhere(pods, 1))
    running_one.cancel()


async def test_a_hub_that_dies_is_replaced_and_passes_on_again(pods: tuple[Router, Router]) -> None:
    one, _ = pods
    hub = one.children()[-1]
    os.kill(hub, signal.SIGKILL)
    assert (await one.ask()).status_code == 200
    await until(one.all_answer)
    assert hub not in one.children()
    await until(lambda: know_each_other(*pods))
    running_one = asyncio.create_task(one.ask(max_tokens=20_000, min_tokens=20_000))
    await until(lambda: in_flight_everywhere(pods, 1))
    running_one.cancel()
    await until(lambda: in_flight_everywhere(pods, 0))
