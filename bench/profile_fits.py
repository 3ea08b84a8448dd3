"""How the coefficients of a worker are fitted to published measurements; `fit_profiles.py` writes them down.

Three kinds of rows, best first. Each fit minimises the sum of absolute relative errors, so that outliers do not steer.

1. energy: ML.ENERGY's median inter-token latency and energy per token over batch and context -> W, H, C, E0, E1, Ec
2. end to end: TPOT = W + H·b + C·b·(isl + osl/2) + Pp·isl·(b - 1)/osl -> W, H, C and Pp (others' prefills interrupt decoding)
3. kernels: sums of measured kernels, to which the host's share is added, as found on H100 between kinds 1, 2 and 3

What a device draws where no engine was metered on it comes from bench/measured/ (one device alone), else from H100.
"""

from __future__ import annotations

import csv
import gzip
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from gpu_energy_fit import MEASURED
from gpu_energy_fit import read as read_measured

Record = dict[str, str]
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Device:
    name: str
    product: str
    memory_gib: float
    max_watts: int
    idle_watts: int
    idle_source: str
    bandwidth_tb_s: float
    peak_tflops: float
    kernels: str = ""
    mlenergy: str = ""
    silicon: str = ""


POWERTRACE = "measured minimum with the model resident and no request (powertrace-sim)"
TORCH = "measured with a model in memory and nothing running (docs/gpu-energy.md)"
DEVICES = {
    "A100": Device("nvidia-a100-80gb", "NVIDIA-A100-SXM4-80GB", 80.0, 400, 71, POWERTRACE, 2.04, 312, "A100-SXM4-80GB"),
    "H100": Device("nvidia-h100-80gb", "NVIDIA-H100-80GB-HBM3", 79.6, 700, 124, TORCH, 3.35, 989, "H100-SXM-80GB",
                   "H100", "h100_sxm"),
    "H200": Device("nvidia-h200", "NVIDIA-H200", 140.4, 700, 127, TORCH, 4.8, 989, "H200-SXM-141GB", "", "h200_sxm"),
    "B200": Device("nvidia-b200", "NVIDIA-B200", 179.1, 1000, 194,
                   "nvidia-smi of GPUs that hold a model, 0 % busy: 192 to 196 W (NVIDIA/TensorRT-LLM issue 10278)",
                   8.0, 2250, "", "B200"),
    "L40S": Device("nvidia-l40s", "NVIDIA-L40S", 45.0, 350, 83,
                   "nvidia-smi of a GPU that holds a vLLM model, 0 % busy (one public listing)", 0.864, 362, "L40S-48GB"),
}  # fmt: skip


def torch_loads(device: Device) -> tuple[float, float] | None:
    """Shares of the power limit that this device drew over W and over C, with Llama-3.1-8B; None where it was not measured."""
    path = MEASURED / f"{device.name}.json"
    if not path.exists():
        return None
    found = next(one for one in read_measured(path) if one.model == "llama-3.1-8b").fitted()
    if found.step_joules is None or found.context_token_joules is None:
        return None
    return (
        found.step_joules.value / found.step_s.value / device.max_watts,
        found.context_token_joules.value / found.step_s_per_context_token.value / device.max_watts,
    )


@dataclass(frozen=True)
class Model:
    """What a model's own configuration says. `attention`: layers x query heads; all have head dimension 128."""

    pattern: str
    mlenergy_id: str
    parameters_b: float
    kv_bytes: int
    attention: int
    weight_bytes: float = 2.0

    @property
    def weight_gb(self) -> float:
        return self.parameters_b * self.weight_bytes


LLAMA_8B = Model("*Llama-3*-8B*", "meta-llama/Llama-3.1-8B-Instruct", 8.03, 131072, 32 * 32)
LLAMA_70B = Model("*Llama-3*-70B*", "", 70.55, 327680, 80 * 64)
LLAMA_70B_FP8 = replace(LLAMA_70B, pattern="*Llama-3*-70B*FP8*", weight_bytes=1.03)
QWEN_8B = Model("*Qwen3-8B*", "Qwen/Qwen3-8B", 8.19, 147456, 36 * 32)
QWEN_14B = Model("*Qwen3-14B*", "Qwen/Qwen3-14B", 14.77, 163840, 40 * 40)
QWEN_32B = Model("*Qwen3-32B*", "Qwen/Qwen3-32B", 32.76, 262144, 64 * 64)

PROMPT_TOKENS = {"lm-arena-chat": 150.0, "gpqa": 250.0}
"""Mean prompt lengths. The data set does not state them: assumed; the report says what 100 tokens more would change."""
PREFILL_LOAD = 0.985
"""Share of the power limit drawn while prefilling: the highest load seen (691 of 700 W on H100, 976 of 1000 W on B200)."""
MEASURED_PROMPT = 2048
"""Prompt at which the energy of a prefill token is taken."""


@dataclass(frozen=True)
class Row:
    """A fitted row: seconds and joules, for the whole worker."""

    device: str
    model: Model
    tensor: int
    kind: str
    w: float
    h: float
    c: float
    pp: float
    pq: float
    e0: float
    e1: float
    ec: float
    step_error: float
    energy_error: float | None
    points: int
    notes: list[str] = field(default_factory=list)

    @property
    def prefill_joules(self) -> float:
        watts = PREFILL_LOAD * DEVICES[self.device].max_watts * self.tensor
        return watts * (self.pp + self.pq * MEASURED_PROMPT / 2)

    @property
    def kv_tokens(self) -> int:
        """(90 % of memory − 3.5 GiB) on each device, less the weights; aiconfigurator's arithmetic."""
        free = (0.9 * DEVICES[self.device].memory_gib - 3.5) * 2**30 * self.tensor - self.model.weight_gb * 1e9
        return int(free / self.model.kv_bytes)


# Fitting


def read(data: Path, name: str) -> list[Record]:
    with gzip.open(data / name, "rt", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def column(records: Sequence[Record], name: str) -> Array:
    return np.array([float(record[name]) for record in records])


def fit(terms: Sequence[Array], values: Array) -> tuple[list[float], Array]:
    """Coefficients ≥ 0 of the terms, and each point's relative error. Least absolute relative errors, by reweighting."""
    matrix, used = np.column_stack(terms) / values[:, None], list(range(len(terms)))
    while True:
        weights = np.ones(len(values))
        for _ in range(100):
            root = np.sqrt(weights)
            found = np.linalg.lstsq(matrix[:, used] * root[:, None], root, rcond=None)[0]
            weights = 1 / np.maximum(np.abs(matrix[:, used] @ found - 1), 1e-3)
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    coefficients = np.zeros(len(terms))
    coefficients[used] = found
    return coefficients.tolist(), np.abs(matrix @ coefficients - 1)


@dataclass(frozen=True)
class Steps:
    """Coefficients of a step with their median error; `pp`, `pq` where the source tells about prefill."""

    w: float
    h: float
    c: float
    error: float
    points: int
    pp: float = 0.0
    pq: float = 0.0


def kernel_steps(profiles: Sequence[Record], device: Device, model: str, tensor: int) -> Steps:
    """Sums of measured kernels: decode over (batch, context), prefill over length."""

    def rows(metric: str) -> list[Record]:
        return [
            r
            for r in profiles
            if (r["gpu"], r["model"], r["tp"], r["metric"]) == (device.kernels, model, str(tensor), metric)
            and r["kind"] == "derived:sum_of_measured_kernels"
        ]

    decode, prefill = rows("decode_step_time"), rows("prefill_throughput")
    batch, length = column(decode, "batch"), column(prefill, "context_tokens")
    (w, h, c), errors = fit(
        [np.ones_like(batch), batch, batch * column(decode, "context_tokens")], column(decode, "value") / 1e3
    )
    (pp, pq), _ = fit([length, length**2 / 2], length / column(prefill, "value"))
    return Steps(w, h, c, float(np.median(errors)), len(decode), pp, pq)


def end_to_end_steps(silicon: Sequence[Record], device: Device, path: str, tensor: int, precision: str) -> Steps:
    """vLLM's own TPOT. Configurations whose TTFT is mostly queueing are left out: their batch is not what it says."""
    key = (device.silicon, "vllm", "agg", path, str(tensor), precision)
    rows = [
        r
        for r in silicon
        if (r["system"], r["backend"], r["mode"], r["model_path"], r["tp_size"], r["precision"]) == key
    ]
    least = {isl: min(float(r["silicon_ttft_ms"]) for r in rows if r["isl"] == isl) for isl in {r["isl"] for r in rows}}
    rows = [r for r in rows if float(r["silicon_ttft_ms"]) <= 3.5 * least[r["isl"]]]
    batch, isl, osl = column(rows, "batch_size"), column(rows, "isl"), column(rows, "osl")
    terms = [np.ones_like(batch), batch, batch * (isl + osl / 2), isl * (batch - 1) / osl]
    (w, h, c, pp), errors = fit(terms, column(rows, "silicon_tpot_ms") / 1e3)
    return Steps(w, h, c, float(np.median(errors)), len(rows), pp)


@dataclass(frozen=True)
class Measured:
    """ML.ENERGY's configurations of one model on one device."""

    batch: Array
    context: Array  # tokens a sequence holds on average
    prompt_share: Array  # prompt tokens per output token
    step_s: Array
    step_joules: Array

    @classmethod
    def of(cls, records: Sequence[Record], device: Device, model: Model, tensor: int, tasks: Sequence[str]) -> Measured:
        key = (device.mlenergy, model.mlenergy_id, str(tensor))
        rows = [r for r in records if (r["gpu_model"], r["model_id"], r["num_gpus"]) == key and r["task"] in tasks]
        batch, output = column(rows, "avg_batch_size"), column(rows, "avg_output_len")
        prompt = np.array([PROMPT_TOKENS[r["task"]] for r in rows])
        joules = column(rows, "energy_per_token_joules") * batch
        return cls(batch, prompt + output / 2, prompt / output, column(rows, "median_itl_ms") / 1e3, joules)


# Rows


@dataclass
class Fits:
    """All data, and the rows made of them."""

    mlenergy: list[Record]
    silicon: list[Record]
    profiles: list[Record]
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, data: Path) -> Fits:
        names = ("energy/mlenergy_v3_llm_configs", "energy/aiconfigurator_silicon_h100_h200", "gpu_profiles")
        fits = cls(*(read(data, f"{name}.csv.gz") for name in names))
        fits.run()
        return fits

    def run(self) -> None:
        h100 = DEVICES["H100"]
        self.h100_8b = kernel_steps(self.profiles, h100, "Llama-3.1-8B", 1)
        self.prefill_factor = statistics.median(
            end_to_end_steps(self.silicon, h100, "Qwen/Qwen3-32B", tensor, "").pp
            / (
                kernel_steps(self.profiles, h100, "Llama-3.1-70B", tensor).pp
                * QWEN_32B.parameters_b
                / LLAMA_70B.parameters_b
            )
            for tensor in (2, 4, 8)
        )
        for model, tensor in ((QWEN_8B, 1), (QWEN_14B, 1), (QWEN_32B, 2)):
            self.energy_row("H100", model, tensor, ("lm-arena-chat", "gpqa"))
        self.energy_row("H100", LLAMA_8B, 1, ("lm-arena-chat",), c=self.h100_8b.c, like=self.row("H100", QWEN_8B))
        for model in (LLAMA_8B, QWEN_8B, QWEN_14B, QWEN_32B):
            like = self.row("H100", model)
            c = like.c * like.tensor * h100.bandwidth_tb_s / DEVICES["B200"].bandwidth_tb_s
            self.energy_row("B200", model, 1, ("lm-arena-chat",), c=c, like=like)
        self.loads = [
            statistics.median(part(r) / (h100.max_watts * r.tensor) for r in self.rows if r.device == "H100")
            for part in (lambda r: r.e0 / r.w, lambda r: r.e1 / r.h, lambda r: r.ec / r.c)
        ]
        self.host_overheads()
        for device, path, model, tensor, precision in (
            ("H100", "Qwen/Qwen3-32B", QWEN_32B, 4, ""),
            ("H100", "meta-llama/Llama-3.1-70B", LLAMA_70B_FP8, 2, "fp8"),
            ("H100", "meta-llama/Llama-3.1-70B", LLAMA_70B_FP8, 4, "fp8"),
            ("H200", "meta-llama/Llama-3.1-70B", LLAMA_70B_FP8, 1, "fp8"),
            ("H200", "meta-llama/Llama-3.1-70B", LLAMA_70B_FP8, 2, "fp8"),
            ("H200", "meta-llama/Llama-3.1-70B", LLAMA_70B_FP8, 4, "fp8"),
        ):
            self.end_to_end_row(device, path, model, tensor, precision)
        for device, name, model, tensors in (
            ("A100", "Llama-3.1-8B", LLAMA_8B, (1,)),
            ("A100", "Llama-3.1-70B", LLAMA_70B, (4, 8)),
            ("H100", "Llama-3.1-70B", LLAMA_70B, (4, 8)),
            ("H200", "Llama-3.1-8B", LLAMA_8B, (1,)),
            ("H200", "Llama-3.1-70B", LLAMA_70B, (2, 4, 8)),
            ("L40S", "Llama-3.1-8B", LLAMA_8B, (1,)),
        ):
            for tensor in tensors:
                self.kernel_row(device, name, model, tensor)

    def row(self, device: str, model: Model) -> Row:
        return next(r for r in self.rows if r.device == device and r.model == model)

    def prefill(self, device: str, model: Model, tensor: int) -> tuple[float, float]:
        """Pp and Pq from Llama-3.1-8B's kernels on H100, by parameters and attention heads, and by peak arithmetic."""
        slower = DEVICES["H100"].peak_tflops / DEVICES[device].peak_tflops * self.prefill_factor / tensor
        return (
            self.h100_8b.pp * model.parameters_b / LLAMA_8B.parameters_b * slower,
            self.h100_8b.pq * model.attention / LLAMA_8B.attention * slower,
        )

    def energy_row(
        self, device: str, model: Model, tensor: int, tasks: Sequence[str], c: float = 0, like: Row | None = None
    ) -> None:
        """Kind 1. Without long-context runs `c` is given, and Ec such that reading context draws `like`'s share of the power limit."""
        data = Measured.of(self.mlenergy, DEVICES[device], model, tensor, tasks)
        one, context = np.ones_like(data.batch), data.batch * data.context
        pp, pq = self.prefill(device, model, tensor)
        row = Row(device, model, tensor, "energy", 0, 0, c, pp, pq, 0, 0, 0, 0, 0, len(one))
        # Energy per token holds the prefills' energy: it is charged to prefill tokens, not to output tokens.
        joules = data.step_joules - row.prefill_joules * data.prompt_share * data.batch
        if like is None:
            (w, h, c), step_errors = fit([one, data.batch, context], data.step_s)
            (e0, e1, ec), energy_errors = fit([one, data.batch, context], joules)
            note = "context cost from the long answers of gpqa"
        else:
            share = like.ec / like.c / (DEVICES[like.device].max_watts * like.tensor)
            ec = share * c * DEVICES[device].max_watts * tensor
            (w, h), step_errors = fit([one, data.batch], data.step_s - c * context)
            (e0, e1), energy_errors = fit([one, data.batch], joules - ec * context)
            note = f"context cost derived from {like.device} ({like.model.pattern.strip('*')})"
        errors = float(np.median(step_errors)), float(np.median(energy_errors))
        self.rows.append(
            replace(row, w=w, h=h, c=c, e0=e0, e1=e1, ec=ec, step_error=errors[0], energy_error=errors[1], notes=[
                f"W, H, E0, E1 fitted to ML.ENERGY v3 ({len(one)} measured vLLM configurations)", note,
                "prefill from aiconfigurator kernels of Llama-3.1-8B on H100, scaled by parameters"
                + ("" if device == "H100" else " and peak bf16 arithmetic"),
            ])
        )  # fmt: skip

    def host_overheads(self) -> None:
        """What the kernels do not hold: per step on one device, per step with tensor parallelism, per sequence."""
        h100, kernels = DEVICES["H100"], self.profiles
        single = self.row("H100", LLAMA_8B)
        self.step_overhead = {1: single.w - self.h100_8b.w}
        per_sequence, parallel = [single.h - self.h100_8b.h], []
        for tensor in (2, 4, 8):
            shared = (
                kernel_steps(kernels, h100, "Llama-3.1-70B", tensor).h * QWEN_32B.parameters_b / LLAMA_70B.parameters_b
            )
            per_sequence.append(end_to_end_steps(self.silicon, h100, "Qwen/Qwen3-32B", tensor, "").h - shared)
        for name in ("H100", "H200"):
            device = DEVICES[name]
            seconds_per_gb = kernel_steps(kernels, device, "Llama-3.1-8B", 1).w / LLAMA_8B.weight_gb
            for tensor in (2, 4, 8):
                fp8 = end_to_end_steps(self.silicon, device, "meta-llama/Llama-3.1-70B", tensor, "fp8").w
                bf16 = fp8 + (LLAMA_70B.weight_gb - LLAMA_70B_FP8.weight_gb) * seconds_per_gb / tensor
                parallel.append(bf16 - kernel_steps(kernels, device, "Llama-3.1-70B", tensor).w)
        self.parallel_overhead = statistics.median(parallel)
        self.sequence_overhead = statistics.median(per_sequence)

    def derived(self, device: str, model: Model, tensor: int, kind: str, steps: Steps, notes: list[str]) -> None:
        """A row whose power was not measured on this engine: shares of the power limit as elsewhere."""
        watts = DEVICES[device].max_watts * tensor
        loads, origin = self.loads, "power not measured: {} of the power limit over W, H, C, the medians of H100"
        measured = torch_loads(DEVICES[device]) if device != "H100" and tensor == 1 else None
        if measured is not None:
            loads = [measured[0], loads[1], measured[1]]
            origin = "power: {} of the power limit over W, H, C, as Llama-3.1-8B drew on this device (docs/gpu-energy.md), over H as on H100"
        e0, e1, ec = (load * watts * part for load, part in zip(loads, (steps.w, steps.h, steps.c), strict=True))
        notes = [*notes, origin.format(", ".join(f"{load:.2f}" for load in loads))]
        self.rows.append(
            Row(device, model, tensor, kind, steps.w, steps.h, steps.c, steps.pp, steps.pq, e0, e1, ec, steps.error, None,
                steps.points, notes)
        )  # fmt: skip

    def end_to_end_row(self, device: str, path: str, model: Model, tensor: int, precision: str) -> None:
        steps = end_to_end_steps(self.silicon, DEVICES[device], path, tensor, precision)
        pq = self.prefill(device, model, tensor)[1]
        notes = [
            f"W, H, C, prefill fitted to TPOT of {steps.points} end-to-end vLLM configurations (aiconfigurator)",
            "attention's share of prefill scaled from Llama-3.1-8B kernels on H100",
        ]
        self.derived(device, model, tensor, "end to end", replace(steps, pq=pq), notes)

    def kernel_row(self, device: str, name: str, model: Model, tensor: int) -> None:
        steps = kernel_steps(self.profiles, DEVICES[device], name, tensor)
        step = self.step_overhead[1] if tensor == 1 else self.parallel_overhead
        steps = replace(
            steps, w=steps.w + step, h=steps.h + self.sequence_overhead, pp=steps.pp * self.prefill_factor,
            pq=steps.pq * self.prefill_factor,
        )  # fmt: skip
        notes = [
            f"sums of measured kernels (aiconfigurator) + host overhead of {step * 1e3:.1f} ms a step and "
            f"{self.sequence_overhead * 1e6:.0f} us a sequence, prefill x {self.prefill_factor:.2f}, as found on H100/H200"
        ]
        self.derived(device, model, tensor, "kernels", steps, notes)
