"""RoutingPolicy (`rp`): for which requests, to which pools, with which objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kvfleet_api.common import Condition, LenientSchema, ModelName, Name, Resource, Schema

Strategy = Annotated[
    str, Field(min_length=1, max_length=63, pattern=r"^[a-z][a-z0-9_]*$", examples=["kvfleet", "round_robin"])
]
"""`kvfleet`, or a baseline: round_robin, least_request, power_of_two, random, …"""


class HeaderMatch(Schema):
    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9!#$%&'*+.^_|~-]+$")]
    value: Annotated[str, Field(max_length=1024)]
    """Exact value."""


class TokenRange(Schema):
    min: Annotated[int, Field(ge=0, le=16_777_216)] = 0
    max: Annotated[int, Field(ge=1, le=16_777_216)] | None = None
    """Inclusive; none: no upper bound."""

    @model_validator(mode="after")
    def _ordered(self) -> TokenRange:
        if self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) must not exceed max ({self.max}): swap them or widen the range")
        return self


class MatchSpec(Schema):
    """All that is set must match; an empty match takes every request for the pools' models."""

    models: Annotated[list[ModelName], Field(max_length=256)] = []
    """Model or adapter names; empty: the models of the policy's pools."""
    headers: Annotated[list[HeaderMatch], Field(max_length=16)] = []
    context_tokens: TokenRange | None = None
    """Estimated prompt tokens."""
    priority: TokenRange | None = None
    """Value of the request's `priority` field (0 when absent; lower is more urgent, as in vLLM)."""


class PoolRef(Schema):
    name: Name
    """A ModelPool of the same namespace."""
    weight: Annotated[int, Field(ge=0, le=1_000_000)] = 100
    """Share of traffic relative to the other pools of the tier, for strategies that do not measure cost. 0: none."""
    tier: Annotated[int, Field(ge=0, le=100)] = 0
    """Pools of the lowest tier with a usable worker are used; higher tiers are for overflow."""


class SLOSpec(Schema):
    ttft_milliseconds: Annotated[int, Field(ge=1, le=3_600_000, alias="ttftMilliseconds")] = 1000
    """Time to first token to be met."""
    itl_milliseconds: Annotated[int, Field(ge=1, le=60_000, alias="itlMilliseconds")] = 50
    """Mean time between tokens to be met."""


class EnergySpec(Schema):
    mode: Literal["Off", "Prefer", "Strict"] = "Off"
    """`Off`: latency alone. `Prefer`: fewest joules among the workers that meet the SLO. `Strict`: also refuse what exceeds maxWatts."""
    microseconds_per_joule: Annotated[int, Field(ge=0, le=1_000_000)] = 200
    """Price of a joule in microseconds of latency (mode Prefer and Strict)."""
    max_watts: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Power budget of the policy's pools."""


class PrefixSpec(Schema):
    enabled: bool = True
    """Prefer workers whose cache holds the prompt's beginning."""
    source: Literal["Auto", "Approximate", "Events"] = "Auto"
    """`Events`: what the engines publish; `Approximate`: what was routed where; `Auto`: events where they arrive, else approximate."""
    block_bytes: Annotated[int, Field(ge=64, le=65536)] = 256
    """Granularity of the index."""


class AdmissionSpec(Schema):
    max_in_flight_per_worker: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Requests a worker may hold. Default: no limit."""
    max_queue: Annotated[int, Field(ge=0, le=1_000_000)] = 1024
    """Requests that may wait at the router; further ones get 429 with Retry-After."""
    queue_timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = 60


class ResilienceSpec(Schema):
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """Tries on other workers before the first byte of the answer."""
    connect_timeout_milliseconds: Annotated[int, Field(ge=1, le=600_000)] = 2000
    timeout_seconds: Annotated[int, Field(ge=1, le=86400)] = 600
    """Longest wait for the first byte of an answer, and between two of its bytes."""
    resume: bool = False
    """Continue a broken text stream on another worker with what was already sent."""


class RoutingPolicySpec(Schema):
    match: Annotated[MatchSpec, Field(default_factory=MatchSpec)]
    pools: Annotated[list[PoolRef], Field(min_length=1, max_length=64)]
    strategy: Strategy = "kvfleet"
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Where several policies match a request, the highest wins; then the more specific match; then the older object."""
    slo: Annotated[SLOSpec, Field(default_factory=SLOSpec)]
    energy: Annotated[EnergySpec, Field(default_factory=EnergySpec)]
    prefix: Annotated[PrefixSpec, Field(default_factory=PrefixSpec)]
    admission: Annotated[AdmissionSpec, Field(default_factory=AdmissionSpec)]
    resilience: Annotated[ResilienceSpec, Field(default_factory=ResilienceSpec)]

    @model_validator(mode="after")
    def _pools_once(self) -> RoutingPolicySpec:
        names = [pool.name for pool in self.pools]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"pools: {', '.join(repeated)} named more than once: keep one entry per pool")
        return self


class ProgrammedRouter(LenientSchema):
    pod: str
    """The router replica."""
    revision: str
    """The configuration it serves with."""


class RoutingPolicyStatus(LenientSchema):
    observed_generation: int | None = None
    conditions: list[Condition] = []
    """Accepted, ResolvedRefs, Conflicted, Programmed, Ready."""
    programmed_by: list[ProgrammedRouter] = []


class RoutingPolicy(Resource):
    kind: Literal["RoutingPolicy"] = "RoutingPolicy"
    spec: RoutingPolicySpec
    status: RoutingPolicyStatus | None = None
