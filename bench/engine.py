"""How fast the simulated engine is: an hour of a conversation-like load on a fleet of engines, in virtual time.

    python bench/engine.py [--engines 32] [--hours 1] [--block-tokens 16] [--single-steps]

Requests: 3.1/s in all by default, prompts of about 13,000 tokens that grow turn by turn within a session (so about a third
of each is cached), outputs of about 350 tokens. Sessions stick to an engine. Prints CPU time, steps/s and requests/s.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator

from kvfleet_api.cost import CostModel
from kvfleet_sim.engine import Engine
from kvfleet_sim.request import Request, StepResult

LLAMA_8B_H100 = CostModel(
    prefill_s_per_token=4e-5,
    prefill_s_per_token_pair=1.3e-9,
    step_s=6.7e-3,
    step_s_per_sequence=8.9e-5,
    step_s_per_context_token=3.9e-8,
    idle_watts=115.0,
    step_joules=3.16,
    token_joules=0.067,
    context_token_joules=2e-5,
    prefill_token_joules=0.022,
    kv_tokens=430_000,
)


def workload(rate_rps: float, seconds: float, block_tokens: int, seed: int) -> Iterator[tuple[float, int, Request]]:
    """(arrival, session, request), in order of arrival."""
    draw = random.Random(seed)
    next_key = 0
    sessions: dict[int, tuple[int, list[int]]] = {}
    now_s = 0.0
    number = 0
    while now_s < seconds:
        now_s += draw.expovariate(rate_rps)
        # Two of three requests open a session; the others continue one of the last 64.
        session = number if draw.random() < 0.66 or not sessions else draw.choice(list(sessions)[-64:])
        tokens, keys = sessions.get(session, (0, []))
        tokens += int(draw.lognormvariate(9.0, 0.8))
        tokens = min(tokens, 120_000)
        missing = tokens // block_tokens - len(keys)
        if missing > 0:
            keys = keys + list(range(next_key, next_key + missing))
            next_key += missing
        sessions[session] = (tokens, keys)
        if len(sessions) > 4096:
            del sessions[next(iter(sessions))]
        output = min(2000, 1 + int(draw.expovariate(1 / 350)))
        yield now_s, session, Request(number, tokens, output, keys)
        number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=32)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=3.1, help="requests per second, all engines together")
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--single-steps", action="store_true", help="without taking decode steps together")
    args = parser.parse_args()

    engines = [Engine(LLAMA_8B_H100, block_tokens=args.block_tokens) for _ in range(args.engines)]
    requests = list(workload(args.rate, args.hours * 3600, args.block_tokens, seed=1))
    finished = 0
    calls = 0
    started = time.process_time()
    for now_s, session, request in requests:
        for engine in engines:
            finished += ended(engine, now_s, single=args.single_steps)
        calls += len(engines)
        engines[session % len(engines)].submit(request, now_s)
    for engine in engines:
        finished += ended(engine, float("inf"), single=args.single_steps)
    cpu_s = time.process_time() - started

    steps = sum(engine.meter.decode_steps + engine.meter.prefill_steps for engine in engines)
    stats = [engine.stats for engine in engines]
    tokens = sum(stat.generation_tokens for stat in stats)
    queries = sum(stat.prefix_queries for stat in stats)
    print(f"{len(requests)} requests, {args.engines} engines, blocks of {args.block_tokens} tokens")
    print(
        f"prompt {queries / len(requests):.0f} tokens, {sum(s.prefix_hits for s in stats) / queries:.0%} of them cached"
    )
    print(f"output {tokens / finished:.0f} tokens, {sum(s.preemptions for s in stats)} preemptions")
    print(f"virtual {max(engine.clock_s for engine in engines):.0f} s in {cpu_s:.1f} s of one core")
    print(f"{steps / cpu_s:,.0f} steps/s  {finished / cpu_s:,.0f} requests/s  {tokens / cpu_s:,.0f} tokens/s")


def ended(engine: Engine, until_s: float, *, single: bool) -> int:
    """Run an engine up to a time; how many requests it finished."""
    if not single:
        return sum(len(result.finished) for result in engine.advance(until_s))
    count = 0
    while engine.has_work and engine.clock_s < until_s:
        result: StepResult | None = engine.step(engine.clock_s)
        count += len(result.finished) if result else 0
    return count


if __name__ == "__main__":
    main()
