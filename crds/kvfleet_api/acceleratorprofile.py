"""AcceleratorProfile (`ap`, cluster-scoped): what an accelerator costs in time and energy, per model and in general.

Integers in named units only, as Kubernetes' API conventions ask; `cost_model` turns them into SI floats.
A model without a measured row gets one from `prior`, which scales with the model's weights.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kvfleet_api.common import Condition, LenientSchema, Name, Resource, Schema

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

    @model_validator(mode="after")
    def _idle_below_max(self) -> PowerSpec:
        if self.idle_watts > self.max_watts:
            raise ValueError(
                f"idleWatts ({self.idle_watts}) must not exceed maxWatts ({self.max_watts}): lower idleWatts or raise maxWatts"
            )
        return self


class StepTime(Schema):
    """Decode step time = fixed + perSequence·sequences + perContextToken·context tokens."""

    fixed_microseconds: Annotated[NonNegative, Field(examples=[6700])]
    per_sequence_nanoseconds: Annotated[NonNegative, Field(examples=[89000])]
    per_context_token_picoseconds: NonNegative = 0


class PrefillTime(Schema):
    """Prefill time of u uncached tokens ending at position L = perToken·u + perTokenPair·u·(L − u/2)."""

    per_token_nanoseconds: Annotated[NonNegative, Field(examples=[40000])]
    per_token_pair_femtoseconds: NonNegative = 0


class EnergyCost(Schema):
    """Energy of a decode step = step + token·sequences + contextToken·context tokens; of prefill = prefillToken·uncached tokens."""

    step_millijoules: Annotated[NonNegative, Field(examples=[3160])]
    token_microjoules: Annotated[NonNegative, Field(examples=[67000])]
    context_token_nanojoules: NonNegative = 0
    prefill_token_microjoules: Annotated[NonNegative, Field(examples=[22000])]


class ModelCost(Schema):
    """One measured (or derived) row: a model on this accelerator."""

    model: Annotated[str, Field(min_length=1, max_length=253, examples=["*Llama-3.1-8B*"])]
    """Model name or URI as in ModelPool `spec.model`; `*` matches any run of characters, case is ignored."""
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Devices the row was measured on."""
    step: StepTime
    prefill: PrefillTime
    energy: EnergyCost
    kv_tokens: Annotated[Positive, Field(examples=[430000])]
    """Tokens of KV cache that fit beside the weights."""
    source: Annotated[str, Field(max_length=1024)] = ""
    """Where the figures come from: measured, fitted or derived, and from what."""


class ModelPrior(Schema):
    """Coefficients for models without a row, from their size."""

    step_microseconds_per_weight_gb: Annotated[NonNegative, Field(alias="stepMicrosecondsPerWeightGB", examples=[420])]
    """Fixed step time per GB of weights read (memory bandwidth)."""
    step_nanoseconds_per_sequence: Annotated[NonNegative, Field(examples=[89000])]
    prefill_nanoseconds_per_billion_parameters: Annotated[NonNegative, Field(examples=[5000])]
    step_millijoules_per_weight_gb: Annotated[NonNegative, Field(alias="stepMillijoulesPerWeightGB", examples=[190])]
    token_microjoules_per_billion_parameters: Annotated[NonNegative, Field(examples=[8300])]
    prefill_token_microjoules_per_billion_parameters: Annotated[NonNegative, Field(examples=[2750])]
    kv_bytes_per_token_per_billion_parameters: Annotated[Positive, Field(examples=[16384])]
    source: Annotated[str, Field(max_length=1024)] = ""


class AcceleratorProfileSpec(Schema):
    accelerator: AcceleratorDevice
    power: PowerSpec
    models: Annotated[list[ModelCost], Field(max_length=128)] = []
    """Rows tried in order; the first whose `model` matches and whose `tensorParallel` is equal wins."""
    prior: ModelPrior
    """Used for a model that no row matches."""


class Estimate(LenientSchema):
    """A coefficient refined at run time."""

    model: str
    coefficient: Literal["StepEnergy", "TokenEnergy", "PrefillTokenEnergy", "IdlePower"]
    value_microunits: int
    """Micro-joules (energies) or micro-watts (power)."""
    standard_error_microunits: int
    samples: int
    last_update_time: str | None = None


class AcceleratorProfileStatus(LenientSchema):
    observed_generation: int | None = None
    conditions: list[Condition] = []
    estimates: list[Estimate] = []
    """What telemetry taught about the coefficients."""
    pools: list[str] = []
    """ModelPools (`namespace/name`) that refer to this profile."""


class AcceleratorProfile(Resource):
    kind: Literal["AcceleratorProfile"] = "AcceleratorProfile"
    spec: AcceleratorProfileSpec
    status: AcceleratorProfileStatus | None = None


__all__ = ["AcceleratorProfile", "AcceleratorProfileSpec", "ModelCost", "ModelPrior", "Name"]
