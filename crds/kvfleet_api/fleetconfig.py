"""FleetConfig: what a router loads. Compiled from the four kinds (`compile.py`), written by the operator into a ConfigMap
as JSON, or built in memory by `kvfleet router -f DIR` and `kvfleet router --workers URL,…`.

Everything is resolved: no references, no defaults to look up, SI units.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import Field

from kvfleet_api.common import Schema
from kvfleet_api.cost import CostModel
from kvfleet_api.fleetrouter import LimitsSpec, TelemetrySpec
from kvfleet_api.routingpolicy import (
    AdmissionSpec,
    DeferSpec,
    DisaggregationSpec,
    HeaderMatch,
    PrefixSpec,
    ResilienceSpec,
    TokenRange,
)

FLEET_CONFIG_KEY = "fleet.json"
"""The key of the ConfigMap, and the file name."""
DRAINING_ANNOTATION = "kvfleet.io/draining"
"""Of the ConfigMap: which workers the autoscaler is about to take away, as JSON: pool → `until` (Unix seconds) and `workers`."""


class Endpoint(Schema):
    """One worker's address. In a cluster these come from EndpointSlices; on a laptop they are listed in the pool."""

    name: str
    """Unique in the fleet: the pod's name, or host:port."""
    url: str
    """`http://host:port` or `https://host:port`, no path."""
    kv_events_url: str | None = None
    """`tcp://host:port` of the engine's KV-event publisher."""
    kv_replay_url: str | None = None


class WorkerTLS(Schema):
    """How workers prove who they are, and routers to them. Paths are as the router sees them."""

    server_name: str
    ca_path: str | None = None
    """PEM file of the authorities to trust; none: those the system trusts."""
    ca_config_map: str | None = None
    """The ConfigMap that a router in a cluster has mounted there."""
    client_certificate_path: str | None = None
    """Directory with `tls.crt` and `tls.key`; none: routers show no certificate."""
    client_certificate_secret: str | None = None
    """The Secret that a router in a cluster has mounted there."""


class PoolConfig(Schema):
    name: str
    namespace: str = "default"
    model: str
    """The name clients send."""
    adapters: list[str] = []
    role: Literal["Unified", "Prefill", "Decode"] = "Unified"
    accelerator: str = ""
    """Name of the AcceleratorProfile; empty: unknown."""
    gpus_per_worker: int = 1
    cost: CostModel
    max_watts: float | None = None
    block_tokens: int = 16
    max_context_tokens: int | None = None
    service: str | None = None
    """Headless Service whose EndpointSlices list the workers."""
    port: int = 8000
    tls: WorkerTLS | None = None
    """The workers of `service` are spoken to by HTTPS. None: by HTTP."""
    kv_events_port: int | None = None
    kv_replay_port: int | None = None
    data_parallel: int = 1
    """Engines behind one worker's address, each with a cache of its own; their KV-event ports follow one another."""
    tokenizer_path: str | None = None
    """Directory, as the router sees it, with the model's tokenizer and chat template; none: cached prefixes are guessed."""
    tokenizer_config_map: str | None = None
    """The ConfigMap that a router in a cluster has mounted there."""
    endpoints: list[Endpoint] = []
    """Static workers, used instead of `service` when not empty."""
    scales_to_zero: bool = False
    wake_target: str | None = None
    """`deployments/NAME` or `leaderworkersets/NAME`: what a router scales to 1 when requests wait for the pool at zero."""


class WeightedPool(Schema):
    name: str
    weight: int = 100
    tier: int = 0


class PolicyConfig(Schema):
    """One RoutingPolicy, resolved. The list in FleetConfig is ordered: the first that matches a request wins."""

    name: str
    namespace: str = "default"
    generation: int = 0
    models: list[str]
    """Every model and adapter name it takes."""
    headers: list[HeaderMatch] = []
    context_tokens: TokenRange | None = None
    priority: TokenRange | None = None
    pools: list[WeightedPool]
    strategy: str = "kvfleet"
    ttft_slo_s: float = 1.0
    itl_slo_s: float = 0.05
    energy_mode: Literal["Off", "Prefer", "Strict"] = "Off"
    energy_s_per_joule: float = 0.0005
    max_watts: float | None = None
    defer: DeferSpec | None = None
    prefix: PrefixSpec = Field(default_factory=PrefixSpec)
    disaggregation: DisaggregationSpec = Field(default_factory=DisaggregationSpec)
    admission: AdmissionSpec = Field(default_factory=AdmissionSpec)
    resilience: ResilienceSpec = Field(default_factory=ResilienceSpec)

    @property
    def revision(self) -> str:
        """12 hex digits naming this very policy, its generation included."""
        return _digest(_canonical(self))


class FleetConfig(Schema):
    name: str = "local"
    """The FleetRouter."""
    namespace: str = "default"
    pools: list[PoolConfig]
    policies: list[PolicyConfig]
    limits: LimitsSpec = Field(default_factory=LimitsSpec)
    routers: int = 1
    """Router processes of the fleet, this one included: what a router knows it does not know while it hears from fewer."""
    max_watts: float | None = None
    telemetry: TelemetrySpec | None = None
    drain_s: float = 120.0

    def to_json(self) -> str:
        """Canonical JSON: equal configurations give equal text."""
        return _canonical(self)

    @property
    def revision(self) -> str:
        """12 hex digits naming this very configuration; routers report the one they serve with."""
        return _digest(self.to_json())


def _canonical(value: Schema) -> str:
    return json.dumps(value.model_dump(mode="json", by_alias=True), sort_keys=True, indent=1)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
