"""Reading usage from an answer's end, and the model from a form."""

import asyncio

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Bench, Seen, json_answer, post

from kvfleet_router.io.multipart import form_model
from kvfleet_router.io.usage import NO_USAGE, Usage, read_usage

FULL = {
    "prompt_tokens": 27,
    "total_tokens": 35,
    "completion_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 16, "audio_tokens": None},
    "completion_tokens_details": {"reasoning_tokens": 3},
}


@pytest.mark.parametrize(
    ("end", "usage"),
    [
        (orjson.dumps({"usage": FULL, "prompt_logprobs": None}), Usage(27, 8, 16)),
        (orjson.dumps({"usage": FULL}, option=orjson.OPT_INDENT_2), Usage(27, 8, 16)),
        (b'data: {"usage":null}\n\ndata: {"usage":{"prompt_tokens":3}}\n\ndata: [DONE]\n\n', Usage(3, None, None)),
        (b'{"usage":{"input_tokens":5,"output_tokens":6}}', Usage(5, 6, None)),
        (b'{"usage":null}', NO_USAGE),
        (b'{"usage":{"prompt_tokens":-1,"completion_tokens":"8"}}', NO_USAGE),
        (b'{"usage":{"prompt_tokens":', NO_USAGE),
        (b"", NO_USAGE),
    ],
)
def test_usage_is_read(end: bytes, usage: Usage) -> None:
    assert read_usage(end) == usage


@given(st.text())
def test_text_of_the_model_cannot_pose_as_usage(text: str) -> None:
    posing = text + '"usage":{"prompt_tokens":1,"completion_tokens":2}' + text
    answer = orjson.dumps({"usage": FULL, "choices": [{"message": {"content": posing}}]})
    assert read_usage(answer) == Usage(27, 8, 16)
    assert read_usage(orjson.dumps({"choices": [{"message": {"content": posing}}]})) == NO_USAGE


@given(st.binary())
def test_any_bytes_are_read_without_failing(end: bytes) -> None:
    read_usage(end)
    form_model(end, b"multipart/form-data; boundary=x")


def form(*parts: tuple[str, bytes], boundary: str = "xyz") -> bytes:
    lines = b"".join(
        b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (boundary.encode(), head.encode(), body)
        for head, body in parts
    )
    return lines + b"--%b--\r\n" % boundary.encode()


AUDIO = ('name="file"; filename="a.wav"', b"RIFF\r\n--xy\r\n\x00\xff" * 1000)


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (form(AUDIO, ('name="model"', b"whisper-1")), "whisper-1"),
        (form(('name="model"', b"whisper-1"), AUDIO), "whisper-1"),
        (form(("name=model", b" whisper-1 ")), "whisper-1"),
        (form(AUDIO), None),
        (
            form(('name="file"; filename="m"', b'form-data; name="model"\r\n\r\nfake\r\n'), ('name="model"', b"real")),
            "real",
        ),
        (form(('name="model"', b"x" * 300)), None),
        (form(('name="model"', b"")), ""),
        (b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\nno end', ""),
        (b"", None),
        (b"--xyz" * 1000, None),
    ],
)
def test_the_model_of_a_form(body: bytes, model: str | None) -> None:
    for content_type in (b"multipart/form-data; boundary=xyz", b'Multipart/Form-Data; charset=x; boundary="xyz"'):
        assert form_model(body, content_type) == model
    assert form_model(body, b"application/json") is None
    assert form_model(body, b"multipart/form-data") is None


async def test_an_upload_is_routed_by_its_form(bench: Bench) -> None:
    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json_answer({"text": "hello"}))

    worker = await bench.worker(behave)
    router = await bench.router(worker, model="whisper-1")
    body = form(AUDIO, ('name="model"', b"whisper-1"))
    request = post(body, path=b"/v1/audio/transcriptions").replace(
        b"application/json", b"multipart/form-data; boundary=xyz"
    )
    assert (await bench.ask(router, request)).json() == {"text": "hello"}
    assert worker.requests[0].body == body
    wrong = await bench.ask(router, request.replace(b"whisper-1", b"whisper-2"))
    assert (wrong.status, wrong.json()["error"]["code"]) == (404, "model_not_found")


OTHER_ENDPOINTS = [
    *("/v1/audio/speech", "/v1/images/generations", "/v1/moderations", "/v1/embeddings", "/v1/responses", "/v1/rerank"),
    *("/rerank", "/score", "/v1/score", "/tokenize", "/detokenize", "/classify", "/pooling", "/v1/messages"),
]


@pytest.mark.parametrize("path", OTHER_ENDPOINTS)
async def test_other_endpoints_are_routed_by_model_and_answers_of_any_kind_pass(bench: Bench, path: str) -> None:
    sound = bytes(range(256)) * 40

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: audio/wav\r\ncontent-length: %d\r\n\r\n%b" % (len(sound), sound)
        )

    worker = await bench.worker(behave)
    router = await bench.router(worker, model="m")
    body = b'{"model": "m", "input": "hi", "messages": [{"role": "user", "content": "x"}], "unknown":  1.50}'
    answer = await bench.ask(router, post(body, path=path.encode()))
    assert (answer.status, answer.header("content-type"), answer.body) == (200, "audio/wav", sound)
    assert worker.requests[0].body == body
    wrong = await bench.ask(router, post(body.replace(b'"m"', b'"n"'), path=path.encode()))
    assert wrong.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "path", [b"/v1/load_lora_adapter", b"/sleep", b"/reset_prefix_cache", b"/v1/chat/completions/render"]
)
async def test_what_controls_an_engine_is_out_of_reach(bench: Bench, path: bytes) -> None:
    worker = await bench.worker()
    router = await bench.router(worker)
    assert (await bench.ask(router, post(b"{}", path=path))).status == 404
    assert not worker.requests
