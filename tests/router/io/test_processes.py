"""`kvfleet router --processes N`: real processes on one port, with one admin port, whatever happens to any of them."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
from router_processes import MODEL, PATIENCE_S, Router, running, until

from kvfleet_sim.config import parse
from kvfleet_sim.server import Server

PROCESSES = 3


@pytest.fixture
async def worker() -> AsyncIterator[Server]:
    server = Server(parse([MODEL, "--host", "127.0.0.1", "--port", "0", "--speed", "20"]))
    await server.start()
    yield server
    await server.close()


@pytest.fixture
async def router(worker: Server, tmp_path: Path, unused_tcp_port_factory: Callable[[], int]) -> AsyncIterator[Router]:
    arguments = ("--workers", f"http://127.0.0.1:{worker.port}", "--speed", "20")
    async with running(tmp_path, unused_tcp_port_factory, *arguments, processes=PROCESSES) as router:
        yield router


async def test_all_processes_serve_and_one_admin_port_speaks_for_them(router: Router) -> None:
    answers = await asyncio.gather(*(router.ask() for _ in range(40)))
    assert {answer.status_code for answer in answers} == {200}
    ids = [answer.headers["x-kvfleet-decision"] for answer in answers]
    assert len({each.partition("-")[0] for each in ids}) == PROCESSES, "every process served some"
    for decision in ids:
        found = await router.get(f"/decisions/{decision}")
        assert found is not None and (found.status_code, found.json()["id"]) == (200, decision)
    listed = await router.get("/decisions?limit=40")
    assert listed is not None and {each["id"] for each in listed.json()["decisions"]} == set(ids)
    assert await router.metric('requests_total{model="llama-8b",outcome="ok"') == 40
    assert await router.metric('processes{state="answering"') == PROCESSES
    assert await router.metric("sharing_peers") == PROCESSES - 1
    for path, said in (("/loaded", "revision"), ("/config", "config"), ("/workers", "workers"), ("/healthz", "status")):
        answer = await router.get(path)
        assert answer is not None and said in answer.json()
    unknown = [await router.get(path) for path in ("/decisions/none-1", "/nothing", "/decisions?limit=x")]
    assert [answer.status_code for answer in unknown if answer is not None] == [404, 404, 400]
    explained = await router.client.post(router.admin + "/explain", json={"model": MODEL, "messages": []})
    assert explained.status_code in (200, 400), explained.text


async def test_what_one_process_has_in_flight_all_know(router: Router) -> None:
    running = asyncio.create_task(router.ask(max_tokens=2000, min_tokens=2000))

    async def known() -> bool:
        answer = await router.get("/workers")
        return answer is not None and answer.json()["workers"][0]["in_flight"] == 1

    await until(known)
    assert await router.metric("in_flight") == 1
    counted = await router.metric('sharing_messages_total{direction="in"}')
    assert counted > 0
    running.cancel()


async def test_a_process_that_is_killed_is_started_again_and_nothing_counted_is_lost(router: Router) -> None:
    before = [answer.status_code for answer in await asyncio.gather(*(router.ask() for _ in range(20)))]
    assert before == [200] * 20
    assert await router.metric('requests_total{model="llama-8b",outcome="ok"') == 20
    victim = router.children()[0]
    os.kill(victim, signal.SIGKILL)
    await until(lambda: victim not in router.children() and len(router.children()) == PROCESSES + 1)
    answers = await asyncio.gather(*(router.ask() for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}, "connections waited for its successor"
    await until(router.all_answer)
    assert await router.metric('requests_total{model="llama-8b",outcome="ok"') == 40


async def test_the_hub_that_dies_comes_back_and_requests_do_not_notice(router: Router) -> None:
    hub = router.children()[-1]
    os.kill(hub, signal.SIGKILL)
    assert (await router.ask()).status_code == 200
    await until(router.all_answer)
    assert hub not in router.children()


async def test_sigterm_lets_streams_of_all_processes_finish(router: Router) -> None:
    async def stream() -> list[bytes]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
        async with (
            httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client,
            client.stream(
                "POST", f"{router.url}/v1/chat/completions", json={**body, "max_tokens": 3000, "min_tokens": 3000}
            ) as answer,
        ):
            assert answer.status_code == 200
            started.release()
            return [piece async for piece in answer.aiter_bytes()]

    started = asyncio.Semaphore(0)
    streams = [asyncio.create_task(stream()) for _ in range(9)]
    for _ in streams:
        await started.acquire()
    router.process.terminate()
    draining = await until(lambda: router.get("/readyz"))
    await until(lambda: _is_draining(router))
    assert draining is not None
    ends = [b"".join(pieces)[-20:] for pieces in await asyncio.gather(*streams)]
    assert all(end.endswith(b"data: [DONE]\n\n") for end in ends)
    async with asyncio.timeout(PATIENCE_S):
        assert await router.process.wait() == 0


async def _is_draining(router: Router) -> bool:
    answer = await router.get("/readyz")
    return answer is None or answer.json()["status"] == "draining"


async def test_a_port_that_somebody_has_is_not_shared_with_him(router: Router, unused_tcp_port: int) -> None:
    second = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvfleet", "router", "--workers", "http://127.0.0.1:1", "--host", "127.0.0.1",
        "--port", router.url.rpartition(":")[2], "--admin-port", str(unused_tcp_port), "--processes", "2",
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, said = await second.communicate()
    assert (second.returncode, b"cannot listen" in said) == (1, True)
