"""OpenAI's own Python client through the router: it must see nothing but OpenAI's API."""

import asyncio
from collections.abc import AsyncIterator

import openai
import orjson
import pytest
from scripted import STREAM_HEAD, Bench, Seen, chunk, completion, json_answer

from kvfleet_router.app import RouterApp


async def engine(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers the endpoints as vLLM does."""
    request = orjson.loads(seen.body)
    if b"/embeddings" in seen.line:
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, -1.0]}]
        writer.write(
            json_answer(
                {"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1}}
            )
        )
        return
    if not request.get("stream"):
        writer.write(json_answer(completion("Hello there")))
        return
    writer.write(STREAM_HEAD)
    for text in ("Hel", "lo"):
        delta = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}
        part = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [delta]}
        writer.write(chunk(b"data: %b\n\n" % orjson.dumps(part)))
        await writer.drain()
    if request.get("break"):
        writer.close()
        return
    writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


@pytest.fixture
async def client(bench: Bench) -> AsyncIterator[openai.AsyncOpenAI]:
    router = await bench.router(await bench.worker(engine), model="m")
    async with openai_client(router) as client:
        yield client


def openai_client(router: RouterApp) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{router.port}/v1", api_key="sk-test", max_retries=0)


MESSAGES = [{"role": "user", "content": "hi"}]


async def test_a_completion(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello there"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7


async def test_a_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    assert "".join([part.choices[0].delta.content or "" async for part in stream]) == "Hello"


async def test_a_stream_that_breaks_raises(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True, extra_body={"break": True})
    texts = []
    with pytest.raises(openai.APIError, match="failed while it answered"):
        async for part in stream:
            texts.append(part.choices[0].delta.content)  # noqa: PERF401 - it raises at the end
    assert texts == ["Hel", "lo"]


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["m"]
    assert (await client.models.retrieve("m")).id == "m"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("none")


async def test_embeddings(client: openai.AsyncOpenAI) -> None:
    answer = await client.embeddings.create(model="m", input="x", encoding_format="float")
    assert answer.data[0].embedding == [0.5, -1.0]


async def test_errors_have_their_types(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="none", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as missing:
        await client.chat.completions.create(model="m", messages=[])
    assert (missing.value.param, missing.value.type) == ("messages", "invalid_request_error")


async def test_a_fleet_without_workers_is_a_server_error_to_retry(bench: Bench) -> None:
    worker = await bench.worker(engine)
    router = await bench.router(worker)
    await worker.stop()
    async with openai_client(router) as client:
        with pytest.raises(openai.InternalServerError) as error:
            await client.chat.completions.create(model="m", messages=MESSAGES)
    assert error.value.status_code == 503
    assert int(error.value.response.headers["retry-after"]) >= 1
