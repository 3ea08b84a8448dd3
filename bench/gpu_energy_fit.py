"""What a measured GPU says of the energy model: coefficients, their errors, and the bundled profile beside it.

    python bench/gpu_energy_fit.py                          tables for docs/gpu-energy.md, of all of bench/measured/
    python bench/gpu_energy_fit.py --write                  write them there, the picture, and examples/accelerators/
    python bench/gpu_energy_fit.py FILE                     of what bench/gpu_energy.py wrote elsewhere

The fit is that of `kvfleet calibrate`. Prompts below 2,048 tokens are left out of it: torch launches each kernel by itself there,
and the device waits for the host.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvfleet.calibrate import Runs, errors, profile
from kvfleet.calibrate_fit import Decode, Fitted, Prefill, fit
from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_api.cost import CostModel
from kvfleet_api.modelpool import ModelSpec
from kvfleet_api.resolve import matching_row, resolve_cost

ROOT = Path(__file__).parents[1]
MEASURED, PROFILES = ROOT / "bench/measured", ROOT / "crds/kvfleet_api/profiles"
PAGE, PICTURE = ROOT / "docs/gpu-energy.md", ROOT / "docs/gpu-energy.png"
EXAMPLES = ROOT / "examples/accelerators"
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
LEAST_PROMPT_TOKENS = 2048
NAMES = {"llama-3.1-8b": "meta-llama/Llama-3.1-8B", "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
         "qwen3-14b": "Qwen/Qwen3-14B", "qwen3-32b": "Qwen/Qwen3-32B"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """One model on one device."""

    device: str
    """The name of the bundled profile, and of the file."""
    model: str
    parameters: int
    bare_watts: float
    """Of the device without any process."""
    conditions: str
    points: Sequence[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [point for point in self.points if point["point"] == kind]

    def watts(self, kind: str) -> float:
        return float(self.of(kind)[0]["watts"])

    @property
    def runs(self) -> Runs:
        return Runs(
            [
                Prefill(p["tokens"], p["seconds"] / p["steps"], p["joules"] / p["steps"])
                for p in self.of("prefill")
                if p["tokens"] >= LEAST_PROMPT_TOKENS
            ],
            [
                Decode(p["sequences"], p["sequences"] * p["context"], p["steps"], p["seconds"], p["joules"])
                for p in self.of("decode")
            ],
            self.watts("resident"),
        )

    @property
    def weight_gb(self) -> float:
        return self.parameters * 2 / 1e9

    def fitted(self) -> Fitted:
        return fit(self.runs.prefills, self.runs.decodes)


def read(path: Path) -> Iterator[Measured]:
    """Each model in a file of bench/gpu_energy.py."""
    content = json.loads(path.read_text(encoding="utf-8"))
    bare = next(point["watts"] for point in content["points"] if point["point"] == "bare")
    conditions = _conditions(content)
    for model in dict.fromkeys(point["model"] for point in content["points"] if point["model"]):
        points = [point for point in content["points"] if point["model"] == model]
        yield Measured(path.stem, model, content["shapes"][model]["parameters"], bare, conditions, points)


def _conditions(content: dict[str, Any]) -> str:
    about = content["device"]
    return (
        f"{about['product']}, {about['power_limit_watts']:.0f} W limit, driver {about['driver']}, torch {content['torch']}, "
        f"{content['dtype']}, random weights, CUDA graphs, no engine around the model, {content['measured']}"
    )


def bundled(measured: Measured) -> tuple[CostModel, str] | None:
    """What the bundled profile believes of this model on one device, and whether of a row or of the prior."""
    path = PROFILES / f"{measured.device}.yaml"
    if not path.exists():
        return None
    spec = AcceleratorProfile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).spec
    model = ModelSpec(name=NAMES[measured.model], parameters_millions=round(measured.parameters / 1e6))
    return resolve_cost(spec, model, 1), "prior" if matching_row(spec, model, 1) is None else "row"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def coefficients(all_measured: Sequence[Measured]) -> str:
    rows = []
    for one in all_measured:
        found = one.fitted()
        assert found.step_joules and found.token_joules and found.context_token_joules and found.prefill_token_joules
        rows.append(
            [
                f"{one.device} {one.model}",
                *(
                    f"{c.value * factor:.3g} ± {c.standard_error * factor:.1g}"
                    for c, factor in (
                        (found.step_s, 1e3),
                        (found.step_s_per_sequence, 1e6),
                        (found.step_s_per_context_token, 1e9),
                        (found.step_joules, 1.0),
                        (found.token_joules, 1e3),
                        (found.context_token_joules, 1e6),
                        (found.prefill_s_per_token, 1e6),
                        (found.prefill_token_joules, 1e3),
                    )
                ),
                f"{found.step_error:.1%}",
                f"{found.energy_error:.1%}",
                f"{1e3 * found.step_joules.value / one.weight_gb:.0f}",
            ]
        )
    head = ["device, model", "W ms", "H us", "C ns", "E0 J", "E1 mJ", "Ec uJ", "Pp us", "ep mJ", "step error",
            "energy error", "E0 mJ/GB"]  # fmt: skip
    return table(head, rows)


def steps(all_measured: Sequence[Measured], context: int = 1024) -> str:
    """Measured decode steps beside what the bundled profile says of them."""
    rows = []
    for one in all_measured:
        known = bundled(one)
        for point in one.of("decode"):
            if point["context"] != context or point["sequences"] not in (1, 8, 32, 128):
                continue
            batch = point["sequences"]
            joules, seconds = point["joules"] / point["steps"], point["seconds"] / point["steps"]
            row = [f"{one.device} {one.model}", str(batch), f"{1e3 * seconds:.2f}", f"{joules / batch:.3f}",
                   f"{joules / seconds:.0f}", str(point["sm_mhz"])]  # fmt: skip
            believed = ["", "", ""]
            if known is not None:
                cost, origin = known
                said_s, said = (
                    cost.decode_step_s(batch, batch * context),
                    cost.decode_step_joules(batch, batch * context),
                )
                believed = [origin, f"{said_s / seconds - 1:+.0%}", f"{said / joules - 1:+.0%}"]
            rows.append(row + believed)
    head = ["device, model", "sequences", "step ms", "J/token", "W", "SM MHz", "bundled", "its step", "its joules"]
    return table(head, rows)


def watts(all_measured: Sequence[Measured]) -> str:
    rows = [
        [f"{one.device} {one.model}", f"{one.bare_watts:.0f}"]
        + [f"{one.watts(kind):.0f}" for kind in ("context", "resident", "exited")]
        + [f"{min(p['joules'] / p['seconds'] for p in one.of('decode')):.0f}"]
        + [f"{max(p['joules'] / p['seconds'] for p in one.of('decode')):.0f}"]
        for one in all_measured
    ]
    return table(
        [
            "device, model",
            "no process W",
            "CUDA context W",
            "model in memory W",
            "after exit W",
            "decode W, least",
            "most",
        ],
        rows,
    )


def gaps(all_measured: Sequence[Measured]) -> str:
    """What a pause between steps draws: the joules it adds over the seconds it adds."""
    rows = []
    for one in all_measured:
        steps_by_shape = {(step["sequences"], step["context"]): step for step in one.of("decode")}
        for point in one.of("gap"):
            step = steps_by_shape[point["sequences"], point["context"]]
            added_s = point["seconds"] / point["steps"] - step["seconds"] / step["steps"]
            added = point["joules"] / point["steps"] - step["joules"] / step["steps"]
            rows.append([f"{one.device} {one.model}", str(point["sequences"]), f"{1e3 * added_s:.2f}", f"{added:.2f}",
                         f"{added / added_s:.0f}"])  # fmt: skip
    return table(["device, model", "sequences", "waited ms", "added J", "W meanwhile"], rows)


def draw(all_measured: Sequence[Measured], path: Path) -> None:
    """Joules of a step over the batch, measured and fitted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for one in all_measured:
        found = one.fitted()
        points = [p for p in one.of("decode") if p["context"] == 1024]
        batches = [p["sequences"] for p in points]
        shapes = [(1.0, b, 1024.0 * b) for b in batches]
        for axis, key, parts in (
            (axes[0], "joules", (found.step_joules, found.token_joules, found.context_token_joules)),
            (axes[1], "seconds", (found.step_s, found.step_s_per_sequence, found.step_s_per_context_token)),
        ):
            factor = 1.0 if key == "joules" else 1e3
            (line,) = axis.loglog(
                batches, [factor * p[key] / p["steps"] for p in points], "o", label=f"{one.device}, {one.model}"
            )
            said = [factor * sum(c.value * x for c, x in zip(parts, shape, strict=True) if c) for shape in shapes]
            axis.loglog(batches, said, "-", color=line.get_color(), linewidth=1)
    axes[0].set_ylabel("J per decode step")
    axes[1].set_ylabel("ms per decode step")
    for axis in axes:
        axis.set_xlabel("sequences (1,024 tokens of context each)")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=7, loc="upper left")
    figure.suptitle("Measured (points) and E0 + E1 b + Ec c, W + H b + C c (lines)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def example(measured: Measured) -> dict[str, Any]:
    """The bundled profile with what was measured in front, as `kvfleet calibrate` writes it."""
    base = AcceleratorProfile.model_validate(
        yaml.safe_load((PROFILES / f"{measured.device}.yaml").read_text(encoding="utf-8"))
    )
    return profile(
        measured.runs,
        measured.fitted(),
        base,
        name=f"{measured.device}-torch",
        model=f"*{measured.model}*",
        tensor=1,
        kv_tokens=int(measured.of("resident")[0]["kv_tokens"]),
        conditions=measured.conditions,
    )


def report(paths: Sequence[Path]) -> tuple[str, list[Measured]]:
    found = [one for path in paths for one in read(path)]
    idle = statistics.median(one.watts("resident") for one in found)
    text = "\n\n".join(
        [
            "\n".join(
                f"- `{device}`: {text}" for device, text in {one.device: one.conditions for one in found}.items()
            ),
            "### Coefficients",
            coefficients(found),
            "### Steps at 1,024 tokens of context, and what the bundled profile says of them",
            steps(found),
            f"### Watts when nothing runs (median with a model in memory: {idle:.0f} W)",
            watts(found),
            "### What waiting for the host draws",
            gaps(found),
        ]
    )
    return text, found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="(default: all of bench/measured/)")
    parser.add_argument("--write", action="store_true", help="into docs/gpu-energy.md and examples/accelerators/")
    args = parser.parse_args()
    paths = args.files or sorted(MEASURED.glob("*.json"))
    text, found = report(paths)
    print(text)
    for one in found:
        print(f"{one.device} {one.model}: {errors(one.fitted())}", file=sys.stderr)
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(
            f"{page.partition(BEGIN)[0]}{BEGIN}\n\n{text}\n\n{END}{page.partition(END)[2]}", encoding="utf-8"
        )
        draw(found, PICTURE)
        EXAMPLES.mkdir(exist_ok=True)
        for one in (one for one in found if one.model == "llama-3.1-8b"):
            header = "# Written by bench/gpu_energy_fit.py; docs/gpu-energy.md says how it was measured.\n"
            manifest = yaml.safe_dump(example(one), sort_keys=False, width=120)
            (EXAMPLES / f"{one.device}-torch.yaml").write_text(header + manifest, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
