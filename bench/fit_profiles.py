"""Fit the bundled AcceleratorProfiles to published measurements.

    python bench/fit_profiles.py DATA_DIR             print coefficients and errors
    python bench/fit_profiles.py DATA_DIR --write     also write crds/kvfleet_api/profiles/ and the tables in
                                                      docs/accelerators.md

DATA_DIR holds, gzipped: `energy/mlenergy_v3_llm_configs.csv.gz` (ML.ENERGY v3: power and inter-token latency, H100 and
B200), `energy/aiconfigurator_silicon_h100_h200.csv.gz` (aiconfigurator: end-to-end TTFT and TPOT), `gpu_profiles.csv.gz`
(aiconfigurator's kernel times summed to steps). docs/accelerators.md says what is made of them.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from profile_fits import (
    DEVICES,
    LLAMA_8B,
    LLAMA_70B,
    PROMPT_TOKENS,
    QWEN_8B,
    QWEN_14B,
    QWEN_32B,
    Fits,
    Record,
    Row,
    column,
)

from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_api.modelpool import ModelSpec
from kvfleet_api.resolve import resolve_cost

ROOT = Path(__file__).parent.parent


# Profiles


def whole(value: float, least: int = 0) -> int:
    """Rounded to four significant digits: more would pretend."""
    digits = 0 if value <= 0 else 3 - math.floor(math.log10(value))
    return max(least, round(round(value, digits)))


def manifest(key: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The AcceleratorProfile of one device."""
    device = DEVICES[key]
    own = sorted((r for r in rows if r.device == key), key=lambda r: (-len(r.model.pattern), r.model.pattern, r.tensor))
    models = [
        {
            "model": row.model.pattern,
            "tensorParallel": row.tensor,
            "step": {
                "fixedMicroseconds": whole(row.w * 1e6),
                "perSequenceNanoseconds": whole(row.h * 1e9),
                "perContextTokenPicoseconds": whole(row.c * 1e12),
            },
            "prefill": {
                "perTokenNanoseconds": whole(row.pp * 1e9),
                "perTokenPairFemtoseconds": whole(row.pq * 1e15),
            },
            "energy": {
                "stepMillijoules": whole(row.e0 * 1e3),
                "tokenMicrojoules": whole(row.e1 * 1e6),
                "contextTokenNanojoules": whole(row.ec * 1e9),
                "prefillTokenMicrojoules": whole(row.prefill_joules * 1e6),
            },
            "kvTokens": whole(row.kv_tokens),
            "source": "; ".join(row.notes) + "; KV tokens computed",
        }
        for row in own
    ]
    spec = {
        "accelerator": {"product": device.product, "memoryGiB": math.floor(device.memory_gib)},
        "power": {"idleWatts": device.idle_watts, "maxWatts": device.max_watts},
        "models": models,
        "prior": prior(own),
    }
    annotations = {"kvfleet.io/idle-watts-source": device.idle_source}
    metadata = {"name": device.name, "annotations": annotations}
    return {"apiVersion": "kvfleet.io/v1alpha1", "kind": "AcceleratorProfile", "metadata": metadata, "spec": spec}


def prior(rows: Sequence[Row]) -> dict[str, Any]:
    """Medians over the device's bf16 rows, per GB of weights or billion parameters."""
    bf16 = [row for row in rows if row.model.weight_bytes == 2.0]

    def median(part: Callable[[Row], float]) -> int:
        return whole(statistics.median(part(row) for row in bf16), 1)

    return {
        "stepMicrosecondsPerWeightGB": median(lambda r: r.w * 1e6 * r.tensor / r.model.weight_gb),
        "stepNanosecondsPerSequence": median(lambda r: r.h * 1e9),
        "prefillNanosecondsPerBillionParameters": median(lambda r: r.pp * 1e9 * r.tensor / r.model.parameters_b),
        "stepMillijoulesPerWeightGB": median(lambda r: r.e0 * 1e3 / r.model.weight_gb),
        "tokenMicrojoulesPerBillionParameters": median(lambda r: r.e1 * 1e6 / r.model.parameters_b),
        "prefillTokenMicrojoulesPerBillionParameters": median(lambda r: r.prefill_joules * 1e6 / r.model.parameters_b),
        "kvBytesPerTokenPerBillionParameters": whole(
            statistics.geometric_mean(
                m.kv_bytes / m.parameters_b for m in (LLAMA_8B, QWEN_8B, QWEN_14B, QWEN_32B, LLAMA_70B)
            )
        ),
        "source": f"medians of the {len(bf16)} bf16 rows above; KV bytes: geometric mean of Llama-3 and Qwen3 models",
    }


# Report


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)])


def rows_table(rows: Sequence[Row]) -> str:
    head = ["GPU", "model", "TP", "from", "W ms", "H us", "C ns", "Pp us", "Pq ns", "E0 J", "E1 mJ", "Ec uJ", "ep mJ",
            "KV tokens", "points", "step error", "energy error"]  # fmt: skip
    lines = []
    for r in sorted(rows, key=lambda r: (list(DEVICES).index(r.device), r.model.pattern, r.tensor)):
        numbers = (
            r.w * 1e3,
            r.h * 1e6,
            r.c * 1e9,
            r.pp * 1e6,
            r.pq * 1e9,
            r.e0,
            r.e1 * 1e3,
            r.ec * 1e6,
            r.prefill_joules * 1e3,
        )
        energy = "derived" if r.energy_error is None else f"{r.energy_error:.1%}"
        lines.append([r.device, r.model.pattern.strip("*"), str(r.tensor), r.kind, *(f"{n:.3g}" for n in numbers),
                      f"{r.kv_tokens:,}", str(r.points), f"{r.step_error:.1%}", energy])  # fmt: skip
    return table(head, lines)


def held_out_table(records: Sequence[Record], manifests: dict[str, dict[str, Any]]) -> str:
    """The priors against dense bf16 models that no row was fitted to, through kvfleet's own resolution."""
    fitted = {model.mlenergy_id for model in (LLAMA_8B, QWEN_8B, QWEN_14B, QWEN_32B)}
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for r in records:
        dense = (r["task"], r["architecture"], r["weight_precision"]) == (
            "lm-arena-chat",
            "Dense Transformer",
            "bfloat16",
        )
        if dense and r["model_id"] not in fitted and r["tensor_parallel"] == r["num_gpus"]:
            groups.setdefault((r["gpu_model"], r["model_id"], int(r["num_gpus"])), []).append(r)
    lines = []
    for (gpu, name, tensor), rows in sorted(groups.items()):
        spec = AcceleratorProfile.model_validate(manifests[gpu]).spec
        millions = round(float(rows[0]["total_params_billions"]) * 1000)
        cost = resolve_cost(spec, ModelSpec(name="held-out", parameters_millions=millions), tensor)
        batch, output = column(rows, "avg_batch_size"), column(rows, "avg_output_len")
        context = batch * (PROMPT_TOKENS["lm-arena-chat"] + output / 2)
        step = np.array([cost.decode_step_s(b, c) for b, c in zip(batch, context, strict=True)])
        joules = np.array([cost.decode_step_joules(b, c) for b, c in zip(batch, context, strict=True)])
        joules = joules / batch + cost.prefill_token_joules * PROMPT_TOKENS["lm-arena-chat"] / output
        errors = step / column(rows, "median_itl_ms") * 1e3 - 1, joules / column(rows, "energy_per_token_joules") - 1
        shown = [f"{np.median(e):+.0%} ({e.min():+.0%} … {e.max():+.0%})" for e in errors]
        lines.append([gpu, name, str(tensor), str(len(rows)), *shown])
    return table(["GPU", "model", "TP", "points", "step: median error (range)", "energy per token"], lines)


def report(fits: Fits, manifests: dict[str, dict[str, Any]]) -> str:
    """The generated part of docs/accelerators.md."""
    shares = ", ".join(f"{load:.2f}" for load in fits.loads)
    row, context_tokens = fits.row("H100", LLAMA_8B), 100
    shift_h, shift_e = row.c * context_tokens / row.h, row.prefill_joules * context_tokens / 400 / row.e1
    priors = [
        [key, *(str(value) for name, value in manifests[key]["spec"]["prior"].items() if name != "source")]
        for key in DEVICES
    ]
    power = [[key, str(d.idle_watts), str(d.max_watts), d.idle_source] for key, d in DEVICES.items()]
    return "\n\n".join(
        [
            "### Rows",
            rows_table(fits.rows),
            "### What the fits found on the way",
            "\n".join(
                [
                    f"- The host adds {fits.step_overhead[1] * 1e3:.2f} ms to a step on one device, {fits.parallel_overhead * 1e3:.1f} ms with "
                    f"tensor parallelism, and {fits.sequence_overhead * 1e6:.0f} us per sequence, to what the kernels take.",
                    f"- Prefill takes {fits.prefill_factor:.2f} times the sum of its kernels.",
                    f"- Power over W, H and C is {shares} of the limit (medians of H100).",
                    f"- {context_tokens} more prompt tokens than assumed in ML.ENERGY's chat task would lower H of Llama-3.1-8B on H100 by "
                    f"{shift_h:.0%} and its E1 by {shift_e:.0%}.",
                ]
            ),
            "### Priors against models they were not fitted to",
            held_out_table(fits.mlenergy, manifests),
            "### Priors",
            table(["GPU", "W us/GB", "H ns", "Pp ns/B", "E0 mJ/GB", "E1 uJ/B", "ep uJ/B", "KV bytes/B"], priors),
            "### Power of a device",
            table(["GPU", "idle W", "limit W", "idle from"], power),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Fit the bundled AcceleratorProfiles.")
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument(
        "--write", action="store_true", help="write the profiles and the tables of docs/accelerators.md"
    )
    options = parser.parse_args()
    fits = Fits.of(options.data)
    manifests = {key: manifest(key, fits.rows) for key in DEVICES}
    text = report(fits, manifests)
    print(text)
    if options.write:
        header = (
            "# Written by bench/fit_profiles.py; docs/accelerators.md says how well it fits and what it cannot know.\n"
        )
        for key, content in manifests.items():
            path = ROOT / "crds/kvfleet_api/profiles" / f"{DEVICES[key].name}.yaml"
            path.write_text(header + yaml.safe_dump(content, sort_keys=False, width=120), encoding="utf-8")
        page = ROOT / "docs/accelerators.md"
        marked = re.compile(r"<!-- fit -->.*<!-- /fit -->", re.DOTALL)
        filled = f"<!-- fit -->\n\n{text}\n\n<!-- /fit -->"
        page.write_text(marked.sub(lambda _: filled, page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
