"""A small fleet under a clock that only the test moves."""

import random
from dataclasses import replace

from kvfleet_api.cost import CostModel
from kvfleet_api.fleetconfig import Endpoint, FleetConfig, PolicyConfig, PoolConfig, WeightedPool
from kvfleet_router.core.dispatcher import Dispatcher, Held, Refusal, Ticket
from kvfleet_router.core.parse import ParsedRequest
from kvfleet_router.policies import REGISTRY

COST = CostModel(
    prefill_s_per_token=40e-6,
    prefill_s_per_token_pair=1e-9,
    step_s=7e-3,
    step_s_per_sequence=90e-6,
    step_s_per_context_token=4e-8,
    idle_watts=115.0,
    step_joules=3.2,
    token_joules=0.067,
    context_token_joules=1e-6,
    prefill_token_joules=0.022,
    kv_tokens=400_000,
)


def cost(**changes):
    return replace(COST, **changes)


def endpoints(count, pool="pool"):
    return [Endpoint(name=f"{pool}-{n}", url=f"http://127.0.0.1:{8000 + n}") for n in range(count)]


def pool(name="pool", workers=2, model="m", **fields):
    return PoolConfig(name=name, model=model, **{"cost": COST, "endpoints": endpoints(workers, name), **fields})


def policy(name="policy", models=("m",), pools=("pool",), strategy="kvfleet", **fields):
    refs = [ref if isinstance(ref, WeightedPool) else WeightedPool(name=ref) for ref in pools]
    return PolicyConfig(name=name, models=list(models), pools=refs, strategy=strategy, **fields)


def config(*policies, pools=None, workers=2, **fields):
    """One pool of `workers` and a kvfleet policy over it, unless told otherwise."""
    return FleetConfig(pools=pools or [pool(workers=workers)], policies=list(policies) or [policy(**fields)])


def request(tokens=1000, *, model="m", prefix=0, tail=None, stream=True, **fields):
    """A request of `tokens`; equal (prefix, tail) are equal prompts, equal prefix an equal first half."""
    blocks = tokens * 4 // 256
    hashes = [hash((prefix, n)) % 2**64 for n in range(blocks // 2)] + [
        hash((prefix, tail, n)) % 2**64 for n in range(blocks // 2, blocks)
    ]
    return ParsedRequest(
        "chat", model, stream=stream, prompt_bytes=tokens * 4, prompt_tokens=tokens, block_hashes=hashes, **fields
    )


class Fleet:
    """A Dispatcher, its clock, and what came back."""

    def __init__(self, fleet_config=None, *, seed=1, **fields):
        self.now = 100.0
        self.called_back = []
        self.dispatcher = Dispatcher(
            fleet_config or config(**fields),
            clock=lambda: self.now,
            rng=random.Random(seed),
            policies=REGISTRY,
            max_decisions=64,
        )
        self.count = 0

    def submit(self, parsed=None, **fields):
        self.count += 1
        parsed = parsed or request(tail=self.count, **fields)
        return self.dispatcher.submit(parsed, request_id=f"r{self.count}", on_assigned=self.called_back.append)

    def sent(self, parsed=None, **fields):
        result = self.submit(parsed, **fields)
        assert isinstance(result, Ticket), result
        return result

    def held(self, parsed=None, **fields):
        result = self.submit(parsed, **fields)
        assert isinstance(result, Held), result
        return result

    def refused(self, parsed=None, **fields):
        result = self.submit(parsed, **fields)
        assert isinstance(result, Refusal), result
        return result

    def answer(self, ticket, *, ttft=0.05, seconds=0.5, output_tokens=50, **reported):
        """The whole life of an answer."""
        self.now += ttft
        self.dispatcher.first_token(ticket)
        self.now += seconds
        self.dispatcher.finish(ticket, output_tokens=output_tokens, **reported)

    def retry(self, ticket, cause="connect"):
        return self.dispatcher.retry(ticket, cause, self.called_back.append)

    def worker(self, name):
        return next(worker for worker in self.dispatcher.workers() if worker.name == name)

    def assert_idle(self):
        """Every worker's accounting is at zero, exactly."""
        for worker in self.dispatcher.workers():
            assert (worker.in_flight, worker.pending, worker.decoding) == (0, 0, 0)
            assert (worker.backlog_s, worker.pending_uncached_tokens, worker.context_tokens) == (0.0, 0.0, 0.0)
            assert worker.kv_used_tokens == 0.0
            assert worker.cache.pinned_blocks == 0
