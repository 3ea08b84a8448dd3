"""Joules of a live fleet: simulated workers with DCGM's counters, a router that reads them, books and tells."""

import asyncio
import re
from typing import Any

import httpx
import openai
import pytest
from scripted import PATIENCE_S, Bench, eventually

from kvfleet_api.compile import static_fleet
from kvfleet_api.fleetrouter import TelemetrySpec
from kvfleet_router.app import RouterApp
from kvfleet_router.io.telemetry import by_worker, exposition, query_result
from kvfleet_sim.config import parse
from kvfleet_sim.server import Server

SPEED = 20.0
MODEL = "llama-8b"
ROW = re.compile(r"^kvfleet_energy_joules_total\{([^}]*)\} (\S+)$", re.MULTILINE)


async def worker(bench: Bench, port: int = 0) -> Server:
    server = Server(parse([MODEL, "--host", "127.0.0.1", "--port", str(port), "--speed", str(SPEED)]))
    await server.start()
    bench.on_close(server.close)
    return server


async def router_for(bench: Bench, *servers: Server, **telemetry: Any) -> RouterApp:
    spec = {"dcgmURLs": ["http://{host}:{port}/dcgm/metrics"], "intervalSeconds": 2, "staleSeconds": 20, **telemetry}
    fleet = static_fleet([f"http://127.0.0.1:{server.port}" for server in servers], "kvfleet", MODEL)
    config = fleet.model_copy(update={"telemetry": TelemetrySpec.model_validate(spec)})
    return await bench.router(config=config, speed=SPEED)


async def ask(router: RouterApp, tenant: str, tokens: int = 24) -> Any:
    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{router.port}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    )
    async with client:
        return await client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"hello {tenant}"}],
            max_tokens=tokens,
            extra_headers={"x-tenant-id": tenant},
        )


async def page(router: RouterApp) -> str:
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.get(f"http://127.0.0.1:{router.admin_port}/metrics")).text


async def loaded(router: RouterApp) -> Any:
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.get(f"http://127.0.0.1:{router.admin_port}/loaded")).json()


def rows(text: str) -> dict[str, float]:
    return {labels: float(value) for labels, value in ROW.findall(text)}


async def test_the_books_equal_the_counters_through_a_restart_with_a_counter_reset(bench: Bench) -> None:
    first, second = await worker(bench), await worker(bench)
    router = await router_for(bench, first, second)
    meters = router.dispatcher.energy.meters
    ledger = router.dispatcher.energy.ledger
    assert ledger is not None
    await eventually(lambda: len(ledger.workers()) == 2)
    answers = await asyncio.gather(*(ask(router, f"tenant-{number % 2}") for number in range(8)))
    assert all(float(answer.headers["x-kvfleet-energy-joules"]) > 0 for answer in answers)
    port = first.port
    await first.close()
    await worker(bench, port)  # the same address, a counter that begins at nothing
    await eventually(lambda: sum(meter.resets for meter in meters()) >= 1)
    await asyncio.gather(*(ask(router, "tenant-0") for _ in range(4)))
    before = sum(meter.joules for meter in meters())
    await eventually(lambda: sum(meter.joules for meter in meters()) > before)
    drawn = sum(meter.joules for meter in meters())
    assert sum(row[-1] for row in ledger.rows()) == pytest.approx(drawn, rel=1e-3)
    booked = rows(await page(router))
    assert sum(booked.values()) >= drawn * 0.999
    for kind in ("prefill", "decode", "step"):
        assert sum(value for labels, value in booked.items() if f'kind="{kind}"' in labels) > 0
    record = router.dispatcher.decisions.get(answers[0].headers["x-kvfleet-decision"])
    assert record is not None
    assert record["outcome"]["joules"] == pytest.approx(float(answers[0].headers["x-kvfleet-energy-joules"]), rel=0.05)


async def test_telemetry_that_is_cut_is_told_and_harms_no_request(bench: Bench) -> None:
    server = await worker(bench)
    router = await router_for(bench, server)
    await eventually(lambda: router.dispatcher.energy_states()[0].source == "Measured")
    cut = router.dispatcher.config.telemetry
    assert cut is not None
    gone = cut.model_copy(update={"dcgm_urls": ["http://127.0.0.1:9/metrics"]})
    router.take_config(router.dispatcher.config.model_copy(update={"telemetry": gone}))
    await eventually(lambda: router.dispatcher.energy_states()[0].source == "Stale")
    assert (await ask(router, "a")).status_code == 200
    text = await page(router)
    told = (await loaded(router))["pools"]["static"]["energy"]
    assert (told["source"], told["trusted"]) == ("Stale", False)
    assert set(told["estimates"]) == {"StepEnergy", "TokenEnergy", "PrefillTokenEnergy", "IdlePower"}
    assert 'kvfleet_energy_trusted{pool="default"} 0.0' in text or re.search(r"kvfleet_energy_trusted\{.*\} 0\.0", text)
    assert re.search(r'kvfleet_energy_source\{.*source="Stale"\} 1\.0', text)
    assert re.search(r'kvfleet_router_telemetry_scrapes_total\{result="failed"\} [1-9]', text)


async def test_without_telemetry_there_is_no_header_and_no_book(bench: Bench) -> None:
    server = await worker(bench)
    fleet = static_fleet([f"http://127.0.0.1:{server.port}"], "kvfleet", MODEL)
    router = await bench.router(config=fleet, speed=SPEED)
    answer = await ask(router, "a")
    assert "x-kvfleet-energy-joules" not in answer.headers
    assert "kvfleet_energy_joules" not in await page(router)
    assert "energy" not in (await loaded(router))["pools"]["static"]


EXPORTER = """# HELP DCGM_FI_DEV_POWER_USAGE Power draw (in W).
# TYPE DCGM_FI_DEV_POWER_USAGE gauge
DCGM_FI_DEV_POWER_USAGE{gpu="0",UUID="GPU-a",Hostname="n",pod="w-0",namespace="x"} 300.5
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="0",UUID="GPU-a",Hostname="n",pod="w-0",namespace="x"} 5000
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="1",UUID="GPU-b",Hostname="n",pod="w-0",namespace="x"} 7000
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="2",UUID="GPU-c",Hostname="n",pod="other",namespace="x"} 9000
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="3",UUID="GPU-d",Hostname="n"} rubbish
DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-a",pod="w-0"} 100
"""


def test_devices_belong_to_the_worker_of_their_pod_label() -> None:
    found = by_worker(exposition(EXPORTER), frozenset(["w-0", "w-1"]))
    assert {name: sorted(devices) for name, devices in found.items()} == {"w-0": ["GPU-a", "GPU-b"]}
    assert (found["w-0"]["GPU-a"].joules, found["w-0"]["GPU-a"].watts) == (5.0, 300.5)


def test_prometheus_says_the_same() -> None:
    body = b"""{"status":"success","data":{"resultType":"vector","result":[
      {"metric":{"__name__":"DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION","UUID":"GPU-a","pod":"exporter","exported_pod":"w-0"},
       "value":[1700000000,"5000"]}]}}"""
    found = by_worker(query_result(body), frozenset(["w-0"]))
    assert found["w-0"]["GPU-a"].joules == 5.0
    with pytest.raises(ValueError, match="no result"):
        list(query_result(b'{"status":"error"}'))
