"""Which pool of a model should carry the load: joules per token from the pools' cost models, and who gets how much.

    b*        sequences a worker is filled to: the least of max sequences, KV tokens / context, (ITL SLO − W)/slope and
              2·E0/E1 (fuller saves little)
    J/token   E0/b* + E1 + Ec·context + ep·uncached prompt tokens / output tokens

Pools that meet the ITL objective come first, then fewer joules per token, then the name. `share_demand` fills them in
that order. A pool is wanted for what better pools cannot carry even at their largest, and kept for what they cannot
carry with the workers they have ready: so a better pool takes over before the worse one is let go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvfleet_api.cost import CostModel


@dataclass(frozen=True, slots=True)
class RequestShape:
    """The mean request of a model."""

    uncached_prompt_tokens: float = 1500.0
    prompt_tokens: float = 2000.0
    output_tokens: float = 300.0

    @property
    def context_tokens(self) -> float:
        """Mean context of a sequence while it decodes."""
        return self.prompt_tokens + self.output_tokens / 2


@dataclass(frozen=True, slots=True)
class RankedPool:
    """A pool in its place among the pools of its model."""

    name: str
    sequences_per_worker: int
    joules_per_token: float
    meets_itl_slo: bool
    explanation: str


def rank_pools(costs: dict[str, CostModel], shape: RequestShape, itl_slo_s: float) -> list[RankedPool]:
    """Pools of one model, the one to fill first at the front."""
    ranked = [_ranked(name, cost, shape, itl_slo_s) for name, cost in costs.items()]
    return sorted(ranked, key=lambda pool: (not pool.meets_itl_slo, pool.joules_per_token, pool.name))


def _ranked(name: str, cost: CostModel, shape: RequestShape, itl_slo_s: float) -> RankedPool:
    sequences = pack_target(cost, shape, itl_slo_s)
    joules = joules_per_token(cost, shape, sequences)
    step_s = cost.decode_step_s(sequences, sequences * shape.context_tokens)
    meets = step_s <= itl_slo_s
    text = f"{joules:.3g} J/token with {sequences} sequences a worker"
    if not meets:
        text += f", but a step takes {step_s * 1000:.3g} ms, more than the SLO's {itl_slo_s * 1000:.3g} ms"
    return RankedPool(name, sequences, joules, meets, text)


def pack_target(cost: CostModel, shape: RequestShape, itl_slo_s: float) -> int:
    """[b*] Sequences a worker is filled to."""
    limits = [float(cost.max_sequences), cost.kv_tokens / max(shape.context_tokens, 1.0)]
    slope = cost.step_s_per_sequence + cost.step_s_per_context_token * shape.context_tokens
    if slope > 0:
        limits.append((itl_slo_s - cost.step_s) / slope)
    if cost.token_joules > 0 and cost.step_joules > 0:
        limits.append(2 * cost.step_joules / cost.token_joules)
    return max(1, int(min(limits)))


def joules_per_token(cost: CostModel, shape: RequestShape, sequences: int) -> float:
    """Joules an output token costs on a worker with so many sequences, its share of the prefill included."""
    decode = cost.decode_step_joules(sequences, sequences * shape.context_tokens) / sequences
    return decode + cost.prefill_token_joules * shape.uncached_prompt_tokens / max(shape.output_tokens, 1.0)


def watts_per_worker(cost: CostModel, shape: RequestShape, sequences: int) -> float:
    """What a worker filled to `sequences` draws."""
    context = sequences * shape.context_tokens
    step_s = cost.decode_step_s(sequences, context)
    drawn = cost.decode_step_joules(sequences, context) / step_s if step_s > 0 else 0.0
    return max(cost.idle_watts, drawn)


@dataclass(frozen=True, slots=True)
class PoolCapacity:
    """What a ranked pool can carry."""

    name: str
    sequences_per_worker: float
    ready: int
    max_replicas: int


def share_demand(demand_sequences: float, ranked: Sequence[PoolCapacity]) -> dict[str, float]:
    """The sequences each pool should be sized for, pools in the order of `rank_pools`.

    The last pool also gets what none can carry. The shares may sum to more than the demand while load moves.
    """
    wanted = kept = max(demand_sequences, 0.0)
    shares: dict[str, float] = {}
    for pool in ranked:
        most = pool.max_replicas * pool.sequences_per_worker
        carried = min(pool.ready, pool.max_replicas) * pool.sequences_per_worker
        shares[pool.name] = max(min(wanted, most), min(kept, carried))
        wanted = max(0.0, wanted - most)
        kept = max(0.0, kept - carried)
    if wanted and ranked:
        shares[ranked[-1].name] += wanted
    return shares
