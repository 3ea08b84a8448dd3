"""From an AcceleratorProfile and a model to the CostModel of one worker.

`resolve_cost` takes the first row of the profile whose `model` pattern matches and whose `tensorParallel` is equal; a
model without a row gets the profile's prior, scaled with its size (`spec.model.parametersMillions`, or read from its
name: `-8B`, `8x7b`, `30B-A3B`) and with its weights' precision (`FP8`, `AWQ`, … in the name or `--quantization`).

Pipeline parallelism: P micro-batches are in flight, one per stage, each over 1/P of the sequences. So a sequence adds
1/P to a step, prefill is P times as fast, and the weights are read P times per round: E0 is multiplied by P. KV tokens
are multiplied by P, a lower bound where a row was measured without pipelining.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from kvfleet_api.acceleratorprofile import AcceleratorProfileSpec, ModelCost
from kvfleet_api.cost import CostModel
from kvfleet_api.modelpool import ModelSpec

GENERIC_COST: Final = CostModel(
    prefill_s_per_token=4e-5,
    prefill_s_per_token_pair=1e-9,
    step_s=0.010,
    step_s_per_sequence=1e-4,
    step_s_per_context_token=5e-8,
    idle_watts=100.0,
    step_joules=4.0,
    token_joules=0.08,
    context_token_joules=2e-5,
    prefill_token_joules=0.025,
    kv_tokens=200_000,
)
"""Where nothing is known about a worker: the order of magnitude of an 8-billion model on one data-centre GPU."""

USABLE_MEMORY: Final = 0.9
"""Share of a device's memory an engine takes (vLLM: --gpu-memory-utilization)."""
OVERHEAD_BYTES: Final = 3 * 2**30
"""Activations, CUDA graphs and the runtime's own memory, per device."""


class CostError(ValueError):
    """No cost can be told. `field` is the field of ModelPool `spec` that would settle it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Billions of parameters: all of them (memory), and those a token passes through (compute)."""

    total: float
    active: float


def resolve_cost(
    profile: AcceleratorProfileSpec,
    model: ModelSpec,
    tensor: int = 1,
    pipeline: int = 1,
    args: Sequence[str] = (),
) -> CostModel:
    """The cost of a worker of `tensor` x `pipeline` devices. Raises `CostError` where the model's size is unknown."""
    row = matching_row(profile, model, tensor, args)
    stage = _from_row(profile, row) if row else _from_prior(profile, model, tensor, pipeline, args)
    default_sequences, default_step_tokens = engine_defaults(profile)
    return replace(
        stage,
        prefill_s_per_token=stage.prefill_s_per_token / pipeline,
        prefill_s_per_token_pair=stage.prefill_s_per_token_pair / pipeline,
        step_s_per_sequence=stage.step_s_per_sequence / pipeline,
        step_s_per_context_token=stage.step_s_per_context_token / pipeline,
        step_joules=stage.step_joules * pipeline,
        idle_watts=float(profile.power.idle_watts * tensor * pipeline),
        kv_tokens=stage.kv_tokens * pipeline if row else stage.kv_tokens,
        max_sequences=integer_argument(args, "max-num-seqs") or default_sequences,
        max_step_tokens=integer_argument(args, "max-num-batched-tokens") or default_step_tokens,
    )


def matching_row(
    profile: AcceleratorProfileSpec, model: ModelSpec, tensor: int, args: Sequence[str] = ()
) -> ModelCost | None:
    """The profile's row for this model on `tensor` devices.

    `*8B*` would also match `8B-FP8`, which takes half the time: a pattern with `*` matches only models of its own precision.
    """
    precision = bytes_per_parameter(f"{model.source} {model.name}", args)
    for row in profile.models:
        if row.tensor_parallel != tensor or ("*" in row.model and bytes_per_parameter(row.model) != precision):
            continue
        if any(glob_matches(row.model, name) for name in (model.source, model.name)):
            return row
    return None


def glob_matches(pattern: str, text: str) -> bool:
    """Whether `text` is `pattern`, where `*` stands for any run of characters and case is ignored. Linear in both."""
    head, *rest = pattern.casefold().split("*")
    text = text.casefold().rstrip("/")
    if not rest:
        return text == head
    if not text.startswith(head):
        return False
    *middle, tail = rest
    position = len(head)
    for part in middle:
        position = text.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return text.endswith(tail) and len(text) - len(tail) >= position


def model_size(model: ModelSpec) -> ModelSize | None:
    """The model's size as stated, or as its URI or name tells."""
    named = _size_in(model.source) or _size_in(model.name)
    if model.parameters_millions is None:
        return named
    total = model.parameters_millions / 1000
    return ModelSize(total, min(named.active, total) if named and named.active < named.total else total)


_MIXTURE = re.compile(r"(?<![a-z0-9.])(\d{1,3})x(\d{1,4}(?:\.\d{1,3})?)b(?![a-z0-9])")
_ACTIVE = re.compile(r"(?<![a-z0-9.])a(\d{1,4}(?:\.\d{1,3})?)b(?![a-z0-9])")
_PLAIN = re.compile(r"(?<![a-z0-9.])(\d{1,4}(?:\.\d{1,3})?)([bm])(?![a-z0-9])")


def _size_in(name: str) -> ModelSize | None:
    name = name.casefold()
    mixture = _MIXTURE.search(name)
    if mixture:
        experts, each = int(mixture[1]), float(mixture[2])
        # Mixtral's convention: two experts a token.
        return ModelSize(experts * each, min(2, experts) * each) if experts * each > 0 else None
    sizes = [float(number) / (1 if unit == "b" else 1000) for number, unit in _PLAIN.findall(name)]
    total = max(sizes, default=0.0)
    if total <= 0:
        return None
    active = _ACTIVE.search(name)
    return ModelSize(total, min(float(active[1]) or total, total) if active else total)


_PRECISIONS: Final = (
    (0.5, ("awq", "gptq", "int4", "w4a16", "w4a8", "4bit", "nvfp4", "mxfp4", "fp4")),
    (1.0, ("fp8", "int8", "w8a8", "w8a16", "8bit")),
)


def bytes_per_parameter(name: str, args: Sequence[str] = ()) -> float:
    """2 (bf16), 1 or 0.5, from the model's name or the engine's `--quantization`."""
    text = f"{name} {argument(args, 'quantization') or argument(args, 'q') or ''}".casefold()
    return next((size for size, marks in _PRECISIONS if any(mark in text for mark in marks)), 2.0)


def argument(args: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`; the last one counts, as in the engine."""
    value = None
    for index, arg in enumerate(args):
        flag, equals, rest = arg.partition("=")
        if flag.lstrip("-").replace("_", "-") != name or not flag.startswith("-"):
            continue
        if equals:
            value = rest
        elif index + 1 < len(args):
            value = args[index + 1]
    return value


_FACTORS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def integer_argument(args: Sequence[str], name: str) -> int | None:
    """A whole-number argument, with vLLM's suffixes (`8k` is 8000, `8K` 8192); None if absent or not a number."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([kKmMgG]?)", (argument(args, name) or "").strip())
    value = int(float(match[1]) * _FACTORS[match[2]]) if match else 0
    return value if value > 0 else None


def engine_defaults(profile: AcceleratorProfileSpec) -> tuple[int, int]:
    """vLLM's own defaults of --max-num-seqs and --max-num-batched-tokens when it serves HTTP on this accelerator."""
    large = profile.accelerator.memory_gib >= 70 and "a100" not in profile.accelerator.product.casefold()
    return (1024, 8192) if large else (256, 2048)


def _from_row(profile: AcceleratorProfileSpec, row: ModelCost) -> CostModel:
    return CostModel(
        prefill_s_per_token=row.prefill.per_token_nanoseconds * 1e-9,
        prefill_s_per_token_pair=row.prefill.per_token_pair_femtoseconds * 1e-15,
        step_s=row.step.fixed_microseconds * 1e-6,
        step_s_per_sequence=row.step.per_sequence_nanoseconds * 1e-9,
        step_s_per_context_token=row.step.per_context_token_picoseconds * 1e-12,
        idle_watts=float(profile.power.idle_watts),
        step_joules=row.energy.step_millijoules * 1e-3,
        token_joules=row.energy.token_microjoules * 1e-6,
        context_token_joules=row.energy.context_token_nanojoules * 1e-9,
        prefill_token_joules=row.energy.prefill_token_microjoules * 1e-6,
        kv_tokens=row.kv_tokens,
    )


def _from_prior(
    profile: AcceleratorProfileSpec, model: ModelSpec, tensor: int, pipeline: int, args: Sequence[str]
) -> CostModel:
    size = model_size(model)
    if size is None:
        raise CostError(
            "model.parametersMillions",
            f"no row of the profile matches {model.source!r} on {tensor} device(s), and its name tells no size: "
            "set parametersMillions",
        )
    prior = profile.prior
    weight_gb = size.total * bytes_per_parameter(f"{model.source} {model.name}", args)
    context_s, context_joules = _context_cost(profile, size)
    return CostModel(
        prefill_s_per_token=prior.prefill_nanoseconds_per_billion_parameters * 1e-9 * size.active / tensor,
        prefill_s_per_token_pair=0.0,
        step_s=prior.step_microseconds_per_weight_gb * 1e-6 * weight_gb / tensor,
        step_s_per_sequence=prior.step_nanoseconds_per_sequence * 1e-9,
        step_s_per_context_token=context_s / tensor,
        idle_watts=float(profile.power.idle_watts),
        step_joules=prior.step_millijoules_per_weight_gb * 1e-3 * weight_gb,
        token_joules=prior.token_microjoules_per_billion_parameters * 1e-6 * size.active,
        context_token_joules=context_joules,
        prefill_token_joules=prior.prefill_token_microjoules_per_billion_parameters * 1e-6 * size.active,
        kv_tokens=_kv_tokens(profile, size, weight_gb, tensor * pipeline),
    )


def _context_cost(profile: AcceleratorProfileSpec, size: ModelSize) -> tuple[float, float]:
    """Seconds (on one device) and joules that a token of context adds to a step.

    Reading a byte of KV cache takes as long, and costs as much, as reading a byte of weights.
    """
    kv_gb = profile.prior.kv_bytes_per_token_per_billion_parameters * size.total * 1e-9
    return (
        profile.prior.step_microseconds_per_weight_gb * 1e-6 * kv_gb,
        profile.prior.step_millijoules_per_weight_gb * 1e-3 * kv_gb,
    )


def _kv_tokens(profile: AcceleratorProfileSpec, size: ModelSize, weight_gb: float, devices: int) -> int:
    memory = devices * (profile.accelerator.memory_gib * 2**30 * USABLE_MEMORY - OVERHEAD_BYTES)
    free = memory - weight_gb * 1e9
    if free <= 0:
        raise CostError(
            "parallelism.tensor",
            f"the weights take about {weight_gb:.0f} GB, but {devices} device(s) of {profile.accelerator.memory_gib} GiB "
            f"leave {max(memory, 0) / 1e9:.0f} GB for them: raise tensor or pipeline, or correct model.parametersMillions",
        )
    return max(1, int(free / (profile.prior.kv_bytes_per_token_per_billion_parameters * size.total)))
