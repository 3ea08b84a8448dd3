"""Requests recorded against vLLM get answers of the recorded shape; refusals, the recorded answers to the letter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sim_client import Answer, complete, parse_answer, send_raw, serving

RECORDINGS = Path(__file__).parent / "recordings" / "http"
_PLAIN = (
    "m_bbpe --served-model-name tiny tiny-alias --max-model-len 1024 --block-size 32 --enable-prompt-tokens-details "
    "--enable-request-id-headers --enable-server-load-tracking"
)
_GUARDED = (
    "m_nfc --served-model-name tiny --max-model-len 1024 --block-size 32 --enable-prompt-tokens-details "
    "--api-key sk-test --enable-lora --lora-modules pre=lora_b --scheduling-policy priority"
)
PLAIN, GUARDED = _PLAIN.split(), _GUARDED.split()
LORA_STORY = [
    *("lora_load_ok", "lora_load_again", "lora_load_inplace", "lora_load_empty", "lora_load_missing_field"),
    *("lora_load_missing_path", "lora_models", "lora_chat", "lora_unload_ok", "lora_unload_again"),
    "lora_chat_after_unload",
]
OWN_TEST = {"err_context_too_long", *LORA_STORY}
KV_EVENTS = {
    "enable_kv_cache_events": True,
    "publisher": "zmq",
    "topic": "kv@tiny",
    "endpoint": "tcp://127.0.0.1:*",
    "replay_endpoint": "tcp://127.0.0.1:*",
}
EXTRA_ARGS = {"kv_event_sources": ["--kv-events-config", json.dumps(KV_EVENTS)]}
REPLACED = {
    "completions_echo": (
        b'80\r\n\r\n{"model": "tiny", "prompt": "abc"',
        b'85\r\n\r\n{"model": "tiny", "prompt": "abcdefgh"',
    )
}
"""Two tokens in the recording have to be two here as well."""
MAPPINGS = {"top_logprobs", "prompt_logprobs"}
"""Objects whose keys are tokens."""


def recording(name: str) -> tuple[bytes, Answer]:
    raw = (RECORDINGS / f"{name}.http").read_bytes()
    request, _, answer = raw.removeprefix(b">>>>> REQUEST\n").partition(b"\n<<<<< RESPONSE (raw bytes)\n")
    return request.replace(*REPLACED.get(name, (b"", b""))), parse_answer(answer)


NAMES = sorted(path.stem for path in RECORDINGS.glob("*.http") if path.stem not in OWN_TEST)


def shape(value: Any, key: str = "") -> Any:
    """Keys in their order and the types of values; what depends on the model's words is left out."""
    if key == "bytes":
        return "bytes"
    if isinstance(value, dict):
        if key in MAPPINGS and "token" not in value:
            return ["mapping", *sorted({str(shape(item)) for item in value.values()})]
        return [[name, shape(item, name)] for name, item in value.items()]
    if isinstance(value, list):
        return ["list", *sorted({json.dumps(shape(item, key)) for item in value})]
    return type(value).__name__


def distinct(shapes: list[str]) -> list[str]:
    """Without repetitions in a row: how many chunks a text takes is the model's affair."""
    return [one for index, one in enumerate(shapes) if index == 0 or one != shapes[index - 1]]


def by_choice(events: list[Any]) -> dict[int | None, list[str]]:
    """The shapes of each choice's chunks, and under None of what belongs to none."""
    result: dict[int | None, list[str]] = {}
    for event in events:
        of_choice = event != "[DONE]" and event["choices"]
        result.setdefault(event["choices"][0]["index"] if of_choice else None, []).append(json.dumps(shape(event)))
    return {index: distinct(shapes) for index, shapes in result.items()}


def without_volatile(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    volatile = {"date", "content-length", "x-request-id"}
    return [(name, "" if name in volatile else value) for name, value in headers]


def check(name: str, answer: Answer, recorded: Answer) -> None:
    assert answer.status == recorded.status, answer.body
    assert without_volatile(answer.headers) == without_volatile(recorded.headers)
    kind = dict(recorded.headers).get("content-type", "")
    if kind.startswith("text/event-stream"):
        assert answer.events[-1] == "[DONE]"
        assert by_choice(answer.events) == by_choice(recorded.events)
        finishes = [choice["finish_reason"] for event in answer.events[:-1] for choice in event["choices"]]
        assert set(finishes) <= {None, "length"}
    elif kind.startswith("application/json") and recorded.status < 400:
        assert json.dumps(shape(answer.json)) == json.dumps(shape(recorded.json))
    elif name == "err_dp_rank":  # recorded with two ranks
        assert answer.body == recorded.body.replace(b"[0, 2)", b"[0, 1)")
    else:
        assert answer.body == recorded.body


@pytest.mark.parametrize("name", NAMES)
async def test_answers_as_recorded(name: str) -> None:
    request, recorded = recording(name)
    guarded = name.startswith("auth_") or b"Authorization" in request
    args = [*(GUARDED if guarded else PLAIN), *EXTRA_ARGS.get(name, ())]
    if not any(header == "x-request-id" for header, _ in recorded.headers) and not guarded:
        args.remove("--enable-request-id-headers")
    async with serving(*args) as server:
        check(name, parse_answer(await send_raw(server.port, request)), recorded)


async def test_adapters_come_and_go_as_recorded() -> None:
    async with serving(*GUARDED) as server:
        for name in LORA_STORY:
            request, recorded = recording(name)
            check(name, parse_answer(await send_raw(server.port, request)), recorded)


async def test_a_prompt_beyond_the_context_is_refused_as_recorded() -> None:
    _, recorded = recording("err_context_too_long")
    async with serving(*PLAIN) as server:
        for stream in (False, True):
            answer = await complete(server, "hello world " * 800, 1, model="tiny", stream=stream)
            assert (answer.status, answer.body) == (400, recorded.body)
