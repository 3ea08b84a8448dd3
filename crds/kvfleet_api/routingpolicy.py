"""RoutingPolicy (`rp`): for which requests, to which pools, with which objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvfleet_api.common import Conditions, LenientSchema, ModelName, Name, Resource, Schema, ShortText
from kvfleet_api.constraints import UniqueBy, rule

Strategy = Annotated[
    str, Field(min_length=1, max_length=63, pattern=r"^[a-z][a-z0-9_]*$", examples=["kvfleet", "round_robin"])
]
"""`kvfleet`, or a baseline: round_robin, least_request, power_of_two, random, …"""


class HeaderMatch(Schema):
    name: Annotated[
        str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9!#$%&'*+.^_|~-]+$", examples=["x-tenant"])
    ]
    """Header name; case is ignored."""
    value: Annotated[str, Field(max_length=1024, examples=["batch"])]
    """Exact value."""


class TokenRange(Schema):
    min: Annotated[int, Field(ge=0, le=16_777_216)] = 0
    """Inclusive."""
    max: Annotated[int, Field(ge=1, le=16_777_216)] | None = None
    """Inclusive; none: no upper bound."""

    @rule(
        cel="!has(self.max) || self.min <= self.max",
        message="min ({min}) must not exceed max ({max}): swap them or widen the range",
        field="min",
    )
    def _ordered(self) -> bool:
        return self.max is None or self.min <= self.max


class MatchSpec(Schema):
    """All that is set must match; an empty match takes every request for the pools' models."""

    models: Annotated[list[ModelName], UniqueBy(), Field(max_length=256, examples=[["llama-8b"]])] = []
    """Model or adapter names; empty: the models of the policy's pools."""
    headers: Annotated[list[HeaderMatch], UniqueBy("name"), Field(max_length=16)] = []
    """Headers the request must carry."""
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


class DeferSpec(Schema):
    max_seconds: Annotated[int, Field(ge=1, le=86_400, examples=[7200])] = 3600
    """How long a request may be kept at most. A request asks for it by the header `x-kvfleet-defer-seconds`."""
    min_priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1, examples=[10])] | None = None
    """Requests of this `priority` and above (less urgent) may be kept without asking. None: only those that ask."""
    max_requests: Annotated[int, Field(ge=1, le=100_000)] = 256
    """Requests that a router process keeps; further ones are not kept."""


class EnergySpec(Schema):
    mode: Literal["Off", "Prefer", "Strict"] = "Off"
    """`Off`: latency alone. `Prefer`: fewest joules among the workers that meet the SLO. `Strict`: also refuse what exceeds maxWatts."""
    microseconds_per_joule: Annotated[int, Field(ge=0, le=1_000_000)] = 500
    """Price of a joule in microseconds of latency (mode Prefer and Strict)."""
    max_watts: Annotated[int, Field(ge=1, le=100_000_000, examples=[20000])] | None = None
    """Power budget of the policy's pools (mode Strict). ModelPools and the FleetRouter have budgets of their own, for every mode."""
    defer: DeferSpec | None = None
    """Requests may be kept for an hour of lower carbon intensity, or for a quiet one. None: all begin as soon as they can."""


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
    """How long a request may wait there; then it gets 503 with Retry-After."""


class ResilienceSpec(Schema):
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """Tries on other workers before the first byte of the answer."""
    retry_budget_percent: Annotated[int, Field(ge=0, le=1000)] = 100
    """Tries on other workers, hedges included, as a share of the requests of the last minute; 100 of them are free. Beyond it
    failures are not retried."""
    eject_at_failure_percent: Annotated[int, Field(ge=1, le=100)] = 50
    """A worker that fails this share of its latest requests (ten or so) gets none for a while, unless half of its pool is
    out already. Three failures in a row have the same effect in any case."""
    probe_path: Annotated[str, Field(pattern=r"^(/[!-~]*)?$", max_length=256)] = "/health"
    """Where an ejected worker is asked whether it is well, before a request is risked on it; empty: a request is the trial."""
    hedge_after_milliseconds: Annotated[int, Field(ge=1, le=3_600_000, examples=[2000])] | None = None
    """A second try on another worker where no byte has come after so long; the first to answer wins, the other is
    cancelled. Default: none."""
    connect_timeout_milliseconds: Annotated[int, Field(ge=1, le=600_000)] = 2000
    """How long a worker may take to accept a connection."""
    first_byte_timeout_seconds: Annotated[int, Field(ge=1, le=86400, examples=[30])] | None = None
    """Streams: longest wait for the first byte, then another worker is tried. Default: `timeoutSeconds`, and no other try."""
    timeout_seconds: Annotated[int, Field(ge=1, le=86400)] = 600
    """Longest wait for the first byte of an answer, and between two of its bytes."""
    resume: bool = False
    """Continue a broken text stream on another worker with what was already sent."""


class DisaggregationSpec(Schema):
    min_uncached_tokens: Annotated[int, Field(ge=1, le=16_777_216)] = 2048
    """Prompts with at least so many tokens to compute go to a Prefill worker first; shorter ones are computed where they decode."""


class RoutingPolicySpec(Schema):
    match: Annotated[MatchSpec, Field(default_factory=MatchSpec)]
    """Which requests the policy is for."""
    pools: Annotated[list[PoolRef], UniqueBy("name"), Field(min_length=1, max_length=64)]
    """Where they may go."""
    strategy: Strategy = "kvfleet"
    """How a worker is chosen: `kvfleet`, or a baseline: round_robin, least_request, power_of_two, random, …"""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Where several policies match a request, the highest wins; then the more specific match; then the older object."""
    slo: Annotated[SLOSpec, Field(default_factory=SLOSpec)]
    """The latency to be met."""
    energy: Annotated[EnergySpec, Field(default_factory=EnergySpec)]
    """Whether and how joules count."""
    prefix: Annotated[PrefixSpec, Field(default_factory=PrefixSpec)]
    """Use of the engines' prefix caches."""
    disaggregation: Annotated[DisaggregationSpec, Field(default_factory=DisaggregationSpec)]
    """When prompts are computed apart, where the pools have the roles Prefill and Decode."""
    admission: Annotated[AdmissionSpec, Field(default_factory=AdmissionSpec)]
    """How many requests may run and wait."""
    resilience: Annotated[ResilienceSpec, Field(default_factory=ResilienceSpec)]
    """What happens when a worker fails or is slow."""


class ProgrammedRouter(LenientSchema):
    pod: ShortText
    """The router replica."""
    revision: ShortText
    """The configuration it serves with."""


class RoutingPolicyStatus(LenientSchema):
    observed_generation: int | None = None
    """The generation of the spec that this status speaks about."""
    conditions: Conditions = []
    """Ready, Accepted, ResolvedRefs, Conflicted, Programmed, CacheKnown."""
    programmed_by: Annotated[list[ProgrammedRouter], UniqueBy("pod"), Field(max_length=1000)] = []
    """Router replicas that serve with this policy."""


class RoutingPolicy(Resource):
    kind: Literal["RoutingPolicy"] = "RoutingPolicy"
    spec: RoutingPolicySpec
    status: RoutingPolicyStatus | None = None
