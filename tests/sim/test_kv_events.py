"""Prefix-cache events on the wire: as recorded from vLLM, published and replayed."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from sim_client import TIMEOUT_S, OpenStream, complete, serving

from kvfleet_sim.config import KvEventsConfig
from kvfleet_sim.kv_publisher import KvPublisher
from kvfleet_sim.request import KvBatch
from kvfleet_sim.server import Server

RECORDING = Path(__file__).parent / "recordings" / "kv_events.jsonl"
CONFIG = {
    "enable_kv_cache_events": True,
    "publisher": "zmq",
    "topic": "kv@tiny",
    "endpoint": "tcp://127.0.0.1:*",
    "replay_endpoint": "tcp://127.0.0.1:*",
}
ARGS = (
    "tiny --max-model-len 1024 --block-size 32 --num-gpu-blocks-override 129 --enable-prompt-tokens-details "
    "--max-num-seqs 64 --kv-events-config"
)
END = b"\xff" * 8

Frames = list[bytes]


def events_server(*extra: str, speed: float = 100.0) -> Any:
    return serving(*ARGS.split(), json.dumps(CONFIG), *extra, speed=speed)


@asynccontextmanager
async def socket_of(kind: int, endpoint: str | None) -> AsyncIterator[zmq.asyncio.Socket]:
    assert endpoint is not None
    context = zmq.asyncio.Context()
    socket = context.socket(kind)
    socket.connect(endpoint)
    try:
        yield socket
    finally:
        context.destroy(linger=0)


async def received(socket: zmq.asyncio.Socket) -> Frames:
    frames: Frames = await asyncio.wait_for(socket.recv_multipart(), TIMEOUT_S)
    return frames


async def replay(server: Server, request: Frames) -> list[Frames]:
    """Every frame set of the answer, with the end marker, but without the empty delimiters."""
    assert server.publisher is not None
    async with socket_of(zmq.DEALER, server.publisher.replay_endpoint) as socket:
        await socket.send_multipart(request)
        answers: list[Frames] = []
        while not answers or answers[-1][1] != END:
            delimiter, *frames = await received(socket)
            assert delimiter == b""
            answers.append(frames)
        return answers


async def published(server: Server, start: int = 0) -> list[list[Any]]:
    """Decoded batches from a sequence number on."""
    batches = await replay(server, [b"", start.to_bytes(8, "big")])
    return [msgspec.msgpack.decode(payload) for _, _, payload in batches[:-1]]


def recorded_batches() -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in RECORDING.read_text().splitlines()]
    return [line for line in lines if "seq" in line]


def canonical(batches: list[list[Any]]) -> list[str]:
    """What two runs must agree in: hashes are numbered by first appearance, sampled tokens blanked.

    The prompts count upwards below 15,000; what breaks the counting in a block is the model's.
    """
    numbers: dict[int, int] = {}

    def number(key: int | None) -> int | None:
        return None if key is None else numbers.setdefault(key, len(numbers))

    def counted(tokens: list[int]) -> list[int]:
        first = tokens[0]
        return [token for index, token in enumerate(tokens) if token < 15_000 and token == first + index]

    result = []
    for _, events, rank in batches:
        rows = [dict(event) for event in events]
        for row in rows:
            if "block_hashes" in row:
                row["block_hashes"] = [number(key) for key in row["block_hashes"]]
            if row["type"] == "BlockStored":
                row["parent_block_hash"] = number(row["parent_block_hash"])
                row["token_ids"] = [len(row["token_ids"]), *counted(row["token_ids"])]
        result.append(json.dumps([rank, rows]))
    return result


async def test_the_recorded_requests_give_the_recorded_events() -> None:
    """The same prompts, in the same order, on a cache of the same size: the same batches, evictions included."""
    first = list(range(2000, 2100))
    async with events_server(speed=1.0) as server:
        # Its first batch clears the cache.
        assert (await complete(server, [1] * 40)).status == 200
        server.worker.engine.clear_prefix_cache()
        skip = len(await published(server))
        cached = []
        for prompt, max_tokens, fields in (
            (first, 1, {}),
            (first, 1, {}),
            (first[:96] + list(range(3000, 3068)), 1, {}),
            (first[:96], 1, {}),
            (list(range(4000, 4030)), 70, {}),
            (first, 1, {"cache_salt": "tenant-a"}),
            (first, 1, {"cache_salt": "tenant-a"}),
            (list(range(5000, 5070)), 3, {"n": 2}),
        ):
            answer = await complete(server, prompt, max_tokens, **fields)
            cached.append(answer.json["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached == [0, 96, 96, 64, 0, 0, 96, 0]
        alone = await OpenStream.start(server, {"prompt": list(range(6000, 6130)), "max_tokens": 40})
        await complete(server, [list(range(start, start + 130)) for start in (6200, 6400)], 40)
        await alone.read_all()
        await complete(server, list(range(10)), 1)
        for start in range(7000, 15000, 1000):
            await complete(server, list(range(start, start + 900)), 1)
        again = await complete(server, first, 1)
        assert again.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        batches = await published(server, skip)

    assert canonical(batches) == canonical([batch["decoded"] for batch in recorded_batches()])


async def test_published_frames_have_the_recorded_form() -> None:
    recorded = next(batch for batch in recorded_batches() if batch["seq"] == 24)
    payload = base64.b64decode(recorded["payload_b64"])
    theirs = msgspec.msgpack.decode(payload)
    assert theirs == recorded["decoded"]
    async with events_server() as server:
        assert server.publisher is not None
        async with socket_of(zmq.SUB, server.publisher.endpoint) as subscriber:
            subscriber.subscribe(b"kv@")
            topic, sequence, mine = await first_heard(server, subscriber)
    assert topic == b"kv@tiny"
    assert len(sequence) == 8
    time_s, events, rank = msgspec.msgpack.decode(mine)
    assert isinstance(time_s, float)
    assert rank == 0
    (event,) = events
    assert [(name, type(value)) for name, value in event.items() if name != "parent_block_hash"] == [
        (name, type(value)) for name, value in theirs[1][0].items() if name != "parent_block_hash"
    ]
    assert list(event) == list(theirs[1][0])


async def first_heard(server: Server, subscriber: zmq.asyncio.Socket) -> Frames:
    """A subscription takes effect some time after it was made: make events until one is heard."""
    for number in range(1000):
        await complete(server, [number] * 32)
        if await subscriber.poll(10):
            return await received(subscriber)
    raise AssertionError("nothing was heard")


async def test_a_replay_repeats_the_published_bytes_and_ends_with_a_marker() -> None:
    async with events_server() as server:
        assert server.publisher is not None
        async with socket_of(zmq.SUB, server.publisher.endpoint) as subscriber:
            subscriber.subscribe(b"")
            await first_heard(server, subscriber)
            for start in range(1000, 1400, 100):
                await complete(server, list(range(start, start + 40)))
            heard: list[Frames] = []
            while len(heard) < 4 or msgspec.msgpack.decode(heard[-1][2])[1][0]["token_ids"][0] != 1300:
                heard.append(await received(subscriber))
        heard = heard[-4:]
        last = int.from_bytes(heard[-1][1], "big")
        whole = await replay(server, [b"", bytes(8)])
        assert [int.from_bytes(sequence, "big") for _, sequence, _ in whole[:-1]] == list(range(last + 1))
        assert whole[-1] == [b"", END, b""]
        tail = await replay(server, [b"", (last - 3).to_bytes(8, "big")])
        assert tail[:-1] == heard
        assert await replay(server, [b"", (last - 3).to_bytes(4, "big")]) == tail
        assert await replay(server, [b"", (last + 1).to_bytes(8, "big")]) == [[b"", END, b""]]


async def test_a_replay_request_without_the_empty_frame_is_ignored() -> None:
    async with events_server() as server:
        assert server.publisher is not None
        async with socket_of(zmq.DEALER, server.publisher.replay_endpoint) as socket:
            await socket.send(bytes(8))
            await socket.send_multipart([b"", bytes(8)])
            assert await received(socket) == [b"", b"", END, b""]
            assert not await socket.poll(50)


async def test_adapters_and_salts_are_in_the_events() -> None:
    async with events_server("--enable-lora", "--lora-modules", "first=a", "second=b") as server:
        await complete(server, [7] * 70, model="second", cache_salt="s1")
        await complete(server, [7] * 70, model="first")
        await complete(server, [7] * 70)
        events = [event for _, events, _ in await published(server) for event in events]
    assert [(event["lora_id"], event["lora_name"], event["extra_keys"]) for event in events] == [
        (2, "second", [["second", "s1"], ["second"]]),
        (1, "first", [["first"], ["first"]]),
        (None, None, [None, None]),
    ]
    assert len({key for event in events for key in event["block_hashes"]}) == 6


@pytest.mark.parametrize("steps", [1, 3])
async def test_the_replay_buffer_is_bounded(steps: int) -> None:
    publisher = KvPublisher(KvEventsConfig(endpoint="tcp://127.0.0.1:*", buffer_steps=steps), 32, {})
    try:
        for key in range(10):
            publisher.publish(KvBatch(0.0, False, [key], []))
        kept = [msgspec.msgpack.decode(payload)[1][0]["block_hashes"] for _, payload in publisher._buffer]
    finally:
        await publisher.close()
    assert kept == [[key] for key in range(10 - steps, 10)]


async def test_the_publisher_connects_to_an_address_without_wildcard() -> None:
    context = zmq.asyncio.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.subscribe(b"")
    port = subscriber.bind_to_random_port("tcp://127.0.0.1")
    config = json.dumps({**CONFIG, "endpoint": f"tcp://127.0.0.1:{port}"})
    try:
        async with serving(*ARGS.split(), config) as server:
            topic, _, _ = await first_heard(server, subscriber)
            assert topic == b"kv@tiny"
    finally:
        context.destroy(linger=0)
