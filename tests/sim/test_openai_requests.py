"""Whatever a client sends gets an answer in vLLM's form, never a crash."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sim_client import Answer, call, complete, serving

from kvfleet_sim.openai import ApiError, RequestReader, parse_body
from kvfleet_sim.tokens import ByteTokenizer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "martian"])},
    optional={
        "content": JSON | st.text() | st.just([{"type": "text", "text": "x"}]) | st.just([{"type": "image_url"}]),
        "tool_calls": JSON | st.just([{"function": {"name": "f", "arguments": "{}"}}]),
    },
)
FIELDS = {
    "max_tokens": st.integers(-2, 200) | JSON,
    "max_completion_tokens": st.integers(-2, 200) | JSON,
    "n": st.integers(-1, 3) | JSON,
    "stream_options": JSON,
    "stop": st.text(max_size=3) | JSON,
    "stop_token_ids": JSON,
    "logprobs": st.booleans() | st.integers(-1, 30) | JSON,
    "top_logprobs": JSON,
    "temperature": JSON,
    "top_p": JSON,
    "priority": JSON,
    "seed": JSON,
    "cache_salt": st.text(max_size=3) | JSON,
    "tools": JSON,
    "tool_choice": JSON,
    "echo": JSON,
    "model": JSON | st.just("llama-8b"),
    "return_token_ids": JSON,
    "continue_final_message": JSON,
    "encoding_format": JSON,
}
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(MESSAGE, max_size=4) | JSON,
        "prompt": st.text() | st.lists(st.integers(0, 2**33), max_size=5) | JSON,
        "input": st.text() | JSON,
        **FIELDS,
    },
)


@given(BODIES)
@settings(max_examples=150, deadline=None)
def test_any_body_is_read_or_refused_with_a_reason(body: dict[str, Any]) -> None:
    reader = RequestReader(ByteTokenizer(), 256, auto_tool_choice=True)
    for read in (reader.chat, reader.completion, reader.embedding):
        try:
            result = read(dict(body), "llama-8b")
        except ApiError as error:
            assert error.status == 400
            assert error.body["error"]["code"] == 400
            assert error.body["error"]["message"]
            json.dumps(error.body)
        else:
            assert 1 <= result.max_tokens < 256
            assert all(0 < len(prompt) + result.max_tokens <= 256 for prompt in result.prompts)


@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_parsed_or_refused(body: bytes) -> None:
    try:
        assert isinstance(parse_body(body, b"application/json; charset=utf-8"), dict)
    except ApiError as error:
        assert error.status == 400


@given(st.lists(BODIES, min_size=1, max_size=3))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_server_survives_any_requests(bodies: list[dict[str, Any]]) -> None:
    async def run() -> list[Answer]:
        async with serving("llama-8b", "--max-model-len", "256") as server:
            paths = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize")
            answers = [await call(server, "POST", path, body) for body in bodies for path in paths]
            assert not server.worker.engine.has_work
            assert server.worker.jobs == 0
            return answers

    assert {answer.status for answer in asyncio.run(run())} <= {200, 400, 404}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": [1, -1]}, "token ids are whole numbers"),
        ({"prompt": [1, 2**32]}, "token ids are whole numbers"),
        ({"prompt": ["a", []]}, "must be provided and non-empty"),
        ({"prompt": "a", "n": 0}, "n must be at least 1"),
        ({"prompt": "a", "n": 10**9}, "at most 1024"),
        ({"prompt": "a", "stop": [""]}, "not empty"),
        ({"prompt": "a", "stop": ["x"] * 65}, "up to 64"),
        ({"prompt": "a", "logprobs": 100}, "logprobs must be from 0 to 20"),
        ({"prompt": "a", "top_p": 0}, "top_p must be in (0, 1]"),
        ({"prompt": "a", "max_tokens": 2.5}, "fractional part"),
        ({"prompt": "a", "stream": "yes"}, "valid boolean"),
        ({"prompt": "a" * 400, "max_tokens": 200}, "you requested 200 output tokens and your prompt contains 100"),
    ],
)
async def test_refusals_name_the_field(fields: dict[str, Any], words: str) -> None:
    async with serving("llama-8b", "--max-model-len", "256") as server:
        answer = await call(server, "POST", "/v1/completions", fields)
    assert answer.status == 400
    assert words in answer.json["error"]["message"]


async def test_images_are_refused() -> None:
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
    async with serving("llama-8b") as server:
        answer = await call(server, "POST", "/v1/chat/completions", {"messages": [message]})
    assert answer.status == 400
    assert "text only" in answer.json["error"]["message"]


async def test_deep_nesting_is_refused() -> None:
    body = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    async with serving("llama-8b") as server:
        answer = await call(server, "POST", "/v1/chat/completions", body)
    assert answer.status == 400
    assert "Too deeply nested" in answer.json["error"]["message"]


async def test_a_request_the_cache_can_never_hold_is_refused() -> None:
    """The engine's own check, for batches that pass the reader's."""
    async with serving("llama-8b", "--num-gpu-blocks-override", "9", "--max-model-len", "128") as server:
        assert (await complete(server, "abcd" * 100, 28)).status == 200
        answer = await complete(server, "abcd" * 100, 29)
    assert answer.status == 400


async def test_defaults_of_max_tokens() -> None:
    async with serving("llama-8b", "--max-model-len", "270") as server:
        text = await call(server, "POST", "/v1/completions", {"prompt": "a"})
        chat = await call(server, "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    assert text.json["usage"]["completion_tokens"] == 16
    assert chat.json["usage"]["total_tokens"] == 270, "no more than the context holds"
