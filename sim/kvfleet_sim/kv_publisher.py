"""Publishes prefix-cache events over ZMQ as vLLM does, and replays them.

PUB: three frames a batch: topic, sequence number (8 bytes, big-endian, from 0), msgpack `[time, events, rank]`; events are
maps with a `type`. ROUTER: a request of two frames, empty and a first sequence number, is answered with every buffered batch
from there on and an end marker with sequence -1. Batches are kept encoded: replayed bytes are the published ones. The buffer
is bounded by `buffer_steps`, as in vLLM, and in bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from typing import Any, Final

import msgspec
import numpy as np
import zmq
import zmq.asyncio

from kvfleet_sim.config import KvEventsConfig
from kvfleet_sim.generation import Choice
from kvfleet_sim.request import KvBatch, Stored
from kvfleet_sim.tokens import Tokens

log = logging.getLogger(__name__)

MAX_BUFFER_BYTES: Final = 64 * 1024 * 1024
END_OF_REPLAY: Final = (-1).to_bytes(8, "big", signed=True)
MEDIUM: Final = "GPU"


def encode_batch(batch: KvBatch, block_tokens: int, lora_ids: dict[str, int], time_s: float) -> bytes:
    """The payload of one batch. `lora_ids` numbers the adapters, from 1."""
    events: list[dict[str, Any]] = []
    if batch.cleared:
        events.append({"type": "AllBlocksCleared"})
    events += [
        {"type": "BlockRemoved", "block_hashes": [key], "medium": MEDIUM, "group_idx": 0} for key in batch.removed
    ]
    events += [_stored(stored, block_tokens, lora_ids) for stored in batch.stored]
    return msgspec.msgpack.encode([time_s, events, 0])


def _stored(stored: Stored, block_tokens: int, lora_ids: dict[str, int]) -> dict[str, Any]:
    choice = stored.request.payload
    assert isinstance(choice, Choice)
    lora, salt = stored.request.lora, choice.job.params.cache_salt
    first, end = stored.first, stored.first + stored.count
    extra: list[list[str] | None] = [[lora] if lora is not None else None] * stored.count
    if salt is not None and first == 0:
        extra[0] = [lora, salt] if lora is not None else [salt]
    return {
        "type": "BlockStored",
        "block_hashes": stored.keys,
        "parent_block_hash": stored.parent_key,
        "token_ids": _token_ids(choice.tokens[first * block_tokens : end * block_tokens]),
        "block_size": block_tokens,
        "lora_id": lora_ids.get(lora) if lora is not None else None,
        "medium": MEDIUM,
        "lora_name": lora,
        "extra_keys": extra,
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }


def _token_ids(tokens: Tokens) -> msgspec.Raw:
    """A msgpack array of 32-bit integers, made without a Python object for each."""
    packed = np.empty((len(tokens), 5), dtype=np.uint8)
    packed[:, 0] = 0xCE
    packed[:, 1:] = tokens.astype(">u4").view(np.uint8).reshape(-1, 4)
    return msgspec.Raw(b"\xdd" + len(tokens).to_bytes(4, "big") + packed.tobytes())


class KvPublisher:
    """The two sockets. Use within a running event loop; `close` ends it. `lora_ids` may grow meanwhile."""

    def __init__(self, config: KvEventsConfig, block_tokens: int, lora_ids: dict[str, int]) -> None:
        self._block_tokens = block_tokens
        self._lora_ids = lora_ids
        self._topic = config.topic.encode()
        self._buffer: deque[tuple[bytes, bytes]] = deque()
        self._buffer_bytes = 0
        self._buffer_steps = config.buffer_steps
        self._sequence = 0
        self._context = zmq.Context()
        self._replaying: asyncio.Task[None] | None = None
        self._router: zmq.asyncio.Socket | None = None
        try:
            self._socket = self._context.socket(zmq.PUB)
            self._socket.setsockopt(zmq.SNDHWM, config.hwm)
            self.endpoint = _attach(self._socket, config.endpoint)
            self.replay_endpoint: str | None = None
            if config.replay_endpoint is not None:
                router = zmq.asyncio.Context.shadow(self._context.underlying).socket(zmq.ROUTER)
                router.setsockopt(zmq.SNDHWM, config.buffer_steps + 1)
                router.bind(config.replay_endpoint)
                self.replay_endpoint = router.getsockopt_string(zmq.LAST_ENDPOINT)
                self._router = router
                self._replaying = asyncio.get_running_loop().create_task(self._serve_replays(router))
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise OSError(
                error.errno, f"--kv-events-config {config.endpoint} {config.replay_endpoint}: {error}"
            ) from None

    def publish(self, batch: KvBatch) -> None:
        sequence = self._sequence.to_bytes(8, "big")
        payload = encode_batch(batch, self._block_tokens, self._lora_ids, time.time())
        self._sequence += 1
        self._buffer.append((sequence, payload))
        self._buffer_bytes += len(payload)
        while len(self._buffer) > self._buffer_steps or self._buffer_bytes > MAX_BUFFER_BYTES:
            self._buffer_bytes -= len(self._buffer.popleft()[1])
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart((self._topic, sequence, payload), zmq.NOBLOCK)

    async def close(self) -> None:
        if self._replaying is not None:
            self._replaying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._replaying
        if self._router is not None:
            # The shadow's socket: `destroy` does not know it, and would wait for it for ever.
            self._router.close(linger=0)
        self._context.destroy(linger=0)

    async def _serve_replays(self, router: zmq.asyncio.Socket) -> None:
        while True:
            frames = await router.recv_multipart()
            if len(frames) != 3 or frames[1]:
                log.warning(
                    "replay request of %d frames ignored: send an empty frame and a sequence number", len(frames)
                )
                continue
            client, _, wanted = frames
            start = int.from_bytes(wanted, "big")
            for sequence, payload in list(self._buffer):
                if int.from_bytes(sequence, "big") >= start:
                    await router.send_multipart((client, b"", self._topic, sequence, payload))
            await router.send_multipart((client, b"", b"", END_OF_REPLAY, b""))


def _attach(socket: zmq.Socket[bytes], endpoint: str) -> str:
    """vLLM's rule: wildcards, ipc and inproc are bound, any other address is connected to."""
    if "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://")):
        socket.bind(endpoint)
        return socket.getsockopt_string(zmq.LAST_ENDPOINT)
    socket.connect(endpoint)
    return endpoint
