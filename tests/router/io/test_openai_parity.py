"""OpenAI's own client gets the same objects through the router as straight from the worker: recorded vLLM answers, resume on and
off, tools, log probabilities, several choices, errors."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from scripted import STREAM_END, STREAM_HEAD, Behaviour, Bench, Seen, chunk, completion, json_answer

RECORDINGS = Path(__file__).parents[2] / "sim/recordings/http"
MODEL = "tiny"
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me a story."}]


def recording(name: str) -> tuple[str, dict[str, Any], bytes]:
    """(path, request, raw answer) of a recorded exchange with vLLM."""
    raw = (RECORDINGS / f"{name}.http").read_bytes()
    request, _, answer = raw.removeprefix(b">>>>> REQUEST\n").partition(b"\n<<<<< RESPONSE (raw bytes)\n")
    head, _, body = request.partition(b"\r\n\r\n")
    return head.split(b" ")[1].decode(), orjson.loads(body), answer


def says(raw: bytes) -> Behaviour:
    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await writer.drain()
        if b"connection: close" in raw:
            writer.close()

    return behave


async def observed(base: str, path: str, body: dict[str, Any]) -> Any:
    """All that a program sees of the answer: objects, or the exception with all it carries."""
    async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
        create: Any = {
            "/v1/chat/completions": client.chat.completions.create,
            "/v1/completions": client.completions.create,
        }[path]
        required = {name: body[name] for name in ("model", "messages", "prompt", "stream") if name in body}
        rest = {name: value for name, value in body.items() if name not in required}
        try:
            answer = await create(**required, extra_body=rest)
            if not body.get("stream"):
                return answer.model_dump()
            return [part.model_dump() async for part in answer]
        except openai.APIStatusError as error:
            return type(error), error.status_code, error.message, error.body, error.code, error.param, error.type
        except openai.APIError as error:
            return type(error), error.message, error.body, error.code


async def both(bench: Bench, raw: bytes, path: str, body: dict[str, Any], *, resume: bool) -> tuple[Any, Any]:
    """(straight from the worker, through the router)."""
    worker = await bench.worker(says(raw))
    router = await bench.router(worker, model=body["model"], resume=resume)
    straight = await observed(worker.url, path, body)
    return straight, await observed(f"http://127.0.0.1:{router.port}", path, body)


ANSWERS = [
    *("chat", "chat_stream", "chat_stream_usage", "chat_stream_usage_continuous", "chat_stream_ignore_eos_n2"),
    *("chat_return_token_ids", "completions", "completions_batch_tokens", "completions_echo"),
    *("completions_stream_n2_logprobs", "completions_stream_usage", "ok_unknown_field", "ok_unknown_role"),
    *("err_bad_temperature", "err_cache_salt_empty", "err_negative_max_tokens"),
    *("err_priority_string", "err_prompt_plus_max_tokens", "err_stream_options_without_stream", "err_zero_max_tokens"),
]


RESUMABLE = [(name, True) for name in ANSWERS if "stream" in name]


@pytest.mark.parametrize(("name", "resume"), [*((name, False) for name in ANSWERS), *RESUMABLE])
async def test_recorded_answers(bench: Bench, name: str, resume: bool) -> None:
    path, body, raw = recording(name)
    straight, routed = await both(bench, raw, path, body, resume=resume)
    assert routed == straight


def tool_call_events() -> bytes:
    """A call of a tool as vLLM streams it: its name at once, its arguments in pieces."""
    call: dict[str, Any] = {"index": 0, "id": "call-1", "type": "function", "function": {"name": "f", "arguments": ""}}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, {"tool_calls": [call]}]
    deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in ('{"a"', ": 1}")]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices[-1]["finish_reason"] = "tool_calls"
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return b"".join(chunk(b"data: %b\n\n" % orjson.dumps(head | {"choices": [choice]})) for choice in choices)


def tool_calls() -> dict[str, Any]:
    call = {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    return completion() | {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_tools(bench: Bench, stream: bool, resume: bool) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    body = {"model": MODEL, "messages": MESSAGES, "tools": [tool], "stream": stream}
    raw = STREAM_HEAD + tool_call_events() + STREAM_END if stream else json_answer(tool_calls())
    straight, routed = await both(bench, raw, "/v1/chat/completions", body, resume=resume)
    assert routed == straight
    text = orjson.dumps(routed).decode()
    assert "call-1" in text
    assert "tool_calls" in text


async def test_log_probabilities_of_a_chat(bench: Bench) -> None:
    token = {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "b", "logprob": -1.5, "bytes": [98]}],
    }
    choice = {"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [token]}, "finish_reason": "stop"}
    event = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]}
    body = {"model": MODEL, "messages": MESSAGES, "logprobs": True, "top_logprobs": 1, "stream": True}
    raw = STREAM_HEAD + chunk(b"data: %b\n\n" % orjson.dumps(event)) + STREAM_END
    straight, routed = await both(bench, raw, "/v1/chat/completions", body, resume=True)
    assert routed == straight
    assert routed[0]["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["token"] == "b"


@pytest.mark.parametrize("resume", [False, True])
async def test_an_error_inside_a_stream_that_is_the_requests_own(bench: Bench, resume: bool) -> None:
    _, body, raw = recording("chat_stream")
    cut = raw.index(b"data: ", raw.index(b"data: ") + 1)
    start = raw.rindex(b"\r\n", 0, cut - 2) + 2  # the head of that chunk
    error = chunk(b'data: {"error": {"message": "no", "type": "BadRequestError", "param": null, "code": 400}}\n\n')
    broken = raw[:start].replace(b"connection: close\r\n", b"") + error + STREAM_END
    straight, routed = await both(bench, broken, "/v1/chat/completions", body, resume=resume)
    assert routed == straight
    assert routed[0] is openai.APIError


REFUSED_BY_THE_ROUTER = ["err_empty_messages", "err_missing_messages", "err_unknown_model", "err_wrong_type"]


@pytest.mark.parametrize("name", REFUSED_BY_THE_ROUTER)
async def test_what_the_router_refuses_itself_is_the_same_exception(bench: Bench, name: str) -> None:
    path, body, raw = recording(name)
    worker = await bench.worker(says(raw))
    router = await bench.router(worker, model=MODEL)
    straight = await _raised(worker.url, path, body)
    routed = await _raised(f"http://127.0.0.1:{router.port}", path, body)
    assert type(routed) is type(straight)
    assert routed.status_code == straight.status_code
    assert isinstance(routed.body, dict)
    assert isinstance(straight.body, dict)
    assert routed.body.keys() == straight.body.keys()
    assert len(worker.requests) == 1


async def _raised(base: str, path: str, body: dict[str, Any]) -> openai.APIStatusError:
    async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APIStatusError) as raised:
            await client.post(path, body=body, cast_to=object)
    return raised.value
