"""OpenTelemetry spans: what a collector gets, of which requests, and that none waits for it."""

import asyncio
import random
from typing import Any

import orjson
import pytest
from scripted import Bench, ScriptedWorker, Seen, chat_body, eventually, fleet, json_answer, post

from kvfleet_router.app import RouterApp
from kvfleet_router.io import tracing

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


async def started(bench: Bench, collector: str, *workers: ScriptedWorker, share: float = 1.0) -> RouterApp:
    router = RouterApp(fleet(workers, model="m"), otlp_endpoint=collector, trace_share=share, rng=random.Random(1))
    await router.start()
    bench.on_close(router.stop, 0.0)
    return router


async def takes(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(json_answer({}))


def spans(collector: ScriptedWorker) -> list[dict[str, Any]]:
    found = []
    for seen in collector.requests:
        assert seen.line == b"POST /v1/traces HTTP/1.1"
        (resource,) = orjson.loads(seen.body)["resourceSpans"]
        assert attributes(resource["resource"]) == {"service.name": "kvfleet-router"}
        found += [span for scope in resource["scopeSpans"] for span in scope["spans"]]
    return found


def attributes(of: dict[str, Any]) -> dict[str, Any]:
    return {pair["key"]: next(iter(pair["value"].values())) for pair in of["attributes"]}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "EVERY_S", 0.02)


async def test_a_span_is_part_of_the_clients_trace(bench: Bench) -> None:
    worker, collector = await bench.worker(), await bench.worker(takes)
    router = await started(bench, collector.url, worker)
    parent = f"traceparent: 00-{TRACE}-{PARENT}-01".encode()
    answer = await bench.ask(router, post(chat_body(), parent))
    await eventually(lambda: collector.requests)
    (span,) = spans(collector)
    assert (span["traceId"], span["parentSpanId"], span["kind"]) == (TRACE, PARENT, 2)
    assert span["name"] == "completions m"
    assert len(span["spanId"]) == 16
    start, first, end = (
        int(text) for text in (span["startTimeUnixNano"], span["events"][0]["timeUnixNano"], span["endTimeUnixNano"])
    )
    assert 0 < start <= first <= end
    told = attributes(span)
    assert told["kvfleet.decision"] == answer.header("x-kvfleet-decision")
    assert told["kvfleet.request_id"] == answer.header("x-request-id")
    assert told["kvfleet.worker"] == answer.header("x-kvfleet-worker")
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == ("11", "7")
    assert (told["kvfleet.outcome"], told["kvfleet.tries"]) == ("ok", "1")
    assert worker.requests[0].header("traceparent") == parent.partition(b": ")[2]


async def test_failures_and_refusals_are_spans_too(bench: Bench) -> None:
    worker, collector = await bench.worker(), await bench.worker(takes)
    router = await started(bench, collector.url, worker)
    await bench.ask(router, post(chat_body(model="none")))
    await worker.stop()
    await bench.ask(router, post(chat_body()))
    await eventually(lambda: len(spans(collector)) == 2)
    refused, failed = spans(collector)
    assert attributes(refused)["error.type"] == "model_not_found"
    assert failed["status"]["code"] == 2
    assert attributes(failed)["error.type"] == "connect_failed"
    assert attributes(failed)["kvfleet.tries"] == "3"
    assert refused["traceId"] != failed["traceId"]
    assert "parentSpanId" not in failed


async def test_what_is_not_sampled_is_not_sent(bench: Bench) -> None:
    worker, collector = await bench.worker(), await bench.worker(takes)
    router = await started(bench, collector.url, worker, share=0.0)
    for header in (
        f"traceparent: 00-{TRACE}-{PARENT}-00",
        "x: y",
        f"traceparent: 00-{'0' * 32}-{PARENT}-01",
        "traceparent: no",
    ):
        await bench.ask(router, post(chat_body(), header.encode()))
    await bench.ask(router, post(chat_body(), f"traceparent: 00-{TRACE}-{PARENT}-01".encode()))
    await eventually(lambda: collector.requests)
    assert [span["traceId"] for span in spans(collector)] == [TRACE]


async def test_a_collector_that_is_away_costs_spans_and_no_request(bench: Bench) -> None:
    worker, collector = await bench.worker(), await bench.worker(takes)
    await collector.stop()
    router = await started(bench, collector.url, worker)
    assert (await bench.ask(router, post(chat_body()))).status == 200
    tracer = router.tracer
    assert tracer is not None
    await eventually(lambda: tracer.dropped == 1)
    await collector.start()
    assert (await bench.ask(router, post(chat_body()))).status == 200
    await eventually(lambda: tracer.sent == 1)
    metrics = await bench.metrics(router)
    assert metrics['kvfleet_router_spans_total{result="dropped"}'] == 1


async def test_the_queue_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MAX_QUEUED", 3)
    monkeypatch.setattr(tracing, "EVERY_S", 3600)
    worker, collector = await bench.worker(), await bench.worker(takes)
    router = await started(bench, collector.url, worker)
    for _ in range(5):
        await bench.ask(router, post(chat_body()))
    assert router.tracer is not None
    assert router.tracer.dropped == 2
    await router.stop(0.0)  # what is left is sent
    assert len(spans(collector)) == 3
