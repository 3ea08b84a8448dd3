"""Whether a configuration can be served."""

from __future__ import annotations

from collections.abc import Iterable

from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_router.core.worker import WorkerEndpoint


class ConfigError(ValueError):
    """The configuration cannot be served: names the field and the remedy."""


def check(config: FleetConfig, strategies: Iterable[str]) -> None:
    """Raises ConfigError."""
    known = sorted(strategies)
    pools = [pool.name for pool in config.pools]
    endpoints = [endpoint.name for pool in config.pools for endpoint in pool.endpoints]
    policies = [policy.name for policy in config.policies]
    for kind, names in (("pools", pools), ("policies", policies), ("endpoints", endpoints)):
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(f"{kind}: {', '.join(repeated)} defined more than once: keep one each")
    for pool in config.pools:
        for endpoint in pool.endpoints:
            try:
                _ = WorkerEndpoint(endpoint.name, endpoint.url).address
            except ValueError as error:
                raise ConfigError(f"pool {pool.name}: {error}") from None
    for policy in config.policies:
        if policy.strategy not in known:
            use = ", ".join(known)
            raise ConfigError(f"policy {policy.name}: strategy {policy.strategy!r} is unknown: use one of {use}")
        missing = [ref.name for ref in policy.pools if ref.name not in pools]
        if missing:
            raise ConfigError(f"policy {policy.name}: pools {', '.join(missing)} are not defined: add or drop them")
