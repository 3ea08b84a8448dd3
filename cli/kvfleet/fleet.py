"""From manifests or addresses to a FleetConfig, for the commands that run without a cluster.

What the operator would write into conditions is an error here, where no later apply can heal it: each line names file,
object, field and remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvfleet_api.compile import CompiledFleet, compile_fleet, static_fleet
from kvfleet_api.fleetconfig import Endpoint, FleetConfig
from kvfleet_api.manifests import Manifests, with_bundled
from kvfleet_api.problems import Problem, did_you_mean


class FleetError(ValueError):
    """The manifests do not make a fleet; one line a problem."""


def compile_manifests(manifests: Manifests) -> FleetConfig:
    """The configuration of the router's namespace. Raises FleetError where anything in any namespace is wrong."""
    namespaces = sorted({obj.metadata.namespace or "default" for obj in [*manifests.pools, *manifests.policies]})
    if not manifests.pools:
        raise FleetError("no ModelPool among the manifests: add one (kind: ModelPool)")
    fleets = {namespace: _compile(manifests, namespace) for namespace in namespaces}
    problems = [problem for fleet in fleets.values() for problem in fleet.errors]
    if problems:
        raise FleetError("\n".join(_located(manifests, problems)))
    homes = {router.metadata.namespace or "default" for router in manifests.routers} or set(namespaces)
    if len(homes) > 1:
        raise FleetError(
            f"objects of several namespaces ({', '.join(sorted(homes))}): a router serves one; pass one namespace's manifests"
        )
    home = homes.pop()
    if home not in fleets:
        raise FleetError(f"the FleetRouter's namespace {home} holds no ModelPool: put both into one namespace")
    return fleets[home].config


def warnings(manifests: Manifests) -> list[str]:
    """What is served, but perhaps not as meant; located as errors are."""
    namespaces = sorted({pool.metadata.namespace or "default" for pool in manifests.pools})
    problems = [problem for name in namespaces for problem in _compile(manifests, name).problems]
    return _located(manifests, [problem for problem in problems if problem.severity == "Warning"])


def _compile(manifests: Manifests, namespace: str) -> CompiledFleet:
    router = next((r for r in manifests.routers if (r.metadata.namespace or "default") == namespace), None)
    profiles = with_bundled(manifests.profiles)
    return compile_fleet(router, manifests.pools, manifests.policies, profiles, namespace=namespace)


def _located(manifests: Manifests, problems: Iterable[Problem]) -> list[str]:
    lines = []
    for problem in problems:
        key = f"{problem.namespace}/{problem.name}" if problem.namespace else problem.name
        source = manifests.sources.get((problem.kind, key))
        lines.append(f"{source}: {problem}" if source else str(problem))
    return lines


def with_strategy(config: FleetConfig, strategy: str) -> FleetConfig:
    """Every policy with `strategy` in place of its own."""
    policies = [policy.model_copy(update={"strategy": strategy}) for policy in config.policies]
    return config.model_copy(update={"policies": policies})


def with_workers(config: FleetConfig, workers: Sequence[str]) -> FleetConfig:
    """The pools with the addresses of `POOL=URL,URL` entries. Raises FleetError naming the entry."""
    urls: dict[str, list[str]] = {pool.name: [] for pool in config.pools}
    for entry in workers:
        pool, separator, addresses = entry.partition("=")
        if not separator or "://" in pool:
            raise FleetError(f"{entry}: with manifests, say whose workers these are: POOL=URL,URL")
        if pool not in urls:
            known = ", ".join(sorted(urls))
            raise FleetError(f"{entry}: no ModelPool {pool}{did_you_mean(pool, urls)}: use one of {known}")
        urls[pool] += addresses.split(",")
    pools = [
        pool.model_copy(update={"endpoints": static_endpoints(urls[pool.name]) if urls[pool.name] else []})
        for pool in config.pools
    ]
    return config.model_copy(update={"pools": pools})


def static_endpoints(urls: Sequence[str]) -> list[Endpoint]:
    """Workers at `urls`. Raises ValueError naming the one that is no `http://host:port`."""
    return static_fleet([url.strip() for url in urls if url.strip()]).pools[0].endpoints
