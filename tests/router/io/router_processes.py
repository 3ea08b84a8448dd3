"""`kvfleet router` as processes of this machine, and what they say."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

PATIENCE_S = 30.0
MODEL = "llama-8b"


async def until(found: Callable[[], Any]) -> Any:
    """Wait until `found()` (or what it awaits to) is true; returns it."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            result = found()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return result
            await asyncio.sleep(0.02)


class Router:
    """A supervisor and its processes."""

    def __init__(
        self, process: asyncio.subprocess.Process, port: int, admin_port: int, processes: int, directory: Path
    ) -> None:
        self.process, self.processes = process, processes
        self.url, self.admin = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}"
        self.client = httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False)
        self._directory = directory

    @property
    def log(self) -> str:
        return (self._directory / "log").read_text()

    def children(self) -> list[int]:
        """Process ids, in the order they were started."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def sockets(self) -> Path:
        """Where the processes have their sockets."""
        (directory,) = self._directory.glob("kvfleet-*")
        return directory

    async def get(self, path: str) -> httpx.Response | None:
        try:
            return await self.client.get(self.admin + path)
        except httpx.HTTPError:
            return None

    async def get_of(self, number: int, path: str) -> Any:
        """What one of the processes answers; none: it does not."""
        transport = httpx.AsyncHTTPTransport(uds=str(self.sockets() / f"admin-{number}"))
        async with httpx.AsyncClient(transport=transport, timeout=PATIENCE_S) as client:
            try:
                return (await client.get(f"http://router{path}")).json()
            except httpx.HTTPError:
                return None

    async def ready(self) -> bool:
        answer = await self.get("/readyz")
        return answer is not None and answer.status_code == 200

    async def all_answer(self) -> bool:
        answer = await self.get("/readyz")
        return answer is not None and answer.status_code == 200 and answer.json()["processes"] == self.processes

    async def ask(self, **fields: Any) -> httpx.Response:
        """One request on a connection of its own."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, **fields}
        async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client:
            return await client.post(f"{self.url}/v1/chat/completions", json=body)

    async def metric(self, name: str) -> float:
        answer = await self.get("/metrics")
        assert answer is not None
        found = [line for line in answer.text.splitlines() if line.startswith(f"kvfleet_router_{name}")]
        return sum(float(line.rpartition(" ")[2]) for line in found)


@asynccontextmanager
async def running(directory: Path, ports: Callable[[], int], *arguments: str, processes: int) -> AsyncIterator[Router]:
    """A router with these arguments once all its processes answer; ended by SIGTERM afterwards, and nothing of it is left."""
    directory.mkdir(exist_ok=True)  # noqa: ASYNC240 - a test waits for it
    port, admin_port = ports(), ports()
    with (directory / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kvfleet", "router", "--host", "127.0.0.1", "--port", str(port),
            "--admin-host", "127.0.0.1", "--admin-port", str(admin_port), "--processes", str(processes), *arguments,
            stderr=log, env={**os.environ, "TMPDIR": str(directory)},
        )  # fmt: skip
    router = Router(process, port, admin_port, processes, directory)
    try:
        await until(router.all_answer)
        yield router
    finally:
        await router.client.aclose()
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
                raise
    left = [path for path in directory.iterdir() if path.name.startswith("kvfleet-")]  # noqa: ASYNC240
    assert not left, "it leaves nothing behind"
