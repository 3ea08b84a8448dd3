"""Time and energy of an engine's work, from the shared CostModel. Pure.

The meter counts work in whole numbers (steps, sequences, tokens, token pairs) and derives seconds and joules from the sums.
So nothing is lost or counted twice, and a run of decode steps taken at once ends at the very same float as the same steps
taken one by one.

    decode step, b sequences, c context tokens    W + H·b + C·c  seconds     E0 + E1·b + Ec·c  joules
    prefill chunk, u tokens ending at position L  Pp·u + Pq·u·(L − u/2)      ep·u, on top of the decode step
    step with prefill chunks only                 the chunks, but at least W and E0: the weights are read once anyhow
    nothing running                               idle watts

The first output token comes out of the last prefill chunk and costs nothing beyond it.
"""

from __future__ import annotations

from kvfleet_api.cost import CostModel


class WorkMeter:
    """Sums of the work done so far. `idle_s` is the time nothing ran."""

    __slots__ = (
        "context_tokens",
        "cost",
        "decode_steps",
        "decode_tokens",
        "floor_joules",
        "floor_s",
        "idle_s",
        "prefill_steps",
        "prefill_tokens",
        "prefill_twice_pairs",
    )

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self.decode_steps = 0
        self.decode_tokens = 0  # sum over steps of the sequences decoding
        self.context_tokens = 0  # sum over steps of the context they hold
        self.prefill_steps = 0  # steps with prefill chunks only
        self.prefill_tokens = 0
        self.prefill_twice_pairs = 0  # sum over chunks of L² − (L − u)², twice u·(L − u/2)
        self.floor_s = 0.0  # what prefill-only steps took beyond their chunks
        self.floor_joules = 0.0
        self.idle_s = 0.0

    def decode(self, steps: int, sequences: int, context_tokens: int) -> None:
        """`steps` decode steps over the same sequences, which hold `context_tokens` in the first of them."""
        self.decode_steps += steps
        self.decode_tokens += steps * sequences
        self.context_tokens += steps * context_tokens + sequences * (steps * (steps - 1) // 2)

    def prefill(self, tokens: int, end: int) -> None:
        """A chunk of `tokens` whose last one is at position `end` (1 for the first token of the prompt)."""
        self.prefill_tokens += tokens
        self.prefill_twice_pairs += end * end - (end - tokens) * (end - tokens)

    def prefill_only_step(self, chunks: list[tuple[int, int]]) -> None:
        """The (tokens, end) chunks just counted were all that their step did."""
        cost = self.cost
        self.prefill_steps += 1
        seconds = sum(cost.prefill_s(tokens, end) for tokens, end in chunks)
        joules = sum(cost.prefill_token_joules * tokens for tokens, _ in chunks)
        self.floor_s += max(0.0, cost.step_s - seconds)
        self.floor_joules += max(0.0, cost.step_joules - joules)

    def busy_s(self) -> float:
        """Seconds of all work so far."""
        return self.busy_s_after(0, 0, 0)

    def busy_s_after(self, steps: int, sequences: int, context_tokens: int) -> float:
        """`busy_s` as it would be after `decode(steps, sequences, context_tokens)`."""
        cost = self.cost
        context = self.context_tokens + steps * context_tokens + sequences * (steps * (steps - 1) // 2)
        return (
            cost.step_s * (self.decode_steps + steps)
            + cost.step_s_per_sequence * (self.decode_tokens + steps * sequences)
            + cost.step_s_per_context_token * context
            + cost.prefill_s_per_token * self.prefill_tokens
            + cost.prefill_s_per_token_pair * self.prefill_twice_pairs / 2
            + self.floor_s
        )

    def busy_joules(self) -> float:
        """Joules of all work so far, without idling."""
        cost = self.cost
        return (
            cost.step_joules * self.decode_steps
            + cost.token_joules * self.decode_tokens
            + cost.context_token_joules * self.context_tokens
            + cost.prefill_token_joules * self.prefill_tokens
            + self.floor_joules
        )

    def joules(self) -> float:
        """Joules of all work and idling so far."""
        return self.busy_joules() + self.cost.idle_watts * self.idle_s
