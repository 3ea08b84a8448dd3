"""Prefill and decode on separate workers, over HTTP: simulated vLLM servers with a KV connector, and workers that misbehave."""

import asyncio
from collections.abc import Sequence
from typing import Any

import openai
import orjson
import pytest
from scripted import PATIENCE_S, Bench, Seen, completion, eventually, json_answer

from kvfleet_api.compile import static_fleet
from kvfleet_api.fleetconfig import Endpoint, FleetConfig, WeightedPool
from kvfleet_router.app import RouterApp
from kvfleet_router.io.disaggregation import decode_body, prefill_body, transfer_params
from kvfleet_sim.config import parse
from kvfleet_sim.server import Server

SPEED = 50.0
MODEL = "llama-8b"
CONNECTOR = ("--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}')
LONG = "word " * 4000
BODY = b'{"model": "llama-8b", "messages": [{"role": "user", "content": "a }"}], "max_tokens": 64, "seed": 1e400}'


def divided(prefill: Sequence[str], decode: Sequence[str]) -> FleetConfig:
    """A pool of each role, with these workers."""
    config = static_fleet([*prefill, *decode], "kvfleet", MODEL)
    (pool,) = config.pools
    pools = [
        pool.model_copy(
            update={
                "name": role.lower(),
                "role": role,
                "endpoints": [Endpoint(name=url.removeprefix("http://"), url=url) for url in urls],
            }
        )
        for role, urls in (("Prefill", prefill), ("Decode", decode))
    ]
    refs = [WeightedPool(name=pool.name) for pool in pools]
    policies = [policy.model_copy(update={"pools": refs}) for policy in config.policies]
    return config.model_copy(update={"pools": pools, "policies": policies})


class Pair:
    """Simulated Prefill and Decode servers, a router before them, and OpenAI's client before that."""

    def __init__(
        self, prefill: list[Server], decode: list[Server], router: RouterApp, client: openai.AsyncOpenAI
    ) -> None:
        self.prefill, self.decode, self.router, self.client = prefill, decode, router, client

    async def ask(self, text: str = LONG, **options: Any) -> Any:
        messages = [{"role": "user", "content": text}]
        return await self.client.chat.completions.with_raw_response.create(
            model=MODEL, messages=messages, **{"max_tokens": 16, **options}
        )

    def prefilled_tokens(self) -> tuple[int, int]:
        """Prompt tokens computed by the Prefill servers, and by the Decode servers."""
        of = [sum(s.worker.engine.meter.prefill_tokens for s in servers) for servers in (self.prefill, self.decode)]
        return of[0], of[1]

    def idle(self) -> bool:
        return all(worker.in_flight == 0 for worker in self.router.dispatcher.workers())


async def pair_of(
    bench: Bench, prefill: int = 1, decode: int = 1, *, connector: Sequence[str] = CONNECTOR, speed: float = SPEED
) -> Pair:
    options = [MODEL, "--host", "127.0.0.1", "--port", "0", "--enable-prompt-tokens-details", "--speed", str(speed)]
    servers = [Server(parse([*options, *connector])) for _ in range(prefill + decode)]
    for server in servers:
        await server.start()
        bench.on_close(server.close)
    urls = [f"http://127.0.0.1:{server.port}" for server in servers]
    router = await bench.router(config=divided(urls[:prefill], urls[prefill:]), speed=speed)
    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{router.port}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    )
    bench.on_close(client.close)
    return Pair(servers[:prefill], servers[prefill:], router, client)


# Bodies


def test_the_prefill_workers_body_is_the_clients_with_other_values_at_the_end() -> None:
    body = prefill_body(BODY + b" \n", chat=True)
    assert body.startswith(BODY[:-1])
    read = orjson.loads(body.replace(b"1e400", b"1"))
    assert (read["max_tokens"], read["max_completion_tokens"], read["stream"], read["stream_options"]) == (
        1,
        1,
        False,
        None,
    )
    assert read["kv_transfer_params"]["do_remote_decode"] is True
    assert read["messages"] == [{"role": "user", "content": "a }"}]
    assert "max_completion_tokens" not in orjson.loads(prefill_body(b'{"prompt": "x"}', chat=False))


def test_the_decode_workers_body_is_the_clients_with_what_was_handed_on() -> None:
    params = transfer_params(b'{"x": [1], "kv_transfer_params": {"remote_block_ids": [[1, 2]], "remote_port": 1e400}}')
    assert params == b'{"remote_block_ids": [[1, 2]], "remote_port": 1e400}'
    assert decode_body(BODY, params) == BODY[:-1] + b',"kv_transfer_params":' + params + b"}"


@pytest.mark.parametrize(
    "answer",
    [b"", b"{}", b"[1]", b'{"kv_transfer_params": null}', b'{"kv_transfer_params": "x"}', b"\xff", b"{" * 9999],
)
def test_an_answer_that_hands_nothing_on(answer: bytes) -> None:
    assert transfer_params(answer) == b""


# With engines


@pytest.mark.parametrize("stream", [False, True])
async def test_a_long_prompt_is_computed_by_one_and_answered_by_the_other(bench: Bench, stream: bool) -> None:
    pair = await pair_of(bench)
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = await pair.ask(**options)
    if stream:
        parts = [part async for part in answer.parse()]
        text, usage = "".join(p.choices[0].delta.content or "" for p in parts if p.choices), parts[-1].usage
    else:
        text, usage = answer.parse().choices[0].message.content, answer.parse().usage
    assert usage.completion_tokens == 16
    assert text
    assert pair.prefilled_tokens() == (usage.prompt_tokens, 1)
    assert answer.headers["x-kvfleet-worker"].endswith(str(pair.decode[0].port))
    assert pair.idle()
    decision = pair.router.dispatcher.decisions.get(answer.headers["x-kvfleet-decision"])
    assert decision is not None
    assert [made["phase"] for made in decision["tries"]] == ["prefill", "decode"]
    assert pair.router.metrics.prefills == {("prefill", "handed_on"): 1}


async def test_the_answer_is_that_of_one_worker_alone(bench: Bench) -> None:
    pair, alone = await pair_of(bench), await pair_of(bench, prefill=0)
    texts = [(await fleet.ask(seed=1)).parse().choices[0].message.content for fleet in (pair, alone)]
    assert texts[0] == texts[1]


async def test_short_prompts_stay_where_they_are_decoded(bench: Bench) -> None:
    pair = await pair_of(bench)
    assert (await pair.ask("hi")).parse().usage.completion_tokens == 16
    assert pair.prefilled_tokens()[0] == 0


async def test_engines_without_a_connector_answer_all_the_same(bench: Bench) -> None:
    pair = await pair_of(bench, connector=())
    assert (await pair.ask()).parse().usage.completion_tokens == 16
    assert pair.router.metrics.prefills == {("prefill", "nothing_handed"): 1}
    assert pair.idle()


async def test_a_prefill_worker_that_dies_costs_nothing(bench: Bench) -> None:
    pair = await pair_of(bench, prefill=2, speed=1.0)
    asking = asyncio.create_task(pair.ask("word " * 30_000, max_tokens=4))
    await eventually(lambda: any(server.worker.jobs for server in pair.prefill))
    busy = next(server for server in pair.prefill if server.worker.jobs)
    await busy.close()
    assert (await asking).parse().usage.completion_tokens == 4
    await eventually(pair.idle)


async def test_a_decode_worker_that_is_gone_sends_the_request_back_to_the_beginning(bench: Bench) -> None:
    pair = await pair_of(bench, decode=2)
    await pair.decode[0].close()
    for number in range(3):
        answer = await pair.ask(f"{number} {LONG}")
        assert answer.headers["x-kvfleet-worker"].endswith(str(pair.decode[1].port))
    await eventually(pair.idle)


async def test_a_client_that_leaves_during_the_prefill_frees_both(bench: Bench) -> None:
    pair = await pair_of(bench, speed=1.0)
    asking = asyncio.create_task(pair.ask("word " * 30_000))
    await eventually(lambda: pair.prefill[0].worker.jobs)
    asking.cancel()
    await eventually(lambda: not pair.prefill[0].worker.jobs and pair.idle())
    assert pair.decode[0].worker.jobs == 0


async def test_the_engines_refusal_is_passed_on(bench: Bench) -> None:
    pair = await pair_of(bench)
    with pytest.raises(openai.BadRequestError) as error:
        await pair.ask(temperature=-1)
    assert error.value.response.headers["x-kvfleet-worker"].endswith(str(pair.prefill[0].port))
    assert pair.idle()


# Workers that misbehave


async def test_what_the_prefill_worker_hands_on_reaches_the_decode_worker_as_it_was_written(bench: Bench) -> None:
    handed = {"do_remote_prefill": True, "remote_block_ids": [[7, 8]], "remote_engine_id": "e", "remote_port": 5600}

    async def prefill(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json_answer(completion() | {"kv_transfer_params": handed}))

    first, second = await bench.worker(prefill), await bench.worker()
    router = await bench.router(config=divided([first.url], [second.url]))
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{router.port}/v1", api_key="none") as client:
        messages: Any = [{"role": "user", "content": LONG}]
        await client.chat.completions.create(
            model=MODEL, messages=messages, max_completion_tokens=9, extra_body={"unknown": {"k": 1}}
        )
    sent, then = (orjson.loads(worker.requests[0].body) for worker in (first, second))
    assert (sent["max_completion_tokens"], sent["max_tokens"], sent["unknown"]) == (1, 1, {"k": 1})
    assert (then["max_completion_tokens"], then["unknown"], then["kv_transfer_params"]) == (9, {"k": 1}, handed)
    assert first.requests[0].header("x-request-id") == second.requests[0].header("x-request-id")


async def test_a_prefill_worker_whose_answer_has_no_end_is_given_up(bench: Bench) -> None:
    async def endless(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 999999999\r\n\r\n")
        while not writer.is_closing():
            writer.write(b" " * 65536)
            await writer.drain()

    first, second = await bench.worker(endless), await bench.worker()
    router = await bench.router(config=divided([first.url], [second.url]))
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{router.port}/v1", api_key="none") as client:
        messages: Any = [{"role": "user", "content": LONG}]
        answer = await client.chat.completions.create(model=MODEL, messages=messages)
    assert answer.choices[0].message.content == "hello"
    assert "kv_transfer_params" not in orjson.loads(second.requests[0].body)
