"""Under cache pressure: what is expected of workers' caches against what they report, by KV events and by guess, live.

    python bench/kvcache.py                   4 simulated workers, documents four times as large as their KV caches together
    python bench/kvcache.py --requests 400 --rate 20 --pressure 8
    python bench/kvcache.py --simulate        the same question in virtual time: no machine is too slow, and events may be late

Real HTTP, real KV events over ZMQ, the router as it is; the engines are simulated and run `--speed` times as fast. For each mode the
fleet starts cold and gets the same requests at the same times. Times and rates are those of the engines. `guess` beside `by KV events`
is what the approximate index expected of the same worker for the same request. Everything runs in this process: compare the
modes of a run, not runs. Needs the `tokenizers` package.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvloop
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kvfleet_api.compile import static_fleet
from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_router.app import RouterApp
from kvfleet_sim.chat import CHAT_TEMPLATE
from kvfleet_sim.config import parse
from kvfleet_sim.fleet import Options, simulate
from kvfleet_sim.server import Server
from kvfleet_sim.workload import LoadRequest

MODEL = "llama-8b"
SLO_TTFT_S = 1.0
HEADER = """| cached tokens expected | answers | hit ratio | correlation | bias | mean distance | within a block | TTFT mean ms | p99 | TTFT <= 1 s |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
DOCS = Path(__file__).parent.parent / "docs"
EVENTS = {
    "enable_kv_cache_events": True,
    "publisher": "zmq",
    "endpoint": "tcp://127.0.0.1:*",
    "replay_endpoint": "tcp://127.0.0.1:*",
}


@dataclass(slots=True)
class Seen:
    """One answer."""

    ttft_s: float
    expected: float
    guessed: float
    reported: float
    prompt_tokens: float


def write_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [path.read_text() for path in sorted(DOCS.glob("*.md"))]
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def documents(options: argparse.Namespace, directory: Path) -> list[str]:
    """Together `pressure` times the KV tokens of the fleet."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    words = sorted({word for path in DOCS.glob("*.md") for word in path.read_text().split() if word.isalpha()})
    rng = random.Random(options.seed)
    left = options.pressure * options.workers * options.kv_tokens
    found = []
    while left > 0:
        count = rng.randint(options.words // 2, options.words * 3 // 2)
        found.append(" ".join(rng.choices(words, k=count)))
        left -= len(tokenizer.encode(found[-1]).ids)
    return found


def plan(options: argparse.Namespace, texts: list[str]) -> list[tuple[float, list[dict[str, str]]]]:
    """(seconds, messages) of each request: a question on a document; the popular ones oftener (Zipf)."""
    rng = random.Random(options.seed + 1)
    weights = [1 / (rank + 1) ** options.zipf for rank in range(len(texts))]
    at, made = 0.0, []
    for number in range(options.requests):
        at += rng.expovariate(options.rate)
        (text,) = rng.choices(texts, weights)
        question = f"Question {number}: what is said of number {rng.randrange(1000)}?"
        made.append((at, [{"role": "system", "content": text}, {"role": "user", "content": question}]))
    return made


async def measure(options: argparse.Namespace, precise: bool, directory: Path, requests: Any) -> list[Seen]:
    arguments = [
        MODEL,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--enable-prompt-tokens-details",
        "--speed",
        str(options.speed),
    ]
    arguments += [
        "--tokenizer",
        str(directory),
        "--kv-events-config",
        json.dumps(EVENTS),
        "--kv-tokens",
        str(options.kv_tokens),
    ]
    servers = [Server(parse(arguments)) for _ in range(options.workers)]
    for server in servers:
        await server.start()
    router = RouterApp(configuration(servers, directory if precise else None, options), speed=options.speed)
    await router.start()
    try:
        for _ in range(400):
            if not precise or all(worker.held and worker.held.known for worker in router.dispatcher.workers()):
                break
            await asyncio.sleep(0.05)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{router.port}", timeout=120, limits=limits) as client:
            started = asyncio.get_running_loop().time()
            asking = [ask(client, router, options, started, at, messages) for at, messages in requests]
            return [seen for seen in await asyncio.gather(*asking) if seen is not None]
    finally:
        await router.stop(0.0)
        for server in servers:
            await server.close()


def configuration(servers: list[Server], tokenizer: Path | None, options: argparse.Namespace) -> FleetConfig:
    cost = replace(servers[0].config.cost, kv_tokens=options.kv_tokens)
    fleet = static_fleet([f"http://127.0.0.1:{server.port}" for server in servers], options.strategy, MODEL, cost=cost)
    (pool,) = fleet.pools
    endpoints = []
    for endpoint, server in zip(pool.endpoints, servers, strict=True):
        assert server.publisher is not None
        urls = {"kv_events_url": server.publisher.endpoint, "kv_replay_url": server.publisher.replay_endpoint}
        endpoints.append(endpoint.model_copy(update=urls))
    path = None if tokenizer is None else str(tokenizer)
    return fleet.model_copy(
        update={"pools": [pool.model_copy(update={"endpoints": endpoints, "tokenizer_path": path})]}
    )


async def ask(
    client: httpx.AsyncClient, router: RouterApp, options: argparse.Namespace, started: float, at: float, messages: Any
) -> Seen | None:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(max(started + at / options.speed - loop.time(), 0.0))
    body = {"model": MODEL, "messages": messages, "max_tokens": options.output_tokens, "stream": True}
    body["stream_options"] = {"include_usage": True}
    sent, first = loop.time(), None
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            return None
        async for _ in answer.aiter_bytes():
            first = first or loop.time()
    record = router.dispatcher.decisions.get(answer.headers["x-kvfleet-decision"])
    if record is None or record["outcome"] is None or first is None:
        return None
    made, outcome = record["tries"][-1], record["outcome"]
    expected = next(c["cached_tokens"] for c in made["candidates"] if c["worker"] == made["worker"])
    return Seen(
        (first - sent) * options.speed,
        expected,
        made["guessed_cached_tokens"],
        outcome["cached_tokens"] or 0,
        outcome["prompt_tokens"] or 0,
    )


def show(name: str, predicted: list[float], seen: list[Seen]) -> None:
    expected, reported = np.array(predicted), np.array([one.reported for one in seen])
    ttft = np.array([one.ttft_s for one in seen])
    correlation = np.corrcoef(expected, reported)[0, 1] if expected.std() and reported.std() else float("nan")
    hits = reported.sum() / sum(one.prompt_tokens for one in seen)
    exact = np.mean(np.abs(expected - reported) <= 16)
    print(
        f"| {name} | {len(seen)} | {hits:.3f} | {correlation:.4f} | {np.mean(expected - reported):+.0f} | "
        f"{np.mean(np.abs(expected - reported)):.0f} | {exact:.3f} | {ttft.mean() * 1e3:.0f} | "
        f"{np.quantile(ttft, 0.99) * 1e3:.0f} | {np.mean(ttft <= SLO_TTFT_S):.3f} |"
    )


def simulated(options: argparse.Namespace) -> None:
    """The router's core before simulated engines, no network: the engines' caches told at once, late, or not at all."""
    rng = random.Random(options.seed)
    cost = replace(parse([MODEL]).cost, kv_tokens=options.kv_tokens)
    names = [f"w{number}" for number in range(options.workers)]
    fleet = static_fleet([f"http://{name}:1" for name in names], options.strategy, MODEL, cost=cost)
    block_tokens = 16
    sizes: list[int] = []
    while sum(sizes) < options.pressure * options.workers * options.kv_tokens:
        sizes.append(rng.randint(options.words // 2, options.words * 3 // 2) // block_tokens * block_tokens)
    keys = [[rng.getrandbits(63) for _ in range(size // block_tokens)] for size in sizes]
    weights = [1 / (rank + 1) ** options.zipf for rank in range(len(sizes))]
    load, at = [], 0.0
    for _ in range(options.requests):
        at += rng.expovariate(options.rate)
        (number,) = rng.choices(range(len(sizes)), weights)
        load.append(LoadRequest(sizes[number] + 20, options.output_tokens, keys[number], at))
    rows = (
        ("told at once", True, 0.0),
        ("told after 10 ms", True, 0.01),
        ("told after 100 ms", True, 0.1),
        ("guess", False, 0.0),
    )
    for name, told, delay_s in rows:
        run = simulate(
            fleet, load, model=MODEL, block_tokens=block_tokens, seed=options.seed,
            options=Options(kv_events=told, event_delay_s=delay_s),
        )  # fmt: skip
        done = run.completed
        columns = (run.ttft_s, run.expected_tokens, run.expected_tokens, run.cached_tokens, run.prompt_tokens)
        seen = [Seen(*row) for row in zip(*(column[done].tolist() for column in columns), strict=True)]
        show(name, [one.expected for one in seen], seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kv-tokens", type=int, default=24_000, help="of each worker")
    parser.add_argument(
        "--pressure", type=float, default=4.0, help="tokens of all documents over KV tokens of the fleet"
    )
    parser.add_argument("--words", type=int, default=1500, help="of a document, on average")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--rate", type=float, default=8.0, help="requests per second of the engines' time")
    parser.add_argument("--zipf", type=float, default=0.8)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--speed", type=float, default=4.0)
    parser.add_argument("--strategy", default="kvfleet")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--simulate", action="store_true", help="in virtual time")
    options = parser.parse_args()
    if options.simulate:
        pressure = f"{options.pressure:g} x {options.workers} x {options.kv_tokens:,} tokens of documents"
        print(f"{pressure}; {options.requests} requests at {options.rate:g}/s; {options.strategy}; virtual time")
        print(HEADER)
        simulated(options)
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_tokenizer(directory)
        texts = documents(options, directory)
        requests = plan(options, texts)
        tokens = f"{options.pressure:g} x {options.workers} x {options.kv_tokens:,}"
        print(
            f"{len(texts)} documents, {tokens} tokens; {options.requests} requests at {options.rate:g}/s; {options.strategy}"
        )
        print(HEADER)
        precise = uvloop.run(measure(options, True, directory, requests))
        show("by KV events", [one.expected for one in precise], precise)
        show("(guess, same requests)", [one.guessed for one in precise], precise)
        guessed = uvloop.run(measure(options, False, directory, requests))
        show("by guess", [one.expected for one in guessed], guessed)


if __name__ == "__main__":
    main()
