"""ModelPool (`mp`): workers of one model on one kind of accelerator."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kvfleet_api.common import Condition, LenientSchema, ModelName, Name, PodTemplate, Resource, Schema

DEFAULT_ENGINE_IMAGE = "vllm/vllm-openai:v0.32.0"


class ModelSpec(Schema):
    name: Annotated[ModelName, Field(examples=["llama-8b"])]
    """The name clients send in `model`. Several pools may serve one name: the router chooses among them."""
    uri: Annotated[str, Field(max_length=1024, examples=["meta-llama/Llama-3.1-8B-Instruct"])] = ""
    """What the engine loads: a Hugging Face repository or a path inside the container. Empty: `name`."""
    revision: Annotated[str, Field(max_length=128)] = ""
    """Branch, tag or commit of the repository."""
    parameters_millions: Annotated[int, Field(ge=1, le=10_000_000, examples=[8030])] | None = None
    """Size of the model. Used for time and energy where the AcceleratorProfile has no row for it; default: read from the name (`-8B`)."""
    max_context_tokens: Annotated[int, Field(ge=16, le=16_777_216, examples=[131072])] | None = None
    """Longest prompt plus output (vLLM: --max-model-len). Default: the model's own."""

    @property
    def source(self) -> str:
        return self.uri or self.name


class KVEventsSpec(Schema):
    enabled: bool = True
    """Have the engine publish what its prefix cache stores and evicts (ZMQ); the router then knows instead of guessing."""
    port: Annotated[int, Field(ge=1, le=65535)] = 5557
    replay_port: Annotated[int, Field(ge=1, le=65535)] = 5558

    @model_validator(mode="after")
    def _ports_differ(self) -> KVEventsSpec:
        if self.port == self.replay_port:
            raise ValueError(
                f"replayPort must differ from port (both are {self.port}): give the replay socket a port of its own"
            )
        return self


class EnvVar(Schema):
    name: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$")]
    value: Annotated[str, Field(max_length=32768)] = ""


class EngineSpec(Schema):
    image: Annotated[str, Field(min_length=1, max_length=512)] = DEFAULT_ENGINE_IMAGE
    args: Annotated[
        list[Annotated[str, Field(max_length=4096)]], Field(max_length=128, examples=[["--max-num-seqs", "256"]])
    ] = []
    """Further arguments of `vllm serve`; they win over the generated ones."""
    env: Annotated[list[EnvVar], Field(max_length=128)] = []
    kv_events: Annotated[KVEventsSpec, Field(default_factory=KVEventsSpec)]
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """HTTP port of the engine."""
    block_tokens: Annotated[int, Field(ge=1, le=1024)] = 16
    """Tokens in a KV-cache block (vLLM: --block-size)."""
    startup_seconds: Annotated[int, Field(ge=10, le=86400)] = 1800
    """How long the engine may take to load the model before it is restarted."""

    @model_validator(mode="after")
    def _port_is_free(self) -> EngineSpec:
        if self.kv_events.enabled and self.port in (self.kv_events.port, self.kv_events.replay_port):
            raise ValueError(f"port {self.port} is also a kvEvents port: choose another")
        return self


class AcceleratorRef(Schema):
    profile_ref: Annotated[Name, Field(examples=["nvidia-h100-80gb"])]
    """Name of an AcceleratorProfile."""
    count: Annotated[int, Field(ge=1, le=64)] | None = None
    """Devices per pod. Default: tensor x pipeline parallelism divided by nodes."""


class ParallelismSpec(Schema):
    tensor: Annotated[int, Field(ge=1, le=64)] = 1
    pipeline: Annotated[int, Field(ge=1, le=64)] = 1
    nodes: Annotated[int, Field(ge=1, le=64)] = 1
    """Pods that together make one worker; above 1 the pool becomes a LeaderWorkerSet."""

    @model_validator(mode="after")
    def _splits_evenly(self) -> ParallelismSpec:
        if (self.tensor * self.pipeline) % self.nodes:
            raise ValueError(
                f"tensor x pipeline ({self.tensor * self.pipeline}) must be a multiple of nodes ({self.nodes}): change one of the three"
            )
        return self


class ScalingSignal(Schema):
    """What to scale on. Exactly one of `concurrency`, `queueDepth`, `timeToFirstToken`, `kvUsage`, `prometheus`."""

    concurrency: ConcurrencySignal | None = None
    queue_depth: QueueSignal | None = None
    time_to_first_token: TTFTSignal | None = None
    kv_usage: KVUsageSignal | None = None
    prometheus: PrometheusSignal | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> ScalingSignal:
        set_fields = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(set_fields) != 1:
            raise ValueError(
                "set exactly one of concurrency, queueDepth, timeToFirstToken, kvUsage, prometheus "
                f"(found {len(set_fields)}): one list entry per signal"
            )
        return self


class ConcurrencySignal(Schema):
    target_per_replica: Annotated[int, Field(ge=1, le=100_000, examples=[48])] | None = None
    """Requests in flight a replica should carry. Default: the router's published pack target."""


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
    value: Annotated[int, Field(ge=1, le=100_000)]
    period_seconds: Annotated[int, Field(ge=1, le=1800)] = 60


class ScalingRules(Schema):
    stabilization_window_seconds: Annotated[int, Field(ge=0, le=3600)] | None = None
    """Scale-down default 300, scale-up default 0, as HorizontalPodAutoscaler."""
    select_policy: Literal["Max", "Min", "Disabled"] = "Max"
    policies: Annotated[list[ScalingPolicy], Field(max_length=16)] = []


class ScalingBehavior(Schema):
    scale_up: ScalingRules | None = None
    scale_down: ScalingRules | None = None


class ScaleToZeroSpec(Schema):
    idle_seconds: Annotated[int, Field(ge=1, le=86400)] = 600
    """Seconds without a request after which the pool goes to zero (needs minReplicas 0)."""


class ScheduleEntry(Schema):
    start: Annotated[str, Field(max_length=128, examples=["0 8 * * 1-5"])]
    """Cron expression (minute hour day month weekday) at which the entry begins."""
    time_zone: Annotated[str, Field(max_length=64)] = "UTC"
    duration_minutes: Annotated[int, Field(ge=1, le=10080)]
    min_replicas: Annotated[int, Field(ge=0, le=10_000)]
    """Lower bound while the entry lasts."""


class AutoscalingSpec(Schema):
    min_replicas: Annotated[int, Field(ge=0, le=10_000)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=10_000)]
    signals: Annotated[list[ScalingSignal], Field(max_length=16)] = []
    """Empty: concurrency and predicted time to first token. The largest wish wins."""
    tolerance_percent: Annotated[int, Field(ge=0, le=100)] = 10
    behavior: Annotated[ScalingBehavior, Field(default_factory=ScalingBehavior)]
    scale_to_zero: ScaleToZeroSpec | None = None
    schedule: Annotated[list[ScheduleEntry], Field(max_length=32)] = []

    @model_validator(mode="after")
    def _consistent(self) -> AutoscalingSpec:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"minReplicas ({self.min_replicas}) must not exceed maxReplicas ({self.max_replicas}): "
                "lower minReplicas or raise maxReplicas"
            )
        if self.scale_to_zero is not None and self.min_replicas != 0:
            raise ValueError("scaleToZero needs minReplicas: 0")
        return self


class AdapterSpec(Schema):
    name: Annotated[ModelName, Field(examples=["llama-8b-sql"])]
    """The name clients send in `model` to get this LoRA adapter."""
    uri: Annotated[str, Field(min_length=1, max_length=1024)]
    """Path or repository the engine loads it from."""


class RolloutSpec(Schema):
    max_surge: Annotated[int, Field(ge=0, le=10_000)] = 1
    """Workers above the wanted number during a rollout."""
    max_unavailable: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Workers that may be missing during a rollout."""
    drain_seconds: Annotated[int, Field(ge=0, le=86400)] = 120
    """How long a leaving worker may finish its streams."""

    @model_validator(mode="after")
    def _can_progress(self) -> RolloutSpec:
        if self.max_surge == 0 and self.max_unavailable == 0:
            raise ValueError(
                "maxSurge and maxUnavailable must not both be 0: a rollout could never progress; set one to 1"
            )
        return self


class ModelPoolSpec(Schema):
    model: ModelSpec
    engine: Annotated[EngineSpec, Field(default_factory=EngineSpec)]
    role: Literal["Unified", "Prefill", "Decode"] = "Unified"
    """Unified workers do both phases; Prefill and Decode pools of one model work in pairs."""
    accelerator: AcceleratorRef
    parallelism: Annotated[ParallelismSpec, Field(default_factory=ParallelismSpec)]
    replicas: Annotated[int, Field(ge=0, le=10_000)] | None = None
    """Workers wanted, where `autoscaling` is not set. Default 1."""
    autoscaling: AutoscalingSpec | None = None
    adapters: Annotated[list[AdapterSpec], Field(max_length=256)] = []
    """LoRA adapters every worker of the pool serves."""
    rollout: Annotated[RolloutSpec, Field(default_factory=RolloutSpec)]
    pod_template: PodTemplate | None = None
    """Partial PodTemplateSpec merged over the generated one (containers by name: `engine`)."""

    @model_validator(mode="after")
    def _consistent(self) -> ModelPoolSpec:
        names = [self.model.name, *(adapter.name for adapter in self.adapters)]
        if len(set(names)) != len(names):
            raise ValueError("adapters: every name must be unique and differ from model.name: rename the repeated one")
        return self

    @property
    def devices_per_pod(self) -> int:
        if self.accelerator.count is not None:
            return self.accelerator.count
        return self.parallelism.tensor * self.parallelism.pipeline // self.parallelism.nodes


class AutoscalingStatus(LenientSchema):
    desired_replicas: int | None = None
    binding_signal: str | None = None
    """The signal that decided, with its value and target."""
    last_scale_time: str | None = None
    held_back_by: str | None = None
    """What keeps the pool from its raw wish: stabilisation, a rate policy, a budget, missing data."""


class ModelPoolStatus(LenientSchema):
    observed_generation: int | None = None
    replicas: int | None = None
    """Workers that exist."""
    ready_replicas: int | None = None
    """Workers that answer their readiness probe."""
    updated_replicas: int | None = None
    selector: str | None = None
    """Label selector of the workers, for the scale subresource."""
    conditions: list[Condition] = []
    autoscaling: AutoscalingStatus | None = None
    adapters: list[str] = []
    """Adapters loaded on every ready worker."""


class ModelPool(Resource):
    kind: Literal["ModelPool"] = "ModelPool"
    spec: ModelPoolSpec
    status: ModelPoolStatus | None = None
