"""Small fleets and loads for the tests of the simulated fleet."""

from __future__ import annotations

from engine_workloads import cost_model

from kvfleet_api.fleetconfig import FleetConfig, PolicyConfig, PoolConfig, WeightedPool
from kvfleet_api.routingpolicy import AdmissionSpec
from kvfleet_sim.variants import with_simulated_workers
from kvfleet_sim.workload import LoadRequest

MODEL = "llama-8b"
BLOCK_TOKENS = 16


def small_fleet(workers: int = 2, *, strategy: str = "lmetric", **admission: int) -> FleetConfig:
    """Workers with 4096 KV tokens, 64 tokens a step and 6 sequences: everything that can run short does."""
    pool = PoolConfig(name="a", model=MODEL, cost=cost_model(), kv_events_port=5557)
    policy = PolicyConfig(
        name="p",
        models=[MODEL],
        pools=[WeightedPool(name="a")],
        strategy=strategy,
        admission=AdmissionSpec.model_validate(
            {"maxInFlightPerWorker": admission.get("most"), "maxQueue": admission.get("queue", 1024)}
        ),
    )
    return with_simulated_workers(FleetConfig(pools=[pool], policies=[policy]), {"a": workers})


def steady_load(count: int, gap_s: float = 0.05, *, families: int = 3) -> list[LoadRequest]:
    """Prompts of 40 to 200 tokens that begin like those of their family."""
    requests = []
    for number in range(count):
        prompt = 40 + 37 * number % 161
        keys = [number % families * 1000 + block for block in range(prompt // BLOCK_TOKENS)]
        requests.append(LoadRequest(prompt, 1 + 7 * number % 40, keys, number * gap_s))
    return requests
