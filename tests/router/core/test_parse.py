"""Reading requests: what routing needs is found, everything else is left alone, errors name the field."""

import json

import pytest

from kvfleet_router.core.parse import MAX_SEQUENCES, MEDIA_BYTES, RequestError, read_request

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def read(path, body, headers=None):
    return read_request(path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers or {})


def test_a_chat_request_gives_what_routing_needs():
    request = read(
        CHAT,
        {
            "model": "m",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": False},
            "max_tokens": 5,
            "max_completion_tokens": 7,
            "n": 2,
            "priority": -3,
            "cache_salt": "tenant",
            "temperature": 0.3,
            "unknown": {"deep": [[[{}]]]},
        },
        {b"x-session-id": b"s1", b"x-tenant-id": b"t1"},
    )
    assert (request.kind, request.model, request.stream, request.include_usage) == ("chat", "m", True, True)
    assert (request.max_output_tokens, request.sequences, request.priority) == (7, 2, -3)
    assert (request.cache_salt, request.session_id, request.tenant) == ("tenant", "s1", "t1")
    assert b"be brief" in request.prompt
    assert request.prompt.index(b"be brief") < request.prompt.index(b"hello")
    assert request.prompt_bytes == len(request.prompt)


def test_absent_fields_have_defaults():
    request = read(CHAT, {"messages": HELLO})
    assert (request.model, request.stream, request.include_usage, request.max_output_tokens) == ("", False, False, None)
    assert (request.sequences, request.priority, request.cache_salt, request.session_id) == (1, 0, None, None)


def test_tools_come_before_messages_and_are_part_of_the_prefix():
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    with_tools = read(CHAT, {"messages": HELLO, "tools": tools}).prompt
    assert with_tools.index(b"look_up") < with_tools.index(b"hello")
    assert with_tools.endswith(read(CHAT, {"messages": HELLO}).prompt)


def test_a_conversation_extends_its_own_prefix():
    turns = [{"role": "user", "content": "a" * 100}, {"role": "assistant", "content": "b" * 100}]
    first = read(CHAT, {"messages": turns}).prompt
    assert read(CHAT, {"messages": [*turns, *HELLO]}).prompt.startswith(first)


def test_roles_and_tool_calls_are_part_of_the_prompt():
    as_user = read(CHAT, {"messages": [{"role": "user", "content": "x"}]}).prompt
    assert as_user != read(CHAT, {"messages": [{"role": "system", "content": "x"}]}).prompt
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    assert b'"f"' in read(CHAT, {"messages": [call]}).prompt


def test_text_parts_are_the_text():
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert b'"hel""lo"' in read(CHAT, {"messages": [{"role": "user", "content": parts}]}).prompt


def image(url):
    return [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]}
    ]


def test_images_are_keyed_by_their_content_and_weigh_the_same_whatever_their_size():
    small, large = image("data:image/png;base64,AAAA"), image("data:image/png;base64," + "B" * 100_000)
    one, same, other = (read(CHAT, {"messages": messages}).prompt for messages in (small, small, large))
    assert one == same
    assert one != other
    assert len(one) == len(other)
    assert MEDIA_BYTES < len(one) < MEDIA_BYTES + 100


@pytest.mark.parametrize(
    ("prompt", "sequences", "tokens"),
    [
        ("tell me", 1, None),
        (["one", "two"], 2, None),
        ([1, 2, 3], 1, 3),
        ([[1, 2], [3]], 2, 3),
        (["one", [1, 2]], 2, None),
    ],
)
def test_completion_prompts_may_be_text_texts_or_token_ids(prompt, sequences, tokens):
    request = read(COMPLETIONS, {"model": "m", "prompt": prompt})
    assert (request.kind, request.sequences, request.prompt_tokens) == ("completions", sequences, tokens)
    assert request.prompt


def test_token_ids_share_prefixes():
    short = read(COMPLETIONS, {"prompt": list(range(50))}).prompt
    assert read(COMPLETIONS, {"prompt": list(range(60))}).prompt.startswith(short)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", "/score", CHAT.replace("chat", "chatty")])
def test_other_endpoints_are_routed_by_model_alone(path):
    request = read(path, {"model": "m", "input": "text"})
    assert (request.kind, request.model, request.prompt) == ("other", "m", b'"text"')


def test_responses_and_embeddings_tell_their_output():
    responses = {"model": "m", "instructions": "be brief", "input": "hello", "max_output_tokens": 9}
    request = read("/v1/responses", responses)
    assert (request.prompt, request.max_output_tokens) == (b'"be brief""hello"', 9)
    assert read("/v1/embeddings", {"model": "m", "input": "hello"}).max_output_tokens == 0


def test_anthropic_messages_are_conversations_with_a_system_prompt():
    body = {"model": "m", "max_tokens": 5, "system": "be brief", "messages": HELLO, "stream": True}
    request = read("/v1/messages", body)
    assert (request.kind, request.max_output_tokens, request.stream) == ("other", 5, True)
    assert request.prompt.startswith(b'"be brief"')
    assert b"hello" in request.prompt
    with pytest.raises(RequestError, match="messages"):
        read("/v1/messages", {"model": "m"})


def test_bodies_that_are_not_json_pass_on_other_endpoints():
    headers = {b"content-type": b"multipart/form-data; boundary=x"}
    request = read("/v1/audio/transcriptions", b"--x\r\n\xff\xfe", headers)
    assert (request.kind, request.model) == ("other", "")


def test_query_and_trailing_slash_do_not_change_the_endpoint():
    assert read(CHAT + "?a=1", {"messages": HELLO}).kind == "chat"
    assert read(CHAT + "/", {"messages": HELLO}).kind == "chat"


@pytest.mark.parametrize(
    ("stream", "expected"),
    [(True, True), (1, True), ("true", True), (False, False), (0, False), (None, False), ("no", False)],
)
def test_stream_is_read_as_leniently_as_engines_do(stream, expected):
    assert read(CHAT, {"messages": HELLO, "stream": stream}).stream is expected


@pytest.mark.parametrize("value", ["many", -5, 10**30, 1e300, 2.5, True, None])
def test_odd_numbers_are_the_engines_business_and_stay_within_bounds(value):
    request = read(CHAT, {"messages": HELLO, "max_tokens": value, "n": value, "priority": value})
    assert request.max_output_tokens is None or 0 <= request.max_output_tokens <= 2**24
    assert 1 <= request.sequences <= MAX_SEQUENCES
    assert abs(request.priority) <= 2**31


BAD = [
    (CHAT, b"", None, "invalid_json"),
    (CHAT, b"{", None, "invalid_json"),
    (CHAT, b'{"messages": []} x', None, "invalid_json"),
    (CHAT, b'{"messages": [{"role": "\xff"}]}', None, "invalid_json"),
    (CHAT, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "invalid_json"),
    (CHAT, b"[]", None, "invalid_type"),
    (CHAT, b"null", None, "invalid_type"),
    (CHAT, {"model": "m"}, "messages", "missing_required_parameter"),
    (CHAT, {"messages": []}, "messages", "missing_required_parameter"),
    (CHAT, {"messages": "hello"}, "messages", "invalid_type"),
    (CHAT, {"messages": [1]}, "messages[0]", "invalid_type"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0]", "missing_required_parameter"),
    (CHAT, {"messages": [{"role": 1, "content": "x"}]}, "messages[0].role", "invalid_type"),
    (CHAT, {"messages": HELLO, "model": 5}, "model", "invalid_type"),
    (CHAT, {"messages": HELLO, "model": "x" * 300}, "model", "invalid_value"),
    (CHAT, {"messages": HELLO, "cache_salt": "x" * 300}, "cache_salt", "invalid_value"),
    (CHAT, {"messages": HELLO, "stream": {}}, "stream", "invalid_type"),
    (COMPLETIONS, {"model": "m"}, "prompt", "missing_required_parameter"),
    (COMPLETIONS, {"prompt": []}, "prompt", "missing_required_parameter"),
    (COMPLETIONS, {"prompt": {}}, "prompt", "invalid_type"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt", "invalid_type"),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt", "invalid_type"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt", "invalid_type"),
    (COMPLETIONS, {"prompt": [2**40]}, "prompt", "invalid_type"),
    ("/v1/embeddings", b"{", None, "invalid_json"),
]


@pytest.mark.parametrize(("path", "body", "param", "code"), BAD)
def test_what_cannot_be_routed_is_refused_as_openai_does(path, body, param, code):
    with pytest.raises(RequestError) as caught:
        read(path, body)
    error = caught.value
    assert (error.status, error.type, error.param, error.code) == (400, "invalid_request_error", param, code)
    assert error.message


def test_a_large_body_is_refused_before_it_is_read():
    with pytest.raises(RequestError) as caught:
        read_request(CHAT, b"x" * 2000, {}, max_body_bytes=1000)
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")


def test_long_header_values_are_cut():
    request = read(CHAT, {"messages": HELLO}, {b"x-session-id": b"s" * 5000, b"x-tenant-id": b"\xff" * 5000})
    assert len(request.session_id) == len(request.tenant) == 256
