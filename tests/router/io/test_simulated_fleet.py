"""The router in front of simulated vLLM servers: whole ways, with the engine's own manners of leaving and dying."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import openai
import pytest
from scripted import PATIENCE_S, Bench, eventually

from kvfleet_api.compile import static_fleet
from kvfleet_router.app import RouterApp
from kvfleet_sim.config import parse
from kvfleet_sim.server import Server

SPEED = 50.0
MODEL = "llama-8b"


class Fleet:
    """Simulated servers, a router before them, and OpenAI's client before that."""

    def __init__(self, servers: Sequence[Server], router: RouterApp, client: openai.AsyncOpenAI) -> None:
        self.servers, self.router, self.client = servers, router, client

    async def ask(self, text: str, **options: Any) -> Any:
        messages = [{"role": "user", "content": text}]
        return await self.client.chat.completions.with_raw_response.create(
            model=MODEL, messages=messages, **{"max_tokens": 16, **options}
        )

    def server_of(self, answer: Any) -> Server:
        port = int(answer.headers["x-kvfleet-worker"].rpartition(":")[2])
        return next(server for server in self.servers if server.port == port)


async def fleet_of(bench: Bench, count: int, *args: str, strategy: str = "kvfleet", speed: float = SPEED) -> Fleet:
    options = [
        MODEL,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--enable-prompt-tokens-details",
        "--speed",
        str(speed),
        *args,
    ]
    servers = [Server(parse(options)) for _ in range(count)]
    for server in servers:
        await server.start()
        bench.on_close(server.close)
    config = static_fleet([f"http://127.0.0.1:{server.port}" for server in servers], strategy, MODEL)
    router = await bench.router(config=config, speed=speed)
    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{router.port}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    )
    bench.on_close(client.close)
    return Fleet(servers, router, client)


@pytest.fixture
async def fleet(bench: Bench) -> AsyncIterator[Fleet]:
    yield await fleet_of(bench, 3)


async def test_streams_and_whole_answers_agree(fleet: Fleet) -> None:
    whole = (await fleet.ask("a story", max_tokens=40)).parse()
    stream = (await fleet.ask("a story", max_tokens=40, stream=True, stream_options={"include_usage": True})).parse()
    parts = [part async for part in stream]
    assert (
        "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        == whole.choices[0].message.content
    )
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens == 40


async def test_a_conversation_stays_with_the_worker_that_has_its_beginning(fleet: Fleet) -> None:
    text = "Once upon a time there was a router. " * 100
    workers = []
    for turn in range(6):
        answer = await fleet.ask(text)
        workers.append(answer.headers["x-kvfleet-worker"])
        if turn:
            assert answer.parse().usage.prompt_tokens_details.cached_tokens > 0
        text += f"And then, {turn}: " + "it routed. " * 50
    assert len(set(workers)) == 1


async def test_predictions_and_outcomes_meet_in_the_decision(fleet: Fleet) -> None:
    answer = await fleet.ask("word " * 2000, stream=True, stream_options={"include_usage": True})
    assert [part async for part in answer.parse()]
    decision = fleet.router.dispatcher.decisions.get(answer.headers["x-kvfleet-decision"])
    assert decision is not None
    (made,) = decision["tries"]
    outcome = decision["outcome"]
    assert outcome["result"] == "ok"
    assert outcome["output_tokens"] == 16
    assert outcome["prompt_tokens"] > 2000
    assert 0 < made["predicted_ttft_s"] < 10


async def test_a_worker_told_to_leave_at_once_costs_no_answer(bench: Bench) -> None:
    """It ends what runs with reason "abort" and gives new requests 500, while its port is still open."""
    fleet = await fleet_of(bench, 3, strategy="least_request", speed=2.0)
    asking = [asyncio.create_task(fleet.ask(f"story {number}", max_tokens=100)) for number in range(12)]
    await eventually(lambda: all(server.worker.jobs == 4 for server in fleet.servers))
    leaving = asyncio.create_task(fleet.servers[0].shut_down())
    await eventually(lambda: fleet.servers[0].app.shutting_down)
    asking += [asyncio.create_task(fleet.ask(f"late story {number}", max_tokens=100)) for number in range(6)]
    answers = [(await task).parse() for task in asking]
    assert {answer.choices[0].finish_reason for answer in answers} == {"length"}
    assert {answer.usage.completion_tokens for answer in answers} == {100}
    await leaving
    assert fleet.router.metrics.errors["engine_aborted"] == 4


async def test_a_worker_that_drains_gets_nothing_new_and_loses_nothing(bench: Bench) -> None:
    fleet = await fleet_of(bench, 2, "--shutdown-timeout", "1", strategy="round_robin", speed=2.0)
    streams = [(await fleet.ask(f"story {number}", max_tokens=50, stream=True)).parse() for number in range(4)]
    leaving = asyncio.create_task(fleet.servers[0].shut_down())
    await eventually(lambda: fleet.servers[0].app.shutting_down)
    late = [await fleet.ask(f"late {number}", max_tokens=4) for number in range(6)]
    assert {fleet.server_of(answer) for answer in late} == {fleet.servers[1]}
    for stream in streams:
        parts = [part async for part in stream]
        assert parts[-1].choices[0].finish_reason == "length"
    await leaving


async def test_a_worker_that_dies_inside_streams_ends_them_with_an_error(bench: Bench) -> None:
    fleet = await fleet_of(bench, 2, strategy="round_robin", speed=1.0)
    streams = [(await fleet.ask(f"story {number}", max_tokens=400, stream=True)) for number in range(4)]
    bodies = [stream.parse() for stream in streams]
    for body in bodies:
        await anext(body)
    dead = fleet.servers[0]
    await dead.close()
    for answer, body in zip(streams, bodies, strict=True):
        if fleet.server_of(answer) is dead:
            with pytest.raises(openai.APIError, match="failed while it answered"):
                assert [part async for part in body]
        else:
            body_task = asyncio.create_task(body.close())
            await body_task
    await eventually(lambda: all(worker.in_flight == 0 for worker in fleet.router.dispatcher.workers()))


async def test_a_client_that_leaves_frees_the_engine(bench: Bench) -> None:
    fleet = await fleet_of(bench, 1, speed=1.0)
    stream = (await fleet.ask("story", max_tokens=2000, stream=True)).parse()
    await anext(stream)
    assert fleet.servers[0].worker.jobs == 1
    await stream.close()
    await eventually(lambda: fleet.servers[0].worker.jobs == 0)
    assert fleet.router.dispatcher.decisions.recent(1)[0]["outcome"]["result"] == "abandoned"


async def test_vllms_own_refusals_are_passed_on(fleet: Fleet) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        await fleet.ask("hi", temperature=-1)
    assert error.value.response.headers["x-kvfleet-worker"]
