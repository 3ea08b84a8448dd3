"""Answers over time: streams, clients that leave or do not read, connections that stay."""

from __future__ import annotations

import asyncio
import json
import socket
from itertools import accumulate, pairwise

import openai
import pytest
from sim_client import TIMEOUT_S, OpenStream, call, complete, parse_answer, request_bytes, send_raw, serving, until

from kvfleet_sim import http

MESSAGES = [{"role": "user", "content": "Tell me a story about routers."}]


async def test_the_openai_client_streams_a_chat() -> None:
    async with (
        serving("llama-8b", "--enable-prompt-tokens-details") as server,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(
            model="llama-8b", messages=MESSAGES, max_tokens=50, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        whole = await client.chat.completions.create(model="llama-8b", messages=MESSAGES, max_tokens=50)
        vectors = await client.embeddings.create(model="llama-8b", input=["one", "two", "one"])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(text) == 200
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 50
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == 16
    first, second, third = (item.embedding for item in vectors.data)
    assert first == third != second
    assert sum(value * value for value in first) == pytest.approx(1.0, rel=1e-5)


async def test_time_passes_as_the_cost_model_says() -> None:
    """At half of real time: the first token when the prompt is prefilled, the others a step apart."""
    async with serving("llama-8b", speed=0.5) as server:
        cost = server.config.cost
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        stream = await OpenStream.start(server, {"prompt": "word" * 4000, "max_tokens": 10})
        assert b"data:" not in stream.received, "the head comes before the first token"
        times = []
        for number in range(1, 11):
            while stream.received.count(b"data: {") < number:
                stream.received += await asyncio.wait_for(stream._reader.read(65536), TIMEOUT_S)
            times.append(loop.time() - start_s)
        await stream.read_all()
    first_s = cost.prefill_s(4000, 4000) / 0.5
    assert times[0] >= first_s * 0.99  # a busy machine may see it later, never sooner
    assert times[-1] >= (first_s + cost.decode_step_s(1, 4001) * 9 / 0.5) * 0.99


async def test_the_same_prompt_says_the_same_and_another_seed_something_else() -> None:
    texts = []
    for args in ((), (), ("--seed", "1")):
        async with serving("llama-8b", *args) as server:
            texts += [(await complete(server, "once", 20, seed=seed)).json["choices"][0]["text"] for seed in (0, 5)]
    assert texts[:2] == texts[2:4]
    assert len({*texts}) == 4


async def test_what_was_said_is_cached_for_the_next_turn() -> None:
    async with serving("llama-8b", "--enable-prompt-tokens-details") as server:
        body = {"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 200}
        first = (await call(server, "POST", "/v1/chat/completions", body)).json
        said = first["choices"][0]["message"]
        history = [
            *body["messages"],
            {"role": "assistant", "content": said["content"]},
            {"role": "user", "content": "go on"},
        ]
        second = (await call(server, "POST", "/v1/chat/completions", {"messages": history, "max_tokens": 1})).json
    known = first["usage"]["total_tokens"] - 1  # the last token of an output is not in the cache
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == known // 16 * 16


async def test_a_stop_string_ends_the_text_before_it() -> None:
    async with serving("llama-8b") as server:
        text = (await complete(server, "once", 50)).json["choices"][0]["text"]
        stop = text[61:67]
        answer = await complete(server, "once", 50, stop=["never said", stop])
        stream = await complete(server, "once", 50, stop=stop, stream=True)
        third_id = (await complete(server, "once", 50, return_token_ids=True)).json["choices"][0]["token_ids"][2]
        by_id = (await complete(server, "once", 50, stop_token_ids=[third_id])).json
    (choice,) = answer.json["choices"]
    cut = text[: text.index(stop)]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (cut, "stop", stop)
    assert answer.json["usage"]["completion_tokens"] == -(-(len(cut) + len(stop)) // 4)
    streamed = [event["choices"][0] for event in stream.events[:-1]]
    assert "".join(choice["text"] for choice in streamed) == cut
    assert streamed[-1]["stop_reason"] == stop
    assert by_id["choices"][0]["stop_reason"] == third_id
    assert by_id["choices"][0]["text"] == text[:8]
    assert by_id["usage"]["completion_tokens"] == 3


FIRST_TOKENS_OF_3 = 'vllm:time_to_first_token_seconds_count{engine="0",model_name="llama-8b"} 3.0'


async def test_a_client_that_leaves_frees_its_blocks() -> None:
    async with serving("llama-8b", speed=1.0) as server:
        engine = server.worker.engine
        stream = await OpenStream.start(server, {"prompt": "x" * 4000, "max_tokens": 100_000, "n": 2})
        await stream.read_until(b"data:")
        waiting = asyncio.create_task(complete(server, "y" * 400, 100_000))
        await until(lambda: engine.num_running == 3)
        while FIRST_TOKENS_OF_3 not in (await call(server, "GET", "/metrics")).body.decode():
            pass  # the third request's first step is still running
        assert engine.cache.usage > 0
        await stream.close()
        await until(lambda: engine.num_running == 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await until(lambda: not engine.has_work)
        assert engine.cache.free == engine.cache.capacity
        assert engine.stats.aborted == 3
        assert server.worker.jobs == 0
        metrics = (await call(server, "GET", "/metrics")).body.decode()
    assert 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="llama-8b"} 0.0' in metrics
    assert 'vllm:e2e_request_latency_seconds_count{engine="0",model_name="llama-8b"} 0.0' in metrics
    assert FIRST_TOKENS_OF_3 in metrics


async def test_a_client_that_does_not_read_gets_merged_tokens_later() -> None:
    """Nothing is queued for it beyond what the sockets hold, and nothing is lost."""
    tokens = 6000
    async with serving("llama-8b", speed=1000.0) as server:
        server._listeners[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = {"prompt": "x", "max_tokens": tokens, "stream": True}
        writer.write(request_bytes("POST", "/v1/completions", body))
        await until(lambda: server.worker.jobs == 0)
        answer = parse_answer(await asyncio.wait_for(reader.read(), TIMEOUT_S))
        writer.close()
        await writer.wait_closed()
        whole = await complete(server, "x", tokens)
    texts = [event["choices"][0]["text"] for event in answer.events[:-1]]
    assert "".join(texts) == whole.json["choices"][0]["text"]
    assert max(map(len, texts)) > 1000
    assert len(answer.body) < tokens * 100


async def test_stream_interval_groups_tokens() -> None:
    async with serving("llama-8b", "--stream-interval", "5", speed=10.0) as server:
        answer = await complete(server, "x", 18, stream=True)
    texts = [event["choices"][0]["text"] for event in answer.events[:-1]]
    ends = set(accumulate(len(text) // 4 for text in texts))
    assert ends <= {1, 6, 11, 16, 18}, "a busy machine may join groups, never split one"
    assert 18 in ends


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serving("llama-8b") as server:
        requests = [
            request_bytes("POST", "/v1/completions", {"prompt": "a", "max_tokens": 30}, close=False),
            request_bytes("GET", "/version", close=False),
            request_bytes("GET", "/health"),
        ]
        raw = await send_raw(server.port, b"".join(requests))
    assert raw.count(b"HTTP/1.1 200 OK") == 3
    assert raw.index(b"text_completion") < raw.index(b"0.32.0") < raw.rindex(b"content-length: 0")


async def test_an_idle_connection_is_closed_and_a_busy_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "KEEP_ALIVE_S", 0.05)
    async with serving("llama-8b", speed=0.2) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = {"prompt": "a", "max_tokens": 4}  # 140 ms
        writer.write(request_bytes("POST", "/v1/completions", body, close=False))
        raw = await asyncio.wait_for(reader.read(), TIMEOUT_S)
        writer.close()
        await writer.wait_closed()
    assert raw.startswith(b"HTTP/1.1 200 OK")
    assert b"connection: close" not in raw


async def test_a_waiting_100_continue_client_is_told_to_go_on() -> None:
    async with serving("llama-8b") as server:
        request = request_bytes("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}, {"Expect": "100-continue"})
        raw = await send_raw(server.port, request)
    assert raw.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


async def test_http_1_0_streams_end_with_the_connection() -> None:
    async with serving("llama-8b") as server:
        request = request_bytes("POST", "/v1/completions", {"prompt": "a", "max_tokens": 3, "stream": True})
        raw = await send_raw(server.port, request.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert b"transfer-encoding" not in raw
    assert raw.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("request_bytes_", "status"),
    [
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 300_000 + b"\r\n\r\n", b"431"),
        (b"POST /tokenize HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", b"413"),
        (b"POST /tokenize HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"400"),
        (b"\x00\x01\x02", b"400"),
    ],
)
async def test_what_is_too_large_or_no_http_is_refused(request_bytes_: bytes, status: bytes) -> None:
    async with serving("llama-8b") as server:
        raw = await send_raw(server.port, request_bytes_)
        assert raw.split()[1] == status
        assert (await call(server, "GET", "/health")).status == 200


async def test_priority_decides_who_waits() -> None:
    async with serving("llama-8b", "--max-num-seqs=1", "--scheduling-policy=priority", speed=5.0) as server:
        blocker = await OpenStream.start(server, {"prompt": "a", "max_tokens": 100})
        done: list[int] = []

        async def ask(priority: int) -> None:
            await complete(server, f"prompt {priority}", 20, priority=priority)
            done.append(priority)

        asks = [asyncio.create_task(ask(priority)) for priority in (5, 0, -5)]
        await until(lambda: server.worker.engine.num_waiting == 3)
        await asyncio.gather(*asks)
        await blocker.read_all()
    assert done == [-5, 0, 5]


async def test_continuous_usage_counts_up() -> None:
    async with serving("llama-8b", speed=10.0) as server:
        options = {"include_usage": True, "continuous_usage_stats": True}
        answer = await complete(server, "abcdefgh", 6, stream=True, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in answer.events[:-1]]
    assert counts[-1] == 6
    assert all(earlier <= later for earlier, later in pairwise(counts))
    assert {event["usage"]["prompt_tokens"] for event in answer.events[:-1]} == {2}


async def test_tools_need_the_parser_arguments_and_change_the_prompt() -> None:
    tool = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
    body = {"messages": MESSAGES, "tools": [tool], "max_tokens": 1}
    async with serving("llama-8b") as server:
        refused = await call(server, "POST", "/v1/chat/completions", body)
        plain = await call(server, "POST", "/tokenize", {"messages": MESSAGES})
    assert refused.status == 400
    assert refused.json["error"]["message"] == (
        '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
    )
    async with serving("llama-8b", "--enable-auto-tool-choice", "--tool-call-parser", "hermes") as server:
        with_tools = await call(server, "POST", "/tokenize", {"messages": MESSAGES, "tools": [tool]})
        assert (await call(server, "POST", "/v1/chat/completions", body)).status == 200
        back = await call(server, "POST", "/detokenize", {"tokens": with_tools.json["tokens"]})
    assert with_tools.json["count"] > plain.json["count"]
    assert json.dumps({"type": "function", "function": {"name": "get_time"}})[:-2] in back.json["prompt"]
