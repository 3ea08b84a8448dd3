"""The router in front of simulated engines that publish KV events: what it expects is what they report."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from scripted import PATIENCE_S, Bench, eventually

from kvfleet_api.compile import static_fleet
from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_router.app import RouterApp
from kvfleet_sim.chat import CHAT_TEMPLATE
from kvfleet_sim.config import parse
from kvfleet_sim.server import Server

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from small_tokenizers import byte_level, document

MODEL = "llama-8b"
EVENTS = {
    "enable_kv_cache_events": True,
    "publisher": "zmq",
    "endpoint": "tcp://127.0.0.1:*",
    "replay_endpoint": "tcp://127.0.0.1:*",
}
WORDS = (
    "worker",
    "router",
    "prefix",
    "cache",
    "token",
    "batch",
    "queue",
    "the",
    "of",
    "and",
    "is",
    "request",
    "energy",
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    without_bos = document(byte_level()) | {"post_processor": None}  # the simulated engine puts none before completions
    (tmp_path / "tokenizer.json").write_text(json.dumps(without_bos))
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tmp_path


async def engines(bench: Bench, count: int, tokenizer: Path, *args: str) -> list[Server]:
    options = [MODEL, "--host", "127.0.0.1", "--port", "0", "--enable-prompt-tokens-details", "--speed", "100"]
    options += ["--tokenizer", str(tokenizer), "--kv-events-config", json.dumps(EVENTS), *args]
    servers = [Server(parse(options)) for _ in range(count)]
    for server in servers:
        await server.start()
        bench.on_close(server.close)
    return servers


def config_of(servers: list[Server], tokenizer: Path | None) -> FleetConfig:
    config = static_fleet([f"http://127.0.0.1:{server.port}" for server in servers], "kvfleet", MODEL)
    (pool,) = config.pools
    endpoints = []
    for endpoint, server in zip(pool.endpoints, servers, strict=True):
        assert server.publisher is not None
        urls = {"kv_events_url": server.publisher.endpoint, "kv_replay_url": server.publisher.replay_endpoint}
        endpoints.append(endpoint.model_copy(update=urls))
    path = None if tokenizer is None else str(tokenizer)
    pool = pool.model_copy(update={"endpoints": endpoints, "tokenizer_path": path})
    return config.model_copy(update={"pools": [pool]})


async def cache_view(bench: Bench, router: RouterApp) -> dict[str, str]:
    told: dict[str, Any] = (await bench.ask(router, b"GET /loaded HTTP/1.1\r\nHost: a\r\n\r\n", admin=True)).json()
    view: dict[str, str] = told["pools"]["static"]
    return view


async def following(bench: Bench, servers: list[Server], tokenizer: Path) -> RouterApp:
    router = await bench.router(config=config_of(servers, tokenizer), speed=100)
    await eventually(
        lambda: all(worker.held is not None and worker.held.known for worker in router.dispatcher.workers())
    )
    assert (await cache_view(bench, router))["mode"] == "Precise"
    return router


def client_of(bench: Bench, router: RouterApp) -> openai.AsyncOpenAI:
    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{router.port}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    )
    bench.on_close(client.close)
    return client


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


async def settled(router: RouterApp, servers: list[Server]) -> None:
    """The router has heard all that was published."""

    def heard() -> bool:
        return all(
            worker.held is not None and worker.held.engines[0].stream.next == server.publisher._sequence  # type: ignore[union-attr]
            for worker, server in zip(router.dispatcher.workers(), servers, strict=True)
        )

    await eventually(heard)


def last_try(router: RouterApp) -> tuple[dict[str, Any], dict[str, Any]]:
    (decision,) = router.dispatcher.decisions.recent(1)
    return decision["tries"][-1], decision["outcome"]


def expected_of(made: dict[str, Any]) -> int:
    return next(candidate["cached_tokens"] for candidate in made["candidates"] if candidate["worker"] == made["worker"])


async def test_conversations_are_expected_to_the_token(bench: Bench, tokenizer: Path) -> None:
    servers = await engines(bench, 2, tokenizer)
    router = await following(bench, servers, tokenizer)
    client = client_of(bench, router)
    rng = random.Random(3)
    system = {"role": "system", "content": words(rng, 300)}
    compared = 0
    for _ in range(3):
        messages: list[Any] = [system]
        for _turn in range(4):
            messages.append({"role": "user", "content": words(rng, 60)})
            answer = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=40)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            made, outcome = last_try(router)
            assert (made["cache_view"], made["cache_view_reason"]) == ("precise", "EventsFollowed")
            assert outcome["cached_tokens"] is not None
            # What was sampled may be spelled otherwise when it comes back, and a block may end inside such a spelling.
            assert 0 <= expected_of(made) - outcome["cached_tokens"] <= 64
            compared += expected_of(made) > 0
            await settled(router, servers)
    assert compared >= 10
    samples = await bench.metrics(router)
    assert samples['kvfleet_router_kv_event_workers{known="complete",pool="static"}'] == 2


async def test_completions_and_token_ids_are_expected_to_the_token(bench: Bench, tokenizer: Path) -> None:
    servers = await engines(bench, 1, tokenizer)
    router = await following(bench, servers, tokenizer)
    client = client_of(bench, router)
    text = words(random.Random(4), 400)
    for prompt in (text, text, byte_level().encode(text, add_special_tokens=False).ids, text + " more"):
        await client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
        made, outcome = last_try(router)
        assert (made["cache_view"], expected_of(made)) == ("precise", outcome["cached_tokens"])
        await settled(router, servers)


async def test_a_decision_says_why_its_prompt_was_guessed(bench: Bench, tokenizer: Path) -> None:
    servers = await engines(bench, 1, tokenizer)
    router = await following(bench, servers, tokenizer)
    client = client_of(bench, router)
    await client.completions.create(model=MODEL, prompt=["one", "two"], max_tokens=1)
    assert last_try(router)[0]["cache_view_reason"] == "PromptNotRendered: several"
    config = config_of(servers, tokenizer)
    for prefix, reason in (({"source": "Approximate"}, "PolicyGuesses"), ({"enabled": False}, "PrefixesNotUsed")):
        (policy,) = config.policies
        guessing = policy.model_copy(update={"prefix": policy.prefix.model_copy(update=prefix)})
        router.take_config(config.model_copy(update={"policies": [guessing]}))
        await client.completions.create(model=MODEL, prompt="one", max_tokens=1)
        made, _ = last_try(router)
        assert (made["cache_view"], made["cache_view_reason"]) == ("approximate", reason)


async def test_what_an_engine_forgets_is_expected_no_more(bench: Bench, tokenizer: Path) -> None:
    """A cache of 64 blocks: the approximate view, sized by the accelerator's profile, still believes."""
    servers = await engines(
        bench, 1, tokenizer, "--block-size", "16", "--num-gpu-blocks-override", "64", "--max-model-len", "900"
    )
    router = await following(bench, servers, tokenizer)
    client = client_of(bench, router)
    first, *others = [words(random.Random(seed), 300) for seed in range(5)]
    for text in (first, *others):
        await client.completions.create(model=MODEL, prompt=text, max_tokens=1)
        await settled(router, servers)
    await client.completions.create(model=MODEL, prompt=first, max_tokens=1)
    made, outcome = last_try(router)
    assert outcome["cached_tokens"] == expected_of(made) == 0
    assert made["guessed_cached_tokens"] > 200


async def test_a_prompt_in_flight_counts_as_cached_before_any_event(bench: Bench, tokenizer: Path) -> None:
    servers = await engines(bench, 2, tokenizer, "--speed", "1")  # the stream outlives whatever holds this process up
    router = await following(bench, servers, tokenizer)
    client = client_of(bench, router)
    text = words(random.Random(6), 2000)
    stream = await client.completions.create(model=MODEL, prompt=text, max_tokens=2000, stream=True)
    await client.completions.create(model=MODEL, prompt=text + " x", max_tokens=1)
    made, _ = last_try(router)
    assert max(candidate["cached_tokens"] for candidate in made["candidates"]) > 1000
    await stream.close()


async def test_a_router_that_begins_late_learns_what_is_there(bench: Bench, tokenizer: Path) -> None:
    servers = await engines(bench, 1, tokenizer)
    text = words(random.Random(7), 400)
    early = await bench.router(config=config_of(servers, None), speed=100)
    await client_of(bench, early).completions.create(model=MODEL, prompt=text, max_tokens=1)
    late = await following(bench, servers, tokenizer)
    await settled(late, servers)
    await client_of(bench, late).completions.create(model=MODEL, prompt=text, max_tokens=1)
    made, outcome = last_try(late)
    assert expected_of(made) == outcome["cached_tokens"] > 0


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "TokenizerNotFound"),
        ({"tokenizer.json": "{"}, "TokenizerInvalid"),
        ({"tokenizer.json": '{"model": {"type": "Unigram"}}'}, "TokenizerNotBPE"),
        ({"tokenizer.json.gz": "plain"}, "TokenizerInvalid"),
    ],
)
async def test_a_tokenizer_that_cannot_be_used_is_told_and_guesses_serve(
    bench: Bench, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory, files: dict[str, str], reason: str
) -> None:
    servers = await engines(bench, 1, tokenizer)
    broken = tmp_path_factory.mktemp("tokenizer")
    for name, content in files.items():
        (broken / name).write_text(content)
    router = await bench.router(config=config_of(servers, broken), speed=100)
    told: dict[str, str] = {}
    while told.get("reason") in (None, "Loading"):
        told = await cache_view(bench, router)
    assert (told["mode"], told["reason"]) == ("Approximate", reason)
    assert str(broken) in told["message"] or reason == "TokenizerNotBPE"
    await client_of(bench, router).completions.create(model=MODEL, prompt="hello", max_tokens=1)
    made, _ = last_try(router)
    assert (made["cache_view"], made["cache_view_reason"]) == ("approximate", reason)
    assert (await bench.metrics(router))[
        f'kvfleet_router_cache_view{{mode="Approximate",pool="static",reason="{reason}"}}'
    ] == 1


async def test_files_put_right_are_taken(
    bench: Bench, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    servers = await engines(bench, 1, tokenizer)
    late = tmp_path_factory.mktemp("tokenizer")
    router = await bench.router(config=config_of(servers, late), speed=100)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (late / name).write_bytes((tokenizer / name).read_bytes())
    (worker,) = router.dispatcher.workers()
    await eventually(lambda: worker.held is not None and worker.held.known)


async def test_the_wrong_template_is_found_out(bench: Bench, tokenizer: Path) -> None:
    """Nothing it leads to is ever cached, but engines report hits: guesses are better."""
    servers = await engines(bench, 1, tokenizer)
    (tokenizer / "chat_template.jinja").write_text("{{ messages[0].content }}")
    router = await following(bench, servers, tokenizer)
    client = client_of(bench, router)
    content = words(random.Random(8), 200)
    for _ in range(40):
        await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}], max_tokens=1)
    await eventually(lambda: router.dispatcher.workers()[0].held is None)
    assert (await cache_view(bench, router))["reason"] == "PredictionsMiss"
    made, _ = last_try(router)
    assert expected_of(made) > 100
