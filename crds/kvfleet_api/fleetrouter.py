"""FleetRouter (`fr`): the router's deployment. It serves every ModelPool and RoutingPolicy of its namespace."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kvfleet_api.common import Condition, LenientSchema, Name, PodTemplate, Resource, Schema

DEFAULT_ROUTER_IMAGE = "ghcr.io/kvfleet/kvfleet:0.1.0"


class ServiceSpec(Schema):
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    port: Annotated[int, Field(ge=1, le=65535)] = 80
    annotations: dict[str, str] = {}


class SecretKeyRef(Schema):
    name: Name
    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]


class AuthSpec(Schema):
    api_keys_secret_ref: SecretKeyRef | None = None
    """Secret whose key holds hashed API keys. None: no authentication."""


class TLSSpec(Schema):
    secret_ref: Name
    """Secret of type kubernetes.io/tls with the certificate clients see."""


class RedisSpec(Schema):
    url: Annotated[
        str,
        Field(min_length=1, max_length=1024, pattern=r"^(redis|rediss|unix)://.+$", examples=["redis://redis:6379/0"]),
    ]
    """Shared state between router replicas: loads within 10 ms, learned prefixes within 100 ms."""


class LimitsSpec(Schema):
    max_body_bytes: Annotated[int, Field(ge=1024, le=1_073_741_824)] = 33_554_432
    """Largest request body; more gets 413."""
    max_header_bytes: Annotated[int, Field(ge=1024, le=1_048_576)] = 65_536
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 16_384


class FleetRouterSpec(Schema):
    replicas: Annotated[int, Field(ge=0, le=1000)] = 2
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """Router processes per pod, sharing one port."""
    image: Annotated[str, Field(min_length=1, max_length=512)] = DEFAULT_ROUTER_IMAGE
    port: Annotated[int, Field(ge=1, le=65535)] = 8080
    admin_port: Annotated[int, Field(ge=1, le=65535)] = 9090
    """Port of /metrics, /healthz, /readyz and decisions."""
    service: Annotated[ServiceSpec, Field(default_factory=ServiceSpec)]
    auth: Annotated[AuthSpec, Field(default_factory=AuthSpec)]
    tls: TLSSpec | None = None
    redis: RedisSpec | None = None
    limits: Annotated[LimitsSpec, Field(default_factory=LimitsSpec)]
    drain_seconds: Annotated[int, Field(ge=0, le=86400)] = 120
    """How long a leaving router may finish its streams."""
    resources: dict[str, Any] | None = None
    """Kubernetes ResourceRequirements of the router container."""
    pod_template: PodTemplate | None = None
    """Partial PodTemplateSpec merged over the generated one (containers by name: `router`)."""


class FleetRouterStatus(LenientSchema):
    observed_generation: int | None = None
    replicas: int | None = None
    ready_replicas: int | None = None
    selector: str | None = None
    revision: str | None = None
    """The compiled configuration last written."""
    address: str | None = None
    """Where clients reach the router inside the cluster."""
    conditions: list[Condition] = []


class FleetRouter(Resource):
    kind: Literal["FleetRouter"] = "FleetRouter"
    spec: Annotated[FleetRouterSpec, Field(default_factory=FleetRouterSpec)]
    status: FleetRouterStatus | None = None
