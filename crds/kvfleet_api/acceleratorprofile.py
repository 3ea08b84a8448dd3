"""AcceleratorProfile (`ap`, cluster-scoped): what an accelerator costs in time and energy, per model and in general.

Integers in named units only, as Kubernetes' API conventions ask; `cost_model` turns them into SI floats.
A model without a measured row gets one from `prior`, which scales with the model's weights.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvfleet_api.common import Conditions, LenientSchema, Name, Resource, Schema, ShortText, Timestamp
from kvfleet_api.constraints import UniqueBy, rule

NonNegative = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(ge=1, le=2**53)]


class AcceleratorDevice(Schema):
    product: Annotated[str, Field(max_length=128, examples=["NVIDIA-H100-80GB-HBM3"])]
    """The product as GPU feature discovery labels it (`nvidia.com/gpu.product`); pods are placed by it when set in a pool."""
    memory_gib: Annotated[int, Field(ge=1, le=4096, alias="memoryGiB", examples=[80])]
    """Memory of one device in GiB."""
    resource_name: Annotated[str, Field(max_length=253)] = "nvidia.com/gpu"
    """The extended resource a pod asks for."""


class PowerSpec(Schema):
    idle_watts: Annotated[int, Field(ge=0, le=10000, examples=[115])]
    """Watts of one device with a model loaded and nothing running."""
    max_watts: Annotated[int, Field(ge=1, le=10000, examples=[700])]
    """The device's power limit in watts."""

    @rule(
        cel="self.idleWatts <= self.maxWatts",
        message="idleWatts ({idleWatts}) must not exceed maxWatts ({maxWatts}): lower idleWatts or raise maxWatts",
        field="idleWatts",
    )
    def _idle_below_max(self) -> bool:
        return self.idle_watts <= self.max_watts


class StepTime(Schema):
    """Decode step time = fixed + perSequence·sequences + perContextToken·context tokens."""

    fixed_microseconds: Annotated[NonNegative, Field(examples=[6700])]
    """The step's own time, however many sequences: reading the weights, launching the kernels."""
    per_sequence_nanoseconds: Annotated[NonNegative, Field(examples=[89000])]
    """What a sequence adds to a step."""
    per_context_token_picoseconds: Annotated[NonNegative, Field(examples=[55000])] = 0
    """What a token of context (of any sequence) adds to a step: reading its keys and values."""


class PrefillTime(Schema):
    """Prefill time of u uncached tokens ending at position L = perToken·u + perTokenPair·u·(L − u/2)."""

    per_token_nanoseconds: Annotated[NonNegative, Field(examples=[40000])]
    """What an uncached prompt token takes."""
    per_token_pair_femtoseconds: Annotated[NonNegative, Field(examples=[600000])] = 0
    """What each token before it adds to an uncached prompt token: attention."""


class EnergyCost(Schema):
    """Energy of a decode step = step + token·sequences + contextToken·context tokens; of prefill = prefillToken·uncached tokens."""

    step_millijoules: Annotated[NonNegative, Field(examples=[3160])]
    """E0: the step's own energy, however many sequences."""
    token_microjoules: Annotated[NonNegative, Field(examples=[67000])]
    """E1: what an output token adds."""
    context_token_nanojoules: Annotated[NonNegative, Field(examples=[25000])] = 0
    """What a token of context adds to each step."""
    prefill_token_microjoules: Annotated[NonNegative, Field(examples=[22000])]
    """What an uncached prompt token takes."""


class ModelCost(Schema):
    """One measured (or derived) row: a model on this accelerator."""

    model: Annotated[str, Field(min_length=1, max_length=253, examples=["*Llama-3.1-8B*"])]
    """Model name or URI as in ModelPool `spec.model`; `*` matches any run of characters, case is ignored.

    A pattern with `*` that names no quantisation (FP8, AWQ, …) does not match a quantised model.
    """
    tensor_parallel: Annotated[int, Field(ge=1, le=64, examples=[1])] = 1
    """Devices the row was measured on."""
    step: StepTime
    """Time of a decode step."""
    prefill: PrefillTime
    """Time of a prefill."""
    energy: EnergyCost
    """Energy of both, with all the power drawn meanwhile."""
    kv_tokens: Annotated[Positive, Field(examples=[430000])]
    """Tokens of KV cache that fit beside the weights."""
    source: Annotated[str, Field(max_length=1024)] = ""
    """Where the figures come from: measured, fitted or derived, and from what."""


class ModelPrior(Schema):
    """Coefficients for models without a row, from their size."""

    step_microseconds_per_weight_gb: Annotated[NonNegative, Field(alias="stepMicrosecondsPerWeightGB", examples=[420])]
    """Fixed step time per GB of weights read (memory bandwidth)."""
    step_nanoseconds_per_sequence: Annotated[NonNegative, Field(examples=[89000])]
    """What a sequence adds to a step."""
    prefill_nanoseconds_per_billion_parameters: Annotated[NonNegative, Field(examples=[5000])]
    """What an uncached prompt token takes, per billion (active) parameters, on one device."""
    step_millijoules_per_weight_gb: Annotated[NonNegative, Field(alias="stepMillijoulesPerWeightGB", examples=[190])]
    """E0 per GB of weights."""
    token_microjoules_per_billion_parameters: Annotated[NonNegative, Field(examples=[8300])]
    """E1 per billion (active) parameters."""
    prefill_token_microjoules_per_billion_parameters: Annotated[NonNegative, Field(examples=[2750])]
    """Energy of an uncached prompt token per billion (active) parameters."""
    kv_bytes_per_token_per_billion_parameters: Annotated[Positive, Field(examples=[16384])]
    """Size of a token's keys and values, per billion parameters."""
    source: Annotated[str, Field(max_length=1024)] = ""
    """Where the figures come from."""


class AcceleratorProfileSpec(Schema):
    accelerator: AcceleratorDevice
    """The device."""
    power: PowerSpec
    """What one device draws."""
    models: Annotated[list[ModelCost], Field(max_length=128)] = []
    """Rows tried in order; the first whose `model` matches and whose `tensorParallel` is equal wins."""
    prior: ModelPrior
    """Used for a model that no row matches."""


class Learned(LenientSchema):
    """A coefficient as telemetry taught it."""

    coefficient: Literal["StepEnergy", "TokenEnergy", "PrefillTokenEnergy", "IdlePower"]
    """E0, E1, the prefill energy of a token, or the idle power of a worker."""
    value_microunits: int
    """Micro-joules (energies) or micro-watts (power)."""
    standard_error_microunits: int
    """Its standard error, in the same unit."""


class Estimate(Learned):
    """A coefficient refined at run time. It is of a whole worker: of all its devices."""

    model: ShortText
    """The model it holds for."""
    tensor_parallel: int
    """Devices that the model is split over."""
    pool: ShortText
    """The ModelPool (`namespace/name`) where it was learned."""
    samples: int
    """Measurements it rests on."""
    last_update_time: Timestamp | None = None
    """When it was last refined."""


class AcceleratorProfileStatus(LenientSchema):
    observed_generation: int | None = None
    """The generation of the spec that this status speaks about."""
    conditions: Conditions = []
    """Ready."""
    estimates: Annotated[
        list[Estimate], UniqueBy("model", "tensor_parallel", "coefficient"), Field(max_length=512)
    ] = []
    """What telemetry taught about the coefficients. It outlives routers and pools; nobody computes with it."""
    pools: Annotated[list[ShortText], UniqueBy(), Field(max_length=1024)] = []
    """ModelPools (`namespace/name`) that refer to this profile."""


class AcceleratorProfile(Resource):
    kind: Literal["AcceleratorProfile"] = "AcceleratorProfile"
    spec: AcceleratorProfileSpec
    status: AcceleratorProfileStatus | None = None


__all__ = ["AcceleratorProfile", "AcceleratorProfileSpec", "ModelCost", "ModelPrior", "Name"]
