"""Fixtures of the operator's tests. Helper modules beside this file are imported by name; importlib mode adds no path."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import kmock
import pytest
from kubernetes.aio.client import Configuration

sys.path.insert(0, str(Path(__file__).parent))

import operator_manifests as manifests
from operator_cluster import Cluster

from kvfleet_api.manifests import KINDS
from kvfleet_operator.api import KubeApi
from kvfleet_operator.metrics import Metrics


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write tests/operator/golden anew")


@pytest.fixture
async def cluster():
    async with Cluster() as handler, kmock.Server(handler):
        yield handler


@pytest.fixture
def login(cluster):
    """Credentials for the test's API server."""

    async def configuration():
        return Configuration(host=str(cluster.url).rstrip("/"))

    return configuration


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
async def api(login, metrics):
    client = KubeApi(await login(), metrics)
    yield client
    await client.close()


@pytest.fixture
def make():
    """Manifests, and `make.parse` to turn them into models."""
    return SimpleNamespace(
        own=manifests.own, profile=manifests.profile, pool=manifests.pool, policy=manifests.policy,
        router=manifests.router, router_pod=manifests.router_pod, worker_pod=manifests.worker_pod,
        parse=lambda manifest: KINDS[manifest["kind"]].model_validate(manifest),
        now=lambda: datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip
