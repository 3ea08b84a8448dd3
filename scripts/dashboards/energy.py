"""Energy: watts and joules per token, measured by NVIDIA's DCGM exporter and set against the engines' own token counters."""

from __future__ import annotations

from grafana_foundation_sdk.models import units

from dashboards.panels import Board, Panel, Query, Row
from dashboards.queries import BY_POOL, ENGINE, NAMESPACE, NAMESPACES, POOL, POOLS, rate, total_rate

BY_PAIR = "by (namespace, kvfleet_io_pool)"
LEGEND = "{{kvfleet_io_pool}}"
WORKERS = f"group by (namespace, pod, kvfleet_io_pool) (vllm:num_requests_running{{{ENGINE}}})"
OUTPUT = total_rate("vllm:generation_tokens_total", ENGINE, BY_PAIR)
COMPUTED = total_rate("vllm:prompt_tokens_by_source_total", f'{ENGINE},source="local_compute"', BY_PAIR)


def of_workers(gpu_series: str, aggregate: str = "sum") -> str:
    """Series of the DCGM exporter, one per GPU, aggregated for each worker's pod, with the pod's pool.

    The exporter names the pod that holds the GPU; unless it is scraped with `honorLabels`, Prometheus calls these labels
    `exported_…` and puts the exporter's own pod in their place.
    """
    named = gpu_series
    for label in ("namespace", "pod"):
        named = f'label_replace({named}, "{label}", "$1", "exported_{label}", "(.+)")'
    return f"{aggregate} by (namespace, pod) ({named}) * on (namespace, pod) group_left (kvfleet_io_pool) {WORKERS}"


WATTS = of_workers("DCGM_FI_DEV_POWER_USAGE")
# The counter is in millijoules.
MEAN_WATTS = f"sum {BY_PAIR} ({of_workers(rate('DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION', ''))}) / 1000"


def board() -> Board:
    return Board(
        uid="kvfleet-energy",
        title="Energy",
        description="Power and energy per token of the pools' GPUs. Needs NVIDIA's DCGM exporter with its mapping to pods.",
        variables=[NAMESPACES, POOLS],
        rows=[Row("Power", _power()), Row("Energy per token", _per_token()), Row("Whose joules", _ledger())],
    )


def _power() -> list[Panel]:
    return [
        Panel(
            "Power now",
            "Of all GPUs of the chosen pools.",
            units.Watt,
            [Query(f"sum({WATTS})")],
            width=8,
            single=True,
        ),
        Panel(
            "Energy in the chosen time",
            "Of all GPUs of the chosen pools, over the dashboard's time range.",
            units.Joule,
            [Query(f"sum({of_workers('increase(DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION[$__range])')}) / 1000")],
            width=8,
            single=True,
        ),
        Panel(
            "Joules per output token now",
            "Over all chosen pools, prompts' and idle energy included.",
            units.Joule,
            [Query(f"sum({MEAN_WATTS}) / sum({OUTPUT})")],
            width=8,
            single=True,
        ),
        Panel(
            "Power by pool",
            "Of the pools' GPUs.",
            units.Watt,
            [Query(f"sum {BY_PAIR} ({WATTS})", LEGEND)],
            stacked=True,
        ),
        Panel("Power by worker", "Of each worker's GPUs together.", units.Watt, [Query(WATTS, "{{pod}}")]),
        Panel(
            "Power budgets",
            "How much of each `maxWatts` is drawn by the routers' cost model, where one is set. At 1 requests wait for power.",
            units.PercentUnit,
            [
                Query(
                    f"max by (namespace, budget) (kvfleet_power_drawn_watts{{{NAMESPACE}}}"
                    f" / kvfleet_power_budget_watts{{{NAMESPACE}}})",
                    "{{budget}}",
                )
            ],
        ),
    ]


def _per_token() -> list[Panel]:
    return [
        Panel(
            "Joules per output token",
            "All energy of a pool over its output tokens. High at low load: an idle GPU draws power for few tokens.",
            units.Joule,
            [Query(f"{MEAN_WATTS} / ({OUTPUT} > 0)", LEGEND)],
        ),
        Panel(
            "Joules per computed token",
            "All energy of a pool over prompt tokens that were computed (not found in a cache) and output tokens.",
            units.Joule,
            [Query(f"{MEAN_WATTS} / ({COMPUTED} + {OUTPUT} > 0)", LEGEND)],
        ),
        Panel(
            "Output tokens",
            "Per second, as the engines count them.",
            units.Short,
            [Query(OUTPUT, LEGEND)],
            stacked=True,
        ),
        Panel(
            "GPU busy",
            "Mean over a pool's GPUs. Near 1 with a single request already: no measure of load.",
            units.PercentUnit,
            [
                Query(
                    f"sum {BY_PAIR} ({of_workers('DCGM_FI_DEV_GPU_UTIL')})"
                    f" / sum {BY_PAIR} ({of_workers('DCGM_FI_DEV_GPU_UTIL', 'count')}) / 100",
                    LEGEND,
                )
            ],
            maximum=1,
        ),
    ]


def _ledger() -> list[Panel]:
    return [
        Panel(
            "Power by tenant",
            "The ten that draw most, by the routers' books; idling is nobody's. Needs spec.telemetry of the FleetRouter.",
            units.Watt,
            [
                Query(
                    f"topk(10, {total_rate('kvfleet_energy_joules_total', POOL, 'by (namespace, tenant)')})",
                    "{{tenant}}",
                )
            ],
            stacked=True,
        ),
        Panel(
            "Power by what it is for",
            "Prompts, tokens, the fixed part of decode steps, and idling.",
            units.Watt,
            [Query(total_rate("kvfleet_energy_joules_total", POOL, "by (kind)"), "{{kind}}")],
            stacked=True,
        ),
        Panel(
            "Energy trusted",
            "1: joules may steer the pool's requests. 0: its telemetry cannot be believed, latency alone steers.",
            units.Short,
            [Query(f"max {BY_POOL} (kvfleet_energy_trusted{{{POOL}}})", "{{pool}}")],
            maximum=1,
        ),
        Panel(
            "Error of the energy model",
            "Mean relative difference between what workers draw and what the learned coefficients say.",
            units.PercentUnit,
            [Query(f"max {BY_POOL} (kvfleet_energy_model_error_ratio{{{POOL}}})", "{{pool}}")],
        ),
    ]
