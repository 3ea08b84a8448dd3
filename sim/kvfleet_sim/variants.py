"""The fleet that is simulated: the configured one with workers made up, another policy, or wrong beliefs. Pure."""

from __future__ import annotations

from dataclasses import replace

from kvfleet_api.cost import CostModel
from kvfleet_api.fleetconfig import Endpoint, FleetConfig
from kvfleet_router.policies import REGISTRY
from kvfleet_sim.traces import BYTES_PER_TOKEN


def with_simulated_workers(config: FleetConfig, replicas: dict[str, int]) -> FleetConfig:
    """The fleet with so many workers in each pool; raises ValueError where that leaves nothing to simulate."""
    pools = []
    for pool in config.pools:
        names = [f"{pool.name}-{number}" for number in range(replicas.get(pool.name, 0))]
        pools.append(
            pool.model_copy(update={"endpoints": [Endpoint(name=n, url=f"http://{n}.invalid:80") for n in names]})
        )
    if not any(pool.endpoints for pool in pools if pool.role != "Prefill"):
        raise ValueError("the fleet has no worker that answers: set spec.replicas (or autoscaling.minReplicas) above 0")
    return config.model_copy(update={"pools": pools})


def with_policy(config: FleetConfig, policy: str) -> FleetConfig:
    """The fleet under a strategy of the router's registry; `NAME:energy` sets energy mode Prefer, plain NAME sets Off.

    `manifests` leaves every RoutingPolicy as it is. Raises ValueError for an unknown name.
    """
    if policy == "manifests":
        return config
    name, _, variant = policy.partition(":")
    if name not in REGISTRY or variant not in ("", "energy") or (variant and "energy" not in REGISTRY[name].parts):
        raise ValueError(f"policy {policy!r} is not known: use one of {', '.join(policy_names())}")
    update = {"strategy": name, "energy_mode": "Prefer" if variant else "Off"}
    return config.model_copy(update={"policies": [p.model_copy(update=update) for p in config.policies]})


def policy_names() -> list[str]:
    """Everything `with_policy` takes."""
    energy = [f"{name}:energy" for name, policy in REGISTRY.items() if "energy" in policy.parts]
    return sorted([*REGISTRY, *energy, "manifests"])


def uses_events(config: FleetConfig) -> bool:
    """Engines publish KV events, and no policy insists on the approximate view."""
    published = all(pool.kv_events_port for pool in config.pools)
    return published and all(policy.prefix.source != "Approximate" for policy in config.policies)


def as_believed(config: FleetConfig, block_tokens: int, error: float, routers: int) -> FleetConfig:
    """The configuration that so many routers load: in blocks of the load, and as wrong about the workers as asked for."""
    pools = [pool.model_copy(update={"cost": _misjudged(pool.cost, error)}) for pool in config.pools]
    policies = [
        policy.model_copy(
            update={"prefix": policy.prefix.model_copy(update={"block_bytes": block_tokens * BYTES_PER_TOKEN})}
        )
        for policy in config.policies
    ]
    return config.model_copy(update={"pools": pools, "policies": policies, "routers": routers})


def _misjudged(cost: CostModel, error: float) -> CostModel:
    return replace(
        cost,
        prefill_s_per_token=cost.prefill_s_per_token * error,
        prefill_s_per_token_pair=cost.prefill_s_per_token_pair * error,
        step_s=cost.step_s / error,
        step_s_per_sequence=cost.step_s_per_sequence / error,
        step_s_per_context_token=cost.step_s_per_context_token / error,
    )
