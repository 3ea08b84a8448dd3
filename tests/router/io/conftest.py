"""Everything runs on uvloop, as in production. The parts are in `scripted.py`; importlib mode adds no path for it."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
import uvloop

sys.path.insert(0, str(Path(__file__).parent))

from fake_api import FakeApi
from followers import Cluster
from scripted import Bench


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    try:
        yield bench
    finally:
        await bench.close()


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    api = FakeApi()
    await api.start()
    try:
        yield api
    finally:
        await api.stop()


@pytest.fixture
async def cluster(api: FakeApi, bench: Bench, tmp_path: Path) -> Cluster:
    return Cluster(api, bench, tmp_path / "serviceaccount")
