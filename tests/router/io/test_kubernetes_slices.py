"""EndpointSlices as the API server writes them, and as nobody should, and the workers they make."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import msgspec
import orjson
import pytest
from fake_api import endpoint_slice
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_router.core.worker import WorkerEndpoint
from kvfleet_router.io import kubernetes_slices
from kvfleet_router.io.kubernetes_slices import DOUBT_S, EndpointSlice, Readiness, workers

SERVICE = "pool-workers"


def parsed(*slices: dict[str, Any]) -> list[EndpointSlice]:
    return [msgspec.json.decode(orjson.dumps(part), type=EndpointSlice) for part in slices]


def of(*slices: dict[str, Any]) -> list[WorkerEndpoint]:
    return workers(parsed(*slices), SERVICE)


def changed(**fields: Any) -> dict[str, Any]:
    """A slice of pod w-0 with other fields of its own or of its only endpoint."""
    part = endpoint_slice("w-0", 8000)
    for name, value in fields.items():
        (part if name in part else part["endpoints"][0])[name] = value
    return part


def test_a_worker_has_its_pods_name_and_the_ports_by_their_names() -> None:
    part = changed(addresses=["10.0.0.7"])
    part["ports"] += [{"name": "kv-replay", "port": 5558}, {"name": "metrics", "port": 1}, {"port": 9}]
    assert of(part) == [
        WorkerEndpoint(
            name="w-0",
            url="http://10.0.0.7:8000",
            kv_events_url="tcp://10.0.0.7:5557",
            kv_replay_url="tcp://10.0.0.7:5558",
        )
    ]


def test_workers_of_a_pool_with_tls_have_https_addresses() -> None:
    (worker,) = workers(parsed(changed(addresses=["fd00::7"])), SERVICE, tls=True)
    assert (worker.url, worker.kv_events_url) == ("https://[fd00::7]:8000", "tcp://[fd00::7]:5557")


def test_ports_that_are_not_there_are_not_invented() -> None:
    (worker,) = of(changed(ports=[{"name": "http", "port": 8000}]))
    assert (worker.kv_events_url, worker.kv_replay_url) == (None, None)


@pytest.mark.parametrize(
    ("conditions", "ready", "terminating"),
    [
        ({"ready": True, "serving": True, "terminating": False}, True, False),
        ({"ready": False, "serving": False, "terminating": False}, False, False),
        ({"ready": False, "serving": True, "terminating": True}, False, True),
        ({"ready": True, "serving": True, "terminating": True}, True, True),
        ({"ready": None, "serving": None, "terminating": None}, True, False),
        ({}, True, False),
    ],
)
def test_what_conditions_mean(conditions: dict[str, bool | None], ready: bool, terminating: bool) -> None:
    (worker,) = of(changed(conditions=conditions))
    assert (worker.ready, worker.terminating) == (ready, terminating)


@pytest.mark.parametrize("port", [None, 0, -1, 65536])
def test_a_worker_without_a_port_for_http_is_left_out(port: int | None) -> None:
    assert of(changed(ports=[{"name": "http", "port": port}])) == []
    assert of(changed(ports=[{"name": "https", "port": 8000}])) == []


@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost",
        "10.0.0",
        "10.0.0.1:80",
        "0.0.0.0",
        "169.254.169.254",
        "224.0.0.1",
        "::",
        "fe80::1",
        "fd00::1%eth0",
    ],
)
def test_what_is_no_address_of_a_pod_is_left_out(address: str) -> None:
    assert of(changed(addresses=[address]), endpoint_slice("w-1", 8001))[0].name == "w-1"


def test_a_host_name_is_never_asked_for() -> None:
    assert of(changed(addressType="FQDN", addresses=["10.0.0.1"])) == []


def test_slices_of_other_services_are_not_ours() -> None:
    assert of(endpoint_slice("w-0", 8000, service="other-workers")) == []
    part = endpoint_slice("w-0", 8000)
    part["metadata"]["labels"] = None
    assert of(part) == []


@pytest.mark.parametrize(
    "target",
    [None, {"kind": "Node", "name": "n"}, {"kind": "Pod", "name": "a\r\nx: y"}, {"kind": "Pod", "name": "a" * 254}, {}],
    ids=["none", "no pod", "a header", "too long", "nothing"],
)
def test_without_a_pods_name_a_worker_is_called_by_its_address(target: dict[str, str] | None) -> None:
    assert [worker.name for worker in of(changed(targetRef=target))] == ["127.0.0.1:8000"]


def test_ipv6_is_written_as_in_urls_and_ipv4_comes_first() -> None:
    six = changed(addressType="IPv6", addresses=["fd00::7"])
    six["metadata"]["name"] = "six"
    assert [worker.url for worker in of(six)] == ["http://[fd00::7]:8000"]
    for slices in ([six, endpoint_slice("w-0", 8000)], [endpoint_slice("w-0", 8000), six]):
        assert [worker.url for worker in of(*slices)] == ["http://127.0.0.1:8000"]


@pytest.mark.parametrize("turned", [False, True])
def test_an_endpoint_in_two_slices_is_as_good_as_the_worse(turned: bool) -> None:
    stale, fresh = endpoint_slice("w-0", 8000), endpoint_slice("w-0", 8000, ready=False, terminating=True)
    slices = [fresh, stale] if turned else [stale, fresh]
    (worker,) = of(*slices)
    assert (worker.ready, worker.terminating) == (False, True)


def test_null_lists_are_empty() -> None:
    assert of(changed(endpoints=None), changed(ports=None), changed(addresses=None)) == []


def test_a_pool_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_slices, "MAX_WORKERS", 2)
    assert [worker.name for worker in of(*(endpoint_slice(f"w-{n}", 8000) for n in range(5)))] == ["w-0", "w-1"]


_ENDPOINTS = st.fixed_dictionaries(
    {"addresses": st.lists(st.one_of(st.ip_addresses().map(str), st.text(max_size=20)), max_size=2) | st.none()},
    optional={
        "conditions": st.fixed_dictionaries(
            {}, optional={"ready": st.none() | st.booleans(), "terminating": st.booleans()}
        ),
        "targetRef": st.none()
        | st.fixed_dictionaries({"kind": st.sampled_from(["Pod", "Node"]), "name": st.text(max_size=9)}),
    },
)
_SLICES = st.fixed_dictionaries(
    {
        "metadata": st.just({"name": "x", "labels": {"kubernetes.io/service-name": SERVICE}}),
        "addressType": st.sampled_from(["IPv4", "IPv6", "FQDN", ""]),
        "endpoints": st.none() | st.lists(_ENDPOINTS, max_size=4),
        "ports": st.none()
        | st.lists(
            st.fixed_dictionaries(
                {"name": st.sampled_from(["http", "kv-events", ""]), "port": st.integers(-1, 70_000)}
            ),
            max_size=3,
        ),
    }
)


@given(st.lists(_SLICES, max_size=4))
def test_whatever_slices_hold_workers_can_be_reached_and_told_apart(slices: list[dict[str, Any]]) -> None:
    found = of(*slices)
    assert all(one.name < other.name for one, other in pairwise(found))
    for worker in found:
        parts = urlsplit(worker.url)
        assert parts.scheme == "http"
        assert parts.hostname
        assert parts.port
        assert 0 < parts.port < 65536
        assert worker.name.isascii()
        assert worker.name.isprintable()


# Whether all of a pool can have lost their readiness


def judged(readiness: Readiness, now: float, **states: str) -> str:
    """Names of the workers to be used; states by name: ready, lost, leaving."""
    told = [
        WorkerEndpoint(name, f"http://{name}:1", ready=state == "ready", terminating=state == "leaving")
        for name, state in states.items()
    ]
    found = readiness.judge(told, now)
    assert [worker.name for worker in found] == list(states)
    assert [worker.terminating for worker in found] == [state == "leaving" for state in states.values()]
    return " ".join(worker.name for worker in found if worker.ready and not worker.terminating)


def test_one_workers_loss_is_believed_at_once_and_all_of_them_only_after_a_while() -> None:
    readiness = Readiness()
    assert judged(readiness, 0, a="ready", b="ready") == "a b"
    assert judged(readiness, 1, a="lost", b="ready") == "b"
    assert readiness.due is None
    assert judged(readiness, 2, a="lost", b="lost") == "a b"
    assert readiness.doubted == ["a", "b"]
    assert readiness.due == 1 + DOUBT_S
    assert judged(readiness, 1 + DOUBT_S, a="lost", b="lost") == "b"
    assert judged(readiness, 2 + DOUBT_S, a="lost", b="lost") == ""
    assert readiness.due is None


def test_the_first_that_is_ready_again_ends_the_doubt() -> None:
    readiness = Readiness()
    judged(readiness, 0, a="ready", b="ready")
    assert judged(readiness, 1, a="lost", b="lost") == "a b"
    assert judged(readiness, 2, a="ready", b="lost") == "a"
    assert judged(readiness, 3, a="ready", b="ready") == "a b"
    assert judged(readiness, 100, a="lost", b="lost") == "a b", "a new loss, a new doubt"


def test_who_never_was_ready_or_is_leaving_or_is_another_is_not_used() -> None:
    readiness = Readiness()
    assert judged(readiness, 0, loading="lost") == ""
    judged(readiness, 1, a="ready", b="ready", loading="lost")
    assert judged(readiness, 2, a="lost", b="leaving", loading="lost") == "a"
    replaced = [WorkerEndpoint("a", "http://elsewhere:1", ready=False)]
    assert readiness.judge(replaced, 3) == replaced
    assert judged(readiness, 4, a="leaving") == ""


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.sampled_from(["ready", "lost", "leaving"])), max_size=12))
def test_doubt_adds_no_worker_where_one_is_ready_and_always_ends(history: list[dict[str, str]]) -> None:
    readiness = Readiness()
    for now, states in enumerate(history):
        used = set(judged(readiness, now, **states).split())
        ready = {name for name, state in states.items() if state == "ready"}
        assert used == ready or (not ready and used == set(readiness.doubted))
        assert used <= {name for name, state in states.items() if state != "leaving"}
        assert (readiness.due is None) == (not readiness.doubted)
    last = history[-1] if history else {}
    assert not judged(readiness, len(history) + DOUBT_S, **dict.fromkeys(last, "lost")) or "ready" in last.values()
