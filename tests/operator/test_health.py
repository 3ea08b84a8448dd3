"""Probes and metrics, over real HTTP from the thread that serves them."""

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from kvfleet_operator.health import Health, HealthServer


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ages():
    return {}


@pytest.fixture
def answered():
    return []


@pytest.fixture
def health(clock, ages, answered):
    return Health(lambda: ages, ready=lambda: bool(answered), watch_limit_s=100, clock=clock)


@pytest.fixture
def get(health):
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc()
    server = HealthServer(health, registry, host="127.0.0.1", port=0)
    server.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
        yield client.get
    server.stop()


def test_a_turning_loop_is_alive_and_a_stuck_one_is_not(get, health, clock):
    assert get("/healthz").status_code == 200
    clock.now = 29
    assert get("/healthz").status_code == 200
    clock.now = 31
    answer = get("/healthz")
    assert (answer.status_code, answer.text) == (503, "the event loop has been stuck for 31 s\n")
    health.beat()
    assert get("/healthz").status_code == 200


def test_a_stalled_watch_of_the_leader_is_told(get, health, ages):
    ages |= {"ModelPool": 101.0, "Service": 3.0}
    assert get("/healthz").status_code == 200  # a standby watches nothing
    health.leading = True
    answer = get("/healthz")
    assert (answer.status_code, answer.text) == (503, "the watch of ModelPool has been stale for 101 s\n")


def test_ready_once_the_api_server_has_answered(get, answered):
    assert get("/readyz").status_code == 503
    answered.append(True)
    assert get("/readyz").status_code == 200


def test_metrics_are_served_and_nothing_else(get):
    assert "things_total 1.0" in get("/metrics").text
    assert get("/").status_code == 404


def test_a_taken_port_is_an_error_at_once(health):
    registry = CollectorRegistry()
    first = HealthServer(health, registry, host="127.0.0.1", port=0)
    with pytest.raises(OSError):
        HealthServer(health, registry, host="127.0.0.1", port=first.port)
    first.start()
    first.stop()
