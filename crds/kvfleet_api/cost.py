"""What one worker costs in time and energy: the one model the router, the autoscaler and the simulator share.

A worker is one engine: one model, its tensor/pipeline-parallel GPUs taken together. All figures are per worker, SI units.

    time of a decode step with b sequences holding c context tokens:   W + H·b + C·c
    time of prefilling u tokens that end at position L:                Pp·u + Pq·u·(L − u/2)
    energy of a decode step:                                           E0 + b·E1 + c·Ec
    energy of prefilling u tokens:                                     ep·u
    power while nothing runs:                                          idle_watts

The linear step and energy models are fitted to measured rows (docs/accelerators.md says how well they fit).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CostModel:
    """Coefficients of one worker. Symbols in brackets are those of the module's formulas."""

    prefill_s_per_token: float  # [Pp] seconds per uncached prompt token
    prefill_s_per_token_pair: float  # [Pq] seconds per (uncached token x token of context before it): attention
    step_s: float  # [W] seconds per decode step, however many sequences
    step_s_per_sequence: float  # [H] seconds a sequence adds to a step
    step_s_per_context_token: float  # [C] seconds a token of context adds to a step
    idle_watts: float  # watts with the model loaded and nothing running, all GPUs of the worker
    step_joules: float  # [E0] joules per decode step
    token_joules: float  # [E1] joules per output token
    context_token_joules: float  # [Ec] joules per step and token of context
    prefill_token_joules: float  # [ep] joules per uncached prompt token
    kv_tokens: int  # tokens of KV cache the worker holds
    max_step_tokens: int = 8192  # token budget of an engine step (vLLM: --max-num-batched-tokens)
    max_sequences: int = 256  # sequences in a step (vLLM: --max-num-seqs)

    def prefill_s(self, uncached_tokens: float, prompt_tokens: float) -> float:
        """Seconds to prefill the last `uncached_tokens` of a prompt of `prompt_tokens`, alone on the worker."""
        context = prompt_tokens - uncached_tokens / 2
        return uncached_tokens * (self.prefill_s_per_token + self.prefill_s_per_token_pair * context)

    def decode_step_s(self, sequences: float, context_tokens: float) -> float:
        """Seconds of one decode step over `sequences` that together hold `context_tokens`."""
        return self.step_s + self.step_s_per_sequence * sequences + self.step_s_per_context_token * context_tokens

    def decode_step_joules(self, sequences: float, context_tokens: float) -> float:
        """Joules of one decode step over `sequences` that together hold `context_tokens`."""
        return self.step_joules + self.token_joules * sequences + self.context_token_joules * context_tokens
