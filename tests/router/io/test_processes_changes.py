"""`kvfleet router --processes N`: what changes changes in every process, and one that cannot be started is no harm to the others."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
from router_processes import MODEL, PATIENCE_S, Router, running, until

from kvfleet_api.compile import static_fleet
from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_router.io.processes.supervisor import MAX_FAILURES
from kvfleet_sim.config import parse
from kvfleet_sim.server import Server

PROCESSES = 3
Ports = Callable[[], int]


@pytest.fixture
async def worker() -> AsyncIterator[Server]:
    server = Server(parse([MODEL, "--host", "127.0.0.1", "--port", "0", "--speed", "20"]))
    await server.start()
    yield server
    await server.close()


class Load:
    """Clients that ask one request after the other, each on a connection of its own, until told to end."""

    def __init__(self, router: Router, clients: int) -> None:
        self._router = router
        self._ended = False
        self.statuses: list[int] = []
        self._clients = [asyncio.create_task(self._ask()) for _ in range(clients)]

    async def _ask(self) -> None:
        while not self._ended:
            self.statuses.append((await self._router.ask()).status_code)

    async def answers(self, more: int) -> None:
        """Wait for so many more."""
        wanted = len(self.statuses) + more
        await until(lambda: len(self.statuses) >= wanted)

    async def end(self) -> list[int]:
        self._ended = True
        await asyncio.gather(*self._clients)
        return self.statuses


def write(path: Path, config: FleetConfig) -> None:
    new = path.with_suffix(".new")
    new.write_text(config.to_json())
    new.replace(path)


# Configuration


async def revisions(router: Router) -> list[str]:
    told = [await router.get_of(number, "/loaded") for number in range(PROCESSES)]
    return ["" if each is None else each["revision"] for each in told]


async def test_every_process_takes_a_new_configuration_and_no_request_is_lost(
    worker: Server, tmp_path: Path, unused_tcp_port_factory: Ports
) -> None:
    config = static_fleet([f"http://127.0.0.1:{worker.port}"])
    path = tmp_path / "fleet.json"
    write(path, config)
    arguments = ("--config", str(path), "--speed", "20")
    async with running(tmp_path / "router", unused_tcp_port_factory, *arguments, processes=PROCESSES) as router:
        load = Load(router, 4)
        await load.answers(20)
        for drain_s in (7.0, 8.0, 9.0):
            changed = config.model_copy(update={"drain_s": drain_s})
            write(path, changed)

            async def taken(wanted: str = changed.revision) -> bool:
                return await revisions(router) == [wanted] * PROCESSES

            await until(taken)
            loaded = await router.get("/loaded")
            assert loaded is not None and loaded.json()["revision"] == changed.revision
            await load.answers(10)
        assert set(await load.end()) == {200}


async def test_a_configuration_that_is_refused_is_refused_by_all_and_all_serve_on(
    worker: Server, tmp_path: Path, unused_tcp_port_factory: Ports
) -> None:
    config = static_fleet([f"http://127.0.0.1:{worker.port}"])
    path = tmp_path / "fleet.json"
    write(path, config)
    arguments = ("--config", str(path), "--speed", "20")
    async with running(tmp_path / "router", unused_tcp_port_factory, *arguments, processes=PROCESSES) as router:
        path.write_text('{"pools": 1}')

        async def refused() -> bool:
            told = [await router.get_of(number, "/loaded") for number in range(PROCESSES)]
            return all(each is not None and each["refused"] for each in told)

        await until(refused)
        assert await revisions(router) == [config.revision] * PROCESSES
        loaded = await router.get("/loaded")
        assert loaded is not None and "pools" in loaded.json()["refused"]
        assert {answer.status_code for answer in await asyncio.gather(*(router.ask() for _ in range(12)))} == {200}
        assert await router.metric("config_errors_total") == PROCESSES


# A process that cannot be started


async def test_one_that_keeps_dying_is_tried_with_pauses_and_the_others_serve(
    worker: Server, tmp_path: Path, unused_tcp_port_factory: Ports
) -> None:
    arguments = ("--workers", f"http://127.0.0.1:{worker.port}", "--speed", "20")
    async with running(tmp_path / "r", unused_tcp_port_factory, *arguments, processes=PROCESSES) as router:
        in_its_way = router.sockets() / "admin-1"
        in_its_way.unlink()
        in_its_way.mkdir()  # what comes after the one that dies now cannot have its socket
        victim = router.children()[1]
        os.kill(victim, signal.SIGKILL)
        await until(lambda: "router process 1 ended (exit code 1): it is started again in 0.1 s" in router.log)
        load = Load(router, 4)  # its socket is closed, and not opened by those that cannot be started
        await until(lambda: "router process 1 ended (exit code 1): it is started again in 0.8 s" in router.log)
        await load.answers(20)
        assert set(await load.end()) == {200}, "its share of connections went to the others"
        log = router.log
        assert f"cannot listen: [Errno 98] {in_its_way}" in log
        assert "Traceback" not in log
        pauses = [f"router process 1 ended (exit code 1): it is started again in {pause} s" for pause in ("0.1", "0.2")]
        assert all(pause in log for pause in pauses)
        assert "router process 0 ended" not in log and "router process 2 ended" not in log
        answer = await router.get("/readyz")
        assert answer is not None and (answer.status_code, answer.json()["processes"]) == (200, PROCESSES - 1)
        in_its_way.rmdir()
        await until(router.all_answer)
        assert {answer.status_code for answer in await asyncio.gather(*(router.ask() for _ in range(12)))} == {200}


async def test_where_all_keep_dying_the_router_ends_with_an_error(
    worker: Server, tmp_path: Path, unused_tcp_port_factory: Ports
) -> None:
    arguments = ("--workers", f"http://127.0.0.1:{worker.port}", "--speed", "20")
    async with running(tmp_path / "r", unused_tcp_port_factory, *arguments, processes=2) as router:
        victims = router.children()[:2]
        for number in range(2):
            path = router.sockets() / f"admin-{number}"
            path.unlink()
            path.mkdir()
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            assert await router.process.wait() == 1
        assert f"all processes keep ending, {MAX_FAILURES} times each: the errors above say why" in router.log


# Unix sockets


async def test_all_processes_take_connections_from_one_unix_socket(
    worker: Server, tmp_path: Path, unused_tcp_port_factory: Ports
) -> None:
    path = tmp_path / "clients.sock"
    port = unused_tcp_port_factory()
    arguments = ("--workers", f"http://127.0.0.1:{worker.port}", "--speed", "20")
    host = ("--host", f"unix:{path},127.0.0.1", "--port", str(port))  # the last one given counts
    async with running(tmp_path / "r", unused_tcp_port_factory, *arguments, *host, processes=2) as router:
        assert f"serving on unix:{path}, 127.0.0.1:{port}, admin on 127.0.0.1:" in router.log

        async def ask() -> httpx.Response:
            transport = httpx.AsyncHTTPTransport(uds=str(path))
            async with httpx.AsyncClient(transport=transport, timeout=PATIENCE_S) as client:
                body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
                return await client.post("http://router/v1/chat/completions", json=body)

        served: set[str] = set()
        for _ in range(50):  # who looks first takes them, so it may take some rounds until both have
            answers = await asyncio.gather(*(ask() for _ in range(10)))
            assert {answer.status_code for answer in answers} == {200}
            served |= {answer.headers["x-kvfleet-decision"].partition("-")[0] for answer in answers}
            if len(served) == 2:
                break
        assert len(served) == 2
        router.url = f"http://127.0.0.1:{port}"
        assert (await router.ask()).status_code == 200
        os.kill(router.children()[0], signal.SIGKILL)
        answers = await asyncio.gather(*(ask() for _ in range(10)))
        assert {answer.status_code for answer in answers} == {200}, "nothing waits for the one that died"
        await until(router.all_answer)
        reader, writer = await asyncio.open_unix_connection(path)
        router.process.terminate()
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.read() == b""
            assert await router.process.wait() == 0
        writer.close()
    with socket.socket(socket.AF_UNIX) as sock:
        assert sock.connect_ex(str(path)) != 0, "nobody listens there any more"
