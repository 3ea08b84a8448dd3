"""Whatever arrives, the reader answers with a request or a RequestError, and a request is within bounds."""

import orjson
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvfleet_router.core.hashing import block_hashes, seed_of
from kvfleet_router.core.parse import MAX_SEQUENCES, ParsedRequest, RequestError, read_request

PATHS = st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/embeddings"])
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=20)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
FIELDS = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "stream",
        "stream_options",
        "max_tokens",
        "n",
        "priority",
        "cache_salt",
        "tools",
        "input",
    ]
)
PART = st.fixed_dictionaries({}, optional={"type": st.text(max_size=5), "text": JSON, "image_url": JSON}) | JSON
MESSAGE = st.fixed_dictionaries(
    {"role": st.text(max_size=8)}, optional={"content": JSON | st.lists(PART, max_size=3), "tool_calls": JSON}
)
BODY = st.dictionaries(FIELDS, JSON, max_size=8) | st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3)},
    optional={"model": st.text(max_size=5), "n": JSON, "stream": JSON, "tools": JSON},
)


def check(path, body):
    try:
        request = read_request(path, body, {})
    except RequestError as error:
        assert 400 <= error.status < 500
        assert error.message
        return
    assert isinstance(request, ParsedRequest)
    assert 1 <= request.sequences <= MAX_SEQUENCES
    assert request.prompt_bytes == len(request.prompt) or not request.prompt
    blocks = block_hashes(request.prompt, seed=seed_of(request.model, request.cache_salt, 64), block_bytes=64)
    assert len(blocks) == len(request.prompt) // 64


@given(PATHS, st.binary(max_size=300))
@example("/v1/chat/completions", b'{"messages":[{"role":"\\ud800"}]}')
@example("/v1/completions", b'{"prompt":"\\ud83d"}')
@settings(max_examples=150, deadline=None)
def test_any_bytes(path, body):
    check(path, body)


@given(PATHS, BODY)
@settings(max_examples=150, deadline=None)
def test_any_json(path, body):
    check(path, orjson.dumps(body, default=str))


@given(PATHS, BODY, st.integers(0, 400), st.binary(max_size=3))
@settings(max_examples=150, deadline=None)
def test_json_damaged_anywhere(path, body, place, damage):
    text = orjson.dumps(body, default=str)
    place = min(place, len(text))
    check(path, text[:place] + damage + text[place + len(damage) :])
