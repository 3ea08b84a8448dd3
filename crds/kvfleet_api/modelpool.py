"""ModelPool (`mp`): workers of one model on one kind of accelerator."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, JsonValue

from kvfleet_api.acceleratorprofile import Learned
from kvfleet_api.common import (
    Conditions,
    LenientSchema,
    ModelName,
    Name,
    PodTemplate,
    Resource,
    Schema,
    ShortText,
    Timestamp,
)
from kvfleet_api.constraints import UniqueBy, rule

DEFAULT_ENGINE_IMAGE = "vllm/vllm-openai:v0.32.0"


NAME_IS_FINAL: Final[dict[str, JsonValue]] = {
    "rule": "self == oldSelf",
    "message": "model.name cannot be changed, or a rollout would answer to two names: create a second ModelPool and delete this one",
}
"""A transition rule: only the API server knows the old object, so it has no twin here."""


class TokenizerSpec(Schema):
    """Exactly one of the two. Files: `tokenizer.json` (or `tokenizer.json.gz`), `tokenizer_config.json`, `chat_template.jinja`."""

    config_map_ref: Annotated[Name, Field(examples=["llama-8b-tokenizer"])] | None = None
    """A ConfigMap of the pool's namespace with these files as keys; `kvfleet tokenizer DIR` writes one. Routers mount it."""
    path: Annotated[str, Field(min_length=1, max_length=1024, examples=["/models/llama-8b"])] | None = None
    """A directory in the router's container: of a volume in the FleetRouter's `podTemplate`, or on a laptop."""

    @rule(
        cel="has(self.configMapRef) != has(self.path)",
        message="set exactly one of configMapRef and path: the tokenizer's files are either in a ConfigMap or in a directory",
    )
    def _exactly_one(self) -> bool:
        return (self.config_map_ref is None) != (self.path is None)


class ModelSpec(Schema):
    name: Annotated[
        ModelName, Field(examples=["llama-8b"], json_schema_extra={"x-kubernetes-validations": [NAME_IS_FINAL]})
    ]
    """The name clients send in `model`. Several pools may serve one name: the router chooses among them."""
    uri: Annotated[str, Field(max_length=1024, examples=["meta-llama/Llama-3.1-8B-Instruct"])] = ""
    """What the engine loads: a Hugging Face repository or a path inside the container. Empty: `name`."""
    revision: Annotated[str, Field(max_length=128, examples=["main"])] = ""
    """Branch, tag or commit of the repository."""
    parameters_millions: Annotated[int, Field(ge=1, le=10_000_000, examples=[8030])] | None = None
    """Size of the model. Used for time and energy where the AcceleratorProfile has no row for it; default: read from the name (`-8B`)."""
    max_context_tokens: Annotated[int, Field(ge=16, le=16_777_216, examples=[131072])] | None = None
    """Longest prompt plus output (vLLM: --max-model-len). Default: the model's own."""
    tokenizer: TokenizerSpec | None = None
    """The model's tokenizer and chat template, for the router. With them (and `engine.kvEvents`) it knows which prefixes
    workers hold; without, it guesses from its own routing."""

    @property
    def source(self) -> str:
        return self.uri or self.name


class KVEventsSpec(Schema):
    enabled: bool = True
    """Have the engine publish what its prefix cache stores and evicts (ZMQ); the router then knows instead of guessing."""
    port: Annotated[int, Field(ge=1, le=65535)] = 5557
    """Port the engine publishes on."""
    replay_port: Annotated[int, Field(ge=1, le=65535)] = 5558
    """Port on which missed events can be asked for again."""

    @rule(
        cel="self.port != self.replayPort",
        message="replayPort must differ from port (both are {port}): give the replay socket a port of its own",
        field="replayPort",
    )
    def _ports_differ(self) -> bool:
        return self.port != self.replay_port


class EnvVar(Schema):
    name: Annotated[
        str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$", examples=["HF_HOME"])
    ]
    """Name of the environment variable."""
    value: Annotated[str, Field(max_length=32768)] = ""
    """Its value. Secrets belong into `podTemplate`, as `valueFrom`."""


class ConfigMapKeyRef(Schema):
    name: Annotated[Name, Field(examples=["llama-8b-ca"])]
    """Name of the ConfigMap, in the same namespace."""
    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$", examples=["ca.crt"])] = (
        "ca.crt"
    )
    """Key inside it."""


class EngineTLSSpec(Schema):
    """Routers and the operator speak HTTPS to the engines, which must prove who they are."""

    certificate_secret_ref: Annotated[Name, Field(examples=["llama-8b-tls"])] | None = None
    """Secret of type kubernetes.io/tls that engines are started with. None: `args` say where it is, or a proxy in the pod has it."""
    ca_config_map_ref: ConfigMapKeyRef | None = None
    """ConfigMap whose key holds the authorities (PEM) to trust. None: those that the images of router and operator trust."""
    server_name: (
        Annotated[
            str,
            Field(
                min_length=1,
                max_length=253,
                pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
                examples=["llama-8b-workers.default.svc"],
            ),
        ]
        | None
    ) = None
    """The name in the engines' certificates. Default: `WORKERS-SERVICE.NAMESPACE.svc`, with the pool's headless Service."""
    client_certificate_secret_ref: Annotated[Name, Field(examples=["router-client-tls"])] | None = None
    """Secret of type kubernetes.io/tls with what routers show engines that ask for a certificate. None: they show none."""


class EngineSpec(Schema):
    image: Annotated[str, Field(min_length=1, max_length=512)] = DEFAULT_ENGINE_IMAGE
    """Container image of the engine."""
    args: Annotated[
        list[Annotated[str, Field(max_length=4096)]], Field(max_length=128, examples=[["--max-num-seqs", "256"]])
    ] = []
    """Further arguments of `vllm serve`; they win over the generated ones."""
    env: Annotated[list[EnvVar], UniqueBy("name"), Field(max_length=128)] = []
    """Environment variables of the engine."""
    kv_events: Annotated[KVEventsSpec, Field(default_factory=KVEventsSpec)]
    """How the engine tells what its prefix cache holds."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """HTTP port of the engine."""
    tls: EngineTLSSpec | None = None
    """Serve HTTPS on it. Default: HTTP."""
    block_tokens: Annotated[int, Field(ge=1, le=1024)] = 16
    """Tokens in a KV-cache block (vLLM: --block-size)."""
    startup_seconds: Annotated[int, Field(ge=10, le=86400)] = 1800
    """How long the engine may take to load the model before it is restarted."""

    @rule(
        cel="!self.kvEvents.enabled || (self.port != self.kvEvents.port && self.port != self.kvEvents.replayPort)",
        message="port ({port}) is also a kvEvents port: choose another",
        field="port",
    )
    def _port_is_free(self) -> bool:
        return not self.kv_events.enabled or self.port not in (self.kv_events.port, self.kv_events.replay_port)


class AcceleratorRef(Schema):
    profile_ref: Annotated[Name, Field(examples=["nvidia-h100-80gb"])]
    """Name of an AcceleratorProfile."""
    count: Annotated[int, Field(ge=1, le=64)] | None = None
    """Devices per pod. Default: tensor x pipeline parallelism divided by nodes."""


class ParallelismSpec(Schema):
    tensor: Annotated[int, Field(ge=1, le=64)] = 1
    """Devices a layer is split over (vLLM: --tensor-parallel-size)."""
    pipeline: Annotated[int, Field(ge=1, le=64)] = 1
    """Stages the layers are split into (vLLM: --pipeline-parallel-size)."""
    nodes: Annotated[int, Field(ge=1, le=64)] = 1
    """Pods that together make one worker; above 1 the pool becomes a LeaderWorkerSet."""

    @rule(
        cel="(self.tensor * self.pipeline) % self.nodes == 0",
        message="tensor ({tensor}) x pipeline ({pipeline}) must be a multiple of nodes ({nodes}): change one of the three",
        field="nodes",
    )
    def _splits_evenly(self) -> bool:
        return (self.tensor * self.pipeline) % self.nodes == 0


class ScalingSignal(Schema):
    """What to scale on. Exactly one of `concurrency`, `queueDepth`, `timeToFirstToken`, `kvUsage`, `prometheus`."""

    concurrency: ConcurrencySignal | None = None
    """Requests in flight per replica."""
    queue_depth: QueueSignal | None = None
    """Requests waiting at the router."""
    time_to_first_token: TTFTSignal | None = None
    """Predicted time to first token against its objective."""
    kv_usage: KVUsageSignal | None = None
    """Use of the KV cache."""
    prometheus: PrometheusSignal | None = None
    """The result of a PromQL query."""

    @rule(
        cel="[has(self.concurrency), has(self.queueDepth), has(self.timeToFirstToken), has(self.kvUsage), "
        "has(self.prometheus)].filter(present, present).size() == 1",
        message="set exactly one of concurrency, queueDepth, timeToFirstToken, kvUsage, prometheus: one list entry per signal",
    )
    def _exactly_one(self) -> bool:
        return sum(getattr(self, name) is not None for name in type(self).model_fields) == 1


class ConcurrencySignal(Schema):
    target_per_replica: Annotated[int, Field(ge=1, le=100_000, examples=[48])] | None = None
    """Requests in flight a replica should carry. Default: by the router's published pack target, see below."""
    target_percent_of_pack_target: Annotated[int, Field(ge=1, le=100)] = 80
    """Without `targetPerReplica`: how full of the pack target replicas are to be. The rest is for bursts, until more are ready."""


class QueueSignal(Schema):
    target_per_replica: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Requests waiting at the router per replica."""


class TTFTSignal(Schema):
    target_percent_of_slo: Annotated[int, Field(ge=1, le=1000)] = 70
    """Predicted time to first token, in percent of the policy's objective."""


class KVUsageSignal(Schema):
    target_percent: Annotated[int, Field(ge=1, le=100)] = 80
    """Share of the KV cache held by running requests."""


class PrometheusSignal(Schema):
    query: Annotated[
        str, Field(min_length=1, max_length=4096, examples=['sum(vllm:num_requests_running{model_name="llama-8b"})'])
    ]
    """PromQL that yields one number."""
    target_milli: Annotated[int, Field(ge=1, le=2**53, examples=[32000])]
    """The target in thousandths of the query's unit."""
    type: Literal["Value", "AverageValue"] = "AverageValue"
    """`Value`: the result itself against the target; `AverageValue`: the result divided by the replicas."""


ScalingSignal.model_rebuild()


class ScalingPolicy(Schema):
    type: Literal["Pods", "Percent"]
    """Whether `value` counts replicas or percent of them."""
    value: Annotated[int, Field(ge=1, le=100_000, examples=[2])]
    """Largest change within a period."""
    period_seconds: Annotated[int, Field(ge=1, le=1800)] = 60
    """Length of the period."""


class ScalingRules(Schema):
    stabilization_window_seconds: Annotated[int, Field(ge=0, le=3600)] | None = None
    """Scale-down default 300, scale-up default 0, as HorizontalPodAutoscaler."""
    select_policy: Literal["Max", "Min", "Disabled"] = "Max"
    """Which policy counts: the one that allows the largest change, the smallest, or no change in this direction."""
    policies: Annotated[list[ScalingPolicy], Field(max_length=16)] = []
    """Bounds on the rate of change. Empty: HorizontalPodAutoscaler's defaults."""


class ScalingBehavior(Schema):
    scale_up: ScalingRules | None = None
    """How fast replicas may be added."""
    scale_down: ScalingRules | None = None
    """How fast replicas may be removed."""


class ScaleToZeroSpec(Schema):
    idle_seconds: Annotated[int, Field(ge=1, le=86400)] = 600
    """Seconds without a request after which the pool goes to zero (needs minReplicas 0)."""


class ScheduleEntry(Schema):
    start: Annotated[str, Field(min_length=9, max_length=128, examples=["0 8 * * 1-5"])]
    """Cron expression (minute hour day month weekday) at which the entry begins."""
    time_zone: Annotated[str, Field(min_length=1, max_length=64, examples=["Europe/Berlin"])] = "UTC"
    """IANA time zone of `start`."""
    duration_minutes: Annotated[int, Field(ge=1, le=10080, examples=[600])]
    """How long the entry lasts."""
    min_replicas: Annotated[int, Field(ge=0, le=10_000)]
    """Lower bound while the entry lasts."""


class ForecastSpec(Schema):
    mode: Literal["Raise", "Observe", "Off"] = "Raise"
    """What a forecast may do: `Raise` starts workers ahead of a load that comes back every day; `Observe` only reports."""
    lead_seconds: Annotated[int, Field(ge=1, le=21_600, examples=[600])] | None = None
    """How far it looks ahead. Default: what the pool's last workers took from their creation until they were ready."""


class AutoscalingSpec(Schema):
    min_replicas: Annotated[int, Field(ge=0, le=10_000)] = 1
    """Fewest workers. 0 lets the pool go to zero."""
    max_replicas: Annotated[int, Field(ge=1, le=10_000, examples=[8])]
    """Most workers."""
    signals: Annotated[list[ScalingSignal], Field(max_length=16)] = []
    """Empty: concurrency and predicted time to first token. The largest wish wins."""
    tolerance_percent: Annotated[int, Field(ge=0, le=100)] = 10
    """Deviations from the target within this share change nothing."""
    behavior: Annotated[ScalingBehavior, Field(default_factory=ScalingBehavior)]
    """Stabilisation and rates, with HorizontalPodAutoscaler's words and meaning."""
    scale_to_zero: ScaleToZeroSpec | None = None
    """When an idle pool goes to zero."""
    schedule: Annotated[list[ScheduleEntry], Field(max_length=32)] = []
    """Lower bounds by the clock."""
    forecast: Annotated[ForecastSpec, Field(default_factory=ForecastSpec)]
    """A lower bound from the day and the week that repeat themselves."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Under a budget of GPUs or watts that all autoscaled pools share, pools of higher priority grow first."""

    @rule(
        cel="self.minReplicas <= self.maxReplicas",
        message="minReplicas ({minReplicas}) must not exceed maxReplicas ({maxReplicas}): lower minReplicas or raise maxReplicas",
        field="minReplicas",
    )
    def _min_below_max(self) -> bool:
        return self.min_replicas <= self.max_replicas

    @rule(
        cel="!has(self.scaleToZero) || self.minReplicas == 0",
        message="scaleToZero needs minReplicas 0 (it is {minReplicas}): set it to 0 or remove scaleToZero",
        field="minReplicas",
    )
    def _zero_allowed(self) -> bool:
        return self.scale_to_zero is None or self.min_replicas == 0


class AdapterSpec(Schema):
    name: Annotated[ModelName, Field(examples=["llama-8b-sql"])]
    """The name clients send in `model` to get this LoRA adapter."""
    uri: Annotated[str, Field(min_length=1, max_length=1024, examples=["my-org/llama-8b-sql-lora"])]
    """Path or repository the engine loads it from."""


class RolloutSpec(Schema):
    max_surge: Annotated[int, Field(ge=0, le=10_000)] = 1
    """Workers above the wanted number during a rollout."""
    max_unavailable: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Workers that may be missing during a rollout."""
    drain_seconds: Annotated[int, Field(ge=0, le=86400)] = 120
    """How long a leaving worker may finish its streams."""

    @rule(
        cel="self.maxSurge > 0 || self.maxUnavailable > 0",
        message="maxSurge and maxUnavailable must not both be 0, a rollout could never progress: set one to 1",
        field="maxSurge",
    )
    def _can_progress(self) -> bool:
        return self.max_surge > 0 or self.max_unavailable > 0


class ModelPoolSpec(Schema):
    model: ModelSpec
    """The model the workers serve."""
    engine: Annotated[EngineSpec, Field(default_factory=EngineSpec)]
    """How vLLM runs."""
    role: Literal["Unified", "Prefill", "Decode"] = "Unified"
    """Unified workers do both phases; Prefill and Decode pools of one model work in pairs."""
    accelerator: AcceleratorRef
    """What the workers run on."""
    parallelism: Annotated[ParallelismSpec, Field(default_factory=ParallelismSpec)]
    """How one worker is spread over devices and nodes."""
    replicas: Annotated[int, Field(ge=0, le=10_000)] | None = 1
    """Workers wanted, where `autoscaling` is not set."""
    autoscaling: AutoscalingSpec | None = None
    """Let the operator choose the number of workers."""
    max_watts: Annotated[int, Field(ge=1, le=100_000_000, examples=[5000])] | None = None
    """Power budget of the pool's workers, by the cost model: requests that would exceed it wait at the router, less urgent ones longer."""
    adapters: Annotated[list[AdapterSpec], UniqueBy("name"), Field(max_length=256)] = []
    """LoRA adapters every worker of the pool serves."""
    rollout: Annotated[RolloutSpec, Field(default_factory=RolloutSpec)]
    """How workers are replaced."""
    pod_template: PodTemplate | None = None
    """Partial PodTemplateSpec merged over the generated one (containers by name: `engine`)."""

    @rule(
        cel="!has(self.adapters) || self.adapters.all(adapter, adapter.name != self.model.name)",
        message="an adapter must not have the name of the model: rename the adapter",
        field="adapters",
    )
    def _adapters_differ_from_model(self) -> bool:
        return all(adapter.name != self.model.name for adapter in self.adapters)

    @property
    def least_workers(self) -> int:
        """Workers that the pool always has."""
        return self.autoscaling.min_replicas if self.autoscaling is not None else self.replicas or 0

    @property
    def devices_per_pod(self) -> int:
        if self.accelerator.count is not None:
            return self.accelerator.count
        return self.parallelism.tensor * self.parallelism.pipeline // self.parallelism.nodes


class AutoscalingStatus(LenientSchema):
    desired_replicas: int | None = None
    """What the autoscaler wants."""
    binding_signal: ShortText | None = None
    """The signal that decided, with its value and target."""
    last_scale_time: Timestamp | None = None
    """When it last changed the number of workers."""
    held_back_by: ShortText | None = None
    """What keeps the pool from its raw wish: stabilisation, a rate policy, a budget, missing data."""
    forecast: ShortText | None = None
    """What the forecast expects, or how far it has learned."""
    startup_seconds: int | None = None
    """What the pool's last workers took until they were ready: the 90th percentile of up to 32."""


class EnergyStatus(LenientSchema):
    """As of the last time it changed noticeably: a coefficient by 5 %, a standard error or the number of samples by half."""

    source: ShortText
    """Where joules come from: `Profile`, `Learning`, `Measured`, `LowConfidence`, `Stale`, `Frozen` or `Absurd`."""
    error_percent: int
    """By how much intervals differ from what the coefficients say, on average."""
    samples: int
    """Intervals the coefficients rest on."""
    coefficients: Annotated[list[Learned], UniqueBy("coefficient"), Field(max_length=4)] = []
    """What was learned, of a whole worker."""


class ModelPoolStatus(LenientSchema):
    observed_generation: int | None = None
    """The generation of the spec that this status speaks about."""
    desired_replicas: int | None = None
    """Workers wanted: `spec.replicas`, or the autoscaler's decision."""
    replicas: int | None = None
    """Workers that exist."""
    ready_replicas: int | None = None
    """Workers that answer their readiness probe."""
    updated_replicas: int | None = None
    """Workers of the current template."""
    selector: ShortText | None = None
    """Label selector of the workers, for the scale subresource."""
    conditions: Conditions = []
    """Ready, and what it rests on."""
    autoscaling: AutoscalingStatus | None = None
    """What the autoscaler last decided."""
    adapters: Annotated[list[ModelName], UniqueBy(), Field(max_length=256)] = []
    """Adapters loaded on every ready worker."""
    energy: EnergyStatus | None = None
    """What routers with telemetry learned of the workers' energy."""


class ModelPool(Resource):
    kind: Literal["ModelPool"] = "ModelPool"
    spec: ModelPoolSpec
    status: ModelPoolStatus | None = None
