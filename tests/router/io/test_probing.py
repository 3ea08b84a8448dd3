"""Ejected workers are asked whether they are well before a client's request is risked on them."""

import asyncio

import httpx
import pytest
from scripted import Bench, ScriptedWorker, Seen, answer_ok, chat_body, completion, eventually, fleet, json_answer, post

from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_router.app import RouterApp
from kvfleet_router.io import probing as probing_module

SPEED = 20.0
"""Pauses of a second are a twentieth of it."""


class Patient:
    """A worker that fails every request while it is `ill`, and says of itself what `health` is."""

    def __init__(self, health: bytes = b"200 OK") -> None:
        self.ill = True
        self.health = health
        self.asked = asyncio.Event()
        self.served: list[bytes] = []
        """Requests of clients, by their lines."""
        self.probes: list[bytes] = []

    async def behave(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if seen.line.startswith(b"GET"):
            self.probes.append(seen.line)
            self.asked.set()
            if self.health:
                writer.write(json_answer({}, self.health))
            else:
                await reader.read()  # says nothing
            return
        self.served.append(seen.line)
        if self.ill:
            writer.transport.abort()
        else:
            await answer_ok(seen, reader, writer)


def with_resilience(config: FleetConfig, **fields: object) -> FleetConfig:
    (policy,) = config.policies
    resilience = policy.resilience.model_copy(update=fields)
    return config.model_copy(update={"policies": [policy.model_copy(update={"resilience": resilience})]})


async def ejected(bench: Bench, patient: Patient, **resilience: object) -> tuple[RouterApp, ScriptedWorker]:
    """A router whose first worker, the patient, is out, and the other one."""
    worker = await bench.worker(patient.behave)
    well = await bench.worker()
    router = await bench.router(config=with_resilience(fleet([worker, well]), **resilience), speed=SPEED)
    while state(router) == "ready":
        assert (await bench.ask(router, post(chat_body()))).json() == completion()
    return router, well


def state(router: RouterApp) -> str:
    return router.dispatcher.workers()[0].state


def counted(router: RouterApp, result: str) -> int:
    return sum(count for (_, told), count in router.prober._results.items() if told == result)


async def test_no_request_is_risked_on_a_worker_that_says_it_is_not_well(bench: Bench) -> None:
    patient = Patient(b"503 Service Unavailable")
    router, _ = await ejected(bench, patient)
    failed = len(patient.served)
    while counted(router, "unhealthy") < 3:
        assert (await bench.ask(router, post(chat_body()))).json() == completion()
    assert len(patient.served) == failed
    assert state(router) == "ejected"
    assert patient.probes[0] == b"GET /health HTTP/1.1"
    async with httpx.AsyncClient() as client:
        told = (await client.get(f"http://127.0.0.1:{router.admin_port}/workers")).json()["workers"]
        assert [worker["last_probe"] for worker in told] == ["status 503", ""]
        metrics = (await client.get(f"http://127.0.0.1:{router.admin_port}/metrics")).text
    assert 'kvfleet_router_probes_total{pool="static",result="unhealthy"}' in metrics
    patient.ill, patient.health = False, b"200 OK"
    while len(patient.served) == failed:
        assert (await bench.ask(router, post(chat_body()))).json() == completion()
    await eventually(lambda: not router.dispatcher.workers()[0].breaker.on_probation)
    assert state(router) == "ready"
    assert counted(router, "healthy") == 1


async def test_a_dead_worker_is_asked_until_it_is_back(bench: Bench) -> None:
    worker = await bench.worker()
    router = await bench.router(worker, await bench.worker(), speed=SPEED)
    await worker.stop()
    while state(router) == "ready":
        assert (await bench.ask(router, post(chat_body()))).status == 200
    await eventually(lambda: counted(router, "unhealthy") >= 2)
    seen = router.dispatcher.workers()[0].breaker.probe_told
    assert seen not in ("", "status 200")
    await worker.start()
    await eventually(lambda: state(router) == "ready")
    assert [seen.line for seen in worker.requests if seen.line.startswith(b"GET")] == [b"GET /health HTTP/1.1"]


async def test_another_path(bench: Bench) -> None:
    patient = Patient()
    router, _ = await ejected(bench, patient, probe_path="/healthz?deep=1")
    await eventually(lambda: state(router) == "ready")
    assert patient.probes[0] == b"GET /healthz?deep=1 HTTP/1.1"


@pytest.mark.parametrize("status", [b"404 Not Found", b"405 Method Not Allowed", b"501 Not Implemented"])
async def test_a_worker_without_such_a_path_is_tried_by_a_request(bench: Bench, status: bytes) -> None:
    router, _ = await ejected(bench, Patient(status))
    await eventually(lambda: state(router) == "ready")
    assert counted(router, "no_such_path") == 1
    assert router.dispatcher.workers()[0].breaker.on_probation


async def test_where_nobody_is_asked_time_alone_ends_the_pause(bench: Bench) -> None:
    patient = Patient(b"503 Service Unavailable")
    router, _ = await ejected(bench, patient, probe_path="")
    await eventually(lambda: state(router) == "ready")
    assert not patient.probes


async def test_a_worker_that_does_not_answer_is_given_up_in_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing_module, "TIMEOUT_S", 0.1)
    patient = Patient(b"")
    router, _ = await ejected(bench, patient)
    await eventually(lambda: counted(router, "unhealthy") >= 1)
    assert router.dispatcher.workers()[0].breaker.probe_told == "no answer within 0.1 s"
    assert state(router) == "ejected"


async def test_no_more_probes_at_once_than_allowed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing_module, "CONCURRENCY", 2)
    patients = [Patient(b"") for _ in range(5)]
    workers = [await bench.worker(patient.behave) for patient in patients]
    router = await bench.router(*workers, speed=SPEED)
    while any(worker.state == "ready" for worker in router.dispatcher.workers()):
        await bench.ask(router, post(chat_body()))
    await eventually(lambda: sum(patient.asked.is_set() for patient in patients) == 2)
    router._sweep()
    assert router.prober._running == 2


async def test_a_router_that_leaves_ends_its_probes(bench: Bench) -> None:
    patient = Patient(b"")
    router, _ = await ejected(bench, patient)
    await asyncio.wait_for(patient.asked.wait(), 10)
    await router.stop(0.0)
    assert router.prober._running == 0
