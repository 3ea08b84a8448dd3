"""A text that goes on at a second worker: cut anywhere, the client gets every token once, and counts of the whole."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_router.core.parse import read_request
from kvfleet_router.core.resumption import MAX_TEXT_BYTES, Resumption

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WORDS = ["Once", " upon", " a", " time", ",", " there", " was", "  ", "\n", "é世", " router", "."]
PROMPT_TOKENS = 7


def request(path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "Say"}
    return {"model": "m", "stream": True, **prompt, **fields}


def resumption(path: str, body: dict[str, Any]) -> Resumption | None:
    raw = orjson.dumps(body)
    return Resumption.of(path, read_request(path, raw, {}), raw)


class Engine:
    """What vLLM streams: a model that says WORDS, one token each, and goes on where its prompt ends."""

    def __init__(self, path: str, *, strips: bool = False, counts: bool = True) -> None:
        self.path = path
        self.strips = strips
        """Its chat template strips the ends of messages."""
        self.counts = counts
        self.asked: list[dict[str, Any]] = []

    def events(self, body: bytes) -> list[bytes]:
        asked = orjson.loads(body)
        self.asked.append(asked)
        assert asked["stream_options"]["continuous_usage_stats"] is True
        said = self._said(asked)
        text, tokens = "", 0
        while text != said:
            text, tokens = text + WORDS[tokens], tokens + 1
            assert len(text) <= len(said), (text, said)
        prompt = PROMPT_TOKENS + tokens
        head = {"id": f"id-{len(self.asked)}", "object": "o", "created": len(self.asked), "model": "m"}
        rest = WORDS[tokens:][: asked.get("max_tokens", 99)]
        reason = "length" if len(rest) < len(WORDS) - tokens or "max_tokens" in asked else "stop"
        events = []
        if self.path == CHAT:
            events.append(head | {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for number, word in enumerate(rest, 1):
            choice = {"index": 0, "finish_reason": reason if number == len(rest) else None}
            choice |= {"delta": {"content": word}} if self.path == CHAT else {"text": word}
            events.append(head | {"choices": [choice]})
        for number, event in enumerate(events, 0 if self.path == CHAT else 1):
            if self.counts:
                event["usage"] = _usage(prompt, number)
        final = _usage(prompt, len(rest)) | {"prompt_tokens_details": {"cached_tokens": 5}}
        events.append(head | {"choices": [], "usage": final})
        return [b"data: " + orjson.dumps(event) for event in events] + [b"data: [DONE]"]

    def _said(self, asked: dict[str, Any]) -> str:
        if self.path != CHAT:
            return str(asked["prompt"].removeprefix("Say"))
        if not asked.get("continue_final_message"):
            assert len(asked["messages"]) == 1
            return ""
        assert asked["add_generation_prompt"] is False
        message = asked["messages"][-1]
        assert message["role"] == "assistant"
        assert isinstance(message["content"], str)
        if self.strips:
            return message["content"].rstrip()
        return message["content"]


def _usage(prompt: int, output: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + output, "completion_tokens": output}


def read(path: str, stream: bytes) -> tuple[str, list[Any], list[str]]:
    """(text, events, finish reasons) as a client reads them."""
    texts = stream.decode().split("\n\n")
    assert texts[-1] == ""
    assert texts[-2] == "data: [DONE]"
    events = [orjson.loads(text.removeprefix("data: ")) for text in texts[:-2]]
    choices = [event["choices"][0] for event in events if event["choices"]]
    text = "".join(choice["delta"].get("content", "") if path == CHAT else choice["text"] for choice in choices)
    return text, events, [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]


def play(path: str, body: dict[str, Any], cuts: list[int], engine: Engine | None = None) -> tuple[bytes, Engine]:
    """The client's stream where each worker dies after so many events, and the last one does not."""
    stream = resumption(path, body)
    assert stream is not None
    engine = engine or Engine(path)
    out = b""
    for cut in (*cuts, None):
        for event in engine.events(stream.body())[:cut]:
            out += stream.take(event)
        assert not stream.failure
        if stream.done:
            return out, engine
        if stream.finished or stream.exhausted:
            return out + stream.closing(), engine
        stream.broke()
    raise AssertionError("a whole stream did not end")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@given(
    cuts=st.lists(st.integers(0, 15), max_size=3),
    limit=st.none() | st.integers(1, 12),
    usage=st.sampled_from([None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]),
    strips=st.booleans(),
)
def test_cut_anywhere_the_client_gets_what_it_would_have_got(
    path: str, cuts: list[int], limit: int | None, usage: dict[str, bool] | None, strips: bool
) -> None:
    fields: dict[str, Any] = {} if usage is None else {"stream_options": usage}
    if limit is not None or path == COMPLETIONS:
        fields["max_tokens"] = limit or 99
    whole, _ = play(path, request(path, **fields), [], Engine(path))
    cut, engine = play(path, request(path, **fields), cuts, Engine(path, strips=strips))
    (text, events, reasons), (expected, plain, plain_reasons) = read(path, cut), read(path, whole)
    assert text == expected == "".join(WORDS[: limit or 99])
    assert reasons == plain_reasons
    assert len({(event["id"], event["created"]) for event in events}) == 1
    roles = [event for event in events if event["choices"] and "role" in event["choices"][0].get("delta", {})]
    assert len(roles) == (path == CHAT)
    counts = [event["usage"] for event in events if event.get("usage")]
    if usage is None:
        assert not counts
    else:
        tokens = len(WORDS[: limit or 99])
        assert {key: counts[-1][key] for key in _usage(0, 0)} == _usage(PROMPT_TOKENS, tokens)
        outputs = [count["completion_tokens"] for count in counts]
        assert outputs == sorted(outputs)
        assert (len(counts) > 1) == (usage.get("continuous_usage_stats", False))
    assert len(engine.asked) <= len(cuts) + 1
    assert len(plain) >= len(reasons)


def test_what_is_asked_of_the_second_worker() -> None:
    body = request(CHAT, max_completion_tokens=50, min_tokens=2, temperature=0.1, seed=7, unknown={"a": 1.0})
    stream = resumption(CHAT, body)
    assert stream is not None
    events = Engine(CHAT).events(stream.body())
    for event in events[:4]:
        stream.take(event)
    stream.broke()
    asked = orjson.loads(stream.body())
    assert asked.pop("messages") == [*body["messages"], {"role": "assistant", "content": "Once upon a"}]
    assert (asked.pop("max_completion_tokens"), asked.pop("min_tokens")) == (47, 0)
    assert (asked.pop("continue_final_message"), asked.pop("add_generation_prompt")) == (True, False)
    assert asked.pop("stream_options") == {"include_usage": True, "continuous_usage_stats": True}
    assert asked.items() <= body.items()


def test_a_completion_without_a_limit_keeps_the_engines_default() -> None:
    stream = resumption(COMPLETIONS, request(COMPLETIONS))
    assert stream is not None
    for event in Engine(COMPLETIONS).events(stream.body())[:5]:
        stream.take(event)
    stream.broke()
    asked = orjson.loads(stream.body())
    assert (asked["prompt"], asked["max_tokens"]) == ("SayOnce upon a time,", 11)


def test_an_engine_that_does_not_count_is_counted_by_events() -> None:
    engine = Engine(COMPLETIONS, counts=False)
    cut, _ = play(COMPLETIONS, request(COMPLETIONS, max_tokens=9, stream_options={"include_usage": True}), [4], engine)
    text, events, _ = read(COMPLETIONS, cut)
    assert text == "".join(WORDS[:9])
    assert events[-1]["usage"]["completion_tokens"] == 9
    assert events[-1]["usage"]["prompt_tokens"] == PROMPT_TOKENS


NOT_RESUMABLE: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"n": 2}),
    (CHAT, {"tools": [{"type": "function"}]}),
    (CHAT, {"logprobs": True}),
    (CHAT, {"response_format": {"type": "json_object"}}),
    (CHAT, {"continue_final_message": True, "add_generation_prompt": False}),
    (CHAT, {"add_generation_prompt": False}),
    (CHAT, {"stream": False}),
    (CHAT, {"max_tokens": "12"}),
    (COMPLETIONS, {"prompt": [1, 2, 3]}),
    (COMPLETIONS, {"prompt": ["a"]}),
    (COMPLETIONS, {"prompt": ["a", "b"]}),
    (COMPLETIONS, {"echo": True}),
    (COMPLETIONS, {"logprobs": 1}),
    (COMPLETIONS, {"suffix": "x"}),
    (COMPLETIONS, {"return_token_ids": True}),
    ("/v1/responses", {"input": "x"}),
]


@pytest.mark.parametrize(("path", "fields"), NOT_RESUMABLE)
def test_what_a_second_worker_could_not_continue_is_left_alone(path: str, fields: dict[str, Any]) -> None:
    assert resumption(path, request(path, **fields)) is None


@pytest.mark.parametrize(
    "fields", [{"tools": []}, {"logprobs": False}, {"n": 1}, {"response_format": {"type": "text"}}, {"tools": None}]
)
def test_fields_that_ask_for_nothing_do_no_harm(fields: dict[str, Any]) -> None:
    assert resumption(CHAT, request(CHAT, **fields)) is not None


def chunk(**choice: Any) -> bytes:
    return b"data: " + orjson.dumps({"id": "x", "created": 1, "choices": [{"index": 0, **choice}]})


def test_an_engine_told_to_leave_has_not_finished() -> None:
    """vLLM on SIGTERM: the last token comes with the reason "abort"; it is asked for again."""
    stream = resumption(CHAT, request(CHAT))
    assert stream is not None
    assert stream.take(chunk(delta={"content": "a"}, finish_reason=None))
    assert stream.take(chunk(delta={"content": "b"}, finish_reason="abort")) == b""
    assert stream.take(b"data: [DONE]") == b""
    assert stream.failure == "engine_aborted"
    stream.broke()
    assert orjson.loads(stream.body())["messages"][-1]["content"] == "a"


def test_a_dead_engines_error_event_is_not_for_the_client_but_the_requests_own_is() -> None:
    stream = resumption(CHAT, request(CHAT))
    assert stream is not None
    own = b'data: {"error": {"message": "too long", "code": 400}}'
    assert stream.take(own) == own + b"\n\n"
    assert not stream.able
    stream = resumption(CHAT, request(CHAT))
    assert stream is not None
    assert stream.take(b'data: {"error": {"message": "EngineCore", "code": 500}}') == b""
    assert stream.failure == "engine_failed"


@pytest.mark.parametrize(
    "event",
    [
        chunk(delta={"reasoning_content": "hm"}),
        chunk(delta={"tool_calls": [{}]}),
        b"data: no JSON",
        b'data: {"choices": 3}',
        b"data: []",
    ],
)
def test_what_is_more_than_text_passes_and_ends_it(event: bytes) -> None:
    stream = resumption(CHAT, request(CHAT))
    assert stream is not None
    assert stream.take(event) == event + b"\n\n"
    assert not stream.able
    assert stream.take(b"data: [DONE]") == b"data: [DONE]\n\n"


def test_memory_is_bounded() -> None:
    stream = resumption(CHAT, request(CHAT))
    assert stream is not None
    event = chunk(delta={"content": "x" * 65536}, finish_reason=None)
    for _ in range(MAX_TEXT_BYTES // 65536):
        assert stream.take(event)
        assert stream.able
    assert stream.take(event)
    assert not stream.able
    assert stream._pieces == []


@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"data: [DONE]", b"data: null", b'data: {"error": 1}'])))
def test_no_event_breaks_it(events: list[bytes]) -> None:
    stream = resumption(COMPLETIONS, request(COMPLETIONS))
    assert stream is not None
    for event in events:
        stream.take(event)
        stream.take(b"data: " + event)
