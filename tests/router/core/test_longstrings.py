"""Long strings taken out of JSON: what is left parses alike, and what was taken comes back."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet_router.core.longstrings import HOPS_AHEAD, LEAST_TEXT_BYTES, LONG_BYTES, cut, is_marked
from kvfleet_router.core.parse import RequestError, read_request

TEXTS = st.text(st.sampled_from('ab"\\\n/ü€'), max_size=40)
DOCUMENTS = st.recursive(
    TEXTS | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
LONG = "x" * LONG_BYTES
PATH = "/v1/chat/completions"


@given(DOCUMENTS, st.booleans(), st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_what_was_taken_comes_back_and_the_rest_is_json(document, ascii_only, long):
    body = json.dumps(document, ensure_ascii=ascii_only).encode()
    found = cut(body, least_text=0, long=long)
    if found is None:
        longest = max(map(len, strings_of(body)), default=0)
        assert longest < long or body.count(b'"') > HOPS_AHEAD
        return
    assert b"".join(found.whole(found.text)) == body
    assert shape(json.loads(found.text)) == shape(document)
    assert all(len(string) >= long for string in found.strings)


def strings_of(body):
    """The contents of a JSON text's strings, as they are written."""
    found, at = [], 0
    while (start := body.find(b'"', at)) >= 0:
        end = start + 1
        while body[end] != ord('"'):
            end += 2 if body[end] == ord("\\") else 1
        found.append(body[start + 1 : end])
        at = end + 1
    return found


def shape(value):
    """Everything but the strings."""
    if isinstance(value, dict):
        return [shape(each) for each in value.values()]
    if isinstance(value, list):
        return [shape(each) for each in value]
    return str if isinstance(value, str) else value


@pytest.mark.parametrize("body", [b'"' + b"x" * 9000, b'"' + b"x" * 9000 + b'\\"', b"x" * 9000, b'"\\' * 5000])
def test_a_string_without_an_end_is_left_to_the_parser(body):
    assert cut(body) is None


def test_texts_that_are_short_or_full_of_quotes_are_left_to_the_parser():
    assert cut(json.dumps(LONG).encode()) is None
    assert cut(json.dumps([LONG] * 10).encode()) is not None
    assert cut(json.dumps(["x"] * 3000 + [LONG] * 10).encode()) is None


def body_of(**fields):
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


CONTENTS = [
    'a long "text", with \\ escapes\n' + "x" * 5000,
    [{"type": "text", "text": "y" * 6000}, {"type": "text", "text": "short"}],
    [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 8000}}],
    ["z" * 5000, {"type": "text", "text": ""}],
]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("path", [PATH, "/v1/messages"])
def test_a_prompt_is_the_same_with_and_without_its_long_strings_taken_out(content, path):
    messages = [
        {"role": "system", "content": "s" * 2000},
        {"role": "user", "content": content, "tool_calls": [{"a": LONG}]},
    ]
    body = body_of(messages=messages, tools=[{"d": LONG}], system="q" * 1500, cache_salt="salt", max_tokens=5)
    assert cut(body) is not None
    request = read_request(path, body, {})
    first = b'{"unknown": ' + json.dumps(["x"] * 20_000).encode() + b", " + body[1:]
    assert cut(first) is None
    other = read_request(path, first, {})
    assert request.prompt == other.prompt
    assert (request.model, request.cache_salt, request.max_output_tokens) == ("m", "salt", 5)


def test_two_images_differ_though_each_is_taken_out():
    def prompt(letter):
        part = {"type": "image_url", "image_url": {"url": letter * 9000}}
        return read_request(PATH, body_of(messages=[{"role": "user", "content": [part]}]), {}).prompt

    assert prompt("A") == prompt("A") != prompt("B")


@pytest.mark.parametrize("field", ["model", "cache_salt"])
def test_a_name_too_long_is_refused_though_it_could_be_taken_out(field):
    body = body_of(**{field: "n" * 2000, "x": "y" * 5000})
    assert cut(body) is not None
    with pytest.raises(RequestError, match=f"`{field}` is longer than 256 characters"):
        read_request(PATH, body, {})


def test_a_long_role_is_part_of_the_prompt():
    body = body_of(messages=[{"role": "r" * 5000, "content": "hi"}])
    assert read_request(PATH, body, {}).prompt == b"\n" + b"r" * 5000 + b'\n"hi"'


def test_marks():
    assert not is_marked(None)
    assert not is_marked("model")
    found = cut(json.dumps(["x" * LEAST_TEXT_BYTES]).encode())
    assert is_marked(json.loads(found.text)[0])
