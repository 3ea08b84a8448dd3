"""`resilience.resume`: a stream whose worker dies goes on at another one, and the client sees one whole answer."""

import asyncio
from typing import Any

import openai
import orjson
import pytest
from scripted import (
    PATIENCE_S,
    STREAM_HEAD,
    Answer,
    Behaviour,
    Bench,
    Seen,
    chat_body,
    chunk,
    eventually,
    json_answer,
    post,
)

from kvfleet_api.compile import static_fleet
from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_router.app import RouterApp
from kvfleet_sim.config import parse
from kvfleet_sim.server import Server

MODEL = "llama-8b"
WORDS = ["Once", " upon", " a", " time", " there", " was", " a", " router"]
COMPLETION = orjson.dumps(
    {"model": "m", "prompt": "Say:", "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}}
)


def streams(*, until: int | None = None, end: bytes | None = None) -> Behaviour:
    """Says WORDS, from where the prompt ends; dies after `until` bytes of the body, or ends it there with `end`."""

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = orjson.loads(seen.body)
        text = asked["prompt"].removeprefix("Say:")
        said = next(count for count in range(len(WORDS) + 1) if "".join(WORDS[:count]) == text)
        assert asked["max_tokens"] == len(WORDS) - said
        id_, prompt = f"cmpl-{writer.get_extra_info('sockname')[1]}", 3 + said
        body = b""
        for number, word in enumerate(WORDS[said:], 1):
            choice = {"index": 0, "text": word, "finish_reason": "length" if said + number == len(WORDS) else None}
            usage = {"prompt_tokens": prompt, "total_tokens": prompt + number, "completion_tokens": number}
            body += chunk(b"data: %b\n\n" % orjson.dumps({"id": id_, "choices": [choice], "usage": usage}))
        last = {"id": id_, "choices": [], "usage": usage}
        body += chunk(b"data: %b\n\n" % orjson.dumps(last)) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        writer.write(STREAM_HEAD + body[:until] + (end or b""))
        await writer.drain()
        if until is not None and end is None:
            writer.close()

    return behave


def assert_whole(answer: Answer) -> None:
    events = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    values = [orjson.loads(event) for event in events[:-2]]
    assert len({value["id"] for value in values}) == 1
    choices = [value["choices"][0] for value in values if value["choices"]]
    assert [choice["text"] for choice in choices] == WORDS
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(WORDS) - 1) + ["length"]
    usages = [value["usage"] for value in values if value.get("usage")]
    assert usages == [{"prompt_tokens": 3, "total_tokens": 11, "completion_tokens": 8}]


def assert_settled(router: RouterApp) -> None:
    assert all(worker.in_flight == 0 for worker in router.dispatcher.workers())
    assert router.server.body_bytes == 0


async def test_wherever_the_worker_dies_the_client_gets_the_whole(bench: Bench) -> None:
    """Cut at every seventh byte: inside chunk heads, events, characters, and behind the last token."""
    dying, good = await bench.worker(), await bench.worker(streams())
    router = await bench.router(dying, good, resume=True, eject_at_failure_percent=100)
    whole = 0
    for until in range(0, 1400, 7):
        dying.behave = streams(until=until)
        answer = await bench.ask(router, post(COMPLETION, path=b"/v1/completions"))
        assert answer.status == 200
        assert_whole(answer)
        whole += 1
        for worker in router.dispatcher.workers():  # its breaker would keep it out of the next rounds
            worker.breaker.success()
        router.dispatcher._circuits.forget(router.dispatcher.workers())
    assert whole == 200
    assert len(dying.requests) > 90
    assert_settled(router)
    metrics = await bench.metrics(router)
    assert sum(value for name, value in metrics.items() if "requests_total" in name and '"ok"' in name) == 200
    assert sum(value for name, value in metrics.items() if 'retries_total{cause="resumed"' in name) > 90


ABORT = chunk(b'data: {"id":"x","choices":[{"index":0,"text":" there","finish_reason":"abort"}]}\n\n')
ENGINE_ERROR = chunk(b'data: {"error": {"message": "EngineCore encountered an issue.", "code": 500}}\n\n')
THE_END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


@pytest.mark.parametrize(
    "end",
    [ABORT + THE_END, ENGINE_ERROR + THE_END, THE_END, b"0\r\n\r\n", b"garbage\r\n"],
    ids=["told to leave", "engine gone", "no reason", "no end", "no HTTP"],
)
async def test_an_engine_that_leaves_in_order_is_resumed_as_well(bench: Bench, end: bytes) -> None:
    first = chunk(b'data: {"id":"x","choices":[{"index":0,"text":"Once","finish_reason":null}],'
                  b'"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1}}\n\n')  # fmt: skip

    async def leaving(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + first + end)

    bad, good = await bench.worker(leaving), await bench.worker(streams())
    router = await bench.router(bad, good, resume=True)
    while not bad.requests:
        assert_whole(await bench.ask(router, post(COMPLETION, path=b"/v1/completions")))
    (decision,) = router.dispatcher.decisions.recent(1)
    assert [made["worker"] for made in decision["tries"]] == [w.url.removeprefix("http://") for w in (bad, good)]
    assert decision["outcome"]["output_tokens"] == 8
    assert_settled(router)


@pytest.mark.parametrize("second", ["dies", "refuses", "is not there"])
async def test_where_nobody_can_go_on_the_client_gets_the_error(bench: Bench, second: str) -> None:
    async def refuses(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json_answer({"error": {"message": "too long", "code": 400}}, b"400 Bad Request"))

    workers = [await bench.worker(streams(until=400)) for _ in range(1 if second == "is not there" else 2)]
    router = await bench.router(*workers, resume=True, retries=1)
    if second == "refuses":
        first = await bench.worker(streams(until=400))
        other = await bench.worker(refuses)
        router = await bench.router(first, other, resume=True)
        while not first.requests:
            answer = await bench.ask(router, post(COMPLETION, path=b"/v1/completions"))
    else:
        answer = await bench.ask(router, post(COMPLETION, path=b"/v1/completions"))
    assert answer.status == 200
    *_, error, done, empty = answer.body.decode().split("\n\n")
    assert orjson.loads(error.removeprefix("data: "))["error"]["code"] in ("upstream_failed", "worker_failed")
    assert (done, empty) == ("data: [DONE]", "")
    assert_settled(router)


async def test_off_is_off_and_what_cannot_be_resumed_breaks_off(bench: Bench) -> None:
    async def broken(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + chunk(b'data: {"id":"x","choices":[{"index":0,"text":"Once"}]}\n\n'))
        await writer.drain()
        writer.close()

    for resume, fields in ((False, {}), (True, {"logprobs": 1})):
        dying = await bench.worker(broken)
        router = await bench.router(dying, resume=resume)
        body = orjson.dumps(orjson.loads(COMPLETION) | fields)
        answer = await bench.ask(router, post(body, path=b"/v1/completions"))
        assert b'"code":"upstream_failed"' in answer.body
        assert dying.requests[0].body == body
        assert_settled(router)


async def test_a_client_that_leaves_between_two_workers_is_cancelled(bench: Bench) -> None:
    async def waits(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        raise ConnectionResetError

    bad, good = await bench.worker(streams(until=400)), await bench.worker(waits)
    router = await bench.router(bad, good, resume=True)
    while True:
        client = await bench.client(router)
        asked = len(good.requests)
        await client.send(post(COMPLETION, path=b"/v1/completions"))
        await eventually(lambda asked=asked: len(good.requests) > asked)
        client.close()
        await eventually(lambda: good.lost == len(good.requests))
        if bad.requests:
            break
    await eventually(lambda: not router.server.connections)
    assert_settled(router)
    assert router.dispatcher.decisions.recent(1)[0]["outcome"]["result"] == "abandoned"


async def test_a_slow_client_slows_the_second_worker_too(bench: Bench) -> None:
    text = "x" * 65536
    sent = 0

    async def floods(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        event = {"id": "b", "choices": [{"index": 0, "text": text, "finish_reason": None}]}
        data = chunk(b"data: %b\n\n" % orjson.dumps(event))
        writer.write(STREAM_HEAD)
        while True:
            writer.write(data)
            await writer.drain()
            sent += len(data)

    bad, good = await bench.worker(streams(until=400)), await bench.worker(floods)
    router = await bench.router(bad, good, resume=True)
    while not bad.requests:
        client = await bench.client(router)
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(post(COMPLETION, path=b"/v1/completions"))
        await eventually(lambda: len(good.requests) and sent)
        before = -1
        async with asyncio.timeout(PATIENCE_S):
            while before != sent:  # until it stands still
                before = sent
                await asyncio.sleep(0.2)
        assert sent < 40_000_000
        client.close()


# The simulated vLLM, whose words follow from all the text before them: the same whole, or the test fails.


class Simulated:
    def __init__(self, servers: list[Server], router: RouterApp, client: openai.AsyncOpenAI) -> None:
        self.servers, self.router, self.client = servers, router, client

    async def whole(self, chat: bool, **options: Any) -> tuple[str, Any]:
        parts, _ = await self.stream(chat, -1, **options)
        return _text(parts), parts[-1].usage

    async def stream(self, chat: bool, dies_after: int, how: str = "close", **options: Any) -> tuple[list[Any], int]:
        """All parts of a stream whose worker dies after so many of them; and how many workers it took."""
        options |= {"stream": True, "stream_options": {"include_usage": True}, "model": MODEL}
        create: Any = (
            self.client.chat.completions.with_raw_response.create(
                messages=[{"role": "user", "content": "A story, please."}], **options
            )
            if chat
            else self.client.completions.with_raw_response.create(prompt="Once upon a time", **options)
        )
        answer = await create
        parts = []
        async for part in answer.parse():
            parts.append(part)
            if len(parts) == dies_after:
                port = int(answer.headers["x-kvfleet-worker"].rpartition(":")[2])
                server = next(server for server in self.servers if server.port == port)
                await (server.close() if how == "close" else server.shut_down())
        decision = self.router.dispatcher.decisions.get(answer.headers["x-kvfleet-decision"])
        assert decision is not None
        return parts, len(decision["tries"])


async def simulated(bench: Bench, count: int) -> Simulated:
    options = [MODEL, "--host", "127.0.0.1", "--port", "0", "--enable-prompt-tokens-details", "--speed", "2"]
    servers = [Server(parse(options)) for _ in range(count)]
    for server in servers:
        await server.start()
        bench.on_close(server.close)
    config = _resuming(static_fleet([f"http://127.0.0.1:{server.port}" for server in servers], "kvfleet", MODEL))
    router = await bench.router(config=config, speed=2.0)
    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{router.port}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    )
    bench.on_close(client.close)
    return Simulated(servers, router, client)


def _resuming(config: FleetConfig) -> FleetConfig:
    policy = config.policies[0]
    resilience = policy.resilience.model_copy(update={"resume": True})
    return config.model_copy(update={"policies": [policy.model_copy(update={"resilience": resilience})]})


def _text(parts: list[Any]) -> str:
    choices = [part.choices[0] for part in parts if part.choices]
    return "".join((choice.delta.content if hasattr(choice, "delta") else choice.text) or "" for choice in choices)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("how", ["close", "shut_down"])
async def test_simulated_workers_that_die_cost_no_token(bench: Bench, chat: bool, how: str) -> None:
    fleet = await simulated(bench, 3)
    text, usage = await fleet.whole(chat, max_tokens=60)
    parts, tries = await fleet.stream(chat, 20, how, max_tokens=60)
    assert tries == 2
    assert _text(parts) == text
    counted = parts[-1].usage
    assert (counted.prompt_tokens, counted.completion_tokens) == (usage.prompt_tokens, 60)
    assert len({part.id for part in parts}) == 1
    assert {part.created for part in parts} == {parts[0].created}
    reasons = [part.choices[0].finish_reason for part in parts if part.choices and part.choices[0].finish_reason]
    assert reasons == ["length"]
    if chat:
        assert [part.choices[0].delta.role for part in parts if part.choices].count("assistant") == 1
    assert_settled(fleet.router)


async def test_a_chat_without_a_limit_ends_where_it_would_have(bench: Bench) -> None:
    fleet = await simulated(bench, 2)
    text, _ = await fleet.whole(True)
    parts, tries = await fleet.stream(True, 30)
    assert (tries, _text(parts)) == (2, text)


async def test_other_streams_pass_as_they_are(bench: Bench) -> None:
    """Asked for or not, what a client sees of a whole stream is the same with and without resume."""
    fleet = await simulated(bench, 1)
    plain = await bench.router(
        config=static_fleet([f"http://127.0.0.1:{server.port}" for server in fleet.servers], "kvfleet", MODEL)
    )
    for options in ({}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}):
        body = chat_body(model=MODEL, stream=True, max_tokens=4, **({"stream_options": options} if options else {}))
        answers = [await bench.ask(router, post(body)) for router in (plain, fleet.router)]
        one, other = [_shape(answer) for answer in answers]
        assert one == other


def _shape(answer: Answer) -> list[Any]:
    values = []
    for event in answer.body.decode().split("\n\n")[:-1]:
        data = event.removeprefix("data: ")
        value = data if data == "[DONE]" else orjson.loads(data)
        if isinstance(value, dict):
            value = {key: item for key, item in value.items() if key not in ("id", "created", "system_fingerprint")}
            (value.get("usage") or {}).pop("prompt_tokens_details", None)
        values.append(value)
    return values
