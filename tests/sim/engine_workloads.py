"""Small random workloads for the engine tests: few blocks, shared prefixes, so that everything that can happen does."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from kvfleet_api.cost import CostModel
from kvfleet_sim.engine import Engine
from kvfleet_sim.request import Request


def cost_model(**changes: float) -> CostModel:
    values: dict[str, float] = {
        "prefill_s_per_token": 4e-5,
        "prefill_s_per_token_pair": 1.3e-9,
        "step_s": 6.7e-3,
        "step_s_per_sequence": 8.9e-5,
        "step_s_per_context_token": 3.9e-8,
        "idle_watts": 115.0,
        "step_joules": 3.16,
        "token_joules": 0.067,
        "context_token_joules": 2e-5,
        "prefill_token_joules": 0.022,
        "kv_tokens": 4096,
        "max_step_tokens": 64,
        "max_sequences": 6,
    }
    return CostModel(**{**values, **changes})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Arrival:
    gap_s: float
    prompt_tokens: int
    output_tokens: int
    family: int
    """Requests of one family share as many blocks as both have."""
    priority: int
    lora: str | None
    keyed_output: bool
    remote: bool
    """Its prompt was computed by another engine."""
    abort_after: int | None
    """Aborted when so many further requests have arrived."""


@dataclass(frozen=True)
class Workload:
    block_tokens: int
    blocks: int
    by_priority: bool
    max_loras: int | None
    context_s: float
    arrivals: list[Arrival]

    def engine(self, *, record_events: bool = True) -> Engine:
        return Engine(
            cost_model(step_s_per_context_token=self.context_s),
            block_tokens=self.block_tokens,
            blocks=self.blocks,
            priority_scheduling=self.by_priority,
            max_loras=self.max_loras,
            record_events=record_events,
        )

    def request(self, number: int) -> Request:
        arrival = self.arrivals[number]
        tokens = arrival.prompt_tokens + (arrival.output_tokens if arrival.keyed_output else 0)
        keys = [arrival.family * 10_000 + index for index in range(tokens // self.block_tokens)]
        return Request(
            number,
            arrival.prompt_tokens,
            arrival.output_tokens,
            keys,
            priority=arrival.priority,
            lora=arrival.lora,
            remote_tokens=arrival.prompt_tokens if arrival.remote else 0,
        )


ARRIVALS = st.builds(
    Arrival,
    gap_s=st.sampled_from([0.0, 0.0, 0.004, 0.05, 1.0]),
    prompt_tokens=st.integers(1, 150),
    output_tokens=st.integers(1, 60),
    family=st.integers(0, 3),
    priority=st.integers(-2, 2),
    lora=st.sampled_from([None, None, "a", "b", "c"]),
    keyed_output=st.booleans(),
    remote=st.sampled_from([False, False, True]),
    abort_after=st.sampled_from([None, None, None, 0, 1, 3]),
)
WORKLOADS = st.builds(
    Workload,
    block_tokens=st.sampled_from([1, 4, 16]),
    blocks=st.integers(215, 260),
    by_priority=st.booleans(),
    max_loras=st.sampled_from([None, 1, 2]),
    context_s=st.sampled_from([0.0, 3.9e-8, 1e-5]),
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=14),
)
"""The longest request has 209 tokens: 215 blocks of one token hold it and not much more, of 16 tokens much more."""


def scarce(workload: Workload) -> Workload:
    """The same with about 220 tokens of KV cache, whatever the block size."""
    blocks = -(-220 // workload.block_tokens) + 1
    return Workload(
        workload.block_tokens,
        blocks,
        workload.by_priority,
        workload.max_loras,
        workload.context_s,
        workload.arrivals,
    )


SCARCE_WORKLOADS = st.one_of(WORKLOADS, WORKLOADS.map(scarce))
