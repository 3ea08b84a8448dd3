"""A real Redis server on the loopback, that tests kill, stop, fill and start again."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import redis.asyncio
from scripted import PATIENCE_S

from kvfleet_router.io.sharing.redis_bus import Redis

CHANNEL = "kvfleet:default/local"


def redis_program() -> str:
    """Skips the test where there is none, but not in CI."""
    program = shutil.which("redis-server")
    if program is None:
        reason = "no redis-server: run tests/setup.sh as root, or install it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return program


class RedisServer:
    def __init__(self, directory: Path, port: int, *arguments: str) -> None:
        self._program = redis_program()
        self._directory, self.port = directory, port
        self.arguments: Sequence[str] = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> Redis:
        return Redis(f"redis://127.0.0.1:{self.port}", CHANNEL)

    def client(self) -> redis.asyncio.Redis:
        return redis.asyncio.Redis(port=self.port)

    async def start(self) -> None:
        plain = ["--port", str(self.port)] if "--tls-port" not in self.arguments else []
        self._process = subprocess.Popen(  # noqa: ASYNC220 - it takes no time, and ends with the test
            [self._program, *plain, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", *self.arguments],
            cwd=self._directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        async with asyncio.timeout(PATIENCE_S):
            while True:
                assert self._process.poll() is None, "redis-server ended"
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    await asyncio.sleep(0.01)
                    continue
                writer.close()
                return

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def stop(self) -> None:
        """Kill it, whatever state it is in."""
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
            self._process = None
