"""What following KV events costs: decoding and indexing alone, a prompt rendered and walked, and a fleet's events over sockets.

    python bench/kvevents.py                     block events per second of one core; microseconds per request
    python bench/kvevents.py --fleet 64 --seconds 300
                                                 so many publishers at --blocks-per-second each, over ZMQ on the loopback, into a
                                                 router's follower: CPU, memory, gaps, and how late the event loop got.
                                                 A row every --every seconds and one of all; SIGINT and SIGTERM end it early,
                                                 with the row of all

A step of an engine stores a prefix of 24 blocks and 6 blocks of decoding sequences, and drops as many as it stores once its
cache is full. CPU time is the process's own (ZMQ's thread included): other load on the machine does not count, but makes it
late. Needs the `tokenizers` package for the second part.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop
import zmq

from kvfleet_api.compile import static_fleet
from kvfleet_router.app import GC_THRESHOLDS
from kvfleet_router.core.dispatcher import Dispatcher
from kvfleet_router.core.kvevents.codec import Codec
from kvfleet_router.core.kvevents.prompt import Prompts
from kvfleet_router.core.kvevents.stream import Counts
from kvfleet_router.core.kvevents.template import ChatTemplate
from kvfleet_router.core.kvevents.view import Engine, ModelView
from kvfleet_router.core.kvevents.wire import Stored, decode
from kvfleet_router.io.kvevents.follower import Follower
from kvfleet_router.policies import REGISTRY
from kvfleet_sim.chat import CHAT_TEMPLATE

BLOCK_TOKENS = 16
VOCABULARY = 130_000
CHAIN_BLOCKS, DECODED_BLOCKS = 24, 6
STEP_BLOCKS = CHAIN_BLOCKS + DECODED_BLOCKS
HASH_MARK, TOKEN_MARK = 0xF0F0F0F000000000, 0x7F000000
MAX_BURST = 1024
DOCS = Path(__file__).parent.parent / "docs"


def byte_level_document(seed: int = 0) -> dict[str, Any]:
    """A tokenizer.json with a vocabulary of common size: tokens of 1 to 8 letters."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words: dict[str, None] = dict.fromkeys(letters)
    while len(words) < VOCABULARY:
        words["".join(rng.choices(letters, k=rng.randint(2, 8)))] = None
    vocabulary = {word: number for number, word in enumerate(words)}
    return {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}


class Steps:
    """Batches of one engine, one after another: a template, its hashes and tokens replaced."""

    def __init__(self, engine: int, held_blocks: int) -> None:
        self._engine = engine
        self._held_steps = max(held_blocks // STEP_BLOCKS, 1)
        self._rng = np.random.default_rng(engine)
        hashes = [HASH_MARK + number for number in range(2 * STEP_BLOCKS)]
        tokens = [TOKEN_MARK + number for number in range(STEP_BLOCKS * BLOCK_TOKENS)]
        events: list[dict[str, Any]] = [
            {"type": "BlockRemoved", "block_hashes": [name], "medium": "GPU", "group_idx": 0}
            for name in hashes[STEP_BLOCKS:]
        ]
        chains = [(None, hashes[:CHAIN_BLOCKS])] + [(hashes[0], [name]) for name in hashes[CHAIN_BLOCKS:STEP_BLOCKS]]
        at = 0
        for parent, names in chains:
            count = len(names) * BLOCK_TOKENS
            events.append(
                {
                    "type": "BlockStored",
                    "block_hashes": names,
                    "parent_block_hash": parent,
                    "token_ids": tokens[at : at + count],
                    "block_size": BLOCK_TOKENS,
                    "lora_id": None,
                    "medium": "GPU",
                    "lora_name": None,
                    "extra_keys": [None] * len(names),
                    "group_idx": 0,
                    "kv_cache_spec_kind": "full_attention",
                }
            )
            at += count
        payload = msgspec.msgpack.encode([time.time(), events, 0])
        self._template = np.frombuffer(payload, dtype=np.uint8)
        self._hash_places = _places(payload, [value.to_bytes(8, "big") for value in hashes])
        self._token_places = _places(payload, [value.to_bytes(4, "big") for value in tokens])
        self._hash_numbers = np.array([number for number, places in enumerate(self._hash_places) for _ in places])
        self._hash_at = np.array([place for places in self._hash_places for place in places])[:, None] + np.arange(8)
        self._token_at = np.array([places[0] for places in self._token_places])[:, None] + np.arange(4)

    def batch(self, step: int) -> bytes:
        payload = self._template.copy()
        stored = np.arange(STEP_BLOCKS, dtype=np.uint64) + np.uint64(step * STEP_BLOCKS)
        earlier = step - self._held_steps
        first = earlier * STEP_BLOCKS if earlier >= 0 else 2**50  # nothing is dropped yet: names nobody knows
        dropped = np.arange(STEP_BLOCKS, dtype=np.uint64) + np.uint64(first)
        names = (np.concatenate([stored, dropped]) << np.uint64(8)) | np.uint64(self._engine) | np.uint64(1 << 63)
        payload[self._hash_at] = names[self._hash_numbers].astype(">u8").view(np.uint8).reshape(-1, 8)
        tokens = self._rng.integers(0, VOCABULARY, STEP_BLOCKS * BLOCK_TOKENS, dtype=np.uint32)
        payload[self._token_at] = tokens.astype(">u4").view(np.uint8).reshape(-1, 4)
        return payload.tobytes()


def _places(payload: bytes, marks: list[bytes]) -> list[list[int]]:
    found = []
    for mark in marks:
        places, at = [], payload.find(mark)
        while at >= 0:
            places.append(at)
            at = payload.find(mark, at + 1)
        found.append(places)
    return found


# One core


def ingest(repeats: int) -> None:
    """Decode and index, without sockets."""
    codec = Codec(byte_level_document())
    steps = Steps(0, held_blocks=27_000)
    payloads = [steps.batch(number) for number in range(2000)]
    best = 0.0
    for _ in range(repeats):
        view = ModelView("bench", codec, Prompts(codec, None, {}))
        engine = Engine(view, 0, 1, 10**6, Counts(), can_replay=False)
        events = 0
        started = time.process_time()
        for number, payload in enumerate(payloads):
            engine.stream.heard(number, payload)
            events += STEP_BLOCKS if number < steps._held_steps else 2 * STEP_BLOCKS
        best = max(best, events / (time.process_time() - started))
        assert len(engine.cache) == min(steps._held_steps, 2000) * STEP_BLOCKS
    kinds = decode(payloads[-1]).events
    stored = sum(isinstance(event, Stored) for event in kinds)
    print(
        f"ingestion: {best:,.0f} block events per second of one core (a batch: {stored} stores, {len(kinds) - stored} removals)"
    )


def request(repeats: int) -> None:
    """Render and walk a chat of 32 KB, all of it cached: for the first time, and when its stretches are remembered."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text = "".join(path.read_text() for path in sorted(DOCS.glob("*.md")))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=8000, special_tokens=special, show_progress=False)
    )
    codec = Codec(json.loads(tokenizer.to_str()))
    view = ModelView("bench", codec, Prompts(codec, ChatTemplate(CHAT_TEMPLATE, {}, now=datetime.now), {}))
    engine = Engine(view, 0, 1, 10**6, Counts(), can_replay=False)
    print(
        "| messages | body bytes | prompt tokens | blocks found | render us | first walk us | later us | both, first us | later us |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for count in (2, 8, 32, 128):
        size = 32_000 // count
        rng = random.Random(count)
        starts = [rng.randrange(len(text) - size) for _ in range(count)]
        messages = [
            {"role": ("user", "assistant")[number % 2], "content": text[start : start + size]}
            for number, start in enumerate(starts)
        ]
        body = json.dumps({"model": "bench", "messages": messages}, ensure_ascii=False).encode()
        prompt = view.prompt("chat", "bench", None, body)
        assert prompt is not None
        ids = tokenizer.encode(prompt.data.decode(), add_special_tokens=False).ids
        whole = len(ids) // BLOCK_TOKENS
        names: list[int | bytes] = [count << 32 | number for number in range(whole)]
        engine.cache.stored(Stored(names, None, ids[: whole * BLOCK_TOKENS], BLOCK_TOKENS), view.root, codec.table)
        view.block_sizes = [BLOCK_TOKENS]
        render = _microseconds(partial(view.prompt, "chat", "bench", None, body), repeats)
        first = _microseconds(partial(view.expected, prompt), repeats, before=view.planes[0].stretches.clear)
        later = _microseconds(partial(view.expected, prompt), repeats)
        found = view.expected(prompt).deepest_tokens // BLOCK_TOKENS
        figures = (render, first, later, render + first, render + later)
        row = " | ".join(f"{figure:.0f}" for figure in figures)
        print(f"| {count} | {len(body)} | {len(ids)} | {found} | {row} |")


def _microseconds(work: Any, repeats: int, before: Callable[[], object] = lambda: None) -> float:
    """Median; `before` each, not counted."""
    times = []
    for _ in range(repeats):
        before()
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2] * 1e6


# A fleet


def publish(pipe: Connection, engines: int, blocks_per_second: float, held_blocks: int, seconds: float) -> None:
    """The other process: publishers that keep their pace; says where they are, then how many batches they sent. Ends early
    where it is told to, or the other is gone (EOFError)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # terminals tell all processes; the other one tells this one
    context = zmq.Context()
    sockets = []
    for _ in range(engines):
        socket = context.socket(zmq.PUB)
        socket.setsockopt(zmq.SNDHWM, 2000)
        socket.bind("tcp://127.0.0.1:*")
        sockets.append(socket)
    pipe.send([socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in sockets])
    pipe.recv()
    steps = [Steps(number, held_blocks) for number in range(engines)]
    period = STEP_BLOCKS / blocks_per_second / engines
    started = last = time.monotonic()
    sent = 0
    while (now := time.monotonic()) - started < seconds and not pipe.poll():
        due = min(sent + int((now - last) / period), sent + MAX_BURST)  # out of breath: slower, not more at once
        last = now if due == sent + MAX_BURST else last + (due - sent) * period
        for turn in range(sent, due):
            step, number = divmod(turn, engines)
            sockets[number].send_multipart((b"", step.to_bytes(8, "big"), steps[number].batch(step)))
        sent = max(sent, due)
        time.sleep(0.002)
    pipe.send((sent, time.process_time()))
    while pipe.recv() != "done":
        pass
    context.destroy(linger=0)


@dataclass
class Reading:
    """What a row is made of: the state at its beginning, and how late the loop was since."""

    at: float
    cpu_s: float
    batches: int
    late_s: list[float]


class Table:
    def __init__(self, follower: Follower, dispatcher: Dispatcher) -> None:
        self._follower, self._dispatcher = follower, dispatcher
        self._first, self._last = self._reading(), self._reading()
        print(
            "| seconds | blocks/s | CPU | us a block | MiB | blocks held | late ms: median | 99 % | most | gaps | resets |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)

    def late(self, seconds: float) -> None:
        self._first.late_s.append(seconds)
        self._last.late_s.append(seconds)

    @property
    def row_age_s(self) -> float:
        return time.monotonic() - self._last.at

    def row(self) -> None:
        self._print(self._last, "")
        self._last = self._reading()

    def all(self) -> None:
        self._print(self._first, "all ")

    def _reading(self) -> Reading:
        return Reading(time.monotonic(), time.process_time(), self._follower.counts.batches, [])

    def _print(self, since: Reading, name: str) -> None:
        wall = time.monotonic() - since.at
        counts = self._follower.counts
        cpu = time.process_time() - since.cpu_s
        blocks = (counts.batches - since.batches) * STEP_BLOCKS
        late = sorted(since.late_s) or [0.0]
        workers = [worker.held for worker in self._dispatcher.workers() if worker.held]
        held = sum(len(engine.cache) for worker in workers for engine in worker.engines)
        print(
            f"| {name}{wall:.0f} | {blocks / wall:,.0f} | {cpu / wall:.0%} | {cpu / max(blocks, 1) * 1e6:.1f} "
            f"| {_resident_mib():.0f} | {held:,} | {late[len(late) // 2] * 1e3:.1f} | {late[int(len(late) * 0.99)] * 1e3:.1f} "
            f"| {late[-1] * 1e3:.0f} | {counts.gaps} | {counts.resets} |",
            flush=True,
        )


async def follow(pipe: Connection, urls: list[str], seconds: float, every_s: float, directory: Path) -> None:
    fleet = static_fleet([f"http://127.0.0.1:{10_000 + number}" for number in range(len(urls))], "kvfleet", "bench")
    (pool,) = fleet.pools
    endpoints = [end.model_copy(update={"kv_events_url": url}) for end, url in zip(pool.endpoints, urls, strict=True)]
    pool = pool.model_copy(update={"endpoints": endpoints, "tokenizer_path": str(directory)})
    fleet = fleet.model_copy(update={"pools": [pool]})
    dispatcher = Dispatcher(fleet, clock=time.monotonic, rng=random.Random(1), policies=REGISTRY)
    follower = Follower(dispatcher)
    follower.update()
    for _ in range(400):
        if all(worker.held is not None for worker in dispatcher.workers()):
            break
        await asyncio.sleep(0.05)
    await asyncio.sleep(1.0)  # subscriptions are on their way
    print(f"{len(urls)} publishers; {_resident_mib():.0f} MiB before the first event\n")
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    table = Table(follower, dispatcher)
    until = time.monotonic() + 2 * seconds + 30  # publishers that are kept from running take longer
    pipe.send("go")
    while not pipe.poll() and not stopped.is_set() and time.monotonic() < until:
        asked = time.perf_counter()
        await asyncio.sleep(0.01)
        table.late(time.perf_counter() - asked - 0.01)
        if table.row_age_s >= every_s:
            table.row()
    table.all()
    pipe.send("stop")
    sent, publisher_cpu = pipe.recv()
    counts = follower.counts
    taken_in_time = counts.batches
    for _ in range(200):
        if counts.batches == sent:
            break
        await asyncio.sleep(0.05)
    malformed = follower.malformed_frames + sum(view.malformed for view in follower.views())
    print(
        f"\nbatches: {sent:,} sent, {taken_in_time:,} taken in by then, {sent - counts.batches:,} lost, {malformed} malformed;"
        f" publishers' own CPU {publisher_cpu:.0f} s"
    )
    follower.close()
    pipe.send("done")


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1_048_576


def run_fleet(engines: int, blocks_per_second: float, held_blocks: int, seconds: float, every_s: float) -> None:
    import gc

    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    arguments = (theirs, engines, blocks_per_second, held_blocks, seconds)
    publisher = multiprocessing.get_context("spawn").Process(target=publish, args=arguments, daemon=True)
    publisher.start()
    theirs.close()
    try:
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "tokenizer.json").write_text(json.dumps(byte_level_document()))
            urls = ours.recv()
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)
            uvloop.run(follow(ours, urls, seconds, every_s, Path(directory)))
    finally:
        ours.close()
        publisher.join(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", type=int, default=0, help="publishers; 0: only what one core does")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--blocks-per-second", type=float, default=1200.0, help="of each publisher")
    parser.add_argument("--held-blocks", type=int, default=27_000, help="of each engine's cache")
    parser.add_argument("--every", type=float, default=30.0, help="seconds a row is about")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.fleet:
        run_fleet(options.fleet, options.blocks_per_second, options.held_blocks, options.seconds, options.every)
    else:
        ingest(options.repeats)
        request(options.repeats * 100)


if __name__ == "__main__":
    main()
