"""The admin port: what is served there, and that the figures are those of what happened."""

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted import (
    STREAM_HEAD,
    Bench,
    Seen,
    chat_body,
    chunk,
    event,
    fleet,
    post,
)

from kvfleet_api.compile import static_fleet
from kvfleet_router.io import metrics as metrics_module

USAGE_EVENT = chunk(
    b'data: {"choices":[],"usage":{"prompt_tokens":40,"completion_tokens":9,"total_tokens":49,'
    b'"prompt_tokens_details":{"cached_tokens":32}}}\n\n'
)
LABELS = 'model="m",pool="static"'


def get(path: str) -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % path.encode()


async def streams_three(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + chunk(b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n') + event("a"))
    await writer.drain()
    writer.write(event("b") + event("c") + (USAGE_EVENT if b"include_usage" in seen.body else b""))
    writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


async def test_health_and_readiness(bench: Bench) -> None:
    router = await bench.router(await bench.worker())
    assert (await bench.ask(router, get("/healthz"), admin=True)).status == 200
    ready = await bench.ask(router, get("/readyz"), admin=True)
    assert (ready.status, ready.json()) == (200, {"status": "ready", "revision": router.dispatcher.config.revision})


async def test_what_is_loaded_is_told_with_every_policy_and_why_a_newer_one_is_not(bench: Bench) -> None:
    router = await bench.router(await bench.worker())

    async def loaded() -> Any:
        told = (await bench.ask(router, get("/loaded"), admin=True)).json()
        (view,) = told.pop("pools").values()
        assert (view["mode"], view["reason"]) == ("Approximate", "NoTokenizer")
        return told

    first = router.dispatcher.config
    policy = first.policies[0]
    policies = {policy.name: {"generation": 0, "revision": policy.revision}}
    assert await loaded() == {"revision": first.revision, "policies": policies, "refused": None}
    newer = policy.model_copy(update={"generation": 3})
    second = first.model_copy(update={"policies": [newer]})
    router.take_config(second)
    policies = {policy.name: {"generation": 3, "revision": newer.revision}}
    assert policy.revision != newer.revision
    assert await loaded() == {"revision": second.revision, "policies": policies, "refused": None}
    router.reject_config("no good")
    assert await loaded() == {"revision": second.revision, "policies": policies, "refused": "no good"}
    assert (await bench.metrics(router))["kvfleet_router_config_refused"] == 1
    router.take_config(second)
    assert await loaded() == {"revision": second.revision, "policies": policies, "refused": None}
    samples = await bench.metrics(router)
    assert (samples["kvfleet_router_config_refused"], samples["kvfleet_router_config_errors_total"]) == (0, 1)


async def test_decisions_can_be_listed_and_looked_up(bench: Bench) -> None:
    router = await bench.router(await bench.worker())
    answers = [await bench.ask(router, post(chat_body(), b"X-Request-Id: req-%d" % number)) for number in range(3)]
    listed = (await bench.ask(router, get("/decisions?limit=2"), admin=True)).json()["decisions"]
    ids = [answer.header("x-kvfleet-decision") for answer in answers]
    assert [decision["id"] for decision in listed] == ids[:0:-1]
    one = await bench.ask(router, get(f"/decisions/{ids[0]}"), admin=True)
    assert one.json()["request_id"] == "req-0"
    by_request = await bench.ask(router, get("/decisions/req-1"), admin=True)
    assert by_request.json()["id"] == ids[1]
    missing = await bench.ask(router, get("/decisions/no-such"), admin=True)
    assert (missing.status, missing.json()["error"]["code"]) == (404, "unknown_decision")


@pytest.mark.parametrize("limit", ["0", "-1", "x", "10001", "99999999999999", "%C2%B2", ""])
async def test_a_bad_limit_is_named(bench: Bench, limit: str) -> None:
    router = await bench.router(await bench.worker())
    answer = await bench.ask(router, get(f"/decisions?limit={limit}"), admin=True)
    assert answer.status == (200 if limit == "" else 400)
    if limit:
        assert answer.json()["error"]["param"] == "limit"


async def test_workers_and_configuration_are_shown(bench: Bench) -> None:
    worker = await bench.worker()
    router = await bench.router(worker)
    (shown,) = (await bench.ask(router, get("/workers"), admin=True)).json()["workers"]
    assert shown == {
        "name": worker.url.removeprefix("http://"),
        "pool": "static",
        "url": worker.url,
        "state": "ready",
        "last_probe": "",
        "in_flight": 0,
        "kv_events": None,
    }
    config = (await bench.ask(router, get("/config"), admin=True)).json()
    assert config["revision"] == router.dispatcher.config.revision
    assert config["config"]["pools"][0]["name"] == "static"


async def test_the_admin_port_is_read_only_and_knows_its_paths(bench: Bench) -> None:
    router = await bench.router(await bench.worker())
    assert (await bench.ask(router, post(b"", path=b"/config"), admin=True)).status == 405
    assert (await bench.ask(router, get("/v1/models"), admin=True)).status == 404
    assert (
        await bench.ask(router, b"HEAD /metrics HTTP/1.1\r\nHost: a\r\n\r\n", admin=True, head_only=True)
    ).status == 200


async def test_the_exposition_is_valid_and_names_are_the_documented_ones(bench: Bench) -> None:
    router = await bench.router(await bench.worker(streams_three))
    await bench.ask(router, post(chat_body(stream=True)))
    answer = await bench.ask(router, get("/metrics"), admin=True)
    assert (answer.header("content-type") or "").startswith("text/plain; version=0.0.4")
    families = {family.name: family.type for family in text_string_to_metric_families(answer.body.decode())}
    ours = {name.removeprefix("kvfleet_router_"): kind for name, kind in families.items() if "kvfleet" in name}
    assert ours == {
        "requests": "counter",
        "in_flight": "gauge",
        "queue_depth": "gauge",
        "deferred_requests": "gauge",
        "deferred_ended": "counter",
        "ttft_seconds": "histogram",
        "itl_seconds": "histogram",
        "e2e_seconds": "histogram",
        "prompt_tokens": "counter",
        "cached_tokens": "counter",
        "cached_tokens_difference": "histogram",
        "cache_view": "gauge",
        "kv_event_batches": "counter",
        "kv_event_repeated": "counter",
        "kv_event_malformed": "counter",
        "kv_event_gaps": "counter",
        "kv_event_replays": "counter",
        "kv_event_replays_failed": "counter",
        "kv_event_restarts": "counter",
        "kv_event_resets": "counter",
        "kv_event_orphan_blocks": "counter",
        "prompts_not_rendered": "counter",
        "kv_event_workers": "gauge",
        "kv_event_blocks": "gauge",
        "generated_blocks_found": "gauge",
        "output_tokens": "counter",
        "retries": "counter",
        "errors": "counter",
        "prefills": "counter",
        "decision_seconds": "histogram",
        "predicted_ttft_seconds": "gauge",
        "ttft_prediction_error_seconds": "histogram",
        "workers": "gauge",
        "worker_in_flight": "gauge",
        "worker_cached_tokens": "gauge",
        "pack_target_sequences": "gauge",
        "packed_sequences": "gauge",
        "config_info": "gauge",
        "config_errors": "counter",
        "config_refused": "gauge",
        "client_connections": "gauge",
        "request_body_bytes": "gauge",
        "probes": "counter",
        "bad_requests": "counter",
        "tasks": "gauge",
    }
    assert "process_resident_memory_bytes" in families


async def test_a_stream_is_counted(bench: Bench) -> None:
    router = await bench.router(await bench.worker(streams_three))
    client = await bench.client(router)
    for options in ({}, {"stream_options": {"include_usage": True}}):
        await client.send(post(chat_body(stream=True, **options)))
        await client.answer()
    samples = await bench.metrics(router)
    assert samples['kvfleet_router_requests_total{model="m",outcome="ok",policy="kvfleet.default",pool="static"}'] == 2
    assert samples[f"kvfleet_router_output_tokens_total{{{LABELS}}}"] == 3 + 9, "chunks where no usage is reported"
    assert samples[f'kvfleet_router_cached_tokens_total{{{LABELS},source="reported"}}'] == 32
    assert samples[f"kvfleet_router_prompt_tokens_total{{{LABELS}}}"] >= 40
    for name in ("ttft", "itl", "e2e"):
        assert samples[f"kvfleet_router_{name}_seconds_count{{{LABELS}}}"] == 2
        assert samples[f'kvfleet_router_{name}_seconds_bucket{{le="+Inf",{LABELS}}}'] == 2
    assert samples['kvfleet_router_ttft_prediction_error_seconds_count{pool="static"}'] == 2
    assert samples["kvfleet_router_decision_seconds_count"] == 2
    assert samples['kvfleet_router_workers{pool="static",state="ready"}'] == 1
    assert samples['kvfleet_router_in_flight{pool="static"}'] == 0


async def test_a_complete_answer_is_counted_without_a_time_to_first_token(bench: Bench) -> None:
    router = await bench.router(await bench.worker())
    await bench.ask(router, post(chat_body()))
    samples = await bench.metrics(router)
    assert samples[f"kvfleet_router_output_tokens_total{{{LABELS}}}"] == 7
    assert samples[f"kvfleet_router_e2e_seconds_count{{{LABELS}}}"] == 1
    assert samples[f"kvfleet_router_ttft_seconds_count{{{LABELS}}}"] == 0
    decision = router.dispatcher.decisions.recent(1)[0]["outcome"]
    assert (decision["prompt_tokens"], decision["cached_tokens"], decision["output_tokens"]) == (11, 5, 7)


async def test_refusals_are_counted_by_cause(bench: Bench) -> None:
    router = await bench.router(await bench.worker(), model="m")
    for body in (b"{", chat_body(model="other")):
        await bench.ask(router, post(body))
    await bench.ask(router, b"nonsense\r\n\r\n")
    samples = await bench.metrics(router)
    assert samples['kvfleet_router_requests_total{model="",outcome="refused",policy="",pool=""}'] == 2
    assert samples['kvfleet_router_errors_total{cause="invalid_json"}'] == 1
    assert samples['kvfleet_router_errors_total{cause="model_not_found"}'] == 1
    assert samples['kvfleet_router_bad_requests_total{cause="malformed_request"}'] == 1


async def test_clients_cannot_make_series_without_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "MAX_SERIES", 5)
    router = await bench.router(await bench.worker())
    client = await bench.client(router)
    for number in range(20):
        await client.send(post(chat_body(model=f"m{number}")))
        await client.answer()
    samples = await bench.metrics(router)
    requests = {name: value for name, value in samples.items() if name.startswith("kvfleet_router_requests_total")}
    assert len(requests) == 6
    assert sum(requests.values()) == 20


async def test_config_revision_follows(bench: Bench) -> None:
    worker = await bench.worker()
    router = await bench.router(worker)
    router.take_config(fleet([worker], retries=1))
    ready = await bench.ask(router, get("/readyz"), admin=True)
    assert ready.json()["revision"] == fleet([worker], retries=1).revision


def explain(body: bytes, query: bytes = b"", *headers: bytes) -> bytes:
    return post(body, *headers, path=b"/explain" + query)


async def test_a_dry_run_tells_where_a_request_would_go_and_sends_nothing(bench: Bench) -> None:
    workers = [await bench.worker() for _ in range(2)]
    router = await bench.router(config=static_fleet([worker.url for worker in workers], "kvfleet", "m"))
    before = router.dispatcher.decisions.recent(10)
    answer = await bench.ask(router, explain(chat_body()), admin=True)
    told = answer.json()
    assert (answer.status, told["would"], told["dry_run"], told["model"]) == (200, "send", True, "m")
    (made,) = told["tries"]
    names = {worker.url.removeprefix("http://") for worker in workers}
    assert {candidate["worker"] for candidate in made["candidates"]} == names
    assert made["candidates"][0]["parts"].keys() >= {"backlog", "prefill", "step"}
    assert not any(worker.requests for worker in workers)
    assert router.dispatcher.decisions.recent(10) == before
    assert all(worker.sent_requests == worker.in_flight == 0 for worker in router.dispatcher.workers())


async def test_a_dry_run_says_why_nobody_would_get_it(bench: Bench) -> None:
    router = await bench.router(config=static_fleet([(await bench.worker()).url], "kvfleet", "m"))
    told = (await bench.ask(router, explain(chat_body(model="other")), admin=True)).json()
    assert (told["would"], told["tries"]) == ("refuse", [])
    assert "'other' does not exist" in told["why"]


@pytest.mark.parametrize(
    ("body", "query", "status", "param"),
    [(b"{", b"", 400, None), (b"{}", b"", 400, "messages"), (b"{}", b"?path=/v1/models", 400, "path")],
)
async def test_a_dry_run_of_a_bad_request_names_what_is_bad(
    bench: Bench, body: bytes, query: bytes, status: int, param: str | None
) -> None:
    router = await bench.router(await bench.worker())
    answer = await bench.ask(router, explain(body, query), admin=True)
    assert (answer.status, answer.json()["error"]["param"]) == (status, param)


async def test_a_dry_run_is_posted(bench: Bench) -> None:
    router = await bench.router(await bench.worker())
    answer = await bench.ask(router, get("/explain"), admin=True)
    assert (answer.status, answer.header("allow")) == (405, "POST")
