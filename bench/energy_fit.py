"""How wrong energy coefficients converge: the router's own fit, fed by a simulated engine's counters.

    python bench/energy_fit.py [--plot FILE] [--intervals 200]

A simulated H100 with Llama-3.1-8B serves a load that comes and goes; every ten seconds its counter is read. The fit begins with
all energies halved, and doubled. Prints coefficients as shares of the truth.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path

from kvfleet.fleet import compile_manifests
from kvfleet_api.cost import CostModel
from kvfleet_api.manifests import load
from kvfleet_router.core.energyfit import NAMES, EnergyFit, Work
from kvfleet_sim.engine import Engine
from kvfleet_sim.request import Request

FLEET = Path(__file__).parents[1] / "examples" / "bench8"
INTERVAL_S = 10.0
ENERGIES = ("step_joules", "token_joules", "prefill_token_joules", "idle_watts")
SHOWN = (1, 2, 5, 10, 20, 50, 100, 200)


def intervals(cost: CostModel, count: int, seed: int = 0) -> list[tuple[Work, float]]:
    """What the engine did in each interval, and what its counter says that took."""
    draw, engine, found = random.Random(seed), Engine(cost), []
    number, due_s = 0, 0.0
    for index in range(count):
        end_s = (index + 1) * INTERVAL_S
        rate_rps = draw.choice((0.0, 0.2, 1.0, 4.0))
        meter = engine.meter
        before = (meter.decode_steps, meter.decode_tokens, meter.context_tokens, meter.prefill_tokens)
        joules, idle_s = engine.joules_at(end_s - INTERVAL_S), engine.idle_s_at(end_s - INTERVAL_S)
        due_s = max(due_s, end_s - INTERVAL_S)
        while rate_rps and (due_s := due_s + draw.expovariate(rate_rps)) < end_s:
            engine.advance(due_s)
            number += 1
            engine.submit(Request(number, draw.randrange(100, 4000), draw.randrange(50, 500), []), due_s)
        engine.advance(end_s)
        after = (meter.decode_steps, meter.decode_tokens, meter.context_tokens, meter.prefill_tokens)
        steps, tokens, context, prefill = (b - a for a, b in zip(before, after, strict=True))
        work = Work(steps, tokens, context, prefill, engine.idle_s_at(end_s) - idle_s)
        found.append((work, engine.joules_at(end_s) - joules))
    return found


def trajectory(cost: CostModel, factor: float, seen: list[tuple[Work, float]]) -> list[tuple[float, ...]]:
    """(coefficients as shares of the truth…, mean error) after each interval."""
    fit = EnergyFit(replace(cost, **{name: getattr(cost, name) * factor for name in ENERGIES}))
    truth = [getattr(cost, name) for name in ENERGIES]
    rows = []
    for work, joules in seen:
        fit.observe(work, joules)
        rows.append((*(e.value / true for e, true in zip(fit.estimates(), truth, strict=True)), fit.error))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--intervals", type=int, default=200)
    arguments = parser.parse_args()
    cost = compile_manifests(load([FLEET])).pools[0].cost
    seen = intervals(cost, arguments.intervals)
    found = {factor: trajectory(cost, factor, seen) for factor in (0.5, 2.0)}
    print(f"{'begins at':>10}{'intervals':>11}" + "".join(f"{name:>20}" for name in NAMES) + f"{'error':>8}")
    for factor, rows in found.items():
        for count in SHOWN:
            if count <= len(rows):
                *shares, error = rows[count - 1]
                print(f"{factor:>10}{count:>11}" + "".join(f"{share:>20.3f}" for share in shares) + f"{error:>8.1%}")
    if arguments.plot is not None:
        draw(found, arguments.plot)


def draw(found: dict[float, list[tuple[float, ...]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(10, 4), sharex=True)
    for axis, (factor, rows) in zip(axes, found.items(), strict=True):
        for place, name in enumerate(NAMES):
            axis.plot([row[place] for row in rows], label=name)
        axis.axhline(1.0, color="grey", linewidth=0.5)
        axis.set_title(f"begins at {factor:g} x the truth")
        axis.set_xlabel("intervals of 10 s")
    axes[0].set_ylabel("share of the truth")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
