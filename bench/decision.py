"""What one routing decision costs: CPU time of parse, hash, look-up, score and the whole, and the memory of the index.

    python bench/decision.py                       the table of docs/routing.md
    python bench/decision.py --workers 8 --prompt-bytes 1024 --repeats 2000
    python bench/decision.py --memory              bytes per indexed block; flat beyond the caches' capacity

CPU time of this process (`time.process_time_ns`), each step by itself, minimum and median over the repeats. `choose` is the
decision proper: look-up, score of every candidate, pick. `submit` is all the router does before it sends: hash, choose,
account, record; `events` its work for first token and end. Requests are chat bodies of which the first half is one of 64 shared beginnings and the rest is new; 3 requests per worker are in flight
all along, so every worker has load, and every cache is filled before the measurement begins.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import random
import statistics
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import orjson

from kvfleet_api.cost import CostModel
from kvfleet_api.fleetconfig import Endpoint, FleetConfig, PolicyConfig, PoolConfig, WeightedPool
from kvfleet_router.core.choose import choose
from kvfleet_router.core.dispatcher import Dispatcher, Ticket
from kvfleet_router.core.hashing import block_hashes, seed_of
from kvfleet_router.core.index import PrefixIndex
from kvfleet_router.core.parse import read_request
from kvfleet_router.policies import REGISTRY

PATH = "/v1/chat/completions"
HEADERS = {b"content-type": b"application/json"}
COST = CostModel(
    prefill_s_per_token=40e-6,
    prefill_s_per_token_pair=1.2e-9,
    step_s=6.7e-3,
    step_s_per_sequence=89e-6,
    step_s_per_context_token=4e-8,
    idle_watts=115.0,
    step_joules=3.16,
    token_joules=0.067,
    context_token_joules=1e-6,
    prefill_token_joules=0.022,
    kv_tokens=430_000,
)
BLOCK_BYTES = 256
STEPS = ("parse", "hash", "look-up", "choose", "submit", "events", "total")


def config(workers: int, strategy: str) -> FleetConfig:
    endpoints = [Endpoint(name=f"worker-{n}", url=f"http://10.0.{n // 250}.{n % 250 + 1}:8000") for n in range(workers)]
    return FleetConfig(
        pools=[PoolConfig(name="pool", model="model", cost=COST, endpoints=endpoints)],
        policies=[PolicyConfig(name="policy", models=["model"], pools=[WeightedPool(name="pool")], strategy=strategy)],
    )


class Bench:
    """A dispatcher under load, and requests to decide."""

    def __init__(self, workers: int, prompt_bytes: int, strategy: str) -> None:
        self.now = 0.0
        self.rng = random.Random(7)
        self.prompt_bytes = prompt_bytes
        self.shared = [self.text(prompt_bytes // 2) for _ in range(64)]
        self.dispatcher = Dispatcher(config(workers, strategy), clock=lambda: self.now, rng=self.rng, policies=REGISTRY)
        self.in_flight: deque[Ticket] = deque()
        self.wanted = 3 * workers
        for worker in self.dispatcher.workers():
            worker.cache.store([self.rng.getrandbits(64) for _ in range(worker.cache.capacity_blocks)], 0.0)
        for _ in range(self.wanted):
            self.submit(self.body())

    def text(self, size: int) -> str:
        return self.rng.randbytes(size // 2 + 1).hex()[:size]

    def body(self) -> bytes:
        messages = [
            {"role": "system", "content": self.rng.choice(self.shared)},
            {"role": "user", "content": self.text(self.prompt_bytes // 2)},
        ]
        return orjson.dumps(
            {"model": "model", "stream": True, "max_tokens": 200, "temperature": 0.7, "messages": messages}
        )

    def submit(self, body: bytes) -> None:
        """Late binding is left out: with a clock that stands still every queue would fill."""
        request = read_request(PATH, body, HEADERS)
        while True:
            ticket = self.dispatcher.submit(request, request_id="bench", on_assigned=self.dropped)
            if isinstance(ticket, Ticket):
                self.in_flight.append(ticket)
                return
            self.dispatcher.cancel(ticket)  # type: ignore[arg-type]  # held: let time pass until there is room
            self.now += 0.05
            self.end_oldest()

    def end_oldest(self) -> None:
        ticket = self.in_flight.popleft()
        self.dispatcher.first_token(ticket)
        self.dispatcher.finish(ticket, output_tokens=200, prompt_tokens=self.prompt_bytes // 4)

    def measure(self, repeats: int) -> dict[str, list[float]]:
        spent: dict[str, list[float]] = {step: [] for step in STEPS}
        dispatcher, rng = self.dispatcher, self.rng
        index, table = dispatcher._fleet.index, dispatcher._fleet.table
        lane = dispatcher._routes._lanes["model"][0]
        seed = seed_of("model", None, BLOCK_BYTES)
        for _ in range(repeats):
            body = self.body()
            self.now += 0.05
            while len(self.in_flight) >= self.wanted:
                self.end_oldest()
            request = _timed(spent["parse"], partial(read_request, PATH, body, HEADERS))
            blocks = _timed(spent["hash"], partial(block_hashes, request.prompt, seed=seed, block_bytes=BLOCK_BYTES))
            _timed(spent["look-up"], partial(index.match, blocks))
            arrival = dispatcher._arrival(request, "bench", lane, self.now)
            candidates = lane.candidates(arrival, rng)
            assert candidates is not None
            _timed(spent["choose"], partial(choose, arrival, candidates, index, table, rng, self.now))
            request = read_request(PATH, body, HEADERS)
            result = _timed(
                spent["submit"], partial(dispatcher.submit, request, request_id="bench", on_assigned=self.dropped)
            )
            if isinstance(result, Ticket):
                spent["total"].append(spent["parse"][-1] + spent["submit"][-1])
                self.in_flight.append(result)
                _timed(spent["events"], self.end_oldest)
            else:
                dispatcher.cancel(result)
                spent["submit"].pop()
        return spent

    @staticmethod
    def dropped(_: object) -> None:
        """Held requests are cancelled before they could be called back."""


def _timed(into: list[float], call: Callable[[], Any]) -> Any:
    begin = time.process_time_ns()
    result = call()
    into.append((time.process_time_ns() - begin) / 1000)
    return result


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(workers: int, distinct_blocks: int) -> None:
    """Fill the index with ever new prompts of 128 blocks; print its size while it grows and after it is full."""
    rng = random.Random(3)
    gc.collect()
    index = PrefixIndex()
    capacity = int(COST.kv_tokens * 4 / 256)
    caches = [index.add_worker(capacity) for _ in range(workers)]
    before, stored = rss_bytes(), 0
    print(f"\nindex of {workers} workers x {capacity} blocks")
    print("| distinct blocks stored | in the index | bytes per block held | MiB |\n| --- | --- | --- | --- |")
    for share in (0.05, 0.1, 0.25, 0.5, 0.75, 1.0):
        while stored < distinct_blocks * share:
            caches[stored // 128 % workers].store([rng.getrandbits(64) for _ in range(128)], float(stored))
            stored += 128
        gc.collect()
        grown = rss_bytes() - before
        print(f"| {stored} | {len(index)} | {grown / max(len(index), 1):.0f} | {grown / 2**20:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--prompt-bytes", type=int, nargs="+", default=[1024, 32768, 400_000])
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--strategy", choices=sorted(REGISTRY), default="kvfleet")
    parser.add_argument("--memory", action="store_true", help="measure the index's memory instead")
    parser.add_argument("--distinct-blocks", type=int, default=2_000_000, help="with --memory")
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, {platform.machine()}; strategy {arguments.strategy}")
    if arguments.memory:
        for workers in arguments.workers:  # a process each: memory freed by one would hide what the next one takes
            process = get_context("spawn").Process(target=memory, args=(workers, arguments.distinct_blocks))
            process.start()
            process.join()
        return
    print(f"CPU microseconds, minimum / median of {arguments.repeats}\n")
    print(f"| workers | prompt | {' | '.join(STEPS)} |\n| --- | --- |{' --- |' * len(STEPS)}")
    for workers in arguments.workers:
        for size in arguments.prompt_bytes:
            spent = Bench(workers, size, arguments.strategy).measure(arguments.repeats)
            cells = [f"{min(spent[step]):.0f} / {statistics.median(spent[step]):.0f}" for step in STEPS]
            print(f"| {workers} | {size} B | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
