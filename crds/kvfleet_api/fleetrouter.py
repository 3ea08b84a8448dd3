"""FleetRouter (`fr`): the router's deployment. It serves every ModelPool and RoutingPolicy of its namespace."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kvfleet_api.common import Annotations, Conditions, LenientSchema, Name, PodTemplate, Resource, Schema, ShortText
from kvfleet_api.constraints import UniqueBy, rule

DEFAULT_ROUTER_IMAGE = "ghcr.io/kvfleet/kvfleet:0.1.0"


class ServiceSpec(Schema):
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    """How the router is reached, as in a Kubernetes Service."""
    port: Annotated[int, Field(ge=1, le=65535, examples=[80])] = 80
    """Port clients connect to."""
    annotations: Annotations = {}
    """Annotations of the Service, for load balancers that want some."""


class SecretKeyRef(Schema):
    name: Name
    """Name of the Secret, in the same namespace."""
    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$", examples=["keys"])]
    """Key inside it."""


class AuthSpec(Schema):
    api_keys_secret_ref: SecretKeyRef | None = None
    """Secret whose key holds hashed API keys. None: no authentication."""


class TLSSpec(Schema):
    secret_ref: Name
    """Secret of type kubernetes.io/tls with the certificate clients see."""


class RedisSpec(Schema):
    url: Annotated[
        str,
        Field(
            min_length=1,
            max_length=1024,
            pattern=r"^(redis|rediss|unix)://([^:/@]+@)?[^@]+$",
            examples=["redis://redis:6379/0", "rediss://router@redis:6380"],
        ),
    ]
    """A Redis server over which the replicas tell each other their loads, within 10 ms, and what prefixes workers have cached,
    within 100 ms. `rediss` is TLS. A user may be in it; the password goes into a Secret."""
    password_secret_ref: SecretKeyRef | None = None
    """Secret whose key holds the server's password. None: it asks for none."""
    ca_secret_ref: SecretKeyRef | None = None
    """Secret whose key holds the certificates (PEM) to trust, with `rediss`. None: the system's."""


class CarbonHour(Schema):
    hour: Annotated[int, Field(ge=0, le=23, examples=[12])]
    """Hour of the day, UTC, from which the value holds."""
    grams_per_kilowatt_hour: Annotated[int, Field(ge=0, le=5000, examples=[180])]
    """Grams of CO2 equivalent per kWh."""


class TelemetrySpec(Schema):
    dcgm_urls: Annotated[
        list[
            Annotated[
                str,
                Field(
                    min_length=1,
                    max_length=1024,
                    pattern=r"^https?://.+$",
                    examples=["http://dcgm-exporter.gpu-operator:9400/metrics", "http://{host}:9400/metrics"],
                ),
            ]
        ],
        Field(max_length=256, alias="dcgmURLs"),
    ] = []
    """DCGM exporters to be read; devices are told apart by their `pod` label. `{host}` and `{port}` stand for each worker's
    address: all devices found there are its own."""
    prometheus_url: Annotated[
        Annotated[
            str,
            Field(
                min_length=1,
                max_length=1024,
                pattern=r"^https?://.+$",
                examples=["http://prometheus.monitoring:9090"],
            ),
        ]
        | None,
        Field(alias="prometheusURL"),
    ] = None
    """A Prometheus that scrapes the exporters, asked in their place."""
    interval_seconds: Annotated[int, Field(ge=1, le=300)] = 10
    """How often they are read."""
    stale_seconds: Annotated[int, Field(ge=2, le=3600)] = 60
    """Energy no longer steers a pool whose workers' telemetry is older than this."""
    carbon_grams_per_kilowatt_hour: Annotated[int, Field(ge=0, le=5000, examples=[380])] | None = None
    """Carbon intensity of the electricity. None: grams are not reported."""
    carbon_by_hour: Annotated[list[CarbonHour], UniqueBy("hour"), Field(max_length=24)] = []
    """Where the intensity changes over the day; holds instead of the above from the first hour listed on, and around midnight."""


class LimitsSpec(Schema):
    max_body_bytes: Annotated[int, Field(ge=1024, le=1_073_741_824)] = 33_554_432
    """Largest request body; more gets 413."""
    max_header_bytes: Annotated[int, Field(ge=1024, le=1_048_576)] = 65_536
    """Largest request head; more gets 431."""
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 16_384
    """Client connections a router process holds."""


class FleetRouterSpec(Schema):
    replicas: Annotated[int, Field(ge=0, le=1000, examples=[2])] = 2
    """Router pods."""
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """Router processes per pod, each on a core of its own: they share one port, their loads and their prefixes."""
    image: Annotated[str, Field(min_length=1, max_length=512)] = DEFAULT_ROUTER_IMAGE
    """Container image of the router."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8080
    """Port of the OpenAI API inside the pod."""
    admin_port: Annotated[int, Field(ge=1, le=65535)] = 9090
    """Port of /metrics, /healthz, /readyz and decisions."""
    service: Annotated[ServiceSpec, Field(default_factory=ServiceSpec)]
    """The Service in front of the router."""
    auth: Annotated[AuthSpec, Field(default_factory=AuthSpec)]
    """Who may send requests."""
    tls: TLSSpec | None = None
    """Serve HTTPS. Default: HTTP."""
    redis: RedisSpec | None = None
    """State shared between replicas. Default: every replica decides alone."""
    limits: Annotated[LimitsSpec, Field(default_factory=LimitsSpec)]
    """Bounds on what a client may send."""
    max_watts: Annotated[int, Field(ge=1, le=100_000_000, examples=[50000])] | None = None
    """Power budget of all pools together, by the cost model: requests that would exceed it wait, less urgent ones longer."""
    telemetry: TelemetrySpec | None = None
    """Keep books of joules, from DCGM's counters where they can be read, else by the model. None: no books."""
    drain_seconds: Annotated[int, Field(ge=0, le=86400)] = 120
    """How long a leaving router may finish its streams."""
    resources: dict[str, Any] | None = None
    """Kubernetes ResourceRequirements of the router container."""
    pod_template: PodTemplate | None = None
    """Partial PodTemplateSpec merged over the generated one (containers by name: `router`)."""

    @rule(
        cel="self.port != self.adminPort",
        message="adminPort must differ from port (both are {port}): give the admin endpoints a port of their own",
        field="adminPort",
    )
    def _ports_differ(self) -> bool:
        return self.port != self.admin_port


class FleetRouterStatus(LenientSchema):
    observed_generation: int | None = None
    """The generation of the spec that this status speaks about."""
    replicas: int | None = None
    """Router pods that exist."""
    ready_replicas: int | None = None
    """Router pods that answer their readiness probe."""
    selector: ShortText | None = None
    """Label selector of the pods, for the scale subresource."""
    revision: ShortText | None = None
    """The compiled configuration last written."""
    address: ShortText | None = None
    """Where clients reach the router inside the cluster."""
    conditions: Conditions = []
    """Ready."""


class FleetRouter(Resource):
    kind: Literal["FleetRouter"] = "FleetRouter"
    spec: Annotated[FleetRouterSpec, Field(default_factory=FleetRouterSpec)]
    status: FleetRouterStatus | None = None
