"""Limits per API key at the socket: 429 with Retry-After, tokens counted once a request has ended, by tenant in metrics and
decisions."""

import asyncio
import hashlib
import time
from pathlib import Path

import openai
import pytest
from scripted import STREAM_END, STREAM_HEAD, Bench, ScriptedWorker, Seen, chat_body, event, eventually, fleet, post

from kvfleet_router.app import RouterApp
from kvfleet_router.io.auth import ApiKeys, KeysRejected


def line(name: str, options: str = "") -> str:
    return f"{name}:{hashlib.sha256(name.encode()).hexdigest()} {options}\n"


def key(name: str) -> bytes:
    return b"authorization: Bearer " + name.encode()


async def started(bench: Bench, tmp_path: Path, text: str, *workers: ScriptedWorker) -> RouterApp:
    file = tmp_path / "keys"
    file.write_text(text)
    router = RouterApp(fleet(workers, model="m"), api_keys=ApiKeys(file))
    await router.start()
    bench.on_close(router.stop, 0.0)
    return router


async def test_a_key_over_its_requests_waits_and_others_do_not(bench: Bench, tmp_path: Path) -> None:
    worker = await bench.worker()
    router = await started(bench, tmp_path, line("alice", "tenant=acme requests-per-minute=2") + line("bob"), worker)
    client = await bench.client(router)
    statuses = []
    for name in ("alice", "alice", "alice", "bob"):
        await client.send(post(chat_body(), key(name)))
        answer = await client.answer()
        statuses.append(answer.status)
        if answer.status == 429:
            assert int(answer.header("retry-after") or 0) in range(1, 31)
            error = answer.json()["error"]
            assert (error["code"], error["type"]) == ("rate_limit_exceeded", "requests")
            assert "alice" in error["message"]
    assert statuses == [200, 200, 429, 200]
    assert len(worker.requests) == 3
    metrics = await bench.metrics(router)
    assert metrics['kvfleet_router_tenant_requests_total{tenant="acme"}'] == 2
    assert metrics['kvfleet_router_tenant_limited_total{limit="requests",tenant="acme"}'] == 1
    assert metrics['kvfleet_router_tenant_tokens_total{kind="output",tenant="acme"}'] == 14
    assert metrics['kvfleet_router_tenant_tokens_total{kind="prompt",tenant="bob"}'] == 11
    tenants = [decision["tenant"] for decision in router.dispatcher.decisions.recent(3)]
    assert tenants == ["bob", "acme", "acme"]


async def test_tokens_count_when_they_are_used(bench: Bench, tmp_path: Path) -> None:
    """A stream that was left counts what it had until then."""
    go = asyncio.Event()

    async def streams(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + b"".join(event("a") for _ in range(200)))
        await go.wait()
        writer.write(STREAM_END)

    router = await started(bench, tmp_path, line("alice", "tokens-per-minute=150"), await bench.worker(streams))
    client = await bench.client(router)
    await client.send(post(chat_body(stream=True), key("alice")))
    await client.reader.readuntil(event("a") * 200)
    client.close()
    await eventually(lambda: not router.server.connections)
    answer = await bench.ask(router, post(chat_body(), key("alice")))
    assert (answer.status, answer.json()["error"]["type"]) == (429, "tokens")
    assert int(answer.header("retry-after") or 0) in range(15, 60)


async def test_what_is_refused_costs_no_tokens(bench: Bench, tmp_path: Path) -> None:
    router = await started(bench, tmp_path, line("alice", "tokens-per-minute=100"), await bench.worker())
    for _ in range(20):
        answer = await bench.ask(
            router, post(chat_body(model="none", messages=[{"role": "user", "content": "x" * 300}]), key("alice"))
        )
        assert answer.status == 404
    assert (await bench.ask(router, post(chat_body(), key("alice")))).status == 200


async def test_openais_client_sees_a_rate_limit(bench: Bench, tmp_path: Path) -> None:
    router = await started(bench, tmp_path, line("alice", "requests-per-minute=1"), await bench.worker())
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{router.port}/v1", api_key="alice", max_retries=0
    ) as client:
        messages = [{"role": "user", "content": "hi"}]
        await client.chat.completions.create(model="m", messages=messages)  # type: ignore[arg-type]
        with pytest.raises(openai.RateLimitError) as error:
            await client.chat.completions.create(model="m", messages=messages)  # type: ignore[arg-type]
        assert error.value.code == "rate_limit_exceeded"
        assert [model.id async for model in client.models.list()] == ["m"]


async def test_new_limits_are_taken_and_the_count_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(line("alice", "requests-per-minute=5"))
    keys = ApiKeys(file)
    account = keys.account_of(b"alice")
    assert account is not None
    account.admit(0, time.monotonic())
    file.write_text(line("alice", "requests-per-minute=7 tenant=acme") + line("bob"))
    keys.reload()
    assert keys.account_of(b"alice") is account
    assert (account.requests, account.tenant) == (1, "acme")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("requests-per-minute=0", "whole number"),
        ("tokens-per-minute=1.5", "whole number"),
        ("tokens-per-minute=1 tokens-per-minute=2", "twice"),
        ("burst=3", "unknown option burst"),
        ("tenant", "not NAME:SHA256"),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, options: str, said: str) -> None:
    file = tmp_path / "keys"
    file.write_text(line("bob") + line("alice", options))
    with pytest.raises(KeysRejected, match="line 2") as error:
        ApiKeys(file)
    assert said in str(error.value)


def test_two_keys_of_one_name_must_agree(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    other = hashlib.sha256(b"other").hexdigest()
    file.write_text(line("alice", "tenant=a") + f"alice:{other} tenant=a\n")
    keys = ApiKeys(file)
    assert keys.account_of(b"alice") is keys.account_of(b"other")
    file.write_text(line("alice", "tenant=a") + f"alice:{other} tenant=b\n")
    with pytest.raises(KeysRejected, match="another tenant"):
        ApiKeys(file)
